// Per-element maths shared by every CPU build of the kernels and by CUDA. No torch, no standard containers.
//
// Each instruction-set build includes this file with its own FASTEM_ISA, so that the linker never
// replaces a plain function by one that needs newer instructions. `fmadd` fixes which products are
// rounded: vector bodies and their scalar tails then agree to the bit. FASTEM_FMA says that the target has the
// instruction (GCC 12 does not define __FMA__ under a target pragma).
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>

#if defined(FASTEM_CUDA)
#include <cuda_runtime.h>
#endif
#if defined(__CUDACC__)
#define FASTEM_HD __host__ __device__ __forceinline__
#else
#define FASTEM_HD inline
#endif
#ifndef FASTEM_ISA
#define FASTEM_ISA host
#endif

namespace fastem {

using cfloat = std::complex<float>;  // same layout as float2 and c10::complex<float>

// Which build of the CPU kernels this machine runs: "generic", "avx2" or "avx512".
const char* cpu_kernels();

inline namespace FASTEM_ISA {

FASTEM_HD float fmadd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(FASTEM_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTEM_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTEM_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x, relative error < 2e-7 for |x| < 87; saturates outside (nan stays nan).
FASTEM_HD float exp_approx(float x) {
  const float t = x < -87.0f ? -87.0f : (x > 87.0f ? 87.0f : x);
  const float shifted = fmadd(t, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  float r = fmadd(n, -0.693359375f, t);  // log 2 in two parts
  r = fmadd(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmadd(p, r, 1.3981999507e-3f);
  p = fmadd(p, r, 8.3334519073e-3f);
  p = fmadd(p, r, 4.1665795894e-2f);
  p = fmadd(p, r, 1.6666665459e-1f);
  p = fmadd(p, r, 5.0000001201e-1f);
  p = fmadd(p, r * r, r) + 1.0f;
  const uint32_t exponent = (float_to_bits(shifted) + 127u) << 23;  // the low bits of `shifted` hold n
  return p * bits_to_float(exponent);
}

// log(u) for normal u > 0, relative error < 3e-7 for u < 1 (exact behaviour at inf and nan is not needed).
FASTEM_HD float log_approx(float u) {
  const uint32_t bits = float_to_bits(u);
  // mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2)
  const uint32_t shifted = bits - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = bits_to_float((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = fmadd(p, f, -1.1514610310e-1f);
  p = fmadd(p, f, 1.1676998740e-1f);
  p = fmadd(p, f, -1.2420140846e-1f);
  p = fmadd(p, f, 1.4249322787e-1f);
  p = fmadd(p, f, -1.6668057665e-1f);
  p = fmadd(p, f, 2.0000714765e-1f);
  p = fmadd(p, f, -2.4999993993e-1f);
  p = fmadd(p, f, 3.3333331174e-1f);
  p = p * f * z;
  p = fmadd(e, -2.12194440e-4f, p);
  p = fmadd(z, -0.5f, p);
  return fmadd(e, 0.693359375f, f + p);
}

// sin and cos of 2 pi u for u in [0, 1), absolute error < 2e-7.
FASTEM_HD void sincos_turns(float u, float* sine, float* cosine) {
  const float quarter = static_cast<float>(static_cast<int32_t>(fmadd(u, 4.0f, 0.5f)));  // nearest, in 0..4
  const uint32_t quadrant = static_cast<uint32_t>(static_cast<int32_t>(quarter));
  const float angle = fmadd(quarter, -0.25f, u) * 6.28318530718f;  // in [-pi / 4, pi / 4]
  const float z = angle * angle;
  float s = fmadd(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = fmadd(s, z, -1.6666654611e-1f);
  s = fmadd(s * z, angle, angle);
  float c = fmadd(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = fmadd(c, z, 4.166664568298827e-2f);
  c = fmadd(c * z, z, fmadd(z, -0.5f, 1.0f));
  const bool swap = quadrant & 1u;
  const uint32_t sine_sign = (quadrant & 2u) << 30, cosine_sign = ((quadrant + 1u) & 2u) << 30;
  *sine = bits_to_float(float_to_bits(swap ? c : s) ^ sine_sign);
  *cosine = bits_to_float(float_to_bits(swap ? s : c) ^ cosine_sign);
}

FASTEM_HD float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }

// One frequency of the guidance: V = conj(K) (Y - K X) / (r2 |K|^2 + sigma2), Eq. (17).
FASTEM_HD void wiener_element(float x_re, float x_im, float y_re, float y_im, float k_re, float k_im, float sigma2,
                              float r2, float* v_re, float* v_im) {
  const float e_re = fmadd(k_im, x_im, fmadd(-k_re, x_re, y_re));  // E = Y - K X
  const float e_im = fmadd(-k_im, x_re, fmadd(-k_re, x_im, y_im));
  const float gain = 1.0f / fmadd(r2, fmadd(k_re, k_re, k_im * k_im), sigma2);
  *v_re = gain * fmadd(k_re, e_re, k_im * e_im);  // V = conj(K) E gain
  *v_im = gain * fmadd(k_re, e_im, -(k_im * e_re));
}

// x0_hat of Eq. (12), clamped and mapped to [0, 1]; `s_hi + s_lo` = sqrt(1 - alpha_bar) beyond float precision:
// at large t the difference x - s eps is hundreds of times smaller than its terms.
FASTEM_HD void predict_x0_element(float x, float eps, float s_hi, float s_lo, float inv_a, float* x0, float* mask) {
  const float raw = fmadd(-s_lo, eps, fmadd(-s_hi, eps, x)) * inv_a;
  const float clamped = raw < -1.0f ? -1.0f : (raw > 1.0f ? 1.0f : raw);  // nan stays nan, as torch.clamp
  *x0 = fmadd(clamped, 0.5f, 0.5f);
  *mask = raw == clamped ? 1.0f : 0.0f;
}

// x_{t-1} of Eq. (15) without its guidance term: c0 (2 x0 - 1) + ct x_t + std noise.
FASTEM_HD float step_element(float x, float x0, float noise, float c0, float ct, float std) {
  return fmadd(std, noise, fmadd(ct, x, c0 * fmadd(2.0f, x0, -1.0f)));
}

// silu(h)
FASTEM_HD float silu(float h) { return h * sigmoid(h); }

// The derivative of silu at h.
FASTEM_HD float silu_slope(float h) {
  const float s = sigmoid(h);
  return s * fmadd(h, 1.0f - s, 1.0f);
}

}  // namespace FASTEM_ISA
}  // namespace fastem
