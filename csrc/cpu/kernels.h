// CPU kernels. Raw pointers and sizes only: callers check shapes, dtypes and devices.
#pragma once

#include <cstdint>

namespace fork_attn::cpu {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8E4M3 = 3 };

// One of K or V: element (page, slot, head, d) at base[page*page_stride + slot*slot_stride +
// head*head_stride + d]. Strides are in elements; the head dimension is contiguous.
struct PagedTensor {
  void* data;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

// A (rows, heads, dim) tensor with contiguous dim.
struct RowTensor {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct TreeAttentionParams {
  const int64_t* plan;   // see core/plan.h
  const int32_t* pages;  // what runs index, where that is not in the plan; else null
  RowTensor q;           // (T, num_q_heads, head_dim), dtype
  PagedTensor k_cache;
  PagedTensor v_cache;
  RowTensor out;         // (T, num_q_heads, head_dim_v), dtype
  float* lse;            // (T, num_q_heads) contiguous, natural log, sinks included
  const float* sinks;    // (num_q_heads,) logits or null
  const float* k_scale;  // (num_kv_heads,) or null: what k_cache and v_cache are multiplied with
  const float* v_scale;
  DType dtype;     // of q and out
  DType kv_dtype;  // of k_cache and v_cache: dtype, or e4m3
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t head_dim_v;
  float softmax_scale;
  float softcap;  // 0 = none: scores become softcap * tanh(score / softcap) before the mask
};

// Rows no item serves get out = 0 and lse = -inf (with sinks: lse = sink).
void tree_attention(const TreeAttentionParams& params);

// Asks for huge memory pages where the operating system gives them on request: KV pages lie
// anywhere, and each read of 4 kB would wait for a look-up of its address. To be called before the
// first write.
void advise_huge_pages(void* data, int64_t bytes);

// Softmax states: out (num_states, rows, num_heads, dim) and lse (num_states, rows, num_heads),
// both fp32 contiguous, merged in index order into merged_out (rows, num_heads, dim) and merged_lse
// (rows, num_heads). All states empty: out = 0, lse = -inf.
void merge_states(const float* out, const float* lse, int64_t num_states, int64_t rows,
                  int32_t num_heads, int32_t dim, float* merged_out, float* merged_lse);

}  // namespace fork_attn::cpu
