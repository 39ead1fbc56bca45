// The CUDA functions under C names, for ctypes. Pointers are plain memory here.
#include "fastem/chain.h"
#include "fastem/network.h"
#include "fastem/psf.h"
#include "fastem/spectral.h"
#include "fastem/step.h"

using namespace fastem;

namespace {

ChainParams chain_params(int64_t n, int64_t h, int64_t w, const float* const* weights, const float* const* biases,
                         const int64_t* widths, int64_t n_layer, float scale) {
  ChainParams p{};
  p.n_image = n, p.h = h, p.w = w, p.n_layer = n_layer, p.scale = scale;
  for (int64_t l = 0; l < n_layer; ++l) p.layers[l] = {weights[l], biases[l], widths[l], widths[l + 1]};
  return p;
}

StepParams step_params(float c0, float ct, float std, float gain, const double* numbers) {
  if (!numbers) return {c0, ct, std, gain};
  return {Number(numbers), Number(numbers + 1), Number(numbers + 2), Number(numbers + 3)};
}

}  // namespace

extern "C" {

void emulate_device(int n_sm, int shared_bytes, int reverse) { emulate::device = {n_sm, shared_bytes, reverse != 0}; }

int wiener_guidance(const cfloat* X, const cfloat* Y, const cfloat* K, const float* sigma2, const float* r2, cfloat* V,
                    int64_t n_image, int64_t n_particle, int64_t n_chan, int64_t n_freq, int coloured) {
  return wiener_guidance_cuda(X, Y, K, sigma2, r2, V, {n_image, n_particle, n_chan, n_freq, coloured != 0}, nullptr);
}

int spectral_sums(const cfloat* X, const cfloat* Y, cfloat* Sxy, float* Sxx, int64_t n_image, int64_t n_particle,
                  int64_t n_chan, int64_t n_freq, int per_channel) {
  return spectral_sums_cuda(X, Y, Sxy, Sxx, {n_image, n_particle, n_chan, n_freq}, per_channel != 0, nullptr);
}

// `numbers` not null: read by the kernel instead of the values; `row` and `run` likewise, for step and stream.
int predict_x0(const float* x, const float* eps, float* x0, float* mask, double alpha_bar, const double* numbers,
               int64_t n) {
  return predict_x0_cuda(x, eps, x0, mask, {numbers ? Number(numbers) : Number(alpha_bar)}, n, nullptr);
}

int step_update(const float* x, const float* x0, const float* noise, const float* guidance, float* out, float c0,
                float ct, float std, float gain, const double* numbers, int64_t n) {
  return step_update_cuda(x, x0, noise, guidance, out, step_params(c0, ct, std, gain, numbers), n, nullptr);
}

int step_update_philox(const float* x, const float* x0, const int64_t* seeds, const float* guidance, float* out,
                       float c0, float ct, float std, float gain, const double* numbers, const int64_t* row,
                       const int64_t* run, int64_t n_image, int64_t n_particle, int64_t count, uint32_t step, uint32_t stream) {
  return step_update_philox_cuda(x, x0, seeds, guidance, out, step_params(c0, ct, std, gain, numbers),
                                 {n_image, n_particle, count, step, stream, row, run}, nullptr);
}

int philox_normal(const int64_t* seeds, float* out, int64_t n_image, int64_t n_particle, int64_t count, uint32_t step,
                  uint32_t stream) {
  return philox_normal_cuda(seeds, out, {n_image, n_particle, count, step, stream}, nullptr);
}

int64_t group_norm_scratch_floats(int64_t n_sample, int64_t n_chan, int64_t n_skip, int64_t n_pixel, int64_t n_group) {
  return group_norm_cuda_scratch({n_sample, n_chan, n_skip, n_pixel, n_group, true, 0.0f});
}

// dtype: 0 float32, 1 float16, 2 bfloat16.
int group_norm_silu(const void* x, const void* skip, const float* weight, const float* bias, const float* scale,
                    const float* shift, int64_t stride, void* y, float* mean, float* rstd, float* scratch, int dtype,
                    int64_t n_sample, int64_t n_chan, int64_t n_skip, int64_t n_pixel, int64_t n_group, float eps) {
  return group_norm_silu_cuda(x, skip, {weight, bias, scale, shift, stride}, y, mean, rstd, scratch,
                              static_cast<DType>(dtype), {n_sample, n_chan, n_skip, n_pixel, n_group, true, eps},
                              nullptr);
}

int group_norm_silu_backward(const void* grad, const void* x, const void* skip, const float* mean, const float* rstd,
                             const float* weight, const float* bias, const float* scale, const float* shift,
                             int64_t stride, void* dx, void* dskip, float* scratch, int dtype, int64_t n_sample,
                             int64_t n_chan, int64_t n_skip, int64_t n_pixel, int64_t n_group) {
  return group_norm_silu_backward_cuda(grad, x, skip, mean, rstd, {weight, bias, scale, shift, stride}, dx, dskip,
                                       scratch, static_cast<DType>(dtype),
                                       {n_sample, n_chan, n_skip, n_pixel, n_group, true, 0.0f}, nullptr);
}

int psf_to_otf(const float* k, cfloat* R, cfloat* K, int64_t n, int64_t h, int64_t w, int64_t height, int64_t width) {
  return psf_to_otf_cuda(k, R, K, {n, h, w, height, width}, nullptr);
}

int convolve_support(const float* g, const float* k, float* z, int64_t n, int64_t h, int64_t w) {
  return convolve_support_cuda(g, k, z, {n, h, w}, nullptr);
}

int project_kernel(const float* z, float* k, int64_t n, int64_t h, int64_t w) {
  return project_kernel_cuda(z, k, {n, h, w}, nullptr);
}

int project_simplex(const float* z, float* k, int64_t n, int64_t h, int64_t w) {
  return project_simplex_cuda(z, k, {n, h, w}, nullptr);
}

int64_t simplex_least_squares_scratch_floats(int64_t n, int64_t h, int64_t w) {
  return simplex_least_squares_cuda_scratch({n, h, w});
}

int simplex_least_squares(const float* g, const float* b, const float* k, float* out, float* scratch, int64_t n,
                          int64_t h, int64_t w, int64_t num_iters) {
  return simplex_least_squares_cuda(g, b, k, out, scratch, {n, h, w}, num_iters, nullptr);
}

int64_t recentre_scratch_floats(int64_t n, int64_t h, int64_t w) { return recentre_cuda_scratch({n, h, w}); }

int recentre(const float* k, float* out, float* scratch, int64_t n, int64_t h, int64_t w) {
  return recentre_cuda(k, out, scratch, {n, h, w}, nullptr);
}

int64_t chain_scratch_floats(int64_t n, int64_t h, int64_t w, const int64_t* widths, int64_t n_layer) {
  const float* const none[kMaxChainLayers] = {};
  return chain_cuda_scratch(chain_params(n, h, w, none, none, widths, n_layer, 1.0f));
}

// g null: the chain alone.
int hqs_chain(const float* a, const float* g, const float* k, const float* noise_std, float* out, float* scratch,
              int64_t n, int64_t h, int64_t w, const float* const* weights, const float* const* biases,
              const int64_t* widths, int64_t n_layer, float scale, int64_t num_iters, int recentred) {
  const ChainParams p = chain_params(n, h, w, weights, biases, widths, n_layer, scale);
  return g ? hqs_chain_cuda(a, g, k, noise_std, out, scratch, p, num_iters, recentred != 0, nullptr)
           : denoise_chain_cuda(k, noise_std, out, scratch, p, nullptr);
}

}  // extern "C"
