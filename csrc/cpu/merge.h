// Merging attention states over disjoint sets of keys by their log-sum-exps (FlashAttention-2,
// arXiv 2307.08691).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "fold_state.h"
#include "softmax_state.h"

namespace fork_attn::cpu {

// Adds up normalised states in the order in which `for_each` passes them to its argument, as (out,
// lse) with `dim` values each. On return acc holds the unnormalised sum and the result what to
// multiply it with. No state, or only empty ones (lse = -inf): scale 0.
template <class ForEach>
RowEnd merge_head(const ForEach& for_each, int32_t dim, const float* sink, float* acc) {
  float max = -std::numeric_limits<float>::infinity();
  for_each([&](const float*, float lse) { max = lse > max ? lse : max; });
  const float origin = max == -std::numeric_limits<float>::infinity() ? 0.0f : max;
  for (int32_t d = 0; d < dim; ++d) acc[d] = 0.0f;
  float sum = 0.0f;
  for_each([&](const float* out, float lse) {
    const float weight = std::exp(lse - origin);
    if (weight == 0.0f) return;  // what an empty state's output holds does not matter
    sum += weight;
    for (int32_t d = 0; d < dim; ++d) acc[d] += weight * out[d];
  });
  return end_row(max, sum, sink);
}

// The same for batch-invariant plans.
template <class ForEach>
RowEnd fold_head(const ForEach& for_each, int32_t dim, const float* sink, float* acc) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  float lse = kEmpty;
  for (int32_t d = 0; d < dim; ++d) acc[d] = 0.0f;
  for_each([&](const float* out, float next) { fold_state(acc, &lse, out, next, dim); });
  return end_row(lse, lse == kEmpty ? 0.0f : 1.0f, sink);
}

}  // namespace fork_attn::cpu
