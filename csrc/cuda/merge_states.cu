#include "cpu/kv_dispatch.h"
#include "cpu/merge_unit.h"
#include "cuda/launch.h"

namespace fork_attn::cuda {

namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ cpu::MergeParams p, int32_t units) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (i >= p.count) return;
  for (int32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
    cpu::merge_unit<N, T>(p, i, unit);
  }
}

template <int N, class T>
void run(const cpu::MergeParams& p, Stream stream) {
  const RowGrid at(p.count, p.dim / N);
  launch("merge_states", merge_kernel<N, T>, at.grid, at.block, 0, stream, p, p.dim / N);
}

}  // namespace

void merge_states(const void* out, const float* lse, cpu::DType dtype, int64_t num_states,
                  int64_t rows, int32_t num_heads, int32_t dim, void* merged_out, float* merged_lse,
                  Stream stream) {
  const cpu::MergeParams p{out, lse, merged_out, merged_lse, num_states, rows * num_heads, dim};
  if (p.count == 0 || dim == 0) return;
  cpu::for_rows(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = cpu::kPackSize<T, T>;
    const bool fits = dim % kPack == 0 && cpu::aligned<kPack>(out, {}, sizeof(T)) &&
                      cpu::aligned<kPack>(merged_out, {}, sizeof(T));
    if (fits) return run<kPack, T>(p, stream);
    run<1, T>(p, stream);
  });
}

}  // namespace fork_attn::cuda
