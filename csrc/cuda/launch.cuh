// What every kernel file shares: launching, shared memory, block-wide sums. No torch, no CUDA library.
#pragma once

#include <algorithm>

#include "fastem/math.h"

namespace fastem {

constexpr int kThreads = 256;           // per block, for kernels that do not say otherwise
constexpr int64_t kMaxGridY = 65535;    // blocks along y and z; kernels stride over the rest
constexpr size_t kPlainShared = 48 << 10;  // bytes of shared memory a kernel gets without asking

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_y(int64_t rows) { return static_cast<unsigned>(std::min(rows, kMaxGridY)); }

// Lets `kernel` have `bytes` of dynamic shared memory.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= kPlainShared) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... Params, class... Args>
cudaError_t launch_as(bool cooperative, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                      cudaStream_t stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const cudaError_t status = allow_shared(kernel, shared);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Launches on `stream`. An empty grid is a success.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   Args... args) {
  return launch_as(false, kernel, grid, threads, shared, stream, args...);
}

// As launch, but all blocks are resident at once, so that they may wait for each other; or the launch fails.
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                               Args... args) {
  return launch_as(true, kernel, grid, threads, shared, stream, args...);
}

// The most dynamic shared memory one block of the current device can have.
inline cudaError_t shared_limit(size_t* bytes) {
  int device = 0, value = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<size_t>(value);
  return status;
}

#ifdef __CUDACC__
__device__ __forceinline__ float* dynamic_shared() {
  extern __shared__ float4 memory[];  // float4: 16-byte aligned
  return reinterpret_cast<float*>(memory);
}
#else  // csrc/cuda/emulate runs these files on the CPU
float* dynamic_shared();
#endif

// The sum of `value` over the block, the same in every thread. `scratch` holds 32 values; the order of the additions
// depends on the block size alone. Ends with the block in step.
template <class T>
__device__ T block_sum(T value, T* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

// The largest `value` of the block, nan if there is one. As block_sum.
__device__ __forceinline__ float block_max(float value, float* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value || other != other ? other : value;
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float top = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) {
    top = scratch[warp] > top || scratch[warp] != scratch[warp] ? scratch[warp] : top;
  }
  __syncthreads();
  return top;
}

// max(x, 0) that keeps nan, as torch.clamp does.
__device__ __forceinline__ float positive(float x) { return x < 0.0f ? 0.0f : x; }

}  // namespace fastem
