// The threads of a CUDA grid as fibers of one CPU thread. See cuda_runtime.h.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

Device device;

namespace {

constexpr size_t kStack = 64 << 10, kRedZone = 256;
constexpr unsigned char kPoison = 0xff;  // floats and doubles of these bytes are nan

struct Barrier {
  int arrived = 0;
  int64_t round = 0;
};

struct Block {
  dim3 index;
  int alive;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<unsigned char> values;  // of the shuffles: 16 bytes per thread
  std::vector<float4> shared;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  unsigned thread;
  bool done;
};

ucontext_t scheduler;
Fiber* current;
const std::function<void()>* body;
int64_t events;  // whatever shows that the grid is not stuck

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated grid: %s in block (%u, %u)\n", what, blockIdx.x, blockIdx.y);
  std::abort();
}

void yield() { swapcontext(&current->context, &scheduler); }

void enter() {
  (*body)();
  current->done = true;
  --current->block->alive;
  ++events;
  yield();
}

void meet(Barrier& barrier, int count) {
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.round;
    ++events;
    return;
  }
  for (const int64_t round = barrier.round; barrier.round == round;) yield();
}

// Runs the fibers of some blocks to their end.
void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, std::vector<Fiber>& fibers) {
  size_t left = fibers.size();
  for (int idle = 0; left > 0;) {
    const int64_t before = events;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[device.reverse ? fibers.size() - 1 - i : i];
      if (fiber.done) continue;
      current = &fiber;
      threadIdx = dim3(fiber.thread);
      blockIdx = fiber.block->index;
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
    idle = events == before ? idle + 1 : 0;
    if (idle > 2) fail("deadlock: a barrier that some threads never reach");
  }
  for (auto& block : blocks) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(block->shared.data());
    for (size_t i = block->shared.size() * sizeof(float4) - kRedZone; i < block->shared.size() * sizeof(float4); ++i) {
      if (bytes[i] != kPoison) fail("write past the end of shared memory");
    }
  }
}

}  // namespace

void block_barrier() { meet(current->block->barrier, current->block->alive); }

void exchange(const void* mine, void* theirs, size_t size, int lane_mask) {
  Block& block = *current->block;
  const unsigned thread = current->thread;
  Barrier& warp = block.warps[thread / 32];
  std::memcpy(&block.values[16 * thread], mine, size);
  meet(warp, 32);
  std::memcpy(theirs, &block.values[16 * (thread / 32 * 32 + (thread % 32 ^ lane_mask))], size);
  meet(warp, 32);
}

void let_others_run(bool progress) {
  events += progress;
  yield();
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned n_block = config.gridDim.x * config.gridDim.y, n_thread = config.blockDim.x;
  if (n_thread == 0 || n_thread > 1024 || n_thread % 32 || config.gridDim.y > 65535) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > static_cast<size_t>(device.shared_bytes)) return cudaErrorInvalidValue;
  const bool cooperative = config.numAttrs > 0 && config.attrs->val.cooperative;
  if (cooperative && n_block > static_cast<unsigned>(device.n_sm)) return cudaErrorCooperativeLaunchTooLarge;

  body = &thread;
  gridDim = config.gridDim, blockDim = config.blockDim;
  const unsigned together = cooperative ? n_block : 1;
  std::vector<Fiber> fibers(together * n_thread);
  for (Fiber& fiber : fibers) fiber.stack.reset(new char[kStack]);
  for (unsigned first = 0; first < n_block; first += together) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (unsigned b = 0; b < together; ++b) {
      auto block = std::make_unique<Block>();
      block->index = dim3((first + b) % gridDim.x, (first + b) / gridDim.x);
      block->alive = static_cast<int>(n_thread);
      block->warps.resize(n_thread / 32);
      block->values.resize(16 * n_thread);
      block->shared.resize((config.dynamicSmemBytes + 15) / 16 + kRedZone / 16);
      std::memset(static_cast<void*>(block->shared.data()), kPoison, block->shared.size() * sizeof(float4));
      for (unsigned t = 0; t < n_thread; ++t) {
        Fiber& fiber = fibers[b * n_thread + t];
        fiber.block = block.get(), fiber.thread = t, fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
      }
      blocks.push_back(std::move(block));
    }
    run_blocks(blocks, fibers);
  }
  return cudaSuccess;
}

}  // namespace emulate

namespace fastem {
float* dynamic_shared() { return reinterpret_cast<float*>(emulate::current->block->shared.data()); }
}  // namespace fastem
