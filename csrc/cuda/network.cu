// GroupNorm with scale and shift, and SiLU, channels last. Spec: group_norm_silu and group_norm_silu_backward in
// fastem/ops/reference.py.
//
// Large maps take three launches, each over all SMs: sums of every channel over chunks of pixels, into a workspace; the
// numbers of each group from them; the result. Small maps, where a launch costs more than reading twice, take one: a
// block per group. Which way and how many chunks depends on the size of a map, not on how many there are, and no sum
// is an atomic: a sample is the same to the bit in any company.
#include "fastem/network.h"

#include "pack.cuh"

namespace fastem {
namespace {

constexpr int kRows = 4;              // pixels a thread loads before it uses the first
constexpr int64_t kMaxChunks = 256;   // of a map
constexpr int64_t kSmall = 1 << 14;   // values of a group that one block takes alone
constexpr int kGroupThreads = 128;    // of the blocks that combine chunks

// The two inputs as one map of channels. A pack never lies in both.
template <class T>
struct Joined {
  const T *x, *skip;
  __device__ const T* at(const GroupNormParams& p, int64_t pixel, int64_t chan) const {
    return chan < p.n_chan ? x + pixel * p.n_chan + chan : skip + pixel * p.n_skip + (chan - p.n_chan);
  }
};

// How the threads of a block share a tile: `lanes` side by side have a pack of channels each, `slots` rows of them have
// every slots-th pixel of the chunk.
struct Tile {
  int lanes, slots;
  int64_t n_chunk, pixels;  // chunks of a map, pixels of a chunk
};

// h = (x - mean) gain + offset for the channels of a pack.
template <int kSize>
struct Channels {
  float mean[kSize], gain[kSize], offset[kSize];

  __device__ Channels(const GroupNormParams& p, const NormFilm& film, const float* means, const float* rstds,
                      int64_t sample, int64_t chan) {
    const int64_t size = p.group_size();
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int64_t group = sample * p.n_group + (chan + i) / size, at = sample * film.stride + chan + i;
      const float factor = film.scale ? 1.0f + film.scale[at] : 1.0f;
      mean[i] = means[group], gain[i] = rstds[group] * (film.weight[chan + i] * factor);
      offset[i] = fmadd(film.bias[chan + i], factor, film.shift ? film.shift[at] : 0.0f);
    }
  }
  __device__ float value(int i, float x) const { return silu(fmadd(x - mean[i], gain[i], offset[i])); }
  // The gradient with respect to h, given d = x - mean.
  __device__ float pulled(int i, float d, float grad) const {
    return grad * silu_slope(fmadd(d, gain[i], offset[i]));
  }
};

// Where a thread works: chunk blockIdx.x of all chunks of all samples.
struct Place {
  int64_t sample, chunk, chan, first, last;  // first pixel of the thread, end of the chunk
  bool active;
};

template <int kSize>
__device__ Place place(const GroupNormParams& p, const Tile& tile) {
  const int lane = threadIdx.x % tile.lanes, slot = threadIdx.x / tile.lanes;
  const int64_t sample = blockIdx.x / tile.n_chunk, chunk = blockIdx.x - sample * tile.n_chunk;
  const int64_t chan = (static_cast<int64_t>(blockIdx.y) * tile.lanes + lane) * kSize;
  const int64_t begin = chunk * tile.pixels, end = begin + tile.pixels;
  return {sample, chunk, chan, begin + slot, end < p.n_pixel ? end : p.n_pixel,
          slot < tile.slots && chan < p.channels()};
}

// The two sums of every channel over a chunk, (sample, chunk, channel) pairs: mean and squared differences from it, or
// in the backward pass the sums of q and of q (x - mean) rstd, q the gradient with respect to (x - mean) rstd.
template <bool kBackward, int kSize, class T>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_chunk_kernel(Joined<T> in, const T* __restrict__ grad, const float* __restrict__ means,
                            const float* __restrict__ rstds, NormFilm film, float2* __restrict__ partial,
                            GroupNormParams p, Tile tile) {
  float* const shared = dynamic_shared();  // [2][slot][lane][pack]
  const Place at = place<kSize>(p, tile);
  const int64_t base = at.sample * p.n_pixel;
  float first[kSize] = {}, second[kSize] = {};
  if (at.active) {
    if constexpr (kBackward) {
      const Channels<kSize> channels(p, film, means, rstds, at.sample, at.chan);
      for (int64_t pixel = at.first; pixel < at.last; pixel += tile.slots) {
        float x[kSize], g[kSize];
        load_pack(in.at(p, base + pixel, at.chan), x);
        load_pack(grad + (base + pixel) * p.channels() + at.chan, g);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float d = x[i] - channels.mean[i], h = channels.pulled(i, d, g[i]);
          first[i] += h, second[i] = fmadd(h, d, second[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {  // what the sums have in common
        second[i] *= channels.gain[i];
        first[i] *= channels.gain[i] / rstds[at.sample * p.n_group + (at.chan + i) / p.group_size()];
      }
    } else {
      int seen = 0;  // the moments of so many pixels are in (first, second)
      for (int64_t pixel = at.first; pixel < at.last; pixel += kRows * tile.slots) {
        float x[kRows][kSize];
        int rows = 0;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const bool inside = pixel + row * tile.slots < at.last;
          // past the end a row repeats the first one, and is not counted
          load_pack(in.at(p, base + (inside ? pixel + row * tile.slots : pixel), at.chan), x[row]);
          rows += inside;
        }
        const float inverse = 1.0f / rows, share = static_cast<float>(rows) / (seen + rows), before = seen;
        seen += rows;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          float sum = 0.0f, off = 0.0f, square = 0.0f;
#pragma unroll
          for (int row = 1; row < kRows; ++row) sum += row < rows ? x[row][i] - x[0][i] : 0.0f;
          const float centre = fmadd(sum, inverse, x[0][i]);
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            const float d = row < rows ? x[row][i] - centre : 0.0f;
            off += d, square = fmadd(d, d, square);
          }
          const float delta = fmadd(off, inverse, centre - first[i]);
          first[i] = fmadd(delta, share, first[i]);  // Chan et al. 1983
          second[i] += fmadd(delta * delta, share * before, square);
        }
      }
    }
  }
  // the slots of a channel, in their order
  const int width = tile.lanes * kSize, slot = threadIdx.x / tile.lanes, column = threadIdx.x % tile.lanes * kSize;
  if (slot < tile.slots) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      shared[slot * width + column + i] = first[i];
      shared[(tile.slots + slot) * width + column + i] = second[i];
    }
  }
  __syncthreads();
  const int64_t chan = static_cast<int64_t>(blockIdx.y) * width;
  const int count = static_cast<int>(at.last - at.chunk * tile.pixels);
  for (int c = threadIdx.x; c < width && chan + c < p.channels(); c += kThreads) {
    const float* const firsts = shared + c;
    const float* const seconds = firsts + tile.slots * width;
    float a = 0.0f, b = 0.0f;
    if constexpr (kBackward) {
      for (int s = 0; s < tile.slots; ++s) a += firsts[s * width], b += seconds[s * width];
    } else {
      const float origin = firsts[0];  // slot 0 is never empty
      for (int s = 0; s < tile.slots; ++s) {
        const int pixels = s < count ? (count - s - 1) / tile.slots + 1 : 0;
        if (pixels > 0) a = fmadd(pixels, firsts[s * width] - origin, a);
      }
      const float offset = a / count;
      for (int s = 0; s < tile.slots; ++s) {
        const int pixels = s < count ? (count - s - 1) / tile.slots + 1 : 0;
        const float d = firsts[s * width] - origin - offset;
        if (pixels > 0) b += fmadd(pixels * d, d, seconds[s * width]);
      }
      a = origin + offset;
    }
    partial[static_cast<int64_t>(blockIdx.x) * p.channels() + chan + c] = make_float2(a, b);
  }
}

// The chunks of a group -> mean and rstd, or the means of q and q (x - mean) rstd. Double: few values, and the mean may
// be far larger than the spread.
template <bool kBackward>
__global__ void __launch_bounds__(kGroupThreads)
    group_norm_combine_kernel(const float2* __restrict__ partial, float* __restrict__ first, float* __restrict__ second,
                              GroupNormParams p, Tile tile) {
  double* const scratch = reinterpret_cast<double*>(dynamic_shared());
  const int size = static_cast<int>(p.group_size()), entries = static_cast<int>(tile.n_chunk) * size;
  const int64_t sample = blockIdx.x / p.n_group, group = blockIdx.x % p.n_group;
  const double total = static_cast<double>(p.n_pixel * size);
  const float2* const values = partial + sample * tile.n_chunk * p.channels() + group * size;
  const auto value = [&](int e) { return values[e / size * p.channels() + e % size]; };
  const auto pixels = [&](int e) {
    const int64_t left = p.n_pixel - e / size * tile.pixels;
    return static_cast<double>(left < tile.pixels ? left : tile.pixels);
  };
  double a = 0, b = 0;
  for (int e = threadIdx.x; e < entries; e += kGroupThreads) {
    a += kBackward ? value(e).x : value(e).x * pixels(e);
    if (kBackward) b += value(e).y;
  }
  a = block_sum(a, scratch) / total;
  if (!kBackward) {
    for (int e = threadIdx.x; e < entries; e += kGroupThreads) {
      const double d = value(e).x - a;
      b += value(e).y + d * d * pixels(e);
    }
  }
  b = block_sum(b, scratch) / total;
  if (threadIdx.x == 0) {
    first[blockIdx.x] = static_cast<float>(a);
    second[blockIdx.x] = static_cast<float>(kBackward ? b : 1 / sqrt(b + p.eps));
  }
}

template <int kSize, class T>
__global__ void __launch_bounds__(kThreads)
    group_norm_silu_kernel(Joined<T> in, const float* __restrict__ means, const float* __restrict__ rstds,
                           NormFilm film, T* __restrict__ y, GroupNormParams p, Tile tile) {
  const Place at = place<kSize>(p, tile);
  if (!at.active) return;
  const Channels<kSize> channels(p, film, means, rstds, at.sample, at.chan);
  for (int64_t i = at.first; i < at.last; i += tile.slots) {
    const int64_t pixel = at.sample * p.n_pixel + i;
    float x[kSize];
    load_pack(in.at(p, pixel, at.chan), x);
#pragma unroll
    for (int c = 0; c < kSize; ++c) x[c] = channels.value(c, x[c]);
    store_pack(y + pixel * p.channels() + at.chan, x);
  }
}

template <class T>
struct Gradients {
  T *dx, *dskip;
  __device__ T* at(const GroupNormParams& p, int64_t pixel, int64_t chan) const {
    return chan < p.n_chan ? dx + pixel * p.n_chan + chan : dskip + pixel * p.n_skip + (chan - p.n_chan);
  }
};

// dx = rstd (q - mean_q - (x - mean) rstd mean_qx), with what belongs to a channel multiplied out beforehand.
template <int kSize, class T>
__global__ void __launch_bounds__(kThreads)
    group_norm_backward_kernel(Joined<T> in, const T* __restrict__ grad, const float* __restrict__ means,
                               const float* __restrict__ rstds, NormFilm film, const float* __restrict__ mean_q,
                               const float* __restrict__ mean_qx, Gradients<T> out, GroupNormParams p, Tile tile) {
  const Place at = place<kSize>(p, tile);
  if (!at.active) return;
  const Channels<kSize> channels(p, film, means, rstds, at.sample, at.chan);
  float constant[kSize], slope[kSize];
#pragma unroll
  for (int c = 0; c < kSize; ++c) {
    const int64_t group = at.sample * p.n_group + (at.chan + c) / p.group_size();
    constant[c] = -rstds[group] * mean_q[group], slope[c] = -rstds[group] * rstds[group] * mean_qx[group];
  }
  for (int64_t i = at.first; i < at.last; i += tile.slots) {
    const int64_t pixel = at.sample * p.n_pixel + i;
    float x[kSize], g[kSize];
    load_pack(in.at(p, pixel, at.chan), x);
    load_pack(grad + pixel * p.channels() + at.chan, g);
#pragma unroll
    for (int c = 0; c < kSize; ++c) {
      const float d = x[c] - channels.mean[c];
      x[c] = fmadd(channels.gain[c], channels.pulled(c, d, g[c]), fmadd(d, slope[c], constant[c]));
    }
    store_pack(out.at(p, pixel, at.chan), x);
  }
}

// ------------------------------------------------------------------------------------------- small maps

// Calls use(pixel, chan) for the packs of a group that are this thread's.
template <int kSize, class Use>
__device__ __forceinline__ void for_each_pack(const GroupNormParams& p, int64_t chan, Use use) {
  const int packs = static_cast<int>(p.group_size()) / kSize, count = static_cast<int>(p.n_pixel) * packs;
  for (int i = threadIdx.x; i < count; i += kThreads) use(i / packs, chan + i % packs * kSize);
}

// A block per group: mean, then squared differences, then the result; the second and third reading comes from cache.
template <int kSize, class T>
__global__ void __launch_bounds__(kThreads)
    group_norm_small_kernel(Joined<T> in, NormFilm film, T* __restrict__ y, float* means, float* rstds,
                            GroupNormParams p) {
  double* const scratch = reinterpret_cast<double*>(dynamic_shared());
  const int64_t sample = blockIdx.x / p.n_group, base = sample * p.n_pixel;
  const int64_t chan = blockIdx.x % p.n_group * p.group_size();
  const double total = static_cast<double>(p.n_pixel * p.group_size());
  const float origin = widen(*in.at(p, base, chan));  // sums of differences from a value of the group lose no digits
  float x[kSize], sum = 0.0f;
  for_each_pack<kSize>(p, chan, [&](int64_t pixel, int64_t c) {
    load_pack(in.at(p, base + pixel, c), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += x[i] - origin;
  });
  const float centre = static_cast<float>(origin + block_sum(static_cast<double>(sum), scratch) / total);
  float off = 0.0f, square = 0.0f;
  for_each_pack<kSize>(p, chan, [&](int64_t pixel, int64_t c) {
    load_pack(in.at(p, base + pixel, c), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float d = x[i] - centre;
      off += d, square = fmadd(d, d, square);
    }
  });
  const double rest = block_sum(static_cast<double>(off), scratch) / total;
  const double variance = block_sum(static_cast<double>(square), scratch) / total - rest * rest;
  if (threadIdx.x == 0) {
    means[blockIdx.x] = static_cast<float>(centre + rest);
    rstds[blockIdx.x] = static_cast<float>(1 / sqrt(variance + p.eps));
  }
  __syncthreads();
  for_each_pack<kSize>(p, chan, [&](int64_t pixel, int64_t c) {
    const Channels<kSize> channels(p, film, means, rstds, sample, c);
    load_pack(in.at(p, base + pixel, c), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = channels.value(i, x[i]);
    store_pack(y + (base + pixel) * p.channels() + c, x);
  });
}

template <int kSize, class T>
__global__ void __launch_bounds__(kThreads)
    group_norm_small_backward_kernel(Joined<T> in, const T* __restrict__ grad, const float* __restrict__ means,
                                     const float* __restrict__ rstds, NormFilm film, Gradients<T> out,
                                     GroupNormParams p) {
  float* const scratch = dynamic_shared();
  const int64_t sample = blockIdx.x / p.n_group, base = sample * p.n_pixel;
  const int64_t chan = blockIdx.x % p.n_group * p.group_size();
  const float total = static_cast<float>(p.n_pixel * p.group_size()), rstd = rstds[blockIdx.x];
  float x[kSize], g[kSize], first = 0.0f, second = 0.0f;  // sums of rstd q, and of that times x - mean
  for_each_pack<kSize>(p, chan, [&](int64_t pixel, int64_t c) {
    const Channels<kSize> channels(p, film, means, rstds, sample, c);
    load_pack(in.at(p, base + pixel, c), x);
    load_pack(grad + (base + pixel) * p.channels() + c, g);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float d = x[i] - channels.mean[i], q = channels.gain[i] * channels.pulled(i, d, g[i]);
      first += q, second = fmadd(q, d, second);
    }
  });
  const float constant = -block_sum(first, scratch) / total;
  const float slope = -rstd * rstd * (block_sum(second, scratch) / total);
  for_each_pack<kSize>(p, chan, [&](int64_t pixel, int64_t c) {
    const Channels<kSize> channels(p, film, means, rstds, sample, c);
    load_pack(in.at(p, base + pixel, c), x);
    load_pack(grad + (base + pixel) * p.channels() + c, g);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float d = x[i] - channels.mean[i];
      x[i] = fmadd(channels.gain[i], channels.pulled(i, d, g[i]), fmadd(d, slope, constant));
    }
    store_pack(out.at(p, base + pixel, c), x);
  });
}

// ------------------------------------------------------------------------------------------------- host

constexpr size_t kSums = 32 * sizeof(double);

bool is_small(const GroupNormParams& p) { return p.n_pixel * p.group_size() <= kSmall; }

Tile make_tile(const GroupNormParams& p, int pack) {
  Tile tile;
  tile.lanes = static_cast<int>(std::min<int64_t>(ceil_div(p.channels(), pack), kThreads));
  tile.slots = kThreads / tile.lanes;
  const int64_t chunks = std::min(ceil_div(p.n_pixel, kRows * tile.slots), kMaxChunks);
  tile.pixels = ceil_div(p.n_pixel, chunks);
  tile.n_chunk = ceil_div(p.n_pixel, tile.pixels);
  return tile;
}

dim3 tile_grid(const GroupNormParams& p, const Tile& tile, int pack) {
  return dim3(static_cast<unsigned>(p.n_sample * tile.n_chunk),
              static_cast<unsigned>(ceil_div(p.channels(), tile.lanes * pack)));
}

size_t tile_shared(const Tile& tile, int pack) { return 2 * sizeof(float) * tile.slots * tile.lanes * pack; }

dim3 group_grid(const GroupNormParams& p) { return dim3(static_cast<unsigned>(p.n_sample * p.n_group)); }

// Whether all of these can be read in packs: aligned, and no pack crosses from x to skip or from group to group where a
// block has one group.
template <class... Pointers>
bool in_packs(const GroupNormParams& p, int pack, Pointers... pointers) {
  uintptr_t any = 0;
  for (const uintptr_t bits : {reinterpret_cast<uintptr_t>(pointers)...}) any |= bits;
  return any % 16 == 0 && p.n_chan % pack == 0 && p.n_skip % pack == 0 && (!is_small(p) || p.group_size() % pack == 0);
}

template <int kSize, class T>
cudaError_t forward(const Joined<T>& in, const NormFilm& film, T* y, float* mean, float* rstd, float* scratch,
                    const GroupNormParams& p, cudaStream_t stream) {
  if (is_small(p)) {
    return launch(group_norm_small_kernel<kSize, T>, group_grid(p), kThreads, kSums, stream, in, film, y, mean, rstd,
                  p);
  }
  const Tile tile = make_tile(p, kSize);
  float2* const partial = reinterpret_cast<float2*>(scratch);
  const dim3 grid = tile_grid(p, tile, kSize);
  cudaError_t status = launch(group_norm_chunk_kernel<false, kSize, T>, grid, kThreads, tile_shared(tile, kSize),
                              stream, in, nullptr, nullptr, nullptr, film, partial, p, tile);
  if (status == cudaSuccess) {
    status = launch(group_norm_combine_kernel<false>, group_grid(p), kGroupThreads, kSums, stream, partial, mean, rstd,
                    p, tile);
  }
  if (status != cudaSuccess) return status;
  return launch(group_norm_silu_kernel<kSize, T>, grid, kThreads, 0, stream, in, mean, rstd, film, y, p, tile);
}

template <int kSize, class T>
cudaError_t backward(const Joined<T>& in, const T* grad, const float* mean, const float* rstd, const NormFilm& film,
                     const Gradients<T>& out, float* scratch, const GroupNormParams& p, cudaStream_t stream) {
  if (is_small(p)) {
    return launch(group_norm_small_backward_kernel<kSize, T>, group_grid(p), kThreads, kSums, stream, in, grad, mean,
                  rstd, film, out, p);
  }
  const Tile tile = make_tile(p, kSize);
  float* const means = scratch;  // of q and of q n, before the partial sums
  const int64_t groups = p.n_sample * p.n_group;
  float2* const partial = reinterpret_cast<float2*>(scratch + ceil_div(2 * groups, 4) * 4);
  const dim3 grid = tile_grid(p, tile, kSize);
  cudaError_t status = launch(group_norm_chunk_kernel<true, kSize, T>, grid, kThreads, tile_shared(tile, kSize), stream,
                              in, grad, mean, rstd, film, partial, p, tile);
  if (status == cudaSuccess) {
    status = launch(group_norm_combine_kernel<true>, group_grid(p), kGroupThreads, kSums, stream, partial, means,
                    means + groups, p, tile);
  }
  if (status != cudaSuccess) return status;
  return launch(group_norm_backward_kernel<kSize, T>, grid, kThreads, 0, stream, in, grad, mean, rstd, film, means,
                means + groups, out, p, tile);
}

template <class T>
cudaError_t forward_of(const void* x, const void* skip, const NormFilm& film, void* y, float* mean, float* rstd,
                       float* scratch, const GroupNormParams& p, cudaStream_t stream) {
  const Joined<T> in{static_cast<const T*>(x), static_cast<const T*>(skip)};
  const auto run = in_packs(p, kPack<T>, x, skip, y) ? forward<kPack<T>, T> : forward<1, T>;
  return run(in, film, static_cast<T*>(y), mean, rstd, scratch, p, stream);
}

template <class T>
cudaError_t backward_of(const void* grad, const void* x, const void* skip, const float* mean, const float* rstd,
                        const NormFilm& film, void* dx, void* dskip, float* scratch, const GroupNormParams& p,
                        cudaStream_t stream) {
  const Joined<T> in{static_cast<const T*>(x), static_cast<const T*>(skip)};
  const Gradients<T> out{static_cast<T*>(dx), static_cast<T*>(dskip)};
  const auto run = in_packs(p, kPack<T>, grad, x, skip, dx, dskip) ? backward<kPack<T>, T> : backward<1, T>;
  return run(in, static_cast<const T*>(grad), mean, rstd, film, out, scratch, p, stream);
}

}  // namespace

int64_t group_norm_cuda_scratch(const GroupNormParams& p) {
  if (is_small(p)) return 0;
  int64_t chunks = 0;  // the most that any dtype takes
  for (const int pack : {1, kPack<float>, kPack<__half>}) chunks = std::max(chunks, make_tile(p, pack).n_chunk);
  return ceil_div(2 * p.n_sample * p.n_group, 4) * 4 + 2 * p.n_sample * chunks * p.channels();
}

cudaError_t group_norm_silu_cuda(const void* x, const void* skip, const NormFilm& film, void* y, float* mean,
                                 float* rstd, float* scratch, DType dtype, const GroupNormParams& p,
                                 cudaStream_t stream) {
  if (!p.channels_last) return cudaErrorInvalidValue;
  const auto run = dtype == DType::kFloat32   ? forward_of<float>
                   : dtype == DType::kFloat16 ? forward_of<__half>
                                              : forward_of<__nv_bfloat16>;
  return run(x, skip, film, y, mean, rstd, scratch, p, stream);
}

cudaError_t group_norm_silu_backward_cuda(const void* grad, const void* x, const void* skip, const float* mean,
                                          const float* rstd, const NormFilm& film, void* dx, void* dskip,
                                          float* scratch, DType dtype, const GroupNormParams& p, cudaStream_t stream) {
  if (!p.channels_last) return cudaErrorInvalidValue;
  const auto run = dtype == DType::kFloat32   ? backward_of<float>
                   : dtype == DType::kFloat16 ? backward_of<__half>
                                              : backward_of<__nv_bfloat16>;
  return run(grad, x, skip, mean, rstd, film, dx, dskip, scratch, p, stream);
}

}  // namespace fastem
