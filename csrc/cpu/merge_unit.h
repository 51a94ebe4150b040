// Merging softmax states over disjoint keys, N elements of one row and head: what one GPU thread
// does of merge_states.
#pragma once

#include <cmath>
#include <cstdint>

#include "kv_units.h"
#include "softmax_state.h"

namespace fork_attn::cpu {

// State s of row and head i (of `count`): out[(s * count + i) * dim ...] and lse[s * count + i].
struct MergeParams {
  const void* out;
  const float* lse;
  void* merged_out;
  float* merged_lse;
  int64_t num_states;
  int64_t count;
  int32_t dim;
};

template <int N, class T>
FORK_ATTN_HD void merge_unit(const MergeParams& p, int64_t i, int32_t unit) {
  constexpr float kInfinity = HUGE_VALF;
  float max = -kInfinity;
  for (int64_t s = 0; s < p.num_states; ++s) {
    const float lse = p.lse[s * p.count + i];
    max = lse > max ? lse : max;
  }
  const float origin = max == -kInfinity ? 0.0f : max;
  float acc[N] = {};
  float total = 0.0f;
  for (int64_t s = 0; s < p.num_states; ++s) {
    const float weight = std::exp(p.lse[s * p.count + i] - origin);
    if (weight == 0.0f) continue;  // what an empty state's output holds does not matter
    total += weight;
    const T* out = static_cast<const T*>(p.out) + (s * p.count + i) * p.dim + unit * N;
    const Pack<T, N> pack = load_pack<N>(out);
    FORK_ATTN_UNROLL
    for (int d = 0; d < N; ++d) acc[d] += weight * to_float(pack.values[d]);
  }
  const RowEnd end = end_row(max, total, nullptr);
  Pack<T, N> merged;
  FORK_ATTN_UNROLL
  for (int d = 0; d < N; ++d) from_float(acc[d] * end.scale, merged.values[d]);
  store_pack(static_cast<T*>(p.merged_out) + i * p.dim + unit * N, merged);
  if (unit == 0) p.merged_lse[i] = end.lse;
}

}  // namespace fork_attn::cpu
