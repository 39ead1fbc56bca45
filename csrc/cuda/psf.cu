// Blur kernels on their support. Spec: the namesakes in fastem/ops/reference.py.
#include "fastem/psf.h"

#include "convolve.cuh"
#include "launch.cuh"
#include "recentre.cuh"

namespace fastem {
namespace {

// ------------------------------------------------------------------------------------------ pruned DFT

constexpr int kOutputs = 8;  // results of one thread that share a twiddle factor or a load

// e^{-2 pi i frequency offset / size}. The angle is reduced in integers, so large sizes lose no digits.
__device__ float2 twiddle(int64_t frequency, int64_t offset, int64_t size) {
  int64_t turn = frequency * offset % size;
  if (turn < 0) turn += size;
  if (2 * turn >= size) turn -= size;  // in [-size / 2, size / 2): small angles are exact to more places
  float sine, cosine;
  sincospif(2.0f * static_cast<float>(turn) / static_cast<float>(size), &sine, &cosine);
  return make_float2(cosine, -sine);
}

// R[p, v] = sum_q k[p, q] e^{-2 pi i v (q - w / 2) / width}: a thread has one v and kOutputs rows p.
__global__ void otf_rows_kernel(const float* __restrict__ k, float2* __restrict__ R, OtfParams p) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, n_col = p.width / 2 + 1;
  if (v >= n_col) return;
  const int64_t tiles = (p.h + kOutputs - 1) / kOutputs;
  for (int64_t tile = blockIdx.y; tile < p.n_image * tiles; tile += gridDim.y) {
    const int64_t image = tile / tiles, first = tile % tiles * kOutputs;
    float2 sum[kOutputs] = {};
    for (int64_t q = 0; q < p.w; ++q) {
      const float2 t = twiddle(v, q - p.w / 2, p.width);
      for (int j = 0; j < kOutputs; ++j) {
        const float value = first + j < p.h ? k[(image * p.h + first + j) * p.w + q] : 0.0f;
        sum[j].x = fmadd(value, t.x, sum[j].x);
        sum[j].y = fmadd(value, t.y, sum[j].y);
      }
    }
    for (int j = 0; j < kOutputs && first + j < p.h; ++j) R[(image * p.h + first + j) * n_col + v] = sum[j];
  }
}

constexpr int kChunk = 32;  // rows of R whose twiddle factors are in shared memory at a time

// K[u, v] = sum_p R[p, v] e^{-2 pi i u (p - h / 2) / height}: a block has kOutputs frequencies u, a thread one v.
__global__ void otf_columns_kernel(const float2* __restrict__ R, float2* __restrict__ K, OtfParams p) {
  float2* const factors = reinterpret_cast<float2*>(dynamic_shared());  // [kChunk][kOutputs]
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, n_col = p.width / 2 + 1;
  const int64_t tiles = (p.height + kOutputs - 1) / kOutputs;
  for (int64_t tile = blockIdx.y; tile < p.n_image * tiles; tile += gridDim.y) {
    const int64_t image = tile / tiles, first = tile % tiles * kOutputs;
    float2 sum[kOutputs] = {};
    for (int64_t start = 0; start < p.h; start += kChunk) {
      __syncthreads();
      for (int i = threadIdx.x; i < kChunk * kOutputs; i += kThreads) {
        factors[i] = twiddle(first + i % kOutputs, start + i / kOutputs - p.h / 2, p.height);
      }
      __syncthreads();
      const int rows = static_cast<int>(p.h - start < kChunk ? p.h - start : kChunk);
      for (int row = 0; row < rows && v < n_col; ++row) {
        const float2 r = R[(image * p.h + start + row) * n_col + v];
        for (int j = 0; j < kOutputs; ++j) {
          const float2 t = factors[row * kOutputs + j];
          sum[j].x = fmadd(r.x, t.x, fmadd(-r.y, t.y, sum[j].x));
          sum[j].y = fmadd(r.x, t.y, fmadd(r.y, t.x, sum[j].y));
        }
      }
    }
    if (v < n_col) {
      for (int j = 0; j < kOutputs && first + j < p.height; ++j) {
        K[(image * p.height + first + j) * n_col + v] = sum[j];
      }
    }
  }
}

// ------------------------------------------------------------------------------- convolution, projections

constexpr int kBandRows = 2;  // rows of one block: 33 x 33 kernels spread over 17 blocks

__global__ void convolve_support_kernel(const float* __restrict__ g, const float* __restrict__ k,
                                        float* __restrict__ z, PsfParams p) {
  const int h = static_cast<int>(p.h), w = static_cast<int>(p.w), first = blockIdx.x * kBandRows;
  const int last = first + kBandRows < h ? first + kBandRows : h;
  for (int64_t image = blockIdx.y; image < p.n_image; image += gridDim.y) {
    float* const out = z + image * h * w;
    convolve_rows(g + image * (2 * h - 1) * (2 * w - 1), 0, k + image * h * w, w, h, w, first, last,
                  [=](int row, int x, float value) { out[row * w + x] = value; });
  }
}

__global__ void project_kernel_kernel(const float* __restrict__ z, float* __restrict__ k, int64_t size) {
  float* const scratch = dynamic_shared();
  z += blockIdx.x * size, k += blockIdx.x * size;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += positive(z[i]);
  sum = block_sum(sum, scratch);
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) k[i] = positive(z[i]) / sum;
}

// Replaces z by the nearest point of the simplex, max(z - tau, 0). Newton's iteration on sum max(z - tau, 0) = 1 (Michelot
// 1986): tau rises over ever fewer positive entries until none drops out, which is what sorting finds. Values are taken
// relative to the largest, so that their size costs no digits. All threads of one block; scratch holds 32 floats.
__device__ void project_simplex_block(float* z, int size, float* scratch) {
  float top = -INFINITY;
  for (int i = threadIdx.x; i < size; i += blockDim.x) top = z[i] > top || z[i] != z[i] ? z[i] : top;
  top = block_max(top, scratch);
  float tau = -1.0f, active = -1.0f;
  while (true) {
    float sum = 0.0f, count = 0.0f;  // counts are exact in float: a support has far fewer than 2^24 pixels
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const float value = z[i] - top;
      if (value > tau) sum += value, count += 1.0f;
    }
    sum = block_sum(sum, scratch), count = block_sum(count, scratch);
    if (count == active) break;
    active = count, tau = (sum - 1.0f) / count;
  }
  for (int i = threadIdx.x; i < size; i += blockDim.x) z[i] = positive(z[i] - top - tau);
  __syncthreads();
}

__global__ void project_simplex_kernel(const float* __restrict__ z, float* k, int size) {
  z += static_cast<int64_t>(blockIdx.x) * size, k += static_cast<int64_t>(blockIdx.x) * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) k[i] = z[i];  // a thread meets only its own entries again
  project_simplex_block(k, size, dynamic_shared());
}

// ----------------------------------------------------------------------------------------------- FISTA

constexpr int kFistaThreads = 512;

// One block per image. The state lives in shared memory, or where that is too small in `scratch`: 3 maps per image.
__global__ void __launch_bounds__(kFistaThreads, 1)
    simplex_least_squares_kernel(const float* g, const float* __restrict__ b, const float* __restrict__ k0,
                                 float* __restrict__ out, float* scratch, int h, int w, int64_t num_iters,
                                 bool in_shared) {
  const int size = h * w, g_size = (2 * h - 1) * (2 * w - 1);
  float* const reduce = dynamic_shared();  // 32 floats
  g += static_cast<int64_t>(blockIdx.x) * g_size, b += static_cast<int64_t>(blockIdx.x) * size;
  k0 += static_cast<int64_t>(blockIdx.x) * size, out += static_cast<int64_t>(blockIdx.x) * size;
  float* k = in_shared ? reduce + 32 : scratch + static_cast<int64_t>(blockIdx.x) * 3 * size;
  float *next = k + size, *momentum = next + size;
  if (in_shared) {
    float* const staged = momentum + size;
    for (int i = threadIdx.x; i < g_size; i += blockDim.x) staged[i] = g[i];
    g = staged;
  }
  for (int i = threadIdx.x; i < size; i += blockDim.x) k[i] = momentum[i] = k0[i];
  __syncthreads();
  float norm = 0.0f;
  for (int i = threadIdx.x; i < g_size; i += blockDim.x) norm += fabsf(g[i]);
  const float step = 1.0f / block_sum(norm, reduce);  // 1 / L
  float t = 1.0f;
  for (int64_t iter = 0; iter < num_iters; ++iter) {
    convolve_rows(g, 0, momentum, w, h, w, 0, h, [=](int row, int x, float value) {
      const int i = row * w + x;
      next[i] = fmadd(-step, value - b[i], momentum[i]);
    });
    __syncthreads();
    project_simplex_block(next, size, reduce);
    const float t_next = (1.0f + sqrtf(1.0f + 4.0f * t * t)) / 2.0f, inertia = (t - 1.0f) / t_next;
    for (int i = threadIdx.x; i < size; i += blockDim.x) momentum[i] = fmadd(inertia, next[i] - k[i], next[i]);
    float* const previous = k;
    k = next, next = previous, t = t_next;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < size; i += blockDim.x) out[i] = k[i];
}

// --------------------------------------------------------------------------------------------- recentre

// One block per image; the coefficients live in shared memory, or where that is too small in `scratch`.
__global__ void recentre_kernel(const float* __restrict__ k, float* __restrict__ out, float* scratch, int h, int w,
                                bool in_shared) {
  double* const reduce = reinterpret_cast<double*>(dynamic_shared());  // 32 doubles
  const int64_t first = static_cast<int64_t>(blockIdx.x) * h * w;
  float* const c = in_shared ? dynamic_shared() + 64 : scratch + first;
  recentre_block([=](int i) { return k[first + i]; }, out + first, c, reduce, h, w);
}

}  // namespace

cudaError_t psf_to_otf_cuda(const float* k, cfloat* R, cfloat* K, const OtfParams& p, cudaStream_t stream) {
  const unsigned columns = static_cast<unsigned>(ceil_div(p.n_col(), kThreads));
  float2* const rows = reinterpret_cast<float2*>(R);
  const cudaError_t status = launch(otf_rows_kernel, dim3(columns, grid_y(p.n_image * ceil_div(p.h, kOutputs))),
                                    kThreads, 0, stream, k, rows, p);
  if (status != cudaSuccess) return status;
  return launch(otf_columns_kernel, dim3(columns, grid_y(p.n_image * ceil_div(p.height, kOutputs))), kThreads,
                kChunk * kOutputs * sizeof(float2), stream, rows, reinterpret_cast<float2*>(K), p);
}

cudaError_t convolve_support_cuda(const float* g, const float* k, float* z, const PsfParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.h, kBandRows)), grid_y(p.n_image));
  return launch(convolve_support_kernel, grid, kThreads, 0, stream, g, k, z, p);
}

cudaError_t project_kernel_cuda(const float* z, float* k, const PsfParams& p, cudaStream_t stream) {
  return launch(project_kernel_kernel, dim3(p.n_image), kThreads, 32 * sizeof(float), stream, z, k, p.h * p.w);
}

cudaError_t project_simplex_cuda(const float* z, float* k, const PsfParams& p, cudaStream_t stream) {
  return launch(project_simplex_kernel, dim3(p.n_image), kThreads, 32 * sizeof(float), stream, z, k, p.h * p.w);
}

int64_t simplex_least_squares_cuda_scratch(const PsfParams& p) { return 3 * p.n_image * p.h * p.w; }

cudaError_t simplex_least_squares_cuda(const float* g, const float* b, const float* k, float* out, float* scratch,
                                       const PsfParams& p, int64_t num_iters, cudaStream_t stream) {
  size_t limit = 0;
  const cudaError_t status = shared_limit(&limit);
  if (status != cudaSuccess) return status;
  const size_t all = sizeof(float) * (32 + 3 * p.h * p.w + (2 * p.h - 1) * (2 * p.w - 1));
  return launch(simplex_least_squares_kernel, dim3(p.n_image), kFistaThreads,
                all <= limit ? all : 32 * sizeof(float), stream, g, b, k, out, scratch, p.h, p.w, num_iters,
                all <= limit);
}

int64_t recentre_cuda_scratch(const PsfParams& p) { return p.n_image * p.h * p.w; }

cudaError_t recentre_cuda(const float* k, float* out, float* scratch, const PsfParams& p, cudaStream_t stream) {
  size_t limit = 0;
  const cudaError_t status = shared_limit(&limit);
  if (status != cudaSuccess) return status;
  const size_t sums = 32 * sizeof(double), all = sums + sizeof(float) * p.h * p.w;
  return launch(recentre_kernel, dim3(p.n_image), kThreads, all <= limit ? all : sums, stream, k, out, scratch, p.h,
                p.w, all <= limit);
}

}  // namespace fastem
