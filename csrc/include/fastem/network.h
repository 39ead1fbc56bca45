// GroupNorm with a per-sample scale and shift, and SiLU: forward, and backward with respect to the input.
// Spec: group_norm_silu and group_norm_silu_backward in fastem/ops/reference.py.
#pragma once

#include "fastem/math.h"

namespace fastem {

// The channels of x and of skip lie behind each other, as if concatenated; skip is never copied. Maps are (sample, chan,
// pixel), or with `channels_last` (sample, pixel, chan).
struct GroupNormParams {
  int64_t n_sample, n_chan, n_skip, n_pixel;  // n_chan of x; n_skip of skip, 0 without one
  int64_t n_group;                            // divides n_chan + n_skip
  bool channels_last;
  float eps;
  FASTEM_HD int64_t channels() const { return n_chan + n_skip; }
  FASTEM_HD int64_t group_size() const { return channels() / n_group; }
};

// h = (x - mean) / std weight (1 + scale) + bias (1 + scale) + shift; weight, bias (channels), scale, shift
// (sample, channels) or both null. `stride` is the distance between the rows of scale and of shift in floats: both are
// often halves of one tensor.
struct NormFilm {
  const float *weight, *bias, *scale, *shift;
  int64_t stride;
};


// On the CPU the work is done in three passes, each in parts that the caller may deal to threads: sums of each part
// into `partial` (group_norm_partials floats), parts [begin, end) of n_sample * group_norm_parts; from them the numbers
// of each group, [begin, end) of n_sample * n_group; and the result, again in parts. Results do not depend on who does
// which part.
int64_t group_norm_parts(const GroupNormParams& p);
int64_t group_norm_partials(const GroupNormParams& p);

// mean and rstd = 1 / sqrt(variance + eps), (sample, group).
void group_norm_moments_cpu(const float* x, const float* skip, float* partial, const GroupNormParams& p, int64_t begin,
                            int64_t end);
void group_norm_finish_cpu(const float* partial, float* mean, float* rstd, const GroupNormParams& p, int64_t begin,
                           int64_t end);
// y = silu(h), all channels in one map.
void group_norm_silu_cpu(const float* x, const float* skip, const float* mean, const float* rstd, const NormFilm& film,
                         float* y, const GroupNormParams& p, int64_t begin, int64_t end);

// q = grad silu'(h) gain goes to dx and dskip; mean_q and mean_qx are the means of q and of q (x - mean) rstd over each
// group.
void group_norm_sums_cpu(const float* grad, const float* x, const float* skip, const float* mean, const float* rstd,
                         const NormFilm& film, float* dx, float* dskip, float* partial, const GroupNormParams& p,
                         int64_t begin, int64_t end);
void group_norm_means_cpu(const float* partial, float* mean_q, float* mean_qx, const GroupNormParams& p, int64_t begin,
                          int64_t end);
// dx = rstd (q - mean_q - (x - mean) rstd mean_qx) in place of the q that dx holds, and the same for skip.
void group_norm_silu_backward_cpu(const float* x, const float* skip, const float* mean, const float* rstd,
                                  const float* mean_q, const float* mean_qx, float* dx, float* dskip,
                                  const GroupNormParams& p, int64_t begin, int64_t end);

#ifdef FASTEM_CUDA
enum class DType { kFloat32, kFloat16, kBFloat16 };  // of the maps; everything else is float32

// Everything, asynchronously on `stream`; `p.channels_last` must be set. Sums are float32 and have an order that depends
// on the size of a map alone. Allocates nothing; `scratch` holds group_norm_cuda_scratch floats (16-byte aligned, may
// be 0); returns the launch status.
int64_t group_norm_cuda_scratch(const GroupNormParams& p);
cudaError_t group_norm_silu_cuda(const void* x, const void* skip, const NormFilm& film, void* y, float* mean,
                                 float* rstd, float* scratch, DType dtype, const GroupNormParams& p,
                                 cudaStream_t stream);
cudaError_t group_norm_silu_backward_cuda(const void* grad, const void* x, const void* skip, const float* mean,
                                          const float* rstd, const NormFilm& film, void* dx, void* dskip,
                                          float* scratch, DType dtype, const GroupNormParams& p, cudaStream_t stream);
#endif

}  // namespace fastem
