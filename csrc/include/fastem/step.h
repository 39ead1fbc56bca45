// Sampler steps, element by element. Spec: predict_x0, step_update, step_update_philox in fastem/ops/reference.py.
#pragma once

#include "fastem/math.h"
#include "fastem/philox.h"

namespace fastem {

// Coefficients of Eq. (12); `s` = sqrt(1 - alpha_bar) as a sum of two floats, see predict_x0_element.
struct PredictParams {
  float s_hi, s_lo, inv_a;
  explicit PredictParams(double alpha_bar) {
    const double s = std::sqrt(1 - alpha_bar);
    s_hi = static_cast<float>(s);
    s_lo = static_cast<float>(s - s_hi);
    inv_a = static_cast<float>(1 / std::sqrt(alpha_bar));
  }
};

// x_{t-1} = c0 (2 x0 - 1) + ct x_t + std noise + gain guidance, Eq. (15).
struct StepParams {
  float c0, ct, std, gain;
};

// Elements [begin, end). x0 in [0, 1], mask 1 where the clamp let x0 through, else 0.
void predict_x0_cpu(const float* x, const float* eps, float* x0, float* mask, const PredictParams& p, int64_t begin,
                    int64_t end);

// Elements [begin, end). `noise` and `guidance` may be null: then their term is left out.
void step_update_cpu(const float* x, const float* x0, const float* noise, const float* guidance, float* out,
                     const StepParams& p, int64_t begin, int64_t end);

// The same with the noise of philox_normal drawn on the fly. A range counts blocks of 4 elements as there.
void step_update_philox_cpu(const float* x, const float* x0, const int64_t* seeds, const float* guidance, float* out,
                            const StepParams& p, const NoiseParams& noise, int64_t begin, int64_t end);

#ifdef FASTEM_CUDA
// `n` elements, asynchronously on `stream`. Allocates nothing; all pointers are on the device; returns the launch
// status.
cudaError_t predict_x0_cuda(const float* x, const float* eps, float* x0, float* mask, const PredictParams& p, int64_t n,
                            cudaStream_t stream);
cudaError_t step_update_cuda(const float* x, const float* x0, const float* noise, const float* guidance, float* out,
                             const StepParams& p, int64_t n, cudaStream_t stream);
cudaError_t step_update_philox_cuda(const float* x, const float* x0, const int64_t* seeds, const float* guidance,
                                    float* out, const StepParams& p, const NoiseParams& noise, cudaStream_t stream);
#endif

}  // namespace fastem
