// Launching kernels and checking the launch. FORK_ATTN_EMULATE: device code on the CPU, see
// tests/cpp/cuda_cpu.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "cuda/cache_kernels.h"

#ifndef FORK_ATTN_EMULATE
#include <cuda_runtime.h>
#define FORK_ATTN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

namespace fork_attn::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not left to the next caller
  fail(ErrorKind::kDevice, std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current for a while.
class DeviceScope {
 public:
  DeviceScope(int32_t device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    if (previous_ == device) return;
    check(cudaSetDevice(device), what);
    switched_ = true;
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() {
    if (switched_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool switched_ = false;
};

template <class... Params, class... Arguments>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared,
            Stream stream, const Arguments&... arguments) {
#ifdef FORK_ATTN_EMULATE
  (void)name;
  (void)stream;
  emulator::launch([&] { kernel(arguments...); }, grid, block, shared);
#else
  const DeviceScope scope(stream.device, name);
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream.handle)> > >(arguments...);
  check(cudaGetLastError(), name);
#endif
}

constexpr int kThreads = 256;

// Blocks of `units` threads a row, several rows to a block where rows are short.
struct RowGrid {
  dim3 grid, block;

  RowGrid(int64_t rows, int32_t units) {
    unsigned wide = 1;
    while (wide < kThreads && static_cast<int32_t>(wide) < units) wide *= 2;
    const unsigned rows_each = kThreads / wide;
    block = dim3(wide, rows_each);
    grid = dim3(static_cast<unsigned>((rows + rows_each - 1) / rows_each));
  }
};

}  // namespace fork_attn::cuda
