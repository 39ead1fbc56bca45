// Checks and views that the CPU and the CUDA bindings share. Shapes are checked here once more, after the friendlier
// checks in fastem/ops: a kernel must not read out of bounds whoever calls torch.ops.fastem.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fastem/chain.h"
#include "fastem/network.h"
#include "fastem/philox.h"
#include "fastem/psf.h"
#include "fastem/spectral.h"
#include "fastem/step.h"

namespace fastem {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

inline const float* in(const Tensor& t) { return t.const_data_ptr<float>(); }  // checks the dtype
inline float* out(const Tensor& t) { return t.mutable_data_ptr<float>(); }
inline const float* in_or_null(const Tensor& t) { return t.defined() ? in(t) : nullptr; }
inline const cfloat* complex_in(const Tensor& t) {
  return reinterpret_cast<const cfloat*>(t.const_data_ptr<c10::complex<float>>());
}
inline cfloat* complex_out(const Tensor& t) {
  return reinterpret_cast<cfloat*>(t.mutable_data_ptr<c10::complex<float>>());
}

inline Tensor dense(const Tensor& t) { return t.contiguous().resolve_conj().resolve_neg(); }

// One image serves all `n_image`.
inline Tensor dense_images(const Tensor& t, int64_t n_image) {
  if (t.dim() > 0 && t.size(0) == 1 && n_image != 1) {
    auto shape = t.sizes().vec();
    shape[0] = n_image;
    return dense(t.expand(shape));
  }
  return dense(t);
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, " must have the shape of ", like_name, ", ", like.sizes(),
                    ", got ", t.sizes());
}

inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " is on ", t.device(), ", the other inputs on ", like.device());
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  check_same_shape(t, like, name, like_name);
  check_device(t, like, name);
}

inline SpectralParams spectral_params(const Tensor& X, const Tensor& Y) {
  TORCH_CHECK_VALUE(X.dim() == 5 && Y.dim() == 4 && X.size(0) == Y.size(0) && X.sizes().slice(2) == Y.sizes().slice(1),
                    "X must be (B, n, C, H, W') and Y (B, C, H, W'), got ", X.sizes(), " and ", Y.sizes());
  check_device(Y, X, "Y");
  return {X.size(0), X.size(1), X.size(2), X.size(3) * X.size(4)};
}

inline std::tuple<Tensor, Tensor> spectral_sums_outputs(const Tensor& X, bool per_channel) {
  const std::vector<int64_t> shape = {X.size(0), per_channel ? X.size(2) : 1, X.size(3), X.size(4)};
  return {at::empty(shape, X.options()), at::empty(shape, X.options().dtype(at::kFloat))};
}

inline SpectralParams wiener_params(const Tensor& X, const Tensor& Y, const Tensor& K, const Tensor& sigma2,
                                    const Tensor& r2) {
  SpectralParams p = spectral_params(X, Y);
  TORCH_CHECK_VALUE(
      K.dim() == 4 && K.size(0) == X.size(0) && K.size(1) == 1 && K.sizes().slice(2) == X.sizes().slice(3),
      "K must be (B, 1, H, W') like X ", X.sizes(), ", got ", K.sizes());
  p.coloured = r2.dim() == 2;
  const auto serves = [&](const Tensor& scalar) { return scalar.dim() == 1 && scalar.size(0) == X.size(0); };
  TORCH_CHECK_VALUE(serves(sigma2), "sigma2 must be (B,) = (", X.size(0), ",), got ", sigma2.sizes());
  TORCH_CHECK_VALUE(p.coloured ? r2.sizes() == X.sizes().slice(3) : serves(r2), "r2 must be (B,) = (", X.size(0),
                    ",) or (H, W') like X ", X.sizes(), ", got ", r2.sizes());
  check_device(K, X, "K");
  check_device(sigma2, X, "sigma2");
  check_device(r2, X, "r2");
  return p;
}

inline PsfParams psf_params(const Tensor& k) {
  TORCH_CHECK_VALUE(k.dim() == 4 && k.size(1) == 1 && k.size(2) > 0 && k.size(3) > 0,
                    "kernels must be (B, 1, h, w), got ", k.sizes());
  return {k.size(0), k.size(2), k.size(3)};
}

inline OtfParams otf_params(const Tensor& k, at::IntArrayRef size) {
  const PsfParams p = psf_params(k);
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] >= p.h && size[1] >= p.w,
                    "size must be (H, W), not smaller than the kernel (", p.h, ", ", p.w, "), got ", size);
  return {p.n_image, p.h, p.w, size[0], size[1]};
}

inline Tensor otf_output(const Tensor& k, const OtfParams& p) {
  return at::empty({p.n_image, 1, p.height, p.n_col()}, k.options().dtype(at::kComplexFloat));
}

inline PsfParams convolve_params(const Tensor& g, const Tensor& k) {
  const PsfParams p = psf_params(k);
  TORCH_CHECK_VALUE(
      g.dim() == 4 && g.size(0) == p.n_image && g.size(1) == 1 && g.size(2) == 2 * p.h - 1 && g.size(3) == 2 * p.w - 1,
      "g must be (B, 1, 2h-1, 2w-1) for k ", k.sizes(), ", got ", g.sizes());
  check_device(g, k, "g");
  return p;
}

// The layers of a denoiser chain; keeps dense copies of the weights alive.
struct Chain {
  ChainParams params;
  std::vector<Tensor> alive;

  Chain(const Tensor& k, const Tensor& noise_std, at::TensorList weights, const OptionalTensors& biases, double scale) {
    const PsfParams p = psf_params(k);
    const int64_t n_layer = static_cast<int64_t>(weights.size());
    TORCH_CHECK_VALUE(n_layer >= 1 && n_layer <= kMaxChainLayers && biases.size() == weights.size(), "a chain has 1..",
                      kMaxChainLayers, " layers and a bias (or None) for each, got ", n_layer, " weights and ",
                      biases.size(), " biases");
    TORCH_CHECK_VALUE(noise_std.dim() == 1 && noise_std.size(0) == p.n_image, "noise_std must be (B,) = (", p.n_image,
                      ",), got ", noise_std.sizes());
    check_device(noise_std, k, "noise_std");
    params.n_image = p.n_image;
    params.h = p.h;
    params.w = p.w;
    params.n_layer = n_layer;
    params.scale = static_cast<float>(scale);
    int64_t n_in = 2;
    for (int64_t i = 0; i < n_layer; ++i) {
      const Tensor weight = dense(weights[i]);
      const OptionalTensor bias = biases.get(i);
      TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == n_in && weight.size(2) == 3 && weight.size(3) == 3 &&
                            weight.size(0) > 0 && (i + 1 < n_layer || weight.size(0) == 1),
                        "layer ", i, " must have weights (out, ", n_in, ", 3, 3)",
                        i + 1 < n_layer ? "" : " with out = 1", ", got ", weight.sizes());
      check_device(weight, k, "a weight");
      n_in = weight.size(0);
      params.layers[i] = {in(weight), nullptr, weight.size(1), weight.size(0)};
      alive.push_back(weight);
      if (bias) {
        const Tensor b = dense(*bias);
        TORCH_CHECK_VALUE(b.dim() == 1 && b.size(0) == n_in, "the bias of layer ", i, " must be (", n_in, ",), got ",
                          b.sizes());
        check_device(b, k, "a bias");
        params.layers[i].bias = in(b);
        alive.push_back(b);
      }
    }
  }
};

// A number of the schedule: the value, or the tensor of one double that the kernel is to read on its device.
inline Number number(double value, const OptionalTensor& on_device, const Tensor& like) {
  if (!on_device) return value;
  TORCH_CHECK_VALUE(on_device->numel() == 1 && on_device->scalar_type() == at::kDouble,
                    "a number on the device must be one float64, got ", on_device->sizes(), " ",
                    on_device->scalar_type());
  check_device(*on_device, like, "a number");
  return Number(on_device->const_data_ptr<double>());
}

// Arguments and results of predict_x0.
struct Predict {
  Tensor x, eps, x0, mask;
  PredictParams params;

  Predict(const Tensor& x_, const Tensor& eps_, double alpha_bar, const OptionalTensor& on_device)
      : x(dense(x_)), eps(dense(eps_)), params{number(alpha_bar, on_device, x)} {
    check_like(eps, x, "eps", "x_t");
    x0 = at::empty_like(x);
    mask = at::empty_like(x);
  }
};

// Arguments and result of step_update. `at`: c0, ct, std and gain on the device, where given.
struct Update {
  Tensor x, x0, noise, guidance, result;
  StepParams params;
  bool noisy;  // as far as the host knows

  Update(const Tensor& x_, const Tensor& x0_, const OptionalTensor& noise_, const OptionalTensor& guidance_, double c0,
         double ct, double std, double gain, const std::array<OptionalTensor, 4>& at)
      : x(dense(x_)),
        x0(dense(x0_)),
        params{number(c0, at[0], x), number(ct, at[1], x), number(std, at[2], x), number(gain, at[3], x)},
        noisy(std != 0 || at[2]) {
    check_like(x0, x, "x0_hat", "x_t");
    if (noise_ && noisy) noise = term(*noise_, "noise");
    if (guidance_ && (gain != 0 || at[3])) guidance = term(*guidance_, "guidance");
    result = at::empty_like(x);
  }

 private:
  Tensor term(const Tensor& t, const char* name) const {
    check_like(t, x, name, "x_t");
    return dense(t);
  }
};

inline NoiseParams noise_params(const Tensor& seeds, int64_t n, at::IntArrayRef shape, int64_t step, int64_t stream) {
  TORCH_CHECK_VALUE(seeds.dim() == 1 && seeds.scalar_type() == at::kLong, "seeds must be (B,) int64, got ",
                    seeds.scalar_type(), " ", seeds.sizes());
  int64_t count = 1;
  for (const int64_t side : shape) count *= side;
  return {seeds.size(0), n, count, static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
}

inline NoiseParams noise_params_like(const Tensor& seeds, const Tensor& x, int64_t step, int64_t stream,
                                     const OptionalTensor& step_at, const OptionalTensor& stream_at) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && seeds.dim() == 1 && x.size(0) == seeds.size(0),
                    "x_t must be (B, n, ...) and seeds (B,), got ", x.sizes(), " and ", seeds.sizes());
  check_device(seeds, x, "seeds");
  NoiseParams p = noise_params(seeds, x.size(1), x.sizes().slice(2), step, stream);
  const auto word = [&x](const OptionalTensor& t, const char* name) -> const int64_t* {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->numel() == 1 && t->scalar_type() == at::kLong, name, " on the device must be one int64, got ",
                      t->sizes(), " ", t->scalar_type());
    check_device(*t, x, name);
    return t->const_data_ptr<int64_t>();
  };
  p.step_at = word(step_at, "the step");
  p.stream_at = word(stream_at, "the stream");
  return p;
}

inline int64_t noise_blocks(const NoiseParams& p) { return p.n_image * p.n_particle * p.blocks(); }

inline Tensor philox_output(const Tensor& seeds, int64_t n, at::IntArrayRef shape) {
  std::vector<int64_t> full = {seeds.size(0), n};
  full.insert(full.end(), shape.begin(), shape.end());
  return at::empty(full, seeds.options().dtype(at::kFloat));
}

inline bool prefers_channels_last(const Tensor& x) {
  return x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// Arguments of group_norm_silu; keeps dense copies of what the pointers show alive.
struct Norm {
  GroupNormParams params;
  NormFilm film;
  at::MemoryFormat memory_format;
  Tensor x, skip, weight, bias, scale, shift;  // skip, scale, shift may be undefined

  Norm(const Tensor& x_, const OptionalTensor& skip_, const Tensor& weight_, const Tensor& bias_,
       const OptionalTensor& scale_, const OptionalTensor& shift_, int64_t groups, double eps) {
    TORCH_CHECK_VALUE(x_.dim() == 4 && x_.size(1) * x_.size(2) * x_.size(3) > 0,
                      "x must be (N, C, H, W) and not empty, got ", x_.sizes());
    const bool channels_last = x_.is_cuda() || prefers_channels_last(x_);
    memory_format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    x = laid_out(x_);
    if (skip_) {
      TORCH_CHECK_VALUE(skip_->dim() == 4 && skip_->size(0) == x.size(0) &&
                            skip_->sizes().slice(2) == x.sizes().slice(2) && skip_->scalar_type() == x.scalar_type(),
                        "skip must be like x ", x.sizes(), " but for its channels, got ", skip_->sizes());
      check_device(*skip_, x, "skip");
      skip = laid_out(*skip_);
    }
    const int64_t n_skip = skip_ ? skip.size(1) : 0, channels = x.size(1) + n_skip;
    TORCH_CHECK_VALUE(groups > 0 && channels % groups == 0, channels, " channels do not divide into ", groups,
                      " groups");
    params = {x.size(0), x.size(1),     n_skip, x.size(2) * x.size(3),
              groups,    channels_last, static_cast<float>(eps)};
    weight = per_channel(weight_, {channels}, "weight");
    bias = per_channel(bias_, {channels}, "bias");
    film = {in(weight), in(bias), nullptr, nullptr, 0};
    if (!scale_ || !shift_) return;
    scale = per_channel(*scale_, {x.size(0), channels}, "scale");
    shift = per_channel(*shift_, {x.size(0), channels}, "shift");
    const auto rows = [](const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; };
    if (!rows(scale) || !rows(shift) || scale.stride(0) != shift.stride(0)) {  // else halves of one tensor stay
      scale = dense(scale);
      shift = dense(shift);
    }
    film.scale = in(scale);
    film.shift = in(shift);
    film.stride = scale.stride(0);
  }

  Tensor laid_out(const Tensor& t) const { return t.resolve_neg().contiguous(memory_format); }
  Tensor output(const Tensor& like, int64_t channels) const {
    return at::empty({like.size(0), channels, like.size(2), like.size(3)}, like.options(), memory_format);
  }
  Tensor statistics() const { return at::empty({params.n_sample, params.n_group}, weight.options()); }
  Tensor checked_grad(const Tensor& grad) const {
    TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == params.channels() &&
                          grad.sizes().slice(2) == x.sizes().slice(2) && grad.scalar_type() == x.scalar_type(),
                      "grad must be like the output, ", params.channels(), " channels of ", x.scalar_type(), " for x ",
                      x.sizes(), ", got ", grad.sizes(), " ", grad.scalar_type());
    check_device(grad, x, "grad");
    return laid_out(grad);
  }
  Tensor checked_statistics(const Tensor& t, const char* name) const {
    return dense(per_channel(t, {params.n_sample, params.n_group}, name));
  }

 private:
  Tensor per_channel(const Tensor& t, at::IntArrayRef shape, const char* name) const {
    TORCH_CHECK_VALUE(t.sizes() == shape && t.scalar_type() == at::kFloat, name, " must be ", shape,
                      " float32, got ", t.sizes(), " ", t.scalar_type());
    check_device(t, x, name);
    return t.dim() == 1 ? dense(t) : t.resolve_neg();
  }
};

}  // namespace fastem
