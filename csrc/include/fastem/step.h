// Sampler steps, element by element. Spec: predict_x0, step_update, step_update_philox in fastem/ops/reference.py.
#pragma once

#include "fastem/math.h"
#include "fastem/philox.h"

namespace fastem {

// A number of the schedule: `value`, or what is at `at` when the kernel runs, where the kernel runs. A launch that is
// recorded once and replayed (a CUDA graph) so reads the numbers of the step that it is replayed for.
struct Number {
  double value;
  const double* at;
  Number(double number) : value(number), at(nullptr) {}
  explicit Number(const double* place) : value(0), at(place) {}
  FASTEM_HD double get() const { return at ? *at : value; }
};

struct PredictParams {
  Number alpha_bar;
};

// x_{t-1} = c0 (2 x0 - 1) + ct x_t + std noise + gain guidance, Eq. (15).
struct StepParams {
  Number c0, ct, std, gain;
};

inline namespace FASTEM_ISA {

// Coefficients of Eq. (12); `s` = sqrt(1 - alpha_bar) as a sum of two floats, see predict_x0_element.
struct PredictFactors {
  float s_hi, s_lo, inv_a;
  FASTEM_HD explicit PredictFactors(const PredictParams& p) {
    const double alpha_bar = p.alpha_bar.get(), s = sqrt(1 - alpha_bar);
    s_hi = static_cast<float>(s);
    s_lo = static_cast<float>(s - s_hi);
    inv_a = static_cast<float>(1 / sqrt(alpha_bar));
  }
};

struct StepFactors {
  float c0, ct, std, gain;
  FASTEM_HD explicit StepFactors(const StepParams& p)
      : c0(static_cast<float>(p.c0.get())),
        ct(static_cast<float>(p.ct.get())),
        std(static_cast<float>(p.std.get())),
        gain(static_cast<float>(p.gain.get())) {}
};

}  // namespace FASTEM_ISA

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
