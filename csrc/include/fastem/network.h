// Pointwise network layers. Spec: film_silu and film_silu_backward in fastem/ops/reference.py.
#pragma once

#include "fastem/math.h"

namespace fastem {

// Rows are (sample, channel) planes of n_pixel values, or with `channels_last` (sample, pixel) vectors of n_chan
// values.
struct FilmParams {
  int64_t n_sample, n_chan, n_pixel;
  bool channels_last;
  int64_t n_row() const { return n_sample * (channels_last ? n_pixel : n_chan); }
};

// out = silu(x (1 + scale) + shift); scale, shift (sample, chan), or both null. `stride` is the distance between the
// rows of scale and of shift in floats (both are often halves of one tensor). Rows [begin, end).
void film_silu_cpu(const float* x, const float* scale, const float* shift, int64_t stride, float* out,
                   const FilmParams& p, int64_t begin, int64_t end);
// The gradient with respect to x, given that of the output. Rows [begin, end).
void film_silu_backward_cpu(const float* grad, const float* x, const float* scale, const float* shift, int64_t stride,
                            float* out, const FilmParams& p, int64_t begin, int64_t end);

#ifdef FASTEM_CUDA
// Everything, asynchronously on `stream`. Allocates nothing; all pointers are on the device; returns the launch status.
cudaError_t film_silu_cuda(const float* x, const float* scale, const float* shift, int64_t stride, float* out,
                           const FilmParams& p, cudaStream_t stream);
cudaError_t film_silu_backward_cuda(const float* grad, const float* x, const float* scale, const float* shift,
                                    int64_t stride, float* out, const FilmParams& p, cudaStream_t stream);
#endif

}  // namespace fastem
