// The kernel denoiser and the M-step loop around it. Spec: denoise_chain and hqs_chain in fastem/ops/reference.py.
#pragma once

#include "fastem/math.h"

namespace fastem {

constexpr int64_t kMaxChainLayers = 32;

struct ChainLayer {
  const float* weight;  // (n_out, n_in, 3, 3), contiguous
  const float* bias;    // (n_out), or null
  int64_t n_in, n_out;
};

// 3x3 convolutions with ReLU between, on (kernel, constant noise-level plane); both planes are multiplied by `scale`,
// the result divided by it. The first layer has 2 inputs, the last 1 output.
struct ChainParams {
  int64_t n_image, h, w;
  ChainLayer layers[kMaxChainLayers];
  int64_t n_layer;
  float scale;
};

// A loop over [0, n) that the caller runs, on as many threads as it likes: `run` calls body(context, begin, end) on
// disjoint ranges that cover [0, n) and returns when all are done.
struct ParallelFor {
  void (*run)(const ParallelFor& self, int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
              void* context);
  void* state;  // the caller's
};
extern const ParallelFor kSerial;  // one range, on the calling thread

// Weights in the order the inner loops read them: chain_packed_size floats, written once and shared by all images.
int64_t chain_packed_size(const ChainParams& p);
void chain_pack_cpu(const ChainParams& p, float* packed);

// One image: z -> denoised out, both (h, w). `scratch` holds chain_scratch_size floats and belongs to this call.
// Results are the same whatever `parallel` does.
int64_t chain_scratch_size(const ChainParams& p);
void denoise_chain_cpu(const float* k, float noise_std, float* out, const float* packed, float* scratch,
                       const ChainParams& p, const ParallelFor& parallel);

// One image: z = project(a + g (*) k), Eq. (24); k = project(denoise(z)), Eq. (25); num_iters times.
int64_t hqs_scratch_size(const ChainParams& p);
void hqs_chain_cpu(const float* a, const float* g, const float* k, float noise_std, float* out, const float* packed,
                   float* scratch, const ChainParams& p, int64_t num_iters, const ParallelFor& parallel);

#ifdef FASTEM_CUDA
// All images, asynchronously on `stream`: a, k, out (image, h, w), g (image, 2 h - 1, 2 w - 1), noise_std (image). The
// pointers of `p.layers` are on the device, `p` itself on the host. Allocates nothing; `scratch` holds
// chain_cuda_scratch floats (16-byte aligned, may be 0); returns the launch status. With `recentre` the same launch moves
// the last k as recentre_cuda does.
int64_t chain_cuda_scratch(const ChainParams& p);
cudaError_t denoise_chain_cuda(const float* k, const float* noise_std, float* out, float* scratch, const ChainParams& p,
                               cudaStream_t stream);
cudaError_t hqs_chain_cuda(const float* a, const float* g, const float* k, const float* noise_std, float* out,
                           float* scratch, const ChainParams& p, int64_t num_iters, bool recentre, cudaStream_t stream);
#endif

}  // namespace fastem
