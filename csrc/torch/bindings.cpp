// The only files that include torch are in this folder: check, allocate, call. Schemas mirror fastem/ops/reference.py.
#include "bindings.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

namespace fastem {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread of their own

// The caller's loop of chain.h on torch's threads.
const ParallelFor kTorchThreads = {
    [](const ParallelFor&, int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
    },
    nullptr};

std::vector<float> floats(int64_t count) { return std::vector<float>(static_cast<size_t>(count)); }

std::tuple<Tensor, Tensor> spectral_sums(const Tensor& X_, const Tensor& Y_, bool per_channel) {
  const Tensor X = dense(X_), Y = dense(Y_);
  const SpectralParams p = spectral_params(X, Y);
  auto [Sxy, Sxx] = spectral_sums_outputs(X, per_channel);
  at::parallel_for(0, Sxx.numel(), kGrain, [&, &Sxy = Sxy, &Sxx = Sxx](int64_t begin, int64_t end) {
    spectral_sums_cpu(complex_in(X), complex_in(Y), complex_out(Sxy), out(Sxx), p, per_channel, begin, end);
  });
  return {Sxy, Sxx};
}

Tensor wiener_guidance(const Tensor& X_, const Tensor& Y_, const Tensor& K_, const Tensor& sigma2_, const Tensor& r2_) {
  const Tensor X = dense(X_), Y = dense_images(Y_, X.size(0)), K = dense_images(K_, X.size(0));
  const Tensor sigma2 = dense_images(sigma2_, X.size(0));
  const Tensor r2 = r2_.dim() == 2 ? dense(r2_) : dense_images(r2_, X.size(0));
  const SpectralParams p = wiener_params(X, Y, K, sigma2, r2);
  Tensor V = at::empty_like(X);
  at::parallel_for(0, V.numel(), kGrain, [&](int64_t begin, int64_t end) {
    wiener_guidance_cpu(complex_in(X), complex_in(Y), complex_in(K), in(sigma2), in(r2), complex_out(V), p, begin, end);
  });
  return V;
}

Tensor psf_to_otf(const Tensor& k_, at::IntArrayRef size) {
  const Tensor k = dense(k_);
  const OtfParams p = otf_params(k, size);
  auto cos_w = floats(p.width), sin_w = floats(p.width), cos_h = floats(p.height), sin_h = floats(p.height);
  dft_table(p.width, cos_w.data(), sin_w.data());
  dft_table(p.height, cos_h.data(), sin_h.data());
  const Tensor R = at::empty({p.n_image, p.h, p.n_col()}, k.options().dtype(at::kComplexFloat));
  const Tensor K = otf_output(k, p);
  at::parallel_for(0, p.n_image * p.h, 8, [&](int64_t begin, int64_t end) {
    psf_to_otf_rows_cpu(in(k), cos_w.data(), sin_w.data(), complex_out(R), p, begin, end);
  });
  at::parallel_for(0, p.n_image * (p.height / 2 + 1), 8, [&](int64_t begin, int64_t end) {
    psf_to_otf_columns_cpu(complex_in(R), cos_h.data(), sin_h.data(), complex_out(K), p, begin, end);
  });
  return K;
}

Tensor convolve_support(const Tensor& g_, const Tensor& k_) {
  const Tensor g = dense(g_), k = dense(k_);
  const PsfParams p = convolve_params(g, k);
  Tensor z = at::empty_like(k);
  at::parallel_for(0, p.n_image, 1, [&](int64_t begin, int64_t end) {
    auto scratch = floats(convolve_support_scratch(p.h, p.w));
    convolve_support_cpu(in(g), in(k), out(z), scratch.data(), p, begin, end);
  });
  return z;
}

Tensor project_kernel(const Tensor& z_) {
  const Tensor z = dense(z_);
  const PsfParams p = psf_params(z);
  Tensor k = at::empty_like(z);
  at::parallel_for(0, p.n_image, 8,
                   [&](int64_t begin, int64_t end) { project_kernel_cpu(in(z), out(k), p, begin, end); });
  return k;
}

Tensor project_simplex(const Tensor& z_) {
  const Tensor z = dense(z_);
  const PsfParams p = psf_params(z);
  Tensor k = at::empty_like(z);
  at::parallel_for(0, p.n_image, 1,
                   [&](int64_t begin, int64_t end) { project_simplex_cpu(in(z), out(k), p, begin, end); });
  return k;
}

Tensor simplex_least_squares(const Tensor& g_, const Tensor& b_, const Tensor& k_, int64_t num_iters) {
  const Tensor g = dense(g_), b = dense(b_), k = dense(k_);
  const PsfParams p = convolve_params(g, k);
  check_like(b, k, "b", "k");
  Tensor result = at::empty_like(k);
  at::parallel_for(0, p.n_image, 1, [&](int64_t begin, int64_t end) {
    auto scratch = floats(simplex_least_squares_scratch(p.h, p.w));
    simplex_least_squares_cpu(in(g), in(b), in(k), out(result), scratch.data(), p, num_iters, begin, end);
  });
  return result;
}

Tensor recentre(const Tensor& k_) {
  const Tensor k = dense(k_);
  const PsfParams p = psf_params(k);
  Tensor moved = at::empty_like(k);
  at::parallel_for(0, p.n_image, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>(recentre_scratch(p.h, p.w)));
    recentre_cpu(in(k), out(moved), scratch.data(), p, begin, end);
  });
  return moved;
}

// Calls one(image, scratch, parallel) for every image: a thread per image where there are enough images, else all
// threads on one image at a time. Never both: torch's parallel regions do not nest. The results are the same.
template <typename One>
void for_each_image(int64_t n_image, int64_t scratch_size, const One& one) {
  if (n_image >= at::get_num_threads()) {
    at::parallel_for(0, n_image, 1, [&](int64_t begin, int64_t end) {
      auto scratch = floats(scratch_size);
      for (int64_t image = begin; image < end; ++image) one(image, scratch.data(), kSerial);
    });
  } else {
    auto scratch = floats(scratch_size);
    for (int64_t image = 0; image < n_image; ++image) one(image, scratch.data(), kTorchThreads);
  }
}

Tensor denoise_chain(const Tensor& k_, const Tensor& noise_std_, at::TensorList weights, const OptionalTensors& biases,
                     double scale) {
  const Tensor k = dense(k_), noise_std = dense_images(noise_std_, k.size(0));
  const Chain chain(k, noise_std, weights, biases, scale);
  auto packed = floats(chain_packed_size(chain.params));
  chain_pack_cpu(chain.params, packed.data());
  Tensor result = at::empty_like(k);
  const int64_t n = chain.params.h * chain.params.w;
  for_each_image(k.size(0), chain_scratch_size(chain.params),
                 [&](int64_t image, float* scratch, const ParallelFor& loop) {
                   denoise_chain_cpu(in(k) + image * n, in(noise_std)[image], out(result) + image * n, packed.data(),
                                     scratch, chain.params, loop);
                 });
  return result;
}

Tensor hqs_chain(const Tensor& a_, const Tensor& g_, const Tensor& k_, const Tensor& noise_std_, at::TensorList weights,
                 const OptionalTensors& biases, double scale, int64_t num_iters, bool recentred) {
  const Tensor a = dense(a_), g = dense(g_), k = dense(k_), noise_std = dense_images(noise_std_, k.size(0));
  const PsfParams shape = convolve_params(g, k);
  check_like(a, k, "a", "k");
  const Chain chain(k, noise_std, weights, biases, scale);
  auto packed = floats(chain_packed_size(chain.params));
  chain_pack_cpu(chain.params, packed.data());
  Tensor result = at::empty_like(k);
  const int64_t n = shape.h * shape.w, n_g = (2 * shape.h - 1) * (2 * shape.w - 1);
  for_each_image(shape.n_image, hqs_scratch_size(chain.params),
                 [&](int64_t image, float* scratch, const ParallelFor& loop) {
                   hqs_chain_cpu(in(a) + image * n, in(g) + image * n_g, in(k) + image * n, in(noise_std)[image],
                                 out(result) + image * n, packed.data(), scratch, chain.params, num_iters, loop);
                 });
  return recentred ? recentre(result) : result;
}

std::tuple<Tensor, Tensor> predict_x0(const Tensor& x, const Tensor& eps, double alpha_bar,
                                      const OptionalTensor& alpha_bar_at) {
  const Predict a(x, eps, alpha_bar, alpha_bar_at);
  at::parallel_for(0, a.x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    predict_x0_cpu(in(a.x), in(a.eps), out(a.x0), out(a.mask), a.params, begin, end);
  });
  return {a.x0, a.mask};
}

Tensor step_update(const Tensor& x, const Tensor& x0, const OptionalTensor& noise, const OptionalTensor& guidance,
                   double c0, double ct, double std, double gain, const OptionalTensor& c0_at, const OptionalTensor& ct_at,
                   const OptionalTensor& std_at, const OptionalTensor& gain_at) {
  const Update a(x, x0, noise, guidance, c0, ct, std, gain, {c0_at, ct_at, std_at, gain_at});
  at::parallel_for(0, a.x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    step_update_cpu(in(a.x), in(a.x0), in_or_null(a.noise), in_or_null(a.guidance), out(a.result), a.params, begin,
                    end);
  });
  return a.result;
}

Tensor step_update_philox(const Tensor& x, const Tensor& x0, const OptionalTensor& guidance, const Tensor& seeds_,
                          double c0, double ct, double std, double gain, int64_t step, int64_t stream,
                          const OptionalTensor& c0_at, const OptionalTensor& ct_at, const OptionalTensor& std_at,
                          const OptionalTensor& gain_at, const OptionalTensor& step_at,
                          const OptionalTensor& stream_at) {
  const Update a(x, x0, {}, guidance, c0, ct, std, gain, {c0_at, ct_at, std_at, gain_at});
  const Tensor seeds = seeds_.contiguous();
  const NoiseParams noise = noise_params_like(seeds, a.x, step, stream, step_at, stream_at);
  if (!a.noisy) {  // nothing to draw
    at::parallel_for(0, a.x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      step_update_cpu(in(a.x), in(a.x0), nullptr, in_or_null(a.guidance), out(a.result), a.params, begin, end);
    });
    return a.result;
  }
  at::parallel_for(0, noise_blocks(noise), kGrain / 16, [&](int64_t begin, int64_t end) {
    step_update_philox_cpu(in(a.x), in(a.x0), seeds.const_data_ptr<int64_t>(), in_or_null(a.guidance), out(a.result),
                           a.params, noise, begin, end);
  });
  return a.result;
}

Tensor philox_normal(const Tensor& seeds_, int64_t n, at::IntArrayRef shape, int64_t step, int64_t stream) {
  const Tensor seeds = seeds_.contiguous();
  const NoiseParams p = noise_params(seeds, n, shape, step, stream);
  Tensor result = philox_output(seeds, n, shape);
  at::parallel_for(0, noise_blocks(p), kGrain / 16, [&](int64_t begin, int64_t end) {
    philox_normal_cpu(seeds.const_data_ptr<int64_t>(), out(result), p, begin, end);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const OptionalTensor& skip, const Tensor& weight,
                                                   const Tensor& bias, const OptionalTensor& scale,
                                                   const OptionalTensor& shift, int64_t groups, double eps) {
  const Norm norm(x, skip, weight, bias, scale, shift, groups, eps);
  const GroupNormParams& p = norm.params;
  Tensor y = norm.output(norm.x, p.channels()), mean = norm.statistics(), rstd = norm.statistics();
  const float *data = in(norm.x), *more = in_or_null(norm.skip);
  const int64_t parts = p.n_sample * group_norm_parts(p);
  auto partial = floats(group_norm_partials(p));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    group_norm_moments_cpu(data, more, partial.data(), p, begin, end);
  });
  group_norm_finish_cpu(partial.data(), out(mean), out(rstd), p, 0, p.n_sample * p.n_group);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    group_norm_silu_cpu(data, more, in(mean), in(rstd), norm.film, out(y), p, begin, end);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> group_norm_silu_backward(const Tensor& grad_, const Tensor& x, const OptionalTensor& skip,
                                                    const Tensor& mean_, const Tensor& rstd_, const Tensor& weight,
                                                    const Tensor& bias, const OptionalTensor& scale,
                                                    const OptionalTensor& shift, int64_t groups) {
  const Norm norm(x, skip, weight, bias, scale, shift, groups, 0);
  const GroupNormParams& p = norm.params;
  const Tensor grad = norm.checked_grad(grad_), mean = norm.checked_statistics(mean_, "mean"),
               rstd = norm.checked_statistics(rstd_, "rstd");
  Tensor dx = norm.output(norm.x, p.n_chan);
  Tensor dskip = p.n_skip > 0 ? norm.output(norm.skip, p.n_skip) : at::empty({0}, norm.x.options());
  const float *data = in(norm.x), *more = in_or_null(norm.skip);
  const int64_t parts = p.n_sample * group_norm_parts(p);
  float *to = out(dx), *other = p.n_skip > 0 ? out(dskip) : nullptr;
  auto partial = floats(group_norm_partials(p)), mean_q = floats(mean.numel()), mean_qx = floats(mean.numel());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    group_norm_sums_cpu(in(grad), data, more, in(mean), in(rstd), norm.film, to, other, partial.data(), p, begin, end);
  });
  group_norm_means_cpu(partial.data(), mean_q.data(), mean_qx.data(), p, 0, mean.numel());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    group_norm_silu_backward_cpu(data, more, in(mean), in(rstd), mean_q.data(), mean_qx.data(), to, other, p, begin,
                                 end);
  });
  return {dx, dskip};
}

// What this build can do, for `fastem doctor`.
std::string build_info() {
  std::string info = std::string("cpu kernels: ") + cpu_kernels();
#ifdef _OPENMP
  info += ", OpenMP";
#else
  info += ", single-threaded";
#endif
#ifdef FASTEM_CUDA
  info += ", CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  info += ", no CUDA";
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY(fastem, m) {
  m.def("build_info() -> str", &build_info);
  m.def("spectral_sums(Tensor X, Tensor Y, bool per_channel=False) -> (Tensor, Tensor)");
  m.def("wiener_guidance(Tensor X, Tensor Y, Tensor K, Tensor sigma2, Tensor r2) -> Tensor");
  m.def("psf_to_otf(Tensor k, int[] size) -> Tensor");
  m.def("convolve_support(Tensor g, Tensor k) -> Tensor");
  m.def("project_kernel(Tensor z) -> Tensor");
  m.def("project_simplex(Tensor z) -> Tensor");
  m.def("simplex_least_squares(Tensor g, Tensor b, Tensor k, int num_iters) -> Tensor");
  m.def("recentre(Tensor k) -> Tensor");
  m.def("denoise_chain(Tensor k, Tensor noise_std, Tensor[] weights, Tensor?[] biases, float scale) -> Tensor");
  m.def(
      "hqs_chain(Tensor a, Tensor g, Tensor k, Tensor noise_std, Tensor[] weights, Tensor?[] biases, float scale, "
      "int num_iters, bool recentred=False) -> Tensor");
  m.def("predict_x0(Tensor x_t, Tensor eps, float alpha_bar, Tensor? alpha_bar_at=None) -> (Tensor, Tensor)");
  m.def(
      "step_update(Tensor x_t, Tensor x0_hat, Tensor? noise, Tensor? guidance, float c0, float ct, float std, "
      "float gain, Tensor? c0_at=None, Tensor? ct_at=None, Tensor? std_at=None, Tensor? gain_at=None) -> Tensor");
  m.def(
      "step_update_philox(Tensor x_t, Tensor x0_hat, Tensor? guidance, Tensor seeds, float c0, float ct, float std, "
      "float gain, int step, int stream, Tensor? c0_at=None, Tensor? ct_at=None, Tensor? std_at=None, "
      "Tensor? gain_at=None, Tensor? step_at=None, Tensor? stream_at=None) -> Tensor");
  m.def("philox_normal(Tensor seeds, int n, int[] shape, int step, int stream) -> Tensor");
  m.def(
      "group_norm_silu(Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, Tensor? skip, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor bias, Tensor? scale, Tensor? shift, int groups) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastem, CPU, m) {
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
