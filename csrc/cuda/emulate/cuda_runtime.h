// A CUDA runtime for the CPU, as far as the kernels of this project need one: it runs the real .cu files where there is
// no GPU, slowly, to test their indexing and their barriers. Threads are fibers, switched at barriers, shuffles and
// atomics; blocks of a cooperative launch are all alive at once. Shared memory starts as nan and ends in a red zone.
// What it cannot show: missing fences, warp divergence inside a shuffle's mask, speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulate {

// The device: what the launch code asks about, and the order in which threads are let run between two barriers.
struct Device {
  int n_sm = 4;
  int shared_bytes = 100 << 10;
  bool reverse = false;
};
extern Device device;

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void block_barrier();
void exchange(const void* mine, void* theirs, size_t size, int lane_mask);  // with the lane `lane ^ lane_mask`
void let_others_run(bool progress);

}  // namespace emulate

inline void __syncthreads() { emulate::block_barrier(); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  T other;
  emulate::exchange(&value, &other, sizeof value, lane_mask);
  return other;
}

template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline unsigned atomicAdd(unsigned* p, unsigned value) {
  emulate::let_others_run(value != 0);
  const unsigned before = *p;
  *p += value;
  return before;
}

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(M_PI * x));
  *cosine = static_cast<float>(std::cos(M_PI * x));
}
using std::isfinite;

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= emulate::device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t shared) {
  *blocks = shared <= static_cast<size_t>(emulate::device.shared_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulate::device.n_sm : emulate::device.shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  return std::memset(p, value, size), cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const std::tuple<Params...> values(args...);
  return emulate::run(*config, [&] { std::apply(kernel, values); });
}
