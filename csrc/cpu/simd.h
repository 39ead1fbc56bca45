// One float vector of the instruction set being compiled: FASTEM_LANES lanes, unaligned loads and stores.
#pragma once

#include "fastem/math.h"

namespace fastem {
inline namespace FASTEM_ISA {

constexpr int kLanes = FASTEM_LANES;

#if defined(__x86_64__) && FASTEM_LANES == 16
using vfloat = __m512;
inline vfloat vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vfloat v) { _mm512_storeu_ps(p, v); }
inline vfloat vset(float x) { return _mm512_set1_ps(x); }
inline vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }  // vmaxps
inline vfloat vfma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__x86_64__) && FASTEM_LANES == 8
using vfloat = __m256;
inline vfloat vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, vfloat v) { _mm256_storeu_ps(p, v); }
inline vfloat vset(float x) { return _mm256_set1_ps(x); }
inline vfloat vmax(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
inline vfloat vfma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
#else  // four lanes anywhere: GCC and Clang vector extensions
typedef float vfloat __attribute__((vector_size(4 * FASTEM_LANES)));
inline vfloat vload(const float* p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void vstore(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
inline vfloat vset(float x) { return vfloat{} + x; }
inline vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat vfma(vfloat a, vfloat b, vfloat c) {
  for (int i = 0; i < FASTEM_LANES; ++i) c[i] = fmadd(a[i], b[i], c[i]);
  return c;
}
#endif

inline float vsum(vfloat v) {  // pairwise, the same order everywhere
  float lane[kLanes];
  vstore(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace FASTEM_ISA
}  // namespace fastem
