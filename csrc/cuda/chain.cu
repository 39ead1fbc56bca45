// The kernel denoiser and the M-step loop around it. Spec: denoise_chain and hqs_chain in fastem/ops/reference.py.
//
// One launch does all layers and all iterations. A team of blocks shares one image: each block owns a band of rows,
// activations pass through L2, and the team meets at a barrier after every layer. A 33 x 33 kernel alone on the device
// then runs on 17 SMs instead of one, and many kernels at once run one team each, on one block each if need be. The
// launch is cooperative, so that no team waits for a block that is not resident. Every sum has an order that depends on
// neither the size of the team nor the number of images: a kernel is the same to the bit in any company.
#include "fastem/chain.h"

#include "convolve.cuh"
#include "launch.cuh"
#include "recentre.cuh"

namespace fastem {
namespace {

constexpr int kOut = 32;          // output channels of one pass over a tile
constexpr int kOutPerThread = 4;  // thus 8 threads side by side
constexpr int kParts = 4;         // input channels are dealt to 4 parts of the block, summed at the end
constexpr int kMaxUnits = 20;     // strips of a tile at work at once: 20 strips x 8 x 4 = 640 threads
constexpr int kMaxThreads = kMaxUnits * 8 * kParts;
constexpr int kMaxTeams = 256;

struct Layer {
  const float* weight;
  const float* bias;
  int64_t packed;  // where its packed weights start
  int n_in, n_out;
};

// How a chain is laid out: a function of the chain and of the device's shared memory, not of the number of images.
struct Plan {
  int h, w, n_layer, max_chan;
  float scale;
  int tile_rows, units;          // rows of a tile; strips that the block works on at once
  int row_floats, plane_floats;  // a staged channel of a tile with its border, in shared memory
  int chunk;                     // input channels staged at a time, a multiple of 32
  Layer layers[kMaxChainLayers];
};

// Packed weights: blocks of 32 outputs as [in][tap][32], zero-filled; a single output as [in][tap].
int64_t packed_size(int64_t n_in, int64_t n_out) { return n_in * 9 * (n_out == 1 ? 1 : ceil_div(n_out, kOut) * kOut); }

__global__ void pack_weights_kernel(const __grid_constant__ Plan plan, float* packed) {
  const Layer& layer = plan.layers[blockIdx.y];
  const int width = layer.n_out == 1 ? 1 : kOut, blocks = (layer.n_out + width - 1) / width, per_in = 9 * width;
  packed += layer.packed;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < blocks * layer.n_in * per_in; i += gridDim.x * kThreads) {
    const int tap = i / width % 9, in = i / per_in % layer.n_in;
    const int out = i / (layer.n_in * per_in) * width + i % width;
    packed[i] = out < layer.n_out ? layer.weight[(out * layer.n_in + in) * 9 + tap] : 0.0f;
  }
}

// ------------------------------------------------------------------------------------------------- teams

struct Team {
  unsigned* counter;  // arrivals so far
  int size, rank;
};

// All blocks of a team have arrived, and see what the others wrote before. Work that touches no shared result may be
// done between the two halves.
__device__ unsigned arrive(const Team& team) {
  __syncthreads();
  unsigned goal = 0;
  if (team.size > 1 && threadIdx.x == 0) {
    __threadfence();
    goal = (atomicAdd(team.counter, 1u) / team.size + 1) * team.size;
  }
  return goal;
}

__device__ void wait(const Team& team, unsigned goal) {
  if (team.size > 1 && threadIdx.x == 0) {
    while (static_cast<int>(atomicAdd(team.counter, 0u) - goal) < 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

// Written by another block a moment ago: read from L2, where it is, and not through the read-only path.
__device__ float fresh(const float* p) { return __ldcg(p); }

// ------------------------------------------------------------------------------------------------ layers

// What the layers read: the activations of the layer before, or for the first layer (kernel / total, noise) * scale.
struct Source {
  const float* data;
  float total, noise, scale;
  bool first;

  __device__ float load(int channel, int64_t pixel, int64_t map) const {
    if (!first) return fresh(data + channel * map + pixel);
    return channel == 0 ? fresh(data + pixel) / total * scale : noise * scale;
  }
};

struct Shared {
  float* reduce;  // 64: 32 floats or doubles
  float* weight;
  float* act;  // a chunk of a tile, and after it the partial sums; between layers the kernel
};

__device__ void stage_weights(const Plan& plan, const Layer& layer, const float* packed, int block, int start,
                              float* shared) {
  const int per_in = 9 * (layer.n_out == 1 ? 1 : kOut), left = layer.n_in - start;
  const int count = (left < plan.chunk ? left : plan.chunk) * per_in;
  packed += layer.packed + (static_cast<int64_t>(block) * layer.n_in + start) * per_in;
  for (int i = threadIdx.x; i < count; i += blockDim.x) shared[i] = packed[i];
}

__device__ void stage_tile(const Plan& plan, const Layer& layer, const Source& source, int row, int start,
                           float* shared) {
  const int left = layer.n_in - start, channels = left < plan.chunk ? left : plan.chunk;
  const int64_t map = static_cast<int64_t>(plan.h) * plan.w;
  for (int i = threadIdx.x; i < channels * plan.plane_floats; i += blockDim.x) {
    const int channel = i / plan.plane_floats, at = i % plan.plane_floats;
    const int y = row - 1 + at / plan.row_floats, x = at % plan.row_floats - 1;
    const bool inside = y >= 0 && y < plan.h && x >= 0 && x < plan.w;
    shared[i] = inside ? source.load(start + channel, static_cast<int64_t>(y) * plan.w + x, map) : 0.0f;
  }
}

// Adds the staged channels to the outputs of a strip: every `parts`-th one, beginning with `part`.
template <int kCount>
__device__ __forceinline__ void accumulate(const Plan& plan, const float* act, const float* weight, int width,
                                           int channels, int part, int parts, float (&acc)[kCount][kStrip]) {
  for (int c = part; c < channels; c += parts) {
    const float* const plane = act + c * plan.plane_floats;
    const float* const taps = weight + c * 9 * width;
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
      float line[kStrip + 2];
#pragma unroll
      for (int i = 0; i < kStrip + 2; i += 2) {  // strips begin at even places of even rows
        const float2 pair = *reinterpret_cast<const float2*>(plane + ky * plan.row_floats + i);
        line[i] = pair.x, line[i + 1] = pair.y;
      }
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
        float value[kCount];
        if constexpr (kCount == 4) {
          const float4 all = *reinterpret_cast<const float4*>(taps + (ky * 3 + kx) * width);
          value[0] = all.x, value[1] = all.y, value[2] = all.z, value[3] = all.w;
        } else {
          value[0] = taps[(ky * 3 + kx) * width];
        }
#pragma unroll
        for (int o = 0; o < kCount; ++o) {
#pragma unroll
          for (int t = 0; t < kStrip; ++t) acc[o][t] = fmadd(value[o], line[t + kx], acc[o][t]);
        }
      }
    }
  }
}

// The rows [begin, end) of a layer's output; calls write(channel, y, x, sum + bias). The weights of the first chunk are
// staged already. kWide: 8 threads side by side have 4 outputs each; else one output, and the 8 share the inputs.
template <bool kWide, class Write>
__device__ void conv_layer(const Plan& plan, const Layer& layer, const Source& source, const float* packed,
                           const Shared& shared, int begin, int end, Write write) {
  constexpr int kCount = kWide ? kOutPerThread : 1, kWidth = kWide ? kOut : 1, kShare = kWide ? 1 : 8;
  const int side = threadIdx.x % 8, slot = threadIdx.x / 8 % plan.units, group = threadIdx.x / (8 * plan.units);
  const int part = kWide ? group : group * 8 + side, column = plan.units * 8;
  const int strips = (plan.w + kStrip - 1) / kStrip, n_chunk = (layer.n_in + plan.chunk - 1) / plan.chunk;
  bool staged = true;  // the weights of this (block, chunk) are in shared memory
  for (int block = 0; block * kWidth < layer.n_out; ++block) {
    for (int row = begin; row < end; row += plan.tile_rows) {
      const int rows = end - row < plan.tile_rows ? end - row : plan.tile_rows;
      for (int first = 0; first < rows * strips; first += plan.units) {
        const int unit = first + slot, y = unit / strips, x = unit % strips * kStrip;
        const bool active = unit < rows * strips;
        float acc[kCount][kStrip] = {};
        for (int chunk = 0; chunk < n_chunk; ++chunk) {
          const int start = chunk * plan.chunk, left = layer.n_in - start;
          if (!staged) stage_weights(plan, layer, packed, block, start, shared.weight);
          stage_tile(plan, layer, source, row, start, shared.act);
          staged = n_chunk == 1;
          __syncthreads();
          if (active) {
            accumulate<kCount>(plan, shared.act + y * plan.row_floats + x,
                               shared.weight + (kWide ? side * kOutPerThread : 0), kWidth,
                               left < plan.chunk ? left : plan.chunk, part, kParts * kShare, acc);
          }
          __syncthreads();
        }
        // sum over the parts of the block, in a fixed order
        for (int o = 0; o < kCount; ++o) {
          for (int t = 0; t < kStrip; ++t) {
            if constexpr (!kWide) {
              for (int offset = 4; offset > 0; offset /= 2) {
                acc[o][t] += __shfl_xor_sync(0xffffffffu, acc[o][t], offset);
              }
            }
            if (group > 0) {
              shared.act[((group - 1) * kCount * kStrip + o * kStrip + t) * column + slot * 8 + side] = acc[o][t];
            }
          }
        }
        __syncthreads();
        if (group == 0 && active && (kWide || side == 0)) {
          for (int o = 0; o < kCount; ++o) {
            const int channel = block * kWidth + side * kCount + o;
            if (channel >= layer.n_out) break;
            const float bias = layer.bias ? layer.bias[channel] : 0.0f;
            for (int t = 0; t < kStrip && x + t < plan.w; ++t) {
              float sum = acc[o][t];
              for (int g = 0; g < kParts - 1; ++g) {
                sum += shared.act[(g * kCount * kStrip + o * kStrip + t) * column + slot * 8 + side];
              }
              write(channel, row + y, x + t, sum + bias);
            }
          }
        }
        __syncthreads();
      }
    }
    staged = false;
  }
}

// All layers, from the map behind `source` to `out` / scale, clamped at 0 where `project`. Enters with the weights of the
// first layer staged, and leaves with them staged again, after a barrier that makes `out` visible to the team.
__device__ void run_chain(const Plan& plan, const Team& team, Source source, const float* packed, float* activations,
                          const Shared& shared, int begin, int end, bool project, float* out) {
  const int64_t map = static_cast<int64_t>(plan.h) * plan.w;
  for (int l = 0; l < plan.n_layer; ++l) {
    const Layer& layer = plan.layers[l];
    const bool last = l + 1 == plan.n_layer;
    float* const target = last ? out : activations + (l % 2) * plan.max_chan * map;
    const float scale = plan.scale;
    const int w = plan.w;
    const auto write = [=](int channel, int y, int x, float value) {
      value = last ? value / scale : (value > 0.0f || value != value ? value : 0.0f);  // ReLU keeps nan
      target[channel * map + static_cast<int64_t>(y) * w + x] = last && project ? positive(value) : value;
    };
    if (layer.n_out == 1) {
      conv_layer<false>(plan, layer, source, packed, shared, begin, end, write);
    } else {
      conv_layer<true>(plan, layer, source, packed, shared, begin, end, write);
    }
    const unsigned goal = arrive(team);
    stage_weights(plan, plan.layers[last ? 0 : l + 1], packed, 0, 0, shared.weight);
    wait(team, goal);
    source = {target, 1.0f, 0.0f, 1.0f, false};
  }
}

__device__ float map_sum(const float* map, int64_t size, float* scratch) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += fresh(map + i);
  return block_sum(sum, scratch);
}

// A function of its own: it wants more registers than the loop before it leaves.
__device__ __noinline__ void recentre_result(const float* k, float total, float* out, float* coefficients,
                                             float* reduce, int h, int w) {
  recentre_block([=](int i) { return fresh(k + i) / total; }, out, coefficients, reinterpret_cast<double*>(reduce), h,
                 w);
}

struct Maps {  // of all images, on the device; g null runs the chain once on k as it is
  const float *a, *g, *k, *noise_std;
  float* out;
  int64_t n_image, num_iters;
  bool recentre;  // the result, as `recentre` does
};

struct Workspace {
  const float* packed;
  unsigned* counters;  // one per team, zero
  float* maps;         // per team: activations of two layers, z, k
};

// `num_iters` times Eq. (24) and (25). `g_floats`: shared memory for the rows of g that a band meets; 0 leaves g in L2.
// `k_in_shared`: whether the kernel fits where the activations will be.
__global__ void __launch_bounds__(kMaxThreads, 1)
    hqs_chain_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Maps io,
                     const __grid_constant__ Workspace space, int n_team, int team_size, int g_floats,
                     bool k_in_shared) {
  const int h = plan.h, w = plan.w, g_width = 2 * w - 1, tiles = (h + plan.tile_rows - 1) / plan.tile_rows;
  const int64_t map = static_cast<int64_t>(h) * w;
  const int team_index = blockIdx.x / team_size;
  const Team team{space.counters + team_index, team_size, static_cast<int>(blockIdx.x % team_size)};
  const int begin = tiles * team.rank / team_size * plan.tile_rows;
  const int stop = tiles * (team.rank + 1) / team_size * plan.tile_rows, end = stop < h ? stop : h;

  float* const reduce = dynamic_shared();  // then g, weights, activations
  float* const staged_g = reduce + 64;
  float* const weight = staged_g + g_floats;
  const Shared shared{reduce, weight, weight + plan.chunk * 9 * kOut};

  float* const activations = space.maps + team_index * (2 * plan.max_chan + 2) * map;
  float* const z_map = activations + 2 * plan.max_chan * map;
  float* const k_map = z_map + map;

  stage_weights(plan, plan.layers[0], space.packed, 0, 0, shared.weight);
  __syncthreads();
  for (int64_t image = team_index; image < io.n_image; image += n_team) {
    const float* current = io.k + image * map;
    const float noise = io.noise_std[image];
    if (!io.g) {
      run_chain(plan, team, {current, 1.0f, noise, plan.scale, true}, space.packed, activations, shared, begin, end,
                false, io.out + image * map);
      continue;
    }
    const float* const a = io.a + image * map;
    const float* g = io.g + image * (2 * h - 1) * g_width;
    if (g_floats > 0) {
      const int rows = end - begin + h - 1;
      for (int i = threadIdx.x; i < rows * g_width; i += blockDim.x) staged_g[i] = g[begin * g_width + i];
      g = staged_g;
    }
    float total = 1.0f;  // the kernel is current / total
    for (int64_t iter = 0; iter < io.num_iters; ++iter) {
      const float* kernel = current;
      if (k_in_shared) {
        for (int i = threadIdx.x; i < h * w; i += blockDim.x) shared.act[i / w * (w | 1) + i % w] = fresh(current + i);
        kernel = shared.act;
      }
      __syncthreads();
      convolve_rows(g, g_floats > 0 ? begin : 0, kernel, k_in_shared ? w | 1 : w, h, w, begin, end,
                    [=](int y, int x, float value) {
                      z_map[y * w + x] = positive(a[y * w + x] + value / total);  // Eq. (24)
                    });
      wait(team, arrive(team));
      total = map_sum(z_map, map, reduce);
      run_chain(plan, team, {z_map, total, noise, plan.scale, true}, space.packed, activations, shared, begin, end,
                true, k_map);
      total = map_sum(k_map, map, reduce);  // Eq. (25)
      current = k_map;
    }
    if (!io.recentre) {
      for (int i = begin * w + threadIdx.x; i < end * w; i += blockDim.x) {
        io.out[image * map + i] = fresh(current + i) / total;
      }
    } else if (team.rank == 0) {  // the others may begin the next image: they wait before they write what is read here
      recentre_result(current, total, io.out + image * map, k_in_shared ? shared.act : activations, reduce, h, w);
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------- host

int64_t packed_floats(const ChainParams& p) {
  int64_t size = 0;
  for (int l = 0; l < p.n_layer; ++l) size += packed_size(p.layers[l].n_in, p.layers[l].n_out);
  return ceil_div(size, 4) * 4;
}

int64_t team_floats(const ChainParams& p) {
  int64_t widest = 0;
  for (int l = 0; l < p.n_layer; ++l) widest = std::max(widest, p.layers[l].n_out);
  return (2 * widest + 2) * p.h * p.w;
}

int64_t shared_act(const Plan& plan) {  // floats: a chunk of a tile, or the partial sums of all parts but one
  return std::max<int64_t>(plan.chunk * plan.plane_floats, (kParts - 1) * kOutPerThread * kStrip * plan.units * 8);
}

int64_t shared_floats(const Plan& plan) { return 64 + plan.chunk * 9 * kOut + shared_act(plan); }

Plan make_plan(const ChainParams& p, int64_t limit) {
  Plan plan{};
  plan.h = static_cast<int>(p.h), plan.w = static_cast<int>(p.w), plan.n_layer = static_cast<int>(p.n_layer);
  plan.scale = p.scale;
  const int strips = (plan.w + kStrip - 1) / kStrip;
  plan.tile_rows = 2 * strips <= kMaxUnits ? 2 : 1;
  const int units = plan.tile_rows * strips, passes = (units + kMaxUnits - 1) / kMaxUnits;
  plan.units = (units + passes - 1) / passes;
  plan.row_floats = strips * kStrip + 2;
  plan.plane_floats = (plan.tile_rows + 2) * plan.row_floats;
  int64_t packed = 0;
  for (int l = 0; l < plan.n_layer; ++l) {
    const ChainLayer& layer = p.layers[l];
    plan.layers[l] = {layer.weight, layer.bias, packed, static_cast<int>(layer.n_in), static_cast<int>(layer.n_out)};
    plan.max_chan = std::max(plan.max_chan, plan.layers[l].n_out);
    packed += packed_size(layer.n_in, layer.n_out);
  }
  plan.chunk = 32;
  while (plan.chunk > kParts && shared_floats(plan) > limit) plan.chunk /= 2;
  return plan;
}

cudaError_t run(const Maps& io, float* scratch, const ChainParams& p, cudaStream_t stream) {
  if (p.n_image == 0) return cudaSuccess;
  int device = 0, n_sm = 0, per_sm = 0;
  size_t limit = 0;
  cudaError_t status = shared_limit(&limit);
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t limit_floats = limit / sizeof(float);
  const Plan plan = make_plan(p, limit_floats);

  // As many blocks per image as the device has room for, and no more than share the tiles evenly.
  const int64_t tiles = ceil_div(p.h, plan.tile_rows), room = std::max<int64_t>(n_sm / p.n_image, 1);
  const int64_t team_size = ceil_div(tiles, ceil_div(tiles, std::min(room, tiles)));
  const int64_t band = ceil_div(tiles, team_size) * plan.tile_rows + p.h - 1;
  int64_t g_floats = io.g ? ceil_div(std::min(band, 2 * p.h - 1) * (2 * p.w - 1), 4) * 4 : 0;
  if (shared_floats(plan) + g_floats > limit_floats) g_floats = 0;
  const size_t shared = (shared_floats(plan) + g_floats) * sizeof(float);
  const int threads = plan.units * 8 * kParts;
  status = allow_shared(hqs_chain_kernel, shared);
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, hqs_chain_kernel, threads, shared);
  }
  if (status != cudaSuccess) return status;
  const int64_t n_team = std::min({p.n_image, per_sm * n_sm / team_size, int64_t{kMaxTeams}});
  if (n_team == 0) return cudaErrorCooperativeLaunchTooLarge;

  unsigned* const counters = reinterpret_cast<unsigned*>(scratch + packed_floats(p));
  status = cudaMemsetAsync(counters, 0, kMaxTeams * sizeof(unsigned), stream);
  if (status != cudaSuccess) return status;
  status = launch(pack_weights_kernel, dim3(16, plan.n_layer), kThreads, 0, stream, plan, scratch);
  if (status != cudaSuccess) return status;
  const Workspace space{scratch, counters, scratch + packed_floats(p) + kMaxTeams};
  return launch_cooperative(hqs_chain_kernel, dim3(n_team * team_size), threads, shared, stream, plan, io, space,
                            n_team, team_size, g_floats, p.h * (p.w | 1) <= shared_act(plan));
}

}  // namespace

int64_t chain_cuda_scratch(const ChainParams& p) {
  return packed_floats(p) + kMaxTeams + std::min<int64_t>(p.n_image, kMaxTeams) * team_floats(p);
}

cudaError_t denoise_chain_cuda(const float* k, const float* noise_std, float* out, float* scratch,
                               const ChainParams& p, cudaStream_t stream) {
  return run({nullptr, nullptr, k, noise_std, out, p.n_image, 1, false}, scratch, p, stream);
}

cudaError_t hqs_chain_cuda(const float* a, const float* g, const float* k, const float* noise_std, float* out,
                           float* scratch, const ChainParams& p, int64_t num_iters, bool recentre, cudaStream_t stream) {
  return run({a, g, k, noise_std, out, p.n_image, num_iters, recentre}, scratch, p, stream);
}

}  // namespace fastem
