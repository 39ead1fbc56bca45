// Half-spectrum ops. Spec: the namesakes in fastem/ops/reference.py.
#pragma once

#include "fastem/math.h"

namespace fastem {

struct SpectralParams {
  int64_t n_image, n_particle, n_chan, n_freq;  // X (image, particle, chan, freq), Y (image, chan, freq)
  bool coloured = false;  // r2 is (freq), the same for all images, instead of (image)
};

// The sums of Eq. (24) over the particles, and over the channels unless `per_channel`:
// Sxy = sum conj(X) Y and Sxx = sum |X|^2, both (image, 1 or n_chan, freq).
// Elements [begin, end) of the flattened result. The caller owns the threads; ranges never overlap.
void spectral_sums_cpu(const cfloat* X, const cfloat* Y, cfloat* Sxy, float* Sxx, const SpectralParams& p,
                       bool per_channel, int64_t begin, int64_t end);

// V = conj(K) (Y - K X) / (r2 |K|^2 + sigma2), Eq. (17): K (image, freq), sigma2 (image), r2 (image) or (freq).
// Elements [begin, end) of the flattened V, which is like X.
void wiener_guidance_cpu(const cfloat* X, const cfloat* Y, const cfloat* K, const float* sigma2, const float* r2,
                         cfloat* V, const SpectralParams& p, int64_t begin, int64_t end);

#ifdef FASTEM_CUDA
// Everything, asynchronously on `stream`. Allocates nothing; all pointers are on the device; returns the launch status.
cudaError_t spectral_sums_cuda(const cfloat* X, const cfloat* Y, cfloat* Sxy, float* Sxx, const SpectralParams& p,
                               bool per_channel, cudaStream_t stream);
cudaError_t wiener_guidance_cuda(const cfloat* X, const cfloat* Y, const cfloat* K, const float* sigma2,
                                 const float* r2, cfloat* V, const SpectralParams& p, cudaStream_t stream);
#endif

}  // namespace fastem
