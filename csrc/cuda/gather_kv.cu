#include "cpu/kv_dispatch.h"
#include "cpu/kv_units.h"
#include "cuda/launch.h"

namespace fork_attn::cuda {

namespace {

template <int N, class Cache, class Row>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ cpu::GatherKvParams p, int32_t units) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= p.shape.rows) return;
  for (int32_t i = threadIdx.x; i < units; i += blockDim.x) {
    cpu::gather_unit<N, Cache, Row>(p, row, i);
  }
}

template <int N, class Cache, class Row>
bool aligned(const cpu::GatherKvParams& p) {
  return cpu::dims_fit<N>(p.shape, 0) && cpu::aligned<N>(p.k, sizeof(Row)) &&
         cpu::aligned<N>(p.v, sizeof(Row)) && cpu::aligned<N>(p.k_cache, sizeof(Cache)) &&
         cpu::aligned<N>(p.v_cache, sizeof(Cache));
}

template <int N, class Cache, class Row>
void run(const cpu::GatherKvParams& p, Stream stream) {
  const int32_t units = cpu::row_units<N>(p.shape, 0, true);
  const RowGrid at(p.shape.rows, units);
  launch("gather_kv", gather_kernel<N, Cache, Row>, at.grid, at.block, 0, stream, p, units);
}

}  // namespace

void gather_kv(const cpu::GatherKvParams& p, Stream stream) {
  if (p.shape.rows == 0) return;
  const auto gather = [&](auto cache, auto rows) {
    using Cache = decltype(cache);
    using Row = decltype(rows);
    constexpr int kPack = cpu::kPackSize<Cache, Row>;
    if (aligned<kPack, Cache, Row>(p)) return run<kPack, Cache, Row>(p, stream);
    run<1, Cache, Row>(p, stream);
  };
  if (p.rows_dtype == cpu::DType::kFloat8E4M3) return gather(cpu::Float8E4M3{}, cpu::Float8E4M3{});
  cpu::for_cache_and_rows(p.cache_dtype, p.rows_dtype, gather);
}

}  // namespace fork_attn::cuda
