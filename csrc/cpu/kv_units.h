// What one thread does of store_kv, gather_kv and shift_rope: a unit of a row, N elements or two
// times N that rotate into each other. A CPU loops over units, a GPU gives each to a thread.
#pragma once

#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "host_device.h"
#include "kv_params.h"
#include "numeric.h"

namespace fork_attn::cpu {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

// On GPUs one access of 16 bytes or several; addresses are aligned there (units_fit), on CPUs they
// need not be.
template <int N, class T>
FORK_ATTN_HD Pack<T, N> load_pack(const T* from) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Pack<T, N>*>(from);
#else
  Pack<T, N> pack;
  std::memcpy(&pack, from, sizeof(T) * N);
  return pack;
#endif
}

template <class T, int N>
FORK_ATTN_HD void store_pack(T* to, const Pack<T, N>& pack) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
#else
  std::memcpy(to, &pack, sizeof(T) * N);
#endif
}

template <class To, class From>
inline constexpr bool kScales = std::is_same_v<To, Float8E4M3> != std::is_same_v<From, Float8E4M3>;

// `factor` counts where one side is quantised and the other is not.
template <class To, class From>
FORK_ATTN_HD void convert(const From& from, float factor, To& to) {
  if constexpr (std::is_same_v<To, From>) {
    to = from;
  } else {
    from_float(kScales<To, From> ? product(to_float(from), factor) : to_float(from), to);
  }
}

template <int N, class To, class From>
FORK_ATTN_HD void convert_pack(const From* from, float factor, To* to) {
  const Pack<From, N> in = load_pack<N>(from);
  Pack<To, N> out;
  FORK_ATTN_UNROLL
  for (int i = 0; i < N; ++i) convert(in.values[i], factor, out.values[i]);
  store_pack(to, out);
}

// (a, b) turned by the angle whose cosine and sine are given.
template <class To, class From>
FORK_ATTN_HD void rotate(const From& a, const From& b, float cos, float sin, float factor, To& to_a,
                         To& to_b) {
  const float x = to_float(a);
  const float y = to_float(b);
  float turned_x = sum(product(x, cos), -product(y, sin));
  float turned_y = sum(product(y, cos), product(x, sin));
  if constexpr (kScales<To, From>) {
    turned_x = product(turned_x, factor);
    turned_y = product(turned_y, factor);
  }
  from_float(turned_x, to_a);
  from_float(turned_y, to_b);
}

// N pairs of a head, beginning with pair `pair`. All is read before anything is written.
template <int N, class To, class From>
FORK_ATTN_HD void rotate_pack(const From* from, const float* cos, const float* sin, int32_t pair,
                              const Rope& rope, float factor, To* to) {
  const int32_t first = rope.interleaved ? 2 * pair : pair;
  const int32_t second = rope.interleaved ? first + N : first + rope.rotary_dim / 2;
  const Pack<From, N> a = load_pack<N>(from + first);
  const Pack<From, N> b = load_pack<N>(from + second);
  const Pack<float, N> c = load_pack<N>(cos + pair);
  const Pack<float, N> s = load_pack<N>(sin + pair);
  Pack<To, N> out_a, out_b;
  if (rope.interleaved) {
    // Pair i is elements 2i and 2i + 1 of a and b taken as one.
    FORK_ATTN_UNROLL
    for (int i = 0; i < N; ++i) {
      const int at = 2 * i % N;
      const int next = (2 * i + 1) % N;
      const bool low = 2 * i < N;
      const bool next_low = 2 * i + 1 < N;
      rotate(low ? a.values[at] : b.values[at], next_low ? a.values[next] : b.values[next],
             c.values[i], s.values[i], factor, low ? out_a.values[at] : out_b.values[at],
             next_low ? out_a.values[next] : out_b.values[next]);
    }
  } else {
    FORK_ATTN_UNROLL
    for (int i = 0; i < N; ++i) {
      rotate(a.values[i], b.values[i], c.values[i], s.values[i], factor, out_a.values[i],
             out_b.values[i]);
    }
  }
  store_pack(to + first, out_a);
  store_pack(to + second, out_b);
}

// Units of one head's row: pairs first, then what does not rotate.
template <int N>
FORK_ATTN_HD int32_t head_units(int32_t dim, int32_t rotary_dim) {
  return (dim - rotary_dim / 2) / N;
}

// Unit `unit` of one head's row. With `in_place`, what does not rotate is left alone.
template <int N, class To, class From>
FORK_ATTN_HD void head_unit(const From* from, const Rope& rope, int64_t table_row, int32_t unit,
                            float factor, bool in_place, To* to) {
  const int32_t half = rope.rotary_dim / 2;
  if (unit * N < half) {
    const int64_t angles = table_row * half;
    rotate_pack<N>(from, rope.cos + angles, rope.sin + angles, unit * N, rope, factor, to);
  } else if (!in_place) {
    const int32_t at = unit * N + half;
    convert_pack<N>(from + at, factor, to + at);
  }
}

template <class T>
FORK_ATTN_HD T* slot_row(const PagedTensor& t, int64_t slot, int32_t head, int32_t page_size) {
  // Caches have fewer than 2^31 slots; GPUs divide 64-bit numbers slowly.
  const uint32_t page = static_cast<uint32_t>(slot) / static_cast<uint32_t>(page_size);
  const uint32_t offset = static_cast<uint32_t>(slot) - page * static_cast<uint32_t>(page_size);
  return static_cast<T*>(t.data) + page * t.page_stride + offset * t.slot_stride +
         head * t.head_stride;
}

template <class T>
FORK_ATTN_HD T* row_head(const RowTensor& t, int64_t row, int32_t head) {
  return static_cast<T*>(t.data) + row * t.row_stride + head * t.head_stride;
}

// Where a unit of a row lies: K's heads come first, then V's.
struct UnitPlace {
  bool is_v;
  int32_t head;
  int32_t unit;
};

template <int N>
FORK_ATTN_HD int32_t row_units(const KvShape& shape, int32_t rotary_dim, bool with_v) {
  return shape.num_heads * (head_units<N>(shape.head_dim, rotary_dim) +
                            (with_v ? head_units<N>(shape.head_dim_v, 0) : 0));
}

template <int N>
FORK_ATTN_HD UnitPlace place_of(const KvShape& shape, int32_t rotary_dim, int32_t index) {
  const int32_t k_units = head_units<N>(shape.head_dim, rotary_dim);
  const bool is_v = index >= shape.num_heads * k_units;
  const int32_t units = is_v ? head_units<N>(shape.head_dim_v, 0) : k_units;
  const int32_t rest = is_v ? index - shape.num_heads * k_units : index;
  const int32_t head = rest / units;
  return {is_v, head, rest - head * units};
}

template <int N, class Cache, class Row>
FORK_ATTN_HD void store_unit(const StoreKvParams& p, int64_t row, int32_t index) {
  const int64_t slot = p.slots[row];
  if (slot < 0) return;
  const UnitPlace at = place_of<N>(p.shape, p.rope.rotary_dim, index);
  const float* scale = at.is_v ? p.v_scale : p.k_scale;
  const float factor = kScales<Cache, Row> ? 1.0f / scale[at.head] : 1.0f;
  const int32_t page_size = p.shape.page_size;
  if (at.is_v) {
    convert_pack<N>(row_head<const Row>(p.v, row, at.head) + at.unit * N, factor,
                    slot_row<Cache>(p.v_cache, slot, at.head, page_size) + at.unit * N);
  } else {
    const int64_t table_row = p.rope.rotary_dim > 0 ? p.rope.table_rows[row] : 0;
    head_unit<N>(row_head<const Row>(p.k, row, at.head), p.rope, table_row, at.unit, factor, false,
                 slot_row<Cache>(p.k_cache, slot, at.head, page_size));
  }
}

template <int N, class Cache, class Row>
FORK_ATTN_HD void gather_unit(const GatherKvParams& p, int64_t row, int32_t index) {
  const UnitPlace at = place_of<N>(p.shape, 0, index);
  Row* to = row_head<Row>(at.is_v ? p.v : p.k, row, at.head) + at.unit * N;
  const int64_t slot = p.slots[row];
  if (slot < 0) {
    store_pack(to, Pack<Row, N>{});
    return;
  }
  const float* scale = at.is_v ? p.v_scale : p.k_scale;
  const float factor = kScales<Row, Cache> ? scale[at.head] : 1.0f;
  const PagedTensor& cache = at.is_v ? p.v_cache : p.k_cache;
  convert_pack<N>(slot_row<const Cache>(cache, slot, at.head, p.shape.page_size) + at.unit * N,
                  factor, to);
}

template <int N, class T>
FORK_ATTN_HD void shift_unit(const ShiftRopeParams& p, int64_t row, int32_t index) {
  const int64_t from = p.from[row];
  const int64_t to = p.to[row];
  const UnitPlace at = place_of<N>(p.shape, p.rope.rotary_dim, index);
  const int32_t page_size = p.shape.page_size;
  if (at.is_v) {
    if (from == to) return;
    convert_pack<N>(slot_row<const T>(p.v_cache, from, at.head, page_size) + at.unit * N, 1.0f,
                    slot_row<T>(p.v_cache, to, at.head, page_size) + at.unit * N);
  } else {
    head_unit<N>(slot_row<const T>(p.k_cache, from, at.head, page_size), p.rope,
                 p.rope.table_rows[row], at.unit, 1.0f, from == to,
                 slot_row<T>(p.k_cache, to, at.head, page_size));
  }
}

// Whether rows of `size` bytes an element can be cut into packs of N, each on a multiple of 16
// bytes or of its own size.
template <int N>
inline bool aligned(const void* data, std::initializer_list<int64_t> strides, int64_t size) {
  const int64_t unit = size * N < 16 ? size * N : 16;
  bool fits = reinterpret_cast<uintptr_t>(data) % unit == 0;
  for (int64_t stride : strides) fits = fits && stride * size % unit == 0;
  return fits;
}

template <int N>
inline bool aligned(const PagedTensor& t, int64_t size) {
  return aligned<N>(t.data, {t.page_stride, t.slot_stride, t.head_stride}, size);
}

template <int N>
inline bool aligned(const RowTensor& t, int64_t size) {
  return aligned<N>(t.data, {t.row_stride, t.head_stride}, size);
}

template <int N>
inline bool dims_fit(const KvShape& shape, int32_t rotary_dim) {
  return rotary_dim / 2 % N == 0 && (shape.head_dim - rotary_dim) % N == 0 &&
         shape.head_dim_v % N == 0;
}

template <int N>
inline bool rope_fits(const Rope& rope) {
  return rope.rotary_dim == 0 ||
         (aligned<N>(rope.cos, {rope.rotary_dim / 2}, 4) && aligned<N>(rope.sin, {}, 4));
}

// Elements of a pack: 16 bytes of the narrower type.
template <class A, class B>
inline constexpr int kPackSize = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

}  // namespace fork_attn::cpu
