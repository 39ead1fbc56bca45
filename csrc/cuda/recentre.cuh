// Moves a kernel by a cubic spline so that its centre of mass sits in the middle, within one block: shared by the ops
// that need it. Spec: recentre in fastem/ops/reference.py.
#pragma once

#include "launch.cuh"

namespace fastem {

// Samples -> cubic B-spline coefficients of one line in place, mirrored at both ends (Unser 1999): a causal and an
// anticausal recursion with the pole sqrt(3) - 2.
inline __device__ void spline_prefilter(float* line, int64_t stride, int size) {
  if (size == 1) return;
  const float pole = -0.26794919243112270647f;
  float power = 1.0f, ahead = line[0], behind = 0.0f;  // the causal start sees one period of the mirrored signal
  for (int i = 1; i < size; ++i) {
    power *= pole;
    ahead = fmadd(power, line[i * stride], ahead);                      // sum of pole^i line[i]
    if (i < size - 1) behind = pole * (behind + line[i * stride]);      // sum of pole^(size - 1 - i) line[i]
  }
  line[0] = fmadd(power, behind, ahead) / (1.0f - power * power);  // power = pole^(size - 1)
  for (int i = 1; i < size; ++i) line[i * stride] = fmadd(pole, line[(i - 1) * stride], line[i * stride]);
  float* const end = line + (size - 1) * stride;
  *end = 6.0f * pole / (pole * pole - 1.0f) * fmadd(pole, *(end - stride), *end);
  for (int i = size - 2; i >= 0; --i) {  // c[i] = pole (c[i + 1] - 6 c+[i]): the gain 6 goes in here
    line[i * stride] = pole * (line[(i + 1) * stride] - 6.0f * line[i * stride]);
  }
}

struct Taps {
  int index[4];
  float weight[4];  // all 0 outside the samples
};

// The cubic B-spline around source position `i - shift`, indices mirrored about the first and last sample.
inline __device__ Taps spline_taps(int i, double shift, int size) {
  const double position = i - shift, base = floor(position), rest = position - base;
  const bool inside = position >= 0 && position <= size - 1;
  const float f = static_cast<float>(rest), scale = inside ? 1.0f / 6.0f : 0.0f;
  Taps taps;
  taps.weight[0] = scale * (1 - f) * (1 - f) * (1 - f);
  taps.weight[1] = scale * (4 - 6 * f * f + 3 * f * f * f);
  taps.weight[2] = scale * (1 + 3 * f + 3 * f * f - 3 * f * f * f);
  taps.weight[3] = scale * f * f * f;
  for (int j = 0; j < 4; ++j) {
    int index = inside ? static_cast<int>(base) + j - 1 : 0;  // at most one past either end
    index = index < 0 ? -index : index;
    index = index >= size ? 2 * size - 2 - index : index;
    taps.index[j] = index < 0 ? 0 : (index >= size ? size - 1 : index);  // sizes 1 and 2 fold twice
  }
  return taps;
}

// The kernel load(0 .. h w) -> out; zeros where it has no mass or is not finite. `c` holds h w floats, shared or global,
// `reduce` 32 doubles. All threads of the block must call.
template <class Load>
__device__ void recentre_block(Load load, float* out, float* c, double* reduce, int h, int w) {
  const int size = h * w;
  double mass = 0, rows = 0, cols = 0;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const double value = c[i] = load(i);
    mass += value, rows += value * (i / w), cols += value * (i % w);
  }
  mass = block_sum(mass, reduce), rows = block_sum(rows, reduce), cols = block_sum(cols, reduce);
  const double down = h / 2 + 0.5 * (1 - h % 2) - rows / mass, right = w / 2 + 0.5 * (1 - w % 2) - cols / mass;
  for (int row = threadIdx.x; row < h; row += blockDim.x) spline_prefilter(c + row * w, 1, w);
  __syncthreads();
  for (int col = threadIdx.x; col < w; col += blockDim.x) spline_prefilter(c + col, w, h);
  __syncthreads();
  double bad = 0;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const Taps y = spline_taps(i / w, down, h), x = spline_taps(i % w, right, w);
    float value = 0.0f;
    for (int a = 0; a < 4; ++a) {
      float line = 0.0f;
      for (int b = 0; b < 4; ++b) line = fmadd(x.weight[b], c[y.index[a] * w + x.index[b]], line);
      value = fmadd(y.weight[a], line, value);
    }
    out[i] = value;
    if (!isfinite(value)) bad = 1;
  }
  if (!isfinite(down) || !isfinite(right)) bad = 1;
  if (block_sum(bad, reduce) > 0) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) out[i] = 0.0f;
  }
}

}  // namespace fastem
