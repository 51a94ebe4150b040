// Arguments of the kernels that move K and V row by row: the same for CPUs and GPUs.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fork_attn::cpu {

// Rotary position embeddings (RoFormer, arXiv 2104.09864) of the first rotary_dim elements of a
// head; scaled variants are in the table.
struct Rope {
  const float* cos;  // (table rows, rotary_dim / 2) contiguous
  const float* sin;
  const int64_t* table_rows;  // (rows,): which row of the table rotates row t
  int32_t rotary_dim;         // 0: no rotation, and the pointers are not read
  bool interleaved;           // pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
};

struct KvShape {
  int64_t rows;
  int32_t num_heads;
  int32_t head_dim;
  int32_t head_dim_v;
  int32_t page_size;
};

// Row t of k and v to slot slots[t] (= page * page_size + offset); negative slots are skipped
// (padding). e4m3 caches hold x / scale, rounded and saturated.
struct StoreKvParams {
  KvShape shape;
  RowTensor k, v;
  PagedTensor k_cache, v_cache;
  const int64_t* slots;
  const float* k_scale;  // (num_heads,), read where the cache is e4m3 and the rows are not
  const float* v_scale;
  Rope rope;
  DType rows_dtype;
  DType cache_dtype;
};

// Slot slots[t] to row t of k and v; a negative slot gives zeros. Rows of another dtype than the
// e4m3 cache get x * scale.
struct GatherKvParams {
  KvShape shape;
  PagedTensor k_cache, v_cache;
  RowTensor k, v;
  const int64_t* slots;
  const float* k_scale;
  const float* v_scale;
  DType cache_dtype;
  DType rows_dtype;
};

// K of slot from[t], rotated, to slot to[t], and V as it is; v_cache.data may be null. from[t] may
// be to[t], but no to[u] with u != t. Quantised K keeps its scale.
struct ShiftRopeParams {
  KvShape shape;
  PagedTensor k_cache, v_cache;
  const int64_t* from;
  const int64_t* to;
  Rope rope;
  DType dtype;
};

// Page i of a cache: page_bytes from data + i * page_stride, in bytes.
struct PageSpan {
  char* data;
  int64_t page_stride;
  int64_t page_bytes;
};

// A row of row_bytes for each head of a slot; strides in bytes.
struct SlotSpan {
  char* data;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
  int32_t num_heads;
  int32_t row_bytes;
};

void store_kv(const StoreKvParams& params);
void gather_kv(const GatherKvParams& params);
void shift_rope(const ShiftRopeParams& params);

// Copies page from[i] to page to[i] in every cache (copy-on-write, compaction). Pages of `to` are
// distinct and not in `from`.
void copy_pages(const PageSpan* caches, int64_t num_caches, const int32_t* from, const int32_t* to,
                int64_t count);

// Moves slot from[i] to slot to[i] in every cache, reading all before writing any (accepted
// drafts).
void move_slots(const SlotSpan* caches, int64_t num_caches, int32_t page_size, const int64_t* from,
                const int64_t* to, int64_t count);

}  // namespace fork_attn::cpu
