// Counter-based noise. Spec: philox4x32 and philox_normal in fastem/ops/reference.py
// (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
#pragma once

#include "fastem/math.h"

namespace fastem {

struct NoiseParams {
  int64_t n_image, n_particle, n_element;  // elements per particle
  uint32_t step, stream;
  // Where not null: read when the kernel runs, where the kernel runs, instead of `step` and `stream`.
  const int64_t *step_at = nullptr, *stream_at = nullptr;
  FASTEM_HD uint32_t step_word() const { return step_at ? static_cast<uint32_t>(*step_at) : step; }
  FASTEM_HD uint32_t stream_word() const { return stream_at ? static_cast<uint32_t>(*stream_at) : stream; }
  int64_t blocks() const { return (n_element + 3) / 4; }  // counters per particle, 4 elements each
};

inline namespace FASTEM_ISA {

constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;  // added to the key after each round

FASTEM_HD void philox_round(uint32_t k0, uint32_t k1, uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3) {
  const uint64_t p0 = static_cast<uint64_t>(*c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(*c2) * 0xCD9E8D57u;
  *c0 = static_cast<uint32_t>(p1 >> 32) ^ *c1 ^ k0;
  *c1 = static_cast<uint32_t>(p1);
  *c2 = static_cast<uint32_t>(p0 >> 32) ^ *c3 ^ k1;
  *c3 = static_cast<uint32_t>(p0);
}

// Philox4x32-10: 4 counter words in, 4 random words out, in place.
FASTEM_HD void philox4x32(uint32_t k0, uint32_t k1, uint32_t c[4]) {
  for (int round = 0; round < 10; ++round) {
    philox_round(k0, k1, c, c + 1, c + 2, c + 3);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}

// Two random words -> two standard normals (Box-Muller on 23-bit uniforms in (0, 1)).
FASTEM_HD void box_muller(uint32_t w0, uint32_t w1, float* n0, float* n1) {
  const float u0 = (static_cast<float>(static_cast<int32_t>(w0 >> 9)) + 0.5f) * 1.1920929e-07f;  // 2^-23
  const float u1 = (static_cast<float>(static_cast<int32_t>(w1 >> 9)) + 0.5f) * 1.1920929e-07f;
  const float radius = sqrtf(-2.0f * log_approx(u0));
  float sine, cosine;
  sincos_turns(u1, &sine, &cosine);
  *n0 = radius * cosine;
  *n1 = radius * sine;
}

// The 4 elements [4 block, 4 block + 4) of one particle.
FASTEM_HD void philox_normal4(uint64_t seed, uint32_t block, uint32_t particle, uint32_t step, uint32_t stream,
                              float out[4]) {
  uint32_t c[4] = {block, particle, step, stream};
  philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), c);
  box_muller(c[0], c[1], out, out + 1);
  box_muller(c[2], c[3], out + 2, out + 3);
}

}  // namespace FASTEM_ISA

// Standard normal noise (n_image, n_particle, n_element) from `seeds` (n_image). A range counts blocks of 4 elements
// over all particles, [begin, end) of n_image * n_particle * blocks().
void philox_normal_cpu(const int64_t* seeds, float* out, const NoiseParams& p, int64_t begin, int64_t end);
#ifdef FASTEM_CUDA
cudaError_t philox_normal_cuda(const int64_t* seeds, float* out, const NoiseParams& p, cudaStream_t stream);
#endif

}  // namespace fastem
