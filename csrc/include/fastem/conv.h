// Convolutions of a network whose weights are frozen, channels last, with what surrounds them fused in.
// Spec: `reference_conv` in fastem/ops/conv.py.
#pragma once

#include <cstdint>

namespace fastem {

enum class ConvKind : int64_t {
  k3x3 = 0,   // stride 1, zero padding 1; weight (out, in, 3, 3)
  kDown = 1,  // 2x2, stride 2; weight (out, in, 2, 2)
  kUp = 2,    // its transpose; weight (in, out, 2, 2)
  k1x1 = 3,   // weight (out, in, 1, 1)
};

struct ConvParams {
  ConvKind kind;
  int64_t n_image, height, width;  // of the input; kDown wants both even
  int64_t n_in, n_out;             // channels
};

// z is the convolution, t what becomes of it, and both live in registers only:
//   t = (gain z + offset) factor + residual
// Null pointers leave their term out. An output may be the same array as `factor` or `residual`, never the input.
struct ConvEpilogue {
  const float *gain, *offset;          // one per output channel
  int64_t gain_stride, offset_stride;  // from one image to the next, in floats; 0 shares
  const float *factor, *residual;      // laid out like the output
  float* out;                          // t
  float* silu;                         // silu(t)
  float* slope;                        // d silu(t) / d z without `factor`: gain silu'(t)
};

// Weights in the order the inner loops read them: conv_packed_size floats, for the machine they were packed on.
// 3x3 weights are stored transformed (Winograd), so packing is worth keeping.
int64_t conv_packed_size(const ConvParams& p);
void conv_pack_cpu(const float* weight, float* packed, const ConvParams& p);

// Input (image, height, width, in) -> outputs (image, height', width', out), all contiguous. Work is counted in blocks,
// conv_blocks of them; this does blocks [begin, end). Blocks write disjoint outputs, and no output depends on how they
// are divided. The caller owns the threads, and `scratch`: conv_scratch_size floats for each call.
int64_t conv_blocks(const ConvParams& p);
int64_t conv_scratch_size(const ConvParams& p);
void conv_cpu(const float* x, const float* packed, const ConvEpilogue& e, float* scratch, const ConvParams& p,
              int64_t begin, int64_t end);

}  // namespace fastem
