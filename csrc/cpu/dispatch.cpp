// The public API: picks the kernels of this machine once, and calls them.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastem {
namespace {

#ifdef FASTEM_X86_DISPATCH
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& choose() {
#ifdef FASTEM_X86_DISPATCH
  __builtin_cpu_init();
  const char* wanted = std::getenv("FASTEM_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const auto is = [&](const Kernels& table) { return any || std::strcmp(wanted, table.name) == 0; };
  if (is(kAvx512Kernels) && has_avx512()) return kAvx512Kernels;
  if (is(kAvx2Kernels) && has_avx2()) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* cpu_kernels() { return kernels().name; }

void spectral_sums_cpu(const cfloat* X, const cfloat* Y, cfloat* Sxy, float* Sxx, const SpectralParams& p,
                       bool per_channel, int64_t begin, int64_t end) {
  kernels().spectral_sums(X, Y, Sxy, Sxx, p, per_channel, begin, end);
}

void wiener_guidance_cpu(const cfloat* X, const cfloat* Y, const cfloat* K, const float* sigma2, const float* r2,
                         cfloat* V, const SpectralParams& p, int64_t begin, int64_t end) {
  kernels().wiener_guidance(X, Y, K, sigma2, r2, V, p, begin, end);
}

void psf_to_otf_rows_cpu(const float* k, const float* cos_w, const float* sin_w, cfloat* R, const OtfParams& p,
                         int64_t begin, int64_t end) {
  kernels().psf_to_otf_rows(k, cos_w, sin_w, R, p, begin, end);
}

void psf_to_otf_columns_cpu(const cfloat* R, const float* cos_h, const float* sin_h, cfloat* K, const OtfParams& p,
                            int64_t begin, int64_t end) {
  kernels().psf_to_otf_columns(R, cos_h, sin_h, K, p, begin, end);
}

int64_t convolve_support_scratch(int64_t h, int64_t w) { return kernels().convolve_support_scratch(h, w); }

void convolve_support_cpu(const float* g, const float* k, float* z, float* scratch, const PsfParams& p, int64_t begin,
                          int64_t end) {
  kernels().convolve_support(g, k, z, scratch, p, begin, end);
}

void project_kernel_cpu(const float* z, float* k, const PsfParams& p, int64_t begin, int64_t end) {
  kernels().project_kernel(z, k, p, begin, end);
}

void project_simplex_cpu(const float* z, float* k, const PsfParams& p, int64_t begin, int64_t end) {
  kernels().project_simplex(z, k, p, begin, end);
}

int64_t simplex_least_squares_scratch(int64_t h, int64_t w) { return kernels().simplex_least_squares_scratch(h, w); }

void simplex_least_squares_cpu(const float* g, const float* b, const float* k, float* out, float* scratch,
                               const PsfParams& p, int64_t num_iters, int64_t begin, int64_t end) {
  kernels().simplex_least_squares(g, b, k, out, scratch, p, num_iters, begin, end);
}

int64_t chain_packed_size(const ChainParams& p) { return kernels().chain_packed_size(p); }

void chain_pack_cpu(const ChainParams& p, float* packed) { kernels().chain_pack(p, packed); }

int64_t chain_scratch_size(const ChainParams& p) { return kernels().chain_scratch_size(p); }

void denoise_chain_cpu(const float* k, float noise_std, float* out, const float* packed, float* scratch,
                       const ChainParams& p, const ParallelFor& parallel) {
  kernels().denoise_chain(k, noise_std, out, packed, scratch, p, parallel);
}

int64_t hqs_scratch_size(const ChainParams& p) { return kernels().hqs_scratch_size(p); }

void hqs_chain_cpu(const float* a, const float* g, const float* k, float noise_std, float* out, const float* packed,
                   float* scratch, const ChainParams& p, int64_t num_iters, const ParallelFor& parallel) {
  kernels().hqs_chain(a, g, k, noise_std, out, packed, scratch, p, num_iters, parallel);
}

const ParallelFor kSerial = {
    [](const ParallelFor&, int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); },
    nullptr};

void predict_x0_cpu(const float* x, const float* eps, float* x0, float* mask, const PredictParams& p, int64_t begin,
                    int64_t end) {
  kernels().predict_x0(x, eps, x0, mask, p, begin, end);
}

void step_update_cpu(const float* x, const float* x0, const float* noise, const float* guidance, float* out,
                     const StepParams& p, int64_t begin, int64_t end) {
  kernels().step_update(x, x0, noise, guidance, out, p, begin, end);
}

void step_update_philox_cpu(const float* x, const float* x0, const int64_t* seeds, const float* guidance, float* out,
                            const StepParams& p, const NoiseParams& noise, int64_t begin, int64_t end) {
  kernels().step_update_philox(x, x0, seeds, guidance, out, p, noise, begin, end);
}

void philox_normal_cpu(const int64_t* seeds, float* out, const NoiseParams& p, int64_t begin, int64_t end) {
  kernels().philox_normal(seeds, out, p, begin, end);
}

int64_t group_norm_parts(const GroupNormParams& p) { return kernels().group_norm_parts(p); }

int64_t group_norm_partials(const GroupNormParams& p) { return kernels().group_norm_partials(p); }

void group_norm_moments_cpu(const float* x, const float* skip, float* partial, const GroupNormParams& p, int64_t begin,
                            int64_t end) {
  kernels().group_norm_moments(x, skip, partial, p, begin, end);
}

void group_norm_finish_cpu(const float* partial, float* mean, float* rstd, const GroupNormParams& p, int64_t begin,
                           int64_t end) {
  kernels().group_norm_finish(partial, mean, rstd, p, begin, end);
}

void group_norm_silu_cpu(const float* x, const float* skip, const float* mean, const float* rstd, const NormFilm& film,
                         float* y, const GroupNormParams& p, int64_t begin, int64_t end) {
  kernels().group_norm_silu(x, skip, mean, rstd, film, y, p, begin, end);
}

void group_norm_sums_cpu(const float* grad, const float* x, const float* skip, const float* mean, const float* rstd,
                         const NormFilm& film, float* dx, float* dskip, float* partial, const GroupNormParams& p,
                         int64_t begin, int64_t end) {
  kernels().group_norm_sums(grad, x, skip, mean, rstd, film, dx, dskip, partial, p, begin, end);
}

void group_norm_means_cpu(const float* partial, float* mean_q, float* mean_qx, const GroupNormParams& p, int64_t begin,
                          int64_t end) {
  kernels().group_norm_means(partial, mean_q, mean_qx, p, begin, end);
}

void group_norm_silu_backward_cpu(const float* x, const float* skip, const float* mean, const float* rstd,
                                  const float* mean_q, const float* mean_qx, float* dx, float* dskip,
                                  const GroupNormParams& p, int64_t begin, int64_t end) {
  kernels().group_norm_silu_backward(x, skip, mean, rstd, mean_q, mean_qx, dx, dskip, p, begin, end);
}

}  // namespace fastem
