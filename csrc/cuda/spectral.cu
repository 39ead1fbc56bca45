// Half-spectrum ops. Spec: the namesakes in fastem/ops/reference.py.
#include "fastem/spectral.h"

#include "launch.cuh"

namespace fastem {
namespace {

__global__ void wiener_guidance_kernel(const float2* __restrict__ X, const float2* __restrict__ Y,
                                       const float2* __restrict__ K, const float* __restrict__ sigma2,
                                       const float* __restrict__ r2, float2* __restrict__ V, SpectralParams p) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (f >= p.n_freq) return;
  const int64_t n_rows = p.n_image * p.n_particle * p.n_chan;  // row = (image * n_particle + particle) * n_chan + chan
  for (int64_t row = blockIdx.y; row < n_rows; row += gridDim.y) {
    const int64_t image = row / (p.n_particle * p.n_chan), y_row = image * p.n_chan + row % p.n_chan;
    const float2 x = X[row * p.n_freq + f], y = Y[y_row * p.n_freq + f], k = K[image * p.n_freq + f];
    float2 v;
    wiener_element(x.x, x.y, y.x, y.y, k.x, k.y, sigma2[image], r2[p.coloured ? f : image], &v.x, &v.y);
    V[row * p.n_freq + f] = v;
  }
}

// One thread per frequency: the particles are summed in a fixed order, so the company in a batch changes no bit.
__global__ void spectral_sums_kernel(const float2* __restrict__ X, const float2* __restrict__ Y,
                                     float2* __restrict__ Sxy, float* __restrict__ Sxx, SpectralParams p,
                                     bool per_channel) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (f >= p.n_freq) return;
  const int64_t n_rows = per_channel ? p.n_image * p.n_chan : p.n_image;
  for (int64_t row = blockIdx.y; row < n_rows; row += gridDim.y) {
    const int64_t image = per_channel ? row / p.n_chan : row;
    const int64_t first = per_channel ? row % p.n_chan : 0, last = per_channel ? first + 1 : p.n_chan;
    float re = 0.0f, im = 0.0f, xx = 0.0f;
    for (int64_t c = first; c < last; ++c) {
      const float2 y = Y[(image * p.n_chan + c) * p.n_freq + f];
      for (int64_t i = 0; i < p.n_particle; ++i) {
        const float2 x = X[((image * p.n_particle + i) * p.n_chan + c) * p.n_freq + f];
        re = fmadd(x.x, y.x, fmadd(x.y, y.y, re));  // conj(X) Y
        im = fmadd(x.x, y.y, fmadd(-x.y, y.x, im));
        xx = fmadd(x.x, x.x, fmadd(x.y, x.y, xx));
      }
    }
    Sxy[row * p.n_freq + f] = make_float2(re, im);
    Sxx[row * p.n_freq + f] = xx;
  }
}

const float2* as_float2(const cfloat* z) { return reinterpret_cast<const float2*>(z); }
float2* as_float2(cfloat* z) { return reinterpret_cast<float2*>(z); }

}  // namespace

cudaError_t wiener_guidance_cuda(const cfloat* X, const cfloat* Y, const cfloat* K, const float* sigma2,
                                 const float* r2, cfloat* V, const SpectralParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.n_freq, kThreads), grid_y(p.n_image * p.n_particle * p.n_chan));
  return launch(wiener_guidance_kernel, grid, kThreads, 0, stream, as_float2(X), as_float2(Y), as_float2(K), sigma2,
                r2, as_float2(V), p);
}

cudaError_t spectral_sums_cuda(const cfloat* X, const cfloat* Y, cfloat* Sxy, float* Sxx, const SpectralParams& p,
                               bool per_channel, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.n_freq, kThreads), grid_y(per_channel ? p.n_image * p.n_chan : p.n_image));
  return launch(spectral_sums_kernel, grid, kThreads, 0, stream, as_float2(X), as_float2(Y), as_float2(Sxy), Sxx, p,
                per_channel);
}

}  // namespace fastem
