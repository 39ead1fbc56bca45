// Pointwise network layers. Spec: film_silu and film_silu_backward in fastem/ops/reference.py.
#include "fastem/network.h"

#include "launch.cuh"

namespace fastem {
namespace {

// silu(h) with h = x (1 + scale) + shift, or, given the gradient of that, the gradient with respect to x.
template <bool kBackward>
__global__ void film_silu_kernel(const float* __restrict__ grad, const float* __restrict__ x,
                                 const float* __restrict__ scale, const float* __restrict__ shift, int64_t stride,
                                 float* __restrict__ out, FilmParams p) {
  const int64_t size = p.n_chan * p.n_pixel, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t n = blockIdx.y; n < p.n_sample; n += gridDim.y) {
    for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < size; e += step) {
      float gain = 1.0f, offset = 0.0f;
      if (scale) {
        // samples of fewer than 2^32 elements, that is all of them in practice, take the cheap division
        const int64_t c = p.channels_last ? (size >> 32 ? e % p.n_chan : uint32_t(e) % uint32_t(p.n_chan))
                                          : (size >> 32 ? e / p.n_pixel : uint32_t(e) / uint32_t(p.n_pixel));
        gain += scale[n * stride + c];
        offset = shift[n * stride + c];
      }
      const int64_t at = n * size + e;
      out[at] = kBackward ? film_silu_backward_element(grad[at], x[at], gain, offset)
                          : film_silu_element(x[at], gain, offset);
    }
  }
}

dim3 film_grid(const FilmParams& p) {
  const int64_t blocks = ceil_div(p.n_chan * p.n_pixel, kThreads);
  return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20)), grid_y(p.n_sample));
}

}  // namespace

cudaError_t film_silu_cuda(const float* x, const float* scale, const float* shift, int64_t stride, float* out,
                           const FilmParams& p, cudaStream_t stream) {
  return launch(film_silu_kernel<false>, film_grid(p), kThreads, 0, stream, nullptr, x, scale, shift, stride, out, p);
}

cudaError_t film_silu_backward_cuda(const float* grad, const float* x, const float* scale, const float* shift,
                                    int64_t stride, float* out, const FilmParams& p, cudaStream_t stream) {
  return launch(film_silu_kernel<true>, film_grid(p), kThreads, 0, stream, grad, x, scale, shift, stride, out, p);
}

}  // namespace fastem
