// z = g (*) k on the support of the kernels, within one block: shared by the ops that need it.
#pragma once

#include "launch.cuh"

namespace fastem {

constexpr int kStrip = 4;  // neighbouring outputs of one thread, along x

// Calls write(p, x, value) for rows [p_begin, p_end) of z, where value = sum_q g[p - q] k[q]. `g` points at its row
// `g_first` (rows have 2 w - 1 values), `k` at its first row (rows are `k_stride` apart); both may be global or shared.
// 8 neighbouring lanes share a strip of outputs: each takes every 8th row of k, and slides a window of g along it.
// In shared memory an odd k_stride is free of bank conflicts, as 2 w - 1 is. All threads of the block must call.
template <class Write>
__device__ void convolve_rows(const float* g, int g_first, const float* k, int k_stride, int h, int w, int p_begin,
                              int p_end, Write write) {
  const int strips = (w + kStrip - 1) / kStrip, units = (p_end - p_begin) * strips;
  const int lane = threadIdx.x % 8, per_pass = blockDim.x / 8;
  for (int first = 0; first < units; first += per_pass) {  // the same number of turns in every thread: shuffles below
    const int unit = first + static_cast<int>(threadIdx.x) / 8;
    const int p = p_begin + unit / strips, x = unit % strips * kStrip;
    float sum[kStrip] = {};
    if (unit < units) {
      for (int q = lane; q < h; q += 8) {
        const float* window = g + static_cast<int64_t>(p - q + h - 1 - g_first) * (2 * w - 1) + x + w - 1;
        const float* row = k + static_cast<int64_t>(q) * k_stride;
        float g1 = x + 1 < w ? window[1] : 0.0f, g2 = x + 2 < w ? window[2] : 0.0f, g3 = x + 3 < w ? window[3] : 0.0f;
#pragma unroll 4
        for (int y = 0; y < w; ++y) {
          const float g0 = window[-y], weight = row[y];
          sum[0] = fmadd(g0, weight, sum[0]);
          sum[1] = fmadd(g1, weight, sum[1]);
          sum[2] = fmadd(g2, weight, sum[2]);
          sum[3] = fmadd(g3, weight, sum[3]);
          g3 = g2, g2 = g1, g1 = g0;
        }
      }
    }
    for (int t = 0; t < kStrip; ++t) {
      for (int offset = 4; offset > 0; offset /= 2) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], offset);
    }
    if (unit < units && lane < kStrip && x + lane < w) {
      write(p, x + lane, lane == 0 ? sum[0] : lane == 1 ? sum[1] : lane == 2 ? sum[2] : sum[3]);
    }
  }
}

}  // namespace fastem
