#include "cpu/kv_dispatch.h"
#include "cpu/kv_units.h"
#include "cuda/launch.h"

namespace fork_attn::cuda {

namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(const __grid_constant__ cpu::ShiftRopeParams p, int32_t units) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= p.shape.rows) return;
  for (int32_t i = threadIdx.x; i < units; i += blockDim.x) cpu::shift_unit<N, T>(p, row, i);
}

template <int N, class T>
bool aligned(const cpu::ShiftRopeParams& p) {
  return cpu::dims_fit<N>(p.shape, p.rope.rotary_dim) && cpu::rope_fits<N>(p.rope) &&
         cpu::aligned<N>(p.k_cache, sizeof(T)) && cpu::aligned<N>(p.v_cache, sizeof(T));
}

template <int N, class T>
void run(const cpu::ShiftRopeParams& p, Stream stream) {
  const bool with_v = p.v_cache.data != nullptr;
  const int32_t units = cpu::row_units<N>(p.shape, p.rope.rotary_dim, with_v);
  const RowGrid at(p.shape.rows, units);
  launch("shift_rope", shift_kernel<N, T>, at.grid, at.block, 0, stream, p, units);
}

}  // namespace

void shift_rope(const cpu::ShiftRopeParams& p, Stream stream) {
  if (p.shape.rows == 0) return;
  cpu::for_cache(p.dtype, [&](auto cache) {
    using T = decltype(cache);
    constexpr int kPack = cpu::kPackSize<T, T>;
    if (aligned<kPack, T>(p)) return run<kPack, T>(p, stream);
    run<1, T>(p, stream);
  });
}

}  // namespace fork_attn::cuda
