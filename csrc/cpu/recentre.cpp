// Cubic-spline shifts of small maps, in double: a few thousand values, and the recursions are serial.
#include <cmath>
#include <cstdint>

#include "fastem/psf.h"

namespace fastem {

void dft_table(int64_t size, float* cosine, float* sine) {
  const double turn = 2 * 3.14159265358979323846;
  for (int64_t i = 0; i < size; ++i) {
    cosine[i] = static_cast<float>(std::cos(turn * i / size));
    sine[i] = static_cast<float>(std::sin(turn * i / size));
  }
}

namespace {

int64_t mirror(int64_t i, int64_t size) {  // about the first and the last sample
  if (size == 1) return 0;
  const int64_t period = 2 * size - 2;
  i %= period;
  if (i < 0) i += period;
  return i < size ? i : period - i;
}

// Samples -> cubic B-spline coefficients in place, mirrored ends (Unser 1999): a causal and an anticausal recursion.
void spline_prefilter(double* s, int64_t size, int64_t stride) {
  if (size == 1) return;
  const double pole = std::sqrt(3.0) - 2;
  const int64_t period = 2 * size - 2;
  double sum = 0, power = 1;  // the mirrored signal is periodic: its geometric series is exact
  for (int64_t i = 0; i < period; ++i, power *= pole) sum += power * s[mirror(i, size) * stride];
  const double last = s[(size - 1) * stride];
  double previous = sum / (1 - power);
  s[0] = previous;
  for (int64_t i = 1; i < size; ++i) previous = s[i * stride] = s[i * stride] + pole * previous;
  // 6 pole / (pole^2 - 1) (2 c+[n - 1] - s[n - 1]), by symmetry about the last sample
  previous = pole / (pole * pole - 1) * (2 * previous - last);
  s[(size - 1) * stride] = 6 * previous;
  for (int64_t i = size - 2; i >= 0; --i) {
    previous = pole * (previous - s[i * stride]);
    s[i * stride] = 6 * previous;
  }
}

// One line through the same taps: out[i] = spline(i - shift), 0 where that lies outside the samples.
void spline_shift(const double* coefficients, double* out, double shift, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    const double position = i - shift;
    double value = 0;
    if (position >= 0 && position <= size - 1) {
      const double base = std::floor(position), f = position - base, r = 1 - f;
      const double taps[4] = {r * r * r, 4 - 6 * f * f + 3 * f * f * f, 1 + 3 * f + 3 * f * f - 3 * f * f * f,
                              f * f * f};
      for (int64_t j = 0; j < 4; ++j)
        value += taps[j] / 6 * coefficients[mirror(static_cast<int64_t>(base) + j - 1, size) * stride];
    }
    out[i * stride] = value;
  }
}

}  // namespace

int64_t recentre_scratch(int64_t h, int64_t w) { return 2 * h * w; }

void recentre_cpu(const float* k, float* out, double* scratch, const PsfParams& p, int64_t begin, int64_t end) {
  const int64_t h = p.h, w = p.w, n = h * w;
  double *coefficients = scratch, *moved = scratch + n;
  for (int64_t image = begin; image < end; ++image) {
    const float* source = k + image * n;
    double mass = 0, rows = 0, cols = 0;
    for (int64_t y = 0; y < h; ++y) {
      double sum = 0;
      for (int64_t x = 0; x < w; ++x) {
        const double value = coefficients[y * w + x] = source[y * w + x];
        sum += value;
        cols += value * x;
      }
      mass += sum;
      rows += sum * y;
    }
    const double shift_y = h / 2 + 0.5 * (1 - h % 2) - rows / mass, shift_x = w / 2 + 0.5 * (1 - w % 2) - cols / mass;
    bool good = std::isfinite(shift_y) && std::isfinite(shift_x);
    if (good) {
      for (int64_t y = 0; y < h; ++y) spline_prefilter(coefficients + y * w, w, 1);
      for (int64_t y = 0; y < h; ++y) spline_shift(coefficients + y * w, moved + y * w, shift_x, w, 1);
      for (int64_t x = 0; x < w; ++x) spline_prefilter(moved + x, h, w);
      for (int64_t x = 0; x < w; ++x) spline_shift(moved + x, coefficients + x, shift_y, h, w);
      for (int64_t i = 0; i < n; ++i) good = good && std::isfinite(static_cast<float>(coefficients[i]));
    }
    for (int64_t i = 0; i < n; ++i) out[image * n + i] = good ? static_cast<float>(coefficients[i]) : 0.0f;
  }
}

}  // namespace fastem
