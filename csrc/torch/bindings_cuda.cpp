// The CUDA side of the schemas in bindings.cpp: check, allocate results and workspace, launch on torch's current stream.
// Built only where torch has CUDA.
#include "bindings.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace fastem {
namespace {

// The device of `t` for the lifetime of this object, and its current stream. Torch's allocator orders by stream, so
// workspace may be freed as soon as the launch is queued.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  explicit OnDevice(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
};

Tensor workspace(int64_t floats, const Tensor& like) { return at::empty({floats}, like.options().dtype(at::kFloat)); }

std::tuple<Tensor, Tensor> spectral_sums(const Tensor& X_, const Tensor& Y_, bool per_channel) {
  const OnDevice on(X_);
  const Tensor X = dense(X_), Y = dense(Y_);
  const SpectralParams p = spectral_params(X, Y);
  auto [Sxy, Sxx] = spectral_sums_outputs(X, per_channel);
  C10_CUDA_CHECK(spectral_sums_cuda(complex_in(X), complex_in(Y), complex_out(Sxy), out(Sxx), p, per_channel, on.stream));
  return {Sxy, Sxx};
}

Tensor wiener_guidance(const Tensor& X_, const Tensor& Y_, const Tensor& K_, const Tensor& sigma2_, const Tensor& r2_) {
  const OnDevice on(X_);
  const Tensor X = dense(X_), Y = dense_images(Y_, X.size(0)), K = dense_images(K_, X.size(0));
  const Tensor sigma2 = dense_images(sigma2_, X.size(0));
  const Tensor r2 = r2_.dim() == 2 ? dense(r2_) : dense_images(r2_, X.size(0));
  const SpectralParams p = wiener_params(X, Y, K, sigma2, r2);
  Tensor V = at::empty_like(X);
  C10_CUDA_CHECK(wiener_guidance_cuda(complex_in(X), complex_in(Y), complex_in(K), in(sigma2), in(r2), complex_out(V), p,
                                      on.stream));
  return V;
}

Tensor psf_to_otf(const Tensor& k_, at::IntArrayRef size) {
  const OnDevice on(k_);
  const Tensor k = dense(k_);
  const OtfParams p = otf_params(k, size);
  const Tensor R = at::empty({p.n_image, p.h, p.n_col()}, k.options().dtype(at::kComplexFloat));
  const Tensor K = otf_output(k, p);
  C10_CUDA_CHECK(psf_to_otf_cuda(in(k), complex_out(R), complex_out(K), p, on.stream));
  return K;
}

Tensor convolve_support(const Tensor& g_, const Tensor& k_) {
  const OnDevice on(k_);
  const Tensor g = dense(g_), k = dense(k_);
  const PsfParams p = convolve_params(g, k);
  Tensor z = at::empty_like(k);
  C10_CUDA_CHECK(convolve_support_cuda(in(g), in(k), out(z), p, on.stream));
  return z;
}

Tensor project_kernel(const Tensor& z_) {
  const OnDevice on(z_);
  const Tensor z = dense(z_);
  const PsfParams p = psf_params(z);
  Tensor k = at::empty_like(z);
  C10_CUDA_CHECK(project_kernel_cuda(in(z), out(k), p, on.stream));
  return k;
}

Tensor project_simplex(const Tensor& z_) {
  const OnDevice on(z_);
  const Tensor z = dense(z_);
  const PsfParams p = psf_params(z);
  Tensor k = at::empty_like(z);
  C10_CUDA_CHECK(project_simplex_cuda(in(z), out(k), p, on.stream));
  return k;
}

Tensor simplex_least_squares(const Tensor& g_, const Tensor& b_, const Tensor& k_, int64_t num_iters) {
  const OnDevice on(k_);
  const Tensor g = dense(g_), b = dense(b_), k = dense(k_);
  const PsfParams p = convolve_params(g, k);
  check_like(b, k, "b", "k");
  Tensor result = at::empty_like(k);
  const Tensor scratch = workspace(simplex_least_squares_cuda_scratch(p), k);
  C10_CUDA_CHECK(simplex_least_squares_cuda(in(g), in(b), in(k), out(result), out(scratch), p, num_iters, on.stream));
  return result;
}

Tensor recentre(const Tensor& k_) {
  const OnDevice on(k_);
  const Tensor k = dense(k_);
  const PsfParams p = psf_params(k);
  Tensor moved = at::empty_like(k);
  const Tensor scratch = workspace(recentre_cuda_scratch(p), k);
  C10_CUDA_CHECK(recentre_cuda(in(k), out(moved), out(scratch), p, on.stream));
  return moved;
}

Tensor denoise_chain(const Tensor& k_, const Tensor& noise_std_, at::TensorList weights, const OptionalTensors& biases,
                     double scale) {
  const OnDevice on(k_);
  const Tensor k = dense(k_), noise_std = dense_images(noise_std_, k.size(0));
  const Chain chain(k, noise_std, weights, biases, scale);
  Tensor result = at::empty_like(k);
  const Tensor scratch = workspace(chain_cuda_scratch(chain.params), k);
  C10_CUDA_CHECK(denoise_chain_cuda(in(k), in(noise_std), out(result), out(scratch), chain.params, on.stream));
  return result;
}

Tensor hqs_chain(const Tensor& a_, const Tensor& g_, const Tensor& k_, const Tensor& noise_std_, at::TensorList weights,
                 const OptionalTensors& biases, double scale, int64_t num_iters, bool recentred) {
  const OnDevice on(k_);
  const Tensor a = dense(a_), g = dense(g_), k = dense(k_), noise_std = dense_images(noise_std_, k.size(0));
  convolve_params(g, k);
  check_like(a, k, "a", "k");
  const Chain chain(k, noise_std, weights, biases, scale);
  Tensor result = at::empty_like(k);
  const Tensor scratch = workspace(chain_cuda_scratch(chain.params), k);
  C10_CUDA_CHECK(hqs_chain_cuda(in(a), in(g), in(k), in(noise_std), out(result), out(scratch), chain.params, num_iters,
                                recentred, on.stream));
  return result;
}

std::tuple<Tensor, Tensor> predict_x0(const Tensor& x, const Tensor& eps, double alpha_bar,
                                      const OptionalTensor& alpha_bar_at) {
  const OnDevice on(x);
  const Predict a(x, eps, alpha_bar, alpha_bar_at);
  C10_CUDA_CHECK(predict_x0_cuda(in(a.x), in(a.eps), out(a.x0), out(a.mask), a.params, a.x.numel(), on.stream));
  return {a.x0, a.mask};
}

Tensor step_update(const Tensor& x, const Tensor& x0, const OptionalTensor& noise, const OptionalTensor& guidance,
                   double c0, double ct, double std, double gain, const OptionalTensor& c0_at, const OptionalTensor& ct_at,
                   const OptionalTensor& std_at, const OptionalTensor& gain_at) {
  const OnDevice on(x);
  const Update a(x, x0, noise, guidance, c0, ct, std, gain, {c0_at, ct_at, std_at, gain_at});
  C10_CUDA_CHECK(step_update_cuda(in(a.x), in(a.x0), in_or_null(a.noise), in_or_null(a.guidance), out(a.result),
                                  a.params, a.x.numel(), on.stream));
  return a.result;
}

Tensor step_update_philox(const Tensor& x, const Tensor& x0, const OptionalTensor& guidance, const Tensor& seeds_,
                          double c0, double ct, double std, double gain, int64_t step, int64_t stream,
                          const OptionalTensor& c0_at, const OptionalTensor& ct_at, const OptionalTensor& std_at,
                          const OptionalTensor& gain_at, const OptionalTensor& step_at,
                          const OptionalTensor& stream_at) {
  const OnDevice on(x);
  const Update a(x, x0, {}, guidance, c0, ct, std, gain, {c0_at, ct_at, std_at, gain_at});
  const Tensor seeds = seeds_.contiguous();
  const NoiseParams noise = noise_params_like(seeds, a.x, step, stream, step_at, stream_at);
  if (a.noisy) {
    C10_CUDA_CHECK(step_update_philox_cuda(in(a.x), in(a.x0), seeds.const_data_ptr<int64_t>(), in_or_null(a.guidance),
                                           out(a.result), a.params, noise, on.stream));
  } else {
    C10_CUDA_CHECK(step_update_cuda(in(a.x), in(a.x0), nullptr, in_or_null(a.guidance), out(a.result), a.params,
                                    a.x.numel(), on.stream));
  }
  return a.result;
}

Tensor philox_normal(const Tensor& seeds_, int64_t n, at::IntArrayRef shape, int64_t step, int64_t stream) {
  const OnDevice on(seeds_);
  const Tensor seeds = seeds_.contiguous();
  const NoiseParams p = noise_params(seeds, n, shape, step, stream);
  Tensor result = philox_output(seeds, n, shape);
  C10_CUDA_CHECK(philox_normal_cuda(seeds.const_data_ptr<int64_t>(), out(result), p, on.stream));
  return result;
}

DType dtype_of(const Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "x must be float32, float16 or bfloat16, got ", type);
  return type == at::kFloat ? DType::kFloat32 : type == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
}

const void* raw(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* raw_out(const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const OptionalTensor& skip, const Tensor& weight,
                                                   const Tensor& bias, const OptionalTensor& scale,
                                                   const OptionalTensor& shift, int64_t groups, double eps) {
  const OnDevice on(x);
  const Norm norm(x, skip, weight, bias, scale, shift, groups, eps);
  const GroupNormParams& p = norm.params;
  Tensor y = norm.output(norm.x, p.channels()), mean = norm.statistics(), rstd = norm.statistics();
  const Tensor scratch = workspace(group_norm_cuda_scratch(p), weight);
  C10_CUDA_CHECK(group_norm_silu_cuda(raw(norm.x), raw(norm.skip), norm.film, raw_out(y), out(mean), out(rstd),
                                      out(scratch), dtype_of(x), p, on.stream));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> group_norm_silu_backward(const Tensor& grad_, const Tensor& x, const OptionalTensor& skip,
                                                    const Tensor& mean_, const Tensor& rstd_, const Tensor& weight,
                                                    const Tensor& bias, const OptionalTensor& scale,
                                                    const OptionalTensor& shift, int64_t groups) {
  const OnDevice on(x);
  const Norm norm(x, skip, weight, bias, scale, shift, groups, 0);
  const GroupNormParams& p = norm.params;
  const Tensor grad = norm.checked_grad(grad_), mean = norm.checked_statistics(mean_, "mean"),
               rstd = norm.checked_statistics(rstd_, "rstd");
  Tensor dx = norm.output(norm.x, p.n_chan);
  Tensor dskip = p.n_skip > 0 ? norm.output(norm.skip, p.n_skip) : at::empty({0}, norm.x.options());
  const Tensor scratch = workspace(group_norm_cuda_scratch(p), weight);
  C10_CUDA_CHECK(group_norm_silu_backward_cuda(raw(grad), raw(norm.x), raw(norm.skip), in(mean), in(rstd), norm.film,
                                               raw_out(dx), raw_out(dskip), out(scratch), dtype_of(x), p, on.stream));
  return {dx, dskip};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastem, CUDA, m) {
  m.impl("spectral_sums", &spectral_sums);
  m.impl("wiener_guidance", &wiener_guidance);
  m.impl("psf_to_otf", &psf_to_otf);
  m.impl("convolve_support", &convolve_support);
  m.impl("project_kernel", &project_kernel);
  m.impl("project_simplex", &project_simplex);
  m.impl("simplex_least_squares", &simplex_least_squares);
  m.impl("recentre", &recentre);
  m.impl("denoise_chain", &denoise_chain);
  m.impl("hqs_chain", &hqs_chain);
  m.impl("predict_x0", &predict_x0);
  m.impl("step_update", &step_update);
  m.impl("step_update_philox", &step_update_philox);
  m.impl("philox_normal", &philox_normal);
  m.impl("group_norm_silu", &group_norm_silu);
  m.impl("group_norm_silu_backward", &group_norm_silu_backward);
}

}  // namespace fastem
