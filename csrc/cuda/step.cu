// Sampler steps and their noise. Spec: the namesakes in fastem/ops/reference.py.
#include "fastem/step.h"

#include "launch.cuh"

namespace fastem {
namespace {

// Threads own 4 neighbouring elements, those of one Philox counter: a float4 where the pointers allow it.
struct Quad {
  float v[4];
};

__device__ Quad load4(const float* p, int64_t at, int count, bool vector) {
  Quad q{};
  if (vector) {
    const float4 all = *reinterpret_cast<const float4*>(p + at);
    return {{all.x, all.y, all.z, all.w}};
  }
  for (int j = 0; j < 4; ++j) {
    if (j < count) q.v[j] = p[at + j];
  }
  return q;
}

__device__ void store4(float* p, int64_t at, int count, bool vector, const Quad& q) {
  if (vector) {
    *reinterpret_cast<float4*>(p + at) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
    return;
  }
  for (int j = 0; j < 4; ++j) {
    if (j < count) p[at + j] = q.v[j];
  }
}

// Whether rows of `length` floats behind all these pointers (null ones aside) can be read as float4.
template <class... Pointers>
bool vectorised(int64_t length, Pointers... pointers) {
  const uintptr_t bits[] = {reinterpret_cast<uintptr_t>(pointers)...};
  uintptr_t any = 0;
  for (const uintptr_t b : bits) any |= b;
  return length % 4 == 0 && any % 16 == 0;
}

__device__ int elements(int64_t left) { return left < 4 ? static_cast<int>(left) : 4; }

__global__ void predict_x0_kernel(const float* __restrict__ x, const float* __restrict__ eps, float* __restrict__ x0,
                                  float* __restrict__ mask, PredictParams p, int64_t n, bool vector) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * 4;
  const PredictFactors f(p);
  for (int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x); at < n; at += stride) {
    const int count = elements(n - at);
    const Quad a = load4(x, at, count, vector), b = load4(eps, at, count, vector);
    Quad image, inside;
    for (int j = 0; j < 4; ++j) {
      predict_x0_element(a.v[j], b.v[j], f.s_hi, f.s_lo, f.inv_a, &image.v[j], &inside.v[j]);
    }
    store4(x0, at, count, vector, image);
    store4(mask, at, count, vector, inside);
  }
}

enum class Noise { kNone, kTensor, kPhilox };

// x_{t-1} of Eq. (15). Rows are particles of `length` elements; without Philox everything is one row.
template <Noise kNoise>
__global__ void step_update_kernel(const float* __restrict__ x, const float* __restrict__ x0,
                                   const float* __restrict__ noise, const int64_t* __restrict__ seeds,
                                   const float* __restrict__ guidance, float* __restrict__ out, StepParams p,
                                   NoiseParams np, bool vector) {
  const int64_t length = np.n_element, blocks = (length + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const StepFactors f(p);
  const uint32_t step = np.step_word(), word = np.stream_word();
  for (int64_t row = blockIdx.y; row < np.n_image * np.n_particle; row += gridDim.y) {
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < blocks; block += stride) {
      const int64_t at = row * length + 4 * block;
      const int count = elements(length - 4 * block);
      const Quad a = load4(x, at, count, vector), b = load4(x0, at, count, vector);
      Quad z{}, result;
      if constexpr (kNoise == Noise::kTensor) z = load4(noise, at, count, vector);
      if constexpr (kNoise == Noise::kPhilox) {
        philox_normal4(static_cast<uint64_t>(seeds[row / np.n_particle]), static_cast<uint32_t>(block),
                       static_cast<uint32_t>(row % np.n_particle), step, word, z.v);
      }
      for (int j = 0; j < 4; ++j) result.v[j] = step_element(a.v[j], b.v[j], z.v[j], f.c0, f.ct, f.std);
      if (guidance) {
        const Quad d = load4(guidance, at, count, vector);
        for (int j = 0; j < 4; ++j) result.v[j] = fmadd(f.gain, d.v[j], result.v[j]);
      }
      store4(out, at, count, vector, result);
    }
  }
}

__global__ void philox_normal_kernel(const int64_t* __restrict__ seeds, float* __restrict__ out, NoiseParams np,
                                     bool vector) {
  const int64_t length = np.n_element, blocks = (length + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = blockIdx.y; row < np.n_image * np.n_particle; row += gridDim.y) {
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < blocks; block += stride) {
      Quad z;
      philox_normal4(static_cast<uint64_t>(seeds[row / np.n_particle]), static_cast<uint32_t>(block),
                     static_cast<uint32_t>(row % np.n_particle), np.step_word(), np.stream_word(), z.v);
      store4(out, row * length + 4 * block, elements(length - 4 * block), vector, z);
    }
  }
}

unsigned quads_grid(int64_t n) {  // blocks along x that give every thread one quad, up to a size past which they stride
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(n, 4 * kThreads), 1 << 20));
}

}  // namespace

cudaError_t predict_x0_cuda(const float* x, const float* eps, float* x0, float* mask, const PredictParams& p,
                            int64_t n, cudaStream_t stream) {
  return launch(predict_x0_kernel, dim3(quads_grid(n)), kThreads, 0, stream, x, eps, x0, mask, p, n,
                vectorised(n, x, eps, x0, mask));
}

cudaError_t step_update_cuda(const float* x, const float* x0, const float* noise, const float* guidance, float* out,
                             const StepParams& p, int64_t n, cudaStream_t stream) {
  const auto kernel = noise ? step_update_kernel<Noise::kTensor> : step_update_kernel<Noise::kNone>;
  return launch(kernel, dim3(quads_grid(n)), kThreads, 0, stream, x, x0, noise, nullptr, guidance, out, p,
                NoiseParams{1, 1, n, 0, 0}, vectorised(n, x, x0, noise, guidance, out));
}

cudaError_t step_update_philox_cuda(const float* x, const float* x0, const int64_t* seeds, const float* guidance,
                                    float* out, const StepParams& p, const NoiseParams& noise, cudaStream_t stream) {
  const dim3 grid(quads_grid(noise.n_element), grid_y(noise.n_image * noise.n_particle));
  return launch(step_update_kernel<Noise::kPhilox>, grid, kThreads, 0, stream, x, x0, nullptr, seeds, guidance, out, p,
                noise, vectorised(noise.n_element, x, x0, guidance, out));
}

cudaError_t philox_normal_cuda(const int64_t* seeds, float* out, const NoiseParams& p, cudaStream_t stream) {
  const dim3 grid(quads_grid(p.n_element), grid_y(p.n_image * p.n_particle));
  return launch(philox_normal_kernel, grid, kThreads, 0, stream, seeds, out, p, vectorised(p.n_element, out));
}

}  // namespace fastem
