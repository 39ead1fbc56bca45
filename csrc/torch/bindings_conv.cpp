// Torch ops of fastem/conv.h, CPU: check, allocate the scratch, run the blocks on torch's threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "fastem/conv.h"

namespace {

using at::Tensor;
using fastem::ConvKind;
using OptionalTensor = std::optional<Tensor>;

ConvKind kind_of(int64_t kind) {
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 3, "kind must be 0 (3x3), 1 (down), 2 (up) or 3 (1x1), got ", kind);
  return static_cast<ConvKind>(kind);
}

void check_floats(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
}

// Scratch of one thread, kept for its next call: fresh memory costs a page fault per 4 KB. In pages of 2 MB where the
// system has them: a tile touches 36 places that lie far apart.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(int64_t count) {
    if (count > count_) {
      constexpr size_t page = size_t{1} << 21;
      const size_t bytes = (count * sizeof(float) + page - 1) / page * page;
      std::free(data_);
      count_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(page, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      count_ = bytes / sizeof(float);
#ifdef MADV_HUGEPAGE
      madvise(data_, bytes, MADV_HUGEPAGE);  // advice: it may fail
#endif
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

Tensor conv_pack(const Tensor& weight_, int64_t kind) {
  const Tensor weight = weight_.contiguous();
  fastem::ConvParams p{kind_of(kind), 0, 0, 0, 0, 0};
  const int64_t side = p.kind == ConvKind::k3x3 ? 3 : p.kind == ConvKind::k1x1 ? 1 : 2;
  check_floats(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == side && weight.size(3) == side, "weight must be (.., .., ",
                    side, ", ", side, "), got ", weight.sizes());
  p.n_out = weight.size(p.kind == ConvKind::kUp ? 1 : 0);
  p.n_in = weight.size(p.kind == ConvKind::kUp ? 0 : 1);
  Tensor packed = at::empty({fastem::conv_packed_size(p)}, weight.options());
  fastem::conv_pack_cpu(weight.const_data_ptr<float>(), packed.mutable_data_ptr<float>(), p);
  return packed;
}

// The pointer to an optional tensor laid out like the output.
float* pixels(const OptionalTensor& t, const char* name, at::IntArrayRef sizes) {
  if (!t.has_value()) return nullptr;
  check_floats(*t, name);
  TORCH_CHECK_VALUE(t->sizes() == sizes, name, " must be ", sizes, " like the output, got ", t->sizes());
  return static_cast<float*>(t->data_ptr());
}

// The pointer to optional (image or 1, channel) values; rows may be strided.
const float* per_channel(const OptionalTensor& t, const char* name, const fastem::ConvParams& p, int64_t* stride) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, name, " must be float32, got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->device().is_cpu(), name, " must be on the CPU, got ", t->device());
  TORCH_CHECK_VALUE(t->dim() == 2 && (t->size(0) == p.n_image || t->size(0) == 1) && t->size(1) == p.n_out, name,
                    " must be (", p.n_image, " or 1, ", p.n_out, "), got ", t->sizes());
  TORCH_CHECK_VALUE(t->size(1) <= 1 || t->stride(1) == 1, name, " must have adjacent channels");
  *stride = t->size(0) == 1 ? 0 : t->stride(0);
  return t->const_data_ptr<float>();
}

void fused_conv(const Tensor& x, const Tensor& packed, int64_t kind, int64_t n_out, const OptionalTensor& gain,
                const OptionalTensor& offset, const OptionalTensor& factor, const OptionalTensor& residual,
                const OptionalTensor& out, const OptionalTensor& silu, const OptionalTensor& slope) {
  check_floats(x, "x");
  check_floats(packed, "packed");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (N, H, W, C), got ", x.sizes());
  const fastem::ConvParams p{kind_of(kind), x.size(0), x.size(1), x.size(2), x.size(3), n_out};
  TORCH_CHECK_VALUE(packed.numel() == fastem::conv_packed_size(p), "packed holds ", packed.numel(),
                    " values where this convolution of ", p.n_in, " to ", n_out, " channels wants ",
                    fastem::conv_packed_size(p), ": pack the weights with conv_pack, on this machine");
  const bool down = p.kind == ConvKind::kDown, up = p.kind == ConvKind::kUp;
  TORCH_CHECK_VALUE(!down || (p.height % 2 == 0 && p.width % 2 == 0),
                    "a 2x2 convolution of stride 2 wants even sizes, got ", p.height, " x ", p.width);
  const auto size = [&](int64_t n) { return down ? n / 2 : up ? 2 * n : n; };
  const int64_t sizes[] = {p.n_image, size(p.height), size(p.width), n_out};
  fastem::ConvEpilogue e{};
  e.gain = per_channel(gain, "gain", p, &e.gain_stride);
  e.offset = per_channel(offset, "offset", p, &e.offset_stride);
  e.factor = pixels(factor, "factor", sizes);
  e.residual = pixels(residual, "residual", sizes);
  e.out = pixels(out, "out", sizes);
  e.silu = pixels(silu, "silu", sizes);
  e.slope = pixels(slope, "slope", sizes);
  for (const float* output : {e.out, e.silu, e.slope})
    TORCH_CHECK_VALUE(output == nullptr || output != x.const_data_ptr<float>(), "an output may not be the input");

  const int64_t scratch_size = fastem::conv_scratch_size(p);
  at::parallel_for(0, fastem::conv_blocks(p), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    fastem::conv_cpu(x.const_data_ptr<float>(), packed.const_data_ptr<float>(), e, scratch.floats(scratch_size), p,
                     begin, end);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastem, m) {
  m.def("conv_pack(Tensor weight, int kind) -> Tensor");
  m.def(
      "fused_conv(Tensor x, Tensor packed, int kind, int n_out, Tensor? gain, Tensor? offset, Tensor? factor, "
      "Tensor? residual, Tensor(a!)? out, Tensor(b!)? silu, Tensor(c!)? slope) -> ()");
}

TORCH_LIBRARY_IMPL(fastem, CPU, m) {
  m.impl("conv_pack", &conv_pack);
  m.impl("fused_conv", &fused_conv);
}
