// Neighbouring values of a float32, float16 or bfloat16 map, moved 16 bytes at a time where the layout allows it and
// worked on as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace fastem {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

template <class T>
constexpr int kPack = 16 / sizeof(T);  // values of one 16-byte access

// kSize values from p on: one access if kSize is kPack<T> (p is 16-byte aligned then), else kSize of them.
template <int kSize, class T>
__device__ __forceinline__ void load_pack(const T* p, float (&out)[kSize]) {
  T values[kSize];
  if constexpr (kSize == kPack<T>) {
    const uint4 all = *reinterpret_cast<const uint4*>(p);
    memcpy(values, &all, sizeof all);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = p[i];
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = widen(values[i]);
}

template <int kSize, class T>
__device__ __forceinline__ void store_pack(T* p, const float (&in)[kSize]) {
  T values[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) narrow(in[i], &values[i]);
  if constexpr (kSize == kPack<T>) {
    uint4 all;
    memcpy(&all, values, sizeof all);
    *reinterpret_cast<uint4*>(p) = all;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) p[i] = values[i];
  }
}

}  // namespace fastem
