// Every CPU kernel against plain loops in double, on sizes that fit no vector. Plain C++: a failed check prints and the
// exit status counts them. Outputs lie between guard zones whose pattern must survive.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fastem/chain.h"
#include "fastem/network.h"
#include "fastem/philox.h"
#include "fastem/psf.h"
#include "fastem/spectral.h"
#include "fastem/step.h"

using namespace fastem;
using complex = std::complex<double>;

namespace {

constexpr double kPi = 3.14159265358979323846;
int failures = 0;

void check(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// `count` values between two guard zones.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count), storage_(count + 2 * kZone, pattern()) {}
  T* data() { return storage_.data() + kZone; }
  T& operator[](int64_t i) { return storage_[kZone + i]; }
  int64_t size() const { return count_; }
  bool intact() const {
    for (int64_t i = 0; i < kZone; ++i)
      if (storage_[i] != pattern() || storage_[kZone + count_ + i] != pattern()) return false;
    return true;
  }

 private:
  static constexpr int64_t kZone = 64;
  static T pattern() { return T(-12345.5f); }
  int64_t count_;
  std::vector<T> storage_;
};

std::vector<float> random_floats(int64_t count, unsigned seed, float low = -1, float high = 1) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = uniform(engine);
  return values;
}

std::vector<cfloat> random_spectrum(int64_t count, unsigned seed) {
  const auto parts = random_floats(2 * count, seed);
  std::vector<cfloat> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = {parts[2 * i], parts[2 * i + 1]};
  return values;
}

// Largest difference over largest value < tolerance, and the guard zones of `actual` untouched.
template <typename T, typename U>
void compare(Guarded<T>& actual, const std::vector<U>& expected, const std::string& what, double tolerance = 2e-6) {
  double difference = 0, largest = 0;
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double d = std::abs(U(actual[i]) - expected[i]);
    difference = d > difference || std::isnan(d) ? d : difference;
    largest = std::max(largest, static_cast<double>(std::abs(expected[i])));
  }
  const double error = largest > 0 ? difference / largest : difference;
  check(error < tolerance, what + ": relative error " + std::to_string(error * 1e6) + "e-6");
  check(actual.intact(), what + ": wrote outside its output");
}

std::string named(const char* op, int64_t a, int64_t b = -1) {
  return std::string(op) + " " + std::to_string(a) + (b < 0 ? "" : " x " + std::to_string(b));
}

// Calls body(begin, end) on uneven pieces of [0, n), as threads would.
void in_pieces(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  int64_t begin = 0;
  for (int64_t piece = 1; begin < n; piece = piece * 2 + 1) {
    const int64_t end = std::min(n, begin + piece);
    body(begin, end);
    begin = end;
  }
}

void test_spectral(int64_t n_freq) {
  const SpectralParams p{2, 3, 3, n_freq};
  const auto X = random_spectrum(2 * 3 * 3 * n_freq, 1), Y = random_spectrum(2 * 3 * n_freq, 2),
             K = random_spectrum(2 * n_freq, 3);
  for (const bool per_channel : {false, true}) {
    const int64_t n_chan = per_channel ? 3 : 1, count = 2 * n_chan * n_freq;
    std::vector<complex> xy(count);
    std::vector<double> xx(count);
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t c = 0; c < 3; ++c)
          for (int64_t f = 0; f < n_freq; ++f) {
            const complex x = X[((b * 3 + i) * 3 + c) * n_freq + f], y = Y[(b * 3 + c) * n_freq + f];
            const int64_t at = (b * n_chan + (per_channel ? c : 0)) * n_freq + f;
            xy[at] += std::conj(x) * y;
            xx[at] += std::norm(x);
          }
    Guarded<cfloat> Sxy(count);
    Guarded<float> Sxx(count);
    in_pieces(count, [&](int64_t begin, int64_t end) {
      spectral_sums_cpu(X.data(), Y.data(), Sxy.data(), Sxx.data(), p, per_channel, begin, end);
    });
    compare(Sxy, xy, named("spectral_sums Sxy", n_freq));
    compare(Sxx, xx, named("spectral_sums Sxx", n_freq));
  }
  const float sigma2[2] = {0.1f, 0.3f}, white[2] = {0.5f, 0.2f};
  const auto spectrum = random_floats(n_freq, 7, 0.1f, 0.6f);
  for (const bool coloured : {false, true}) {
    SpectralParams q = p;
    q.coloured = coloured;
    const float* r2 = coloured ? spectrum.data() : white;
    std::vector<complex> V(X.size());
    for (size_t at = 0; at < V.size(); ++at) {
      const int64_t f = at % n_freq, c = at / n_freq % 3, b = at / (9 * n_freq);
      const complex x = X[at], y = Y[(b * 3 + c) * n_freq + f], k = K[b * n_freq + f];
      V[at] = std::conj(k) * (y - k * x) / (r2[coloured ? f : b] * std::norm(k) + sigma2[b]);
    }
    Guarded<cfloat> v(static_cast<int64_t>(X.size()));
    in_pieces(v.size(), [&](int64_t begin, int64_t end) {
      wiener_guidance_cpu(X.data(), Y.data(), K.data(), sigma2, r2, v.data(), q, begin, end);
    });
    compare(v, V, named(coloured ? "wiener_guidance coloured" : "wiener_guidance", n_freq));
  }
}

void test_psf_to_otf(int64_t h, int64_t w, int64_t height, int64_t width) {
  const OtfParams p{2, h, w, height, width};
  const auto k = random_floats(2 * h * w, 4, 0, 1);
  std::vector<complex> expected(2 * height * p.n_col());
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t u = 0; u < height; ++u)
      for (int64_t v = 0; v < p.n_col(); ++v)
        for (int64_t y = 0; y < h; ++y)
          for (int64_t x = 0; x < w; ++x)
            expected[(b * height + u) * p.n_col() + v] +=
                static_cast<double>(k[(b * h + y) * w + x]) *
                std::polar(
                    1.0,
                    -2 * kPi * (u * (y - h / 2.0 + h % 2 / 2.0) / height + v * (x - w / 2.0 + w % 2 / 2.0) / width));
  std::vector<float> cos_h(height), sin_h(height), cos_w(width), sin_w(width);
  dft_table(height, cos_h.data(), sin_h.data());
  dft_table(width, cos_w.data(), sin_w.data());
  Guarded<cfloat> R(2 * h * p.n_col()), K(2 * height * p.n_col());
  in_pieces(2 * h, [&](int64_t begin, int64_t end) {
    psf_to_otf_rows_cpu(k.data(), cos_w.data(), sin_w.data(), R.data(), p, begin, end);
  });
  in_pieces(2 * (height / 2 + 1), [&](int64_t begin, int64_t end) {
    psf_to_otf_columns_cpu(R.data(), cos_h.data(), sin_h.data(), K.data(), p, begin, end);
  });
  check(R.intact(), named("psf_to_otf rows wrote outside", h, w));
  compare(K, expected, named("psf_to_otf", h, w));
}

// z[p] = sum_q g[p - q] k[q] in double.
std::vector<double> naive_convolve(const float* g, const std::vector<double>& k, int64_t h, int64_t w) {
  std::vector<double> z(h * w);
  for (int64_t y = 0; y < h; ++y)
    for (int64_t x = 0; x < w; ++x)
      for (int64_t qy = 0; qy < h; ++qy)
        for (int64_t qx = 0; qx < w; ++qx)
          z[y * w + x] += g[(y - qy + h - 1) * (2 * w - 1) + x - qx + w - 1] * k[qy * w + qx];
  return z;
}

std::vector<double> naive_project(std::vector<double> z) {
  double sum = 0;
  for (double& value : z) sum += value = std::max(value, 0.0);
  for (double& value : z) value /= sum;
  return z;
}

std::vector<double> naive_simplex(const std::vector<double>& z) {
  std::vector<double> sorted = z;
  std::sort(sorted.rbegin(), sorted.rend());
  double sum = -1, tau = 0;
  for (size_t i = 0; i < sorted.size(); ++i) {
    sum += sorted[i];
    if (sorted[i] * (i + 1) > sum) tau = sum / (i + 1);
  }
  std::vector<double> k(z.size());
  for (size_t i = 0; i < z.size(); ++i) k[i] = std::max(z[i] - tau, 0.0);
  return k;
}

std::vector<double> widened(const std::vector<float>& values) { return {values.begin(), values.end()}; }

void test_psf(int64_t h, int64_t w) {
  const PsfParams p{1, h, w};
  const int64_t n = h * w, n_g = (2 * h - 1) * (2 * w - 1);
  const auto g = random_floats(n_g, 5), z = random_floats(n, 6, -0.2f, 1);
  Guarded<float> out(n), scratch(convolve_support_scratch(h, w));
  convolve_support_cpu(g.data(), z.data(), out.data(), scratch.data(), p, 0, 1);
  compare(out, naive_convolve(g.data(), widened(z), h, w), named("convolve_support", h, w));
  check(scratch.intact(), named("convolve_support left its scratch", h, w));

  project_kernel_cpu(z.data(), out.data(), p, 0, 1);
  if (*std::max_element(z.begin(), z.end()) > 0) compare(out, naive_project(widened(z)), named("project_kernel", h, w));
  project_simplex_cpu(z.data(), out.data(), p, 0, 1);
  compare(out, naive_simplex(widened(z)), named("project_simplex", h, w));

  std::vector<float> spd(n_g);  // an autocorrelation: a positive definite Toeplitz operator
  for (int64_t dy = 1 - h; dy < h; ++dy)
    for (int64_t dx = 1 - w; dx < w; ++dx) {
      double sum = 0;
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x)
          if (y + dy >= 0 && y + dy < h && x + dx >= 0 && x + dx < w)
            sum += double(z[y * w + x]) * z[(y + dy) * w + x + dx];
      spd[(dy + h - 1) * (2 * w - 1) + dx + w - 1] = static_cast<float>(sum);
    }
  const auto b = random_floats(n, 7);
  double norm = 0;
  for (const float value : spd) norm += std::fabs(value);
  std::vector<double> k(n, 1.0 / n), momentum = k;
  double t = 1;
  for (int iter = 0; iter < 5; ++iter) {
    auto gradient = naive_convolve(spd.data(), momentum, h, w);
    for (int64_t i = 0; i < n; ++i) gradient[i] = momentum[i] - (gradient[i] - b[i]) / norm;
    const auto previous = k;
    k = naive_simplex(gradient);
    const double t_next = (1 + std::sqrt(1 + 4 * t * t)) / 2;
    for (int64_t i = 0; i < n; ++i) momentum[i] = k[i] + (t - 1) / t_next * (k[i] - previous[i]);
    t = t_next;
  }
  const std::vector<float> start(n, 1.0f / n);
  Guarded<float> fista_scratch(simplex_least_squares_scratch(h, w));
  simplex_least_squares_cpu(spd.data(), b.data(), start.data(), out.data(), fista_scratch.data(), p, 5, 0, 1);
  compare(out, k, named("simplex_least_squares", h, w), 1e-5);
  check(fista_scratch.intact(), named("simplex_least_squares left its scratch", h, w));
}

// The spline shift by solving the mirrored interpolation system with Gauss-Seidel, far from the recursion it checks.
void test_recentre(int64_t h, int64_t w) {
  const PsfParams p{1, h, w};
  const int64_t n = h * w;
  const auto k = random_floats(n, 8, 0, 1);
  const auto mirror = [](int64_t i, int64_t size) {
    while (size > 1 && (i < 0 || i >= size)) i = i < 0 ? -i : 2 * size - 2 - i;
    return size == 1 ? 0 : i;
  };
  const auto shift_line = [&](std::vector<double> samples, double shift) {
    const int64_t size = static_cast<int64_t>(samples.size());
    std::vector<double> c = samples, moved(size);
    for (int sweep = 0; sweep < 200 && size > 1; ++sweep)
      for (int64_t i = 0; i < size; ++i) c[i] = (6 * samples[i] - c[mirror(i - 1, size)] - c[mirror(i + 1, size)]) / 4;
    for (int64_t i = 0; i < size; ++i) {
      const double at = i - shift;
      if (at < 0 || at > size - 1) continue;
      for (int64_t j = static_cast<int64_t>(std::floor(at)) - 2; j <= std::floor(at) + 3; ++j) {
        const double d = std::fabs(at - j);  // cubic B-spline
        const double weight = d < 1 ? 2.0 / 3 - d * d + d * d * d / 2 : d < 2 ? (2 - d) * (2 - d) * (2 - d) / 6 : 0;
        moved[i] += weight * c[mirror(j, size)];
      }
    }
    return moved;
  };
  double mass = 0, row = 0, col = 0;
  for (int64_t i = 0; i < n; ++i) mass += k[i], row += k[i] * double(i / w), col += k[i] * double(i % w);
  std::vector<double> moved(n);
  for (int64_t y = 0; y < h; ++y) {
    const auto line = shift_line(std::vector<double>(k.begin() + y * w, k.begin() + (y + 1) * w),
                                 (w - 1) / 2.0 + (w % 2 ? 0 : 1) - col / mass);
    std::copy(line.begin(), line.end(), moved.begin() + y * w);
  }
  for (int64_t x = 0; x < w; ++x) {
    std::vector<double> line(h);
    for (int64_t y = 0; y < h; ++y) line[y] = moved[y * w + x];
    line = shift_line(line, (h - 1) / 2.0 + (h % 2 ? 0 : 1) - row / mass);
    for (int64_t y = 0; y < h; ++y) moved[y * w + x] = line[y];
  }
  Guarded<float> out(n);
  Guarded<double> scratch(recentre_scratch(h, w));
  recentre_cpu(k.data(), out.data(), scratch.data(), p, 0, 1);
  compare(out, moved, named("recentre", h, w));
  check(scratch.intact(), named("recentre left its scratch", h, w));

  const std::vector<float> nothing(n, 0.0f);
  recentre_cpu(nothing.data(), out.data(), scratch.data(), p, 0, 1);
  compare(out, std::vector<double>(n), named("recentre of nothing", h, w));
}

// A chain of layers of the given widths, in double.
struct Net {
  std::vector<int64_t> widths;
  std::vector<std::vector<float>> weights, biases;
  explicit Net(std::vector<int64_t> inner) : widths(std::move(inner)) {
    widths.insert(widths.begin(), 2);
    widths.push_back(1);
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      const float bound = 1.0f / std::sqrt(static_cast<float>(widths[i]));
      weights.push_back(random_floats(widths[i + 1] * widths[i] * 9, 20 + i, -bound, bound));
      biases.push_back(i == 1 ? std::vector<float>() : random_floats(widths[i + 1], 40 + i, -0.1f, 0.1f));
    }
  }
  ChainParams params(int64_t h, int64_t w, float scale) const {
    ChainParams p{1, h, w, {}, static_cast<int64_t>(weights.size()), scale};
    for (size_t i = 0; i < weights.size(); ++i)
      p.layers[i] = {weights[i].data(), biases[i].empty() ? nullptr : biases[i].data(), widths[i], widths[i + 1]};
    return p;
  }
  std::vector<double> operator()(const std::vector<double>& k, double noise_std, int64_t h, int64_t w,
                                 double scale) const {
    std::vector<double> map(2 * h * w, noise_std * scale);
    for (int64_t i = 0; i < h * w; ++i) map[i] = k[i] * scale;
    for (size_t layer = 0; layer < weights.size(); ++layer) {
      std::vector<double> next(widths[layer + 1] * h * w);
      for (int64_t o = 0; o < widths[layer + 1]; ++o)
        for (int64_t y = 0; y < h; ++y)
          for (int64_t x = 0; x < w; ++x) {
            double sum = biases[layer].empty() ? 0 : biases[layer][o];
            for (int64_t i = 0; i < widths[layer]; ++i)
              for (int64_t ty = -1; ty < 2; ++ty)
                for (int64_t tx = -1; tx < 2; ++tx)
                  if (y + ty >= 0 && y + ty < h && x + tx >= 0 && x + tx < w)
                    sum += map[(i * h + y + ty) * w + x + tx] *
                           weights[layer][((o * widths[layer] + i) * 3 + ty + 1) * 3 + tx + 1];
            next[(o * h + y) * w + x] = layer + 1 < weights.size() ? std::max(sum, 0.0) : sum;
          }
      map = next;
    }
    for (double& value : map) value /= scale;
    return map;
  }
};

// Two threads on uneven halves.
const ParallelFor kTwoThreads = {
    [](const ParallelFor&, int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
      const int64_t middle = n / 3;
      std::thread first([=] { body(context, 0, middle); });
      body(context, middle, n);
      first.join();
    },
    nullptr};

void test_chain(int64_t h, int64_t w, const std::vector<int64_t>& inner) {
  const Net net(inner);
  const ChainParams p = net.params(h, w, 2.0f);
  const int64_t n = h * w, n_g = (2 * h - 1) * (2 * w - 1);
  Guarded<float> packed(chain_packed_size(p)), scratch(chain_scratch_size(p)), hqs_scratch(hqs_scratch_size(p));
  chain_pack_cpu(p, packed.data());
  check(packed.intact(), named("chain_pack", h, w));

  const auto k = random_floats(n, 9, 0, 1);
  Guarded<float> out(n), again(n);
  denoise_chain_cpu(k.data(), 0.3f, out.data(), packed.data(), scratch.data(), p, kSerial);
  compare(out, net(widened(k), 0.3f, h, w, 2), named("denoise_chain", h, w));
  check(scratch.intact(), named("denoise_chain left its scratch", h, w));

  const auto a = random_floats(n, 10, 0, 1), g = random_floats(n_g, 11, 0, 0.1f);
  std::vector<double> expected = widened(k);
  for (int iter = 0; iter < 3; ++iter) {
    auto z = naive_convolve(g.data(), expected, h, w);
    for (int64_t i = 0; i < n; ++i) z[i] += a[i];
    auto denoised = net(naive_project(z), 0.3f, h, w, 2);
    if (*std::max_element(denoised.begin(), denoised.end()) <= 0) return;  // no kernel left: 0 / 0
    expected = naive_project(denoised);
  }
  hqs_chain_cpu(a.data(), g.data(), k.data(), 0.3f, out.data(), packed.data(), hqs_scratch.data(), p, 3, kSerial);
  compare(out, expected, named("hqs_chain", h, w), 1e-5);
  check(hqs_scratch.intact(), named("hqs_chain left its scratch", h, w));
  hqs_chain_cpu(a.data(), g.data(), k.data(), 0.3f, again.data(), packed.data(), hqs_scratch.data(), p, 3, kTwoThreads);
  check(std::equal(out.data(), out.data() + n, again.data()), named("hqs_chain depends on the threads", h, w));
}

void test_step(int64_t n) {
  const auto x = random_floats(n, 12, -2, 2), eps = random_floats(n, 13, -2, 2), guidance = random_floats(n, 14);
  for (const double alpha_bar : {0.9, 4e-5, 1.0}) {
    std::vector<double> expected(n), expected_mask(n);
    for (int64_t i = 0; i < n; ++i) {
      const double raw = (x[i] - std::sqrt(1 - alpha_bar) * eps[i]) / std::sqrt(alpha_bar);
      expected[i] = (std::clamp(raw, -1.0, 1.0) + 1) / 2;
      expected_mask[i] = raw >= -1 && raw <= 1;
    }
    Guarded<float> x0(n), mask(n);
    in_pieces(n, [&](int64_t begin, int64_t end) {
      predict_x0_cpu(x.data(), eps.data(), x0.data(), mask.data(), PredictParams{alpha_bar}, begin, end);
    });
    compare(x0, expected, named("predict_x0", n));
    compare(mask, expected_mask, named("predict_x0 mask", n));
  }

  const NoiseParams noise{1, 1, n, 3, 4};
  const int64_t seed = -6;
  Guarded<float> normals(n), out(n), fused(n);
  in_pieces(noise.blocks(),
            [&](int64_t begin, int64_t end) { philox_normal_cpu(&seed, normals.data(), noise, begin, end); });
  std::vector<double> expected_noise(n), expected(n);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t words[4] = {static_cast<uint32_t>(i / 4), 0, 3, 4};
    philox4x32(static_cast<uint32_t>(-6), 0xffffffffu, words);
    const int64_t pair = i % 4 / 2 * 2;
    const double u0 = ((words[pair] >> 9) + 0.5) / (1 << 23), u1 = ((words[pair + 1] >> 9) + 0.5) / (1 << 23);
    expected_noise[i] = std::sqrt(-2 * std::log(u0)) * (i % 2 ? std::sin(2 * kPi * u1) : std::cos(2 * kPi * u1));
    expected[i] = 0.3 * (2 * x[i] - 1) + 0.6 * eps[i] + 0.2 * normals[i] + 0.05 * guidance[i];
  }
  compare(normals, expected_noise, named("philox_normal", n));
  const StepParams p{0.3f, 0.6f, 0.2f, 0.05f};
  in_pieces(n, [&](int64_t begin, int64_t end) {
    step_update_cpu(eps.data(), x.data(), normals.data(), guidance.data(), out.data(), p, begin, end);
  });
  compare(out, expected, named("step_update", n));
  in_pieces(noise.blocks(), [&](int64_t begin, int64_t end) {
    step_update_philox_cpu(eps.data(), x.data(), &seed, guidance.data(), fused.data(), p, noise, begin, end);
  });
  check(fused.intact() && std::equal(out.data(), out.data() + n, fused.data()), named("step_update_philox", n));
}

void test_philox_known_answers() {  // Random123, philox 4x32 10 rounds
  const struct {
    uint32_t counter[4], key[2], answer[4];
  } cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& known : cases) {
    uint32_t words[4];
    std::copy(known.counter, known.counter + 4, words);
    philox4x32(known.key[0], known.key[1], words);
    check(std::equal(words, words + 4, known.answer), "philox4x32 known answer");
  }
}

void test_group_norm(int64_t n_chan, int64_t n_skip, int64_t n_group, int64_t n_pixel, float mean_x) {
  const int64_t channels = n_chan + n_skip, size = channels / n_group, n = 2 * channels * n_pixel;
  const auto joined = random_floats(n, 15, mean_x - 2, mean_x + 2), grad = random_floats(n, 16);  // (2, channels, pixel)
  const auto weight = random_floats(channels, 17), bias = random_floats(channels, 18),
             both = random_floats(4 * channels, 19);
  const double tolerance = mean_x == 0 ? 2e-6 : 2e-5;  // x has so few digits of its difference from the mean
  for (const bool film : {false, true}) {
    std::vector<double> y(n), gradient(n), mean(2 * n_group), rstd(2 * n_group);
    for (int64_t group = 0; group < 2 * n_group; ++group) {
      const int64_t first = group * size * n_pixel, count = size * n_pixel;
      double variance = 0, q_sum = 0, qn_sum = 0;
      for (int64_t i = first; i < first + count; ++i) mean[group] += joined[i] / double(count);
      for (int64_t i = first; i < first + count; ++i)
        variance += (joined[i] - mean[group]) * (joined[i] - mean[group]) / count;
      rstd[group] = 1 / std::sqrt(variance + 1e-5);
      std::vector<double> q(count), normal(count);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = (first + i) / n_pixel % channels, row = group / n_group * 2 * channels;
        const double factor = film ? 1 + double(both[row + c]) : 1;
        normal[i] = (joined[first + i] - mean[group]) * rstd[group];
        const double gain = weight[c] * factor;
        const double h = normal[i] * gain + bias[c] * factor + (film ? both[row + channels + c] : 0);
        const double s = 1 / (1 + std::exp(-h));
        y[first + i] = h * s;
        q[i] = grad[first + i] * gain * s * (1 + h * (1 - s));
        q_sum += q[i];
        qn_sum += q[i] * normal[i];
      }
      for (int64_t i = 0; i < count; ++i)
        gradient[first + i] = rstd[group] * (q[i] - q_sum / count - normal[i] * qn_sum / count);
    }
    for (const bool last : {false, true}) {
      // (2, channels, pixel) -> this layout, channels [from, to)
      const auto lay = [&](const auto& map, int64_t from, int64_t to) {
        std::decay_t<decltype(map)> part;
        for (int64_t b = 0; b < 2; ++b)
          for (int64_t i = 0; i < (to - from) * n_pixel; ++i) {
            const int64_t c = last ? i % (to - from) : i / n_pixel, at = last ? i / (to - from) : i % n_pixel;
            part.push_back(map[(b * channels + from + c) * n_pixel + at]);
          }
        return part;
      };
      const GroupNormParams p{2, n_chan, n_skip, n_pixel, n_group, last, 1e-5f};
      const NormFilm numbers{weight.data(), bias.data(), film ? both.data() : nullptr,
                             film ? both.data() + channels : nullptr, 2 * channels};
      const auto x = lay(joined, 0, n_chan), skip = lay(joined, n_chan, channels), g = lay(grad, 0, channels);
      const int64_t parts = 2 * group_norm_parts(p), groups = 2 * n_group;
      Guarded<float> partial(group_norm_partials(p)), m(groups), r(groups), out(n), q(groups), qn(groups);
      Guarded<float> dx(2 * n_chan * n_pixel), dskip(2 * n_skip * n_pixel);
      const std::string what = named("group_norm", channels, n_pixel);
      in_pieces(parts, [&](int64_t begin, int64_t end) {
        group_norm_moments_cpu(x.data(), skip.data(), partial.data(), p, begin, end);
      });
      in_pieces(groups, [&](int64_t begin, int64_t end) {
        group_norm_finish_cpu(partial.data(), m.data(), r.data(), p, begin, end);
      });
      in_pieces(parts, [&](int64_t begin, int64_t end) {
        group_norm_silu_cpu(x.data(), skip.data(), m.data(), r.data(), numbers, out.data(), p, begin, end);
      });
      compare(r, rstd, what + " rstd", tolerance);
      compare(out, lay(y, 0, channels), what + " y", tolerance);
      in_pieces(parts, [&](int64_t begin, int64_t end) {
        group_norm_sums_cpu(g.data(), x.data(), skip.data(), m.data(), r.data(), numbers, dx.data(), dskip.data(),
                            partial.data(), p, begin, end);
      });
      in_pieces(groups, [&](int64_t begin, int64_t end) {
        group_norm_means_cpu(partial.data(), q.data(), qn.data(), p, begin, end);
      });
      in_pieces(parts, [&](int64_t begin, int64_t end) {
        group_norm_silu_backward_cpu(x.data(), skip.data(), m.data(), r.data(), q.data(), qn.data(), dx.data(),
                                     dskip.data(), p, begin, end);
      });
      compare(dx, lay(gradient, 0, n_chan), what + " dx", 3 * tolerance);
      if (n_skip > 0) compare(dskip, lay(gradient, n_chan, channels), what + " dskip", 3 * tolerance);
      check(partial.intact() && m.intact() && q.intact() && qn.intact(), what + ": wrote outside its scratch");
    }
  }
}

}  // namespace

int main() {
  for (const int64_t n : {1, 2, 7, 8, 31, 129, 300}) test_spectral(n);
  for (const int64_t h : {1, 2, 3, 5, 8})
    for (const int64_t w : {1, 2, 4, 7}) {
      test_psf_to_otf(h, w, h, w);
      test_psf_to_otf(h, w, 13, 10);
    }
  test_psf_to_otf(9, 11, 32, 150);
  for (const auto& [h, w] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 9}, {2, 2}, {3, 8}, {5, 33}, {17, 16}, {20, 19}, {9, 50}}) {
    test_psf(h, w);
    test_recentre(h, w);
    test_chain(h, w, {8, 8});
  }
  test_chain(11, 13, {});
  test_chain(11, 13, {32, 32, 32, 32});
  test_chain(12, 7, {5, 24, 3, 17});
  test_chain(6, 37, {48, 16});
  for (const int64_t n : {1, 3, 4, 5, 64, 1001}) test_step(n);
  test_philox_known_answers();
  for (const float mean : {0.0f, 20.0f}) {
    test_group_norm(1, 0, 1, 7, mean);
    test_group_norm(8, 0, 2, 35, mean);
    test_group_norm(5, 4, 3, 129, mean);    // groups that straddle the two inputs
    test_group_norm(140, 4, 4, 33, mean);   // more channels than are taken at a time
    test_group_norm(2, 2, 1, 20011, mean);  // several parts
  }
  std::printf("%s kernels: %s\n", cpu_kernels(), failures ? "FAILED" : "all good");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
