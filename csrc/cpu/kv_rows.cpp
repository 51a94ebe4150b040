// store_kv, gather_kv and shift_rope on the cores of the machine.
#include <cstring>

#include "kv_dispatch.h"
#include "kv_units.h"

namespace fork_attn::cpu {

namespace {

constexpr int64_t kParallelElements = 1 << 16;  // below, threads cost more than they give

int64_t num_elements(const KvShape& s) {
  return s.rows * s.num_heads * (int64_t{s.head_dim} + s.head_dim_v);
}

// Calls body(row, index) for every unit of every row.
template <class Body>
void for_each_unit(const KvShape& shape, int32_t units, const Body& body) {
#pragma omp parallel for schedule(static) if (num_elements(shape) > kParallelElements)
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int32_t index = 0; index < units; ++index) body(row, index);
  }
}

// Rows that change neither type nor angle are moved as bytes.
template <class T>
void store_bytes(const StoreKvParams& p) {
#pragma omp parallel for schedule(static) if (num_elements(p.shape) > kParallelElements)
  for (int64_t row = 0; row < p.shape.rows; ++row) {
    if (p.slots[row] < 0) continue;
    for (int32_t h = 0; h < p.shape.num_heads; ++h) {
      std::memcpy(slot_row<T>(p.k_cache, p.slots[row], h, p.shape.page_size),
                  row_head<const T>(p.k, row, h), sizeof(T) * p.shape.head_dim);
      std::memcpy(slot_row<T>(p.v_cache, p.slots[row], h, p.shape.page_size),
                  row_head<const T>(p.v, row, h), sizeof(T) * p.shape.head_dim_v);
    }
  }
}

template <int N, class Cache, class Row>
void store_units(const StoreKvParams& p) {
  const int32_t units = row_units<N>(p.shape, p.rope.rotary_dim, true);
  for_each_unit(p.shape, units,
                [&](int64_t row, int32_t index) { store_unit<N, Cache, Row>(p, row, index); });
}

template <int N, class Cache, class Row>
void gather_units(const GatherKvParams& p) {
  const int32_t units = row_units<N>(p.shape, 0, true);
  for_each_unit(p.shape, units,
                [&](int64_t row, int32_t index) { gather_unit<N, Cache, Row>(p, row, index); });
}

template <int N, class T>
void shift_units(const ShiftRopeParams& p) {
  const bool with_v = p.v_cache.data != nullptr;
  const int32_t units = row_units<N>(p.shape, p.rope.rotary_dim, with_v);
  for_each_unit(p.shape, units,
                [&](int64_t row, int32_t index) { shift_unit<N, T>(p, row, index); });
}

}  // namespace

void store_kv(const StoreKvParams& p) {
  for_cache_and_rows(p.cache_dtype, p.rows_dtype, [&](auto cache, auto rows) {
    using Cache = decltype(cache);
    using Row = decltype(rows);
    if constexpr (std::is_same_v<Cache, Row>) {
      if (p.rope.rotary_dim == 0) return store_bytes<Cache>(p);
    }
    constexpr int kPack = kPackSize<Cache, Row>;
    if (dims_fit<kPack>(p.shape, p.rope.rotary_dim)) return store_units<kPack, Cache, Row>(p);
    store_units<1, Cache, Row>(p);
  });
}

void gather_kv(const GatherKvParams& p) {
  const auto gather = [&](auto cache, auto rows) {
    using Cache = decltype(cache);
    using Row = decltype(rows);
    constexpr int kPack = kPackSize<Cache, Row>;
    if (dims_fit<kPack>(p.shape, 0)) return gather_units<kPack, Cache, Row>(p);
    gather_units<1, Cache, Row>(p);
  };
  if (p.rows_dtype == DType::kFloat8E4M3) return gather(Float8E4M3{}, Float8E4M3{});
  for_cache_and_rows(p.cache_dtype, p.rows_dtype, gather);
}

void shift_rope(const ShiftRopeParams& p) {
  for_cache(p.dtype, [&](auto cache) {
    using T = decltype(cache);
    constexpr int kPack = kPackSize<T, T>;
    if (dims_fit<kPack>(p.shape, p.rope.rotary_dim)) return shift_units<kPack, T>(p);
    shift_units<1, T>(p);
  });
}

}  // namespace fork_attn::cpu
