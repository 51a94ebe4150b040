// Marks functions that host compilers and nvcc both compile: CPU and GPU kernels share their
// element arithmetic.
#pragma once

#if defined(__CUDACC__)
#define FORK_ATTN_HD __host__ __device__ __forceinline__
#define FORK_ATTN_UNROLL _Pragma("unroll")
#else
#define FORK_ATTN_HD inline
#define FORK_ATTN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fork_attn::cpu {

// One rounding each, never fused: results are the same bits on every machine.

FORK_ATTN_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FORK_ATTN_HD float sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

}  // namespace fork_attn::cpu
