// Device code on the CPU, for tests: a .cu file compiled as C++ with FORK_ATTN_EMULATE and this
// header included first. Threads of a block are fibres that run until a barrier, in an order that
// changes from block to block; blocks run one after another. Shared memory begins as 0xff bytes
// (NaN) and is as large as the launch asked for, so that AddressSanitizer sees an overrun.
//
// There is no inline PTX, no cp.async, no tensor core. Races between barriers are not detected, but
// the changing order makes many of them visible.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// The part of the CUDA runtime that launches use.
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace emulator {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr unsigned kWarp = 32;

struct Fibre {
  ucontext_t context;
  dim3 thread;
  unsigned index;
  bool done;
};

// `alive` threads meet; `arrived` of them are there.
struct Barrier {
  unsigned alive = 0, arrived = 0, generation = 0;

  void release_if_full() {
    if (alive == 0 || arrived < alive) return;
    arrived = 0;
    ++generation;
  }
};

inline std::vector<Fibre> fibres;
inline std::vector<char> stacks;
inline ucontext_t scheduler;
inline Fibre* current;
inline dim3 block_index, block_size, grid_size;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<uint64_t> exchanged;  // one value a thread, for shuffles
inline std::function<void()> body;
inline std::unique_ptr<char[]> shared_memory;
inline bool progress;
inline std::mt19937 order(1);

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  progress = true;
  barrier.release_if_full();
  while (barrier.generation == generation) yield();
}

inline void enter() {
  body();
  current->done = progress = true;
  for (Barrier* barrier : {&block_barrier, &warp_barriers[current->index / kWarp]}) {
    --barrier->alive;
    barrier->release_if_full();
  }
  swapcontext(&current->context, &scheduler);
}

inline void start(unsigned index) {
  Fibre& fibre = fibres[index];
  fibre.index = index;
  fibre.done = false;
  fibre.thread = dim3(index % block_size.x, index / block_size.x % block_size.y,
                      index / block_size.x / block_size.y);
  ++warp_barriers[index / kWarp].alive;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = &stacks[kStackBytes * index];
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
}

inline void run_block(std::size_t shared) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  fibres.resize(threads);
  stacks.resize(kStackBytes * threads);
  exchanged.assign(threads, 0);
  warp_barriers.assign((threads + kWarp - 1) / kWarp, Barrier{});
  block_barrier = Barrier{threads};
  shared_memory.reset(new char[shared]);
  std::memset(shared_memory.get(), 0xff, shared);
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) start(turn[i] = i);
  std::shuffle(turn.begin(), turn.end(), order);
  for (unsigned left = threads; left > 0;) {
    left = 0;
    progress = false;
    for (unsigned i : turn) {
      if (fibres[i].done) continue;
      current = &fibres[i];
      swapcontext(&scheduler, &current->context);
      left += !current->done;
    }
    if (left > 0 && !progress) {
      std::fprintf(stderr, "emulator: threads wait at barriers that others never reach\n");
      std::abort();
    }
  }
}

template <class F>
void launch(F f, dim3 grid, dim3 block, std::size_t shared) {
  if (block.x * block.y * block.z > 1024 || shared > (48 << 10) || grid.y > 65535 ||
      grid.z > 65535 || grid.x * block.x == 0) {
    std::fprintf(stderr, "emulator: a launch that no GPU takes\n");
    std::abort();
  }
  grid_size = grid;
  block_size = block;
  body = f;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(shared);
      }
    }
  }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define FORK_ATTN_DYNAMIC_SHARED(name) char* name = emulator::shared_memory.get()

inline void __syncthreads() { emulator::wait(emulator::block_barrier); }

inline void __syncwarp(unsigned = ~0u) {
  emulator::wait(emulator::warp_barriers[emulator::current->index / emulator::kWarp]);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned index = emulator::current->index;
  std::memcpy(&emulator::exchanged[index], &value, sizeof(T));
  __syncwarp();
  T result;
  std::memcpy(&result,
              &emulator::exchanged[index / emulator::kWarp * emulator::kWarp + (lane & 31)],
              sizeof(T));
  __syncwarp();
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(emulator::current->index & 31) ^ bits);
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

inline void __threadfence() {}
