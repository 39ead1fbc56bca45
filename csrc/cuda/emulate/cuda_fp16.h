// Half precision for the emulated device: storage, and the two conversions that the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 1023u;
  if (exponent == 31) return std::copysign(mantissa ? NAN : INFINITY, sign ? -1.0f : 1.0f);
  const float value = exponent ? std::ldexp(1024.0f + mantissa, static_cast<int>(exponent) - 25)
                               : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -value : value;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000u : 0u;
  const float size = std::fabs(x);
  if (size != size) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  int exponent;
  std::frexp(size, &exponent);  // size = f 2^exponent, f in [1/2, 1)
  exponent = exponent < -13 ? -13 : exponent;
  const long steps = std::lrint(std::ldexp(size, 11 - exponent));  // to even; 2048 carries into the exponent
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps))};
}
