// Batch-invariant plans: results of a row's chunks, added one after another in context order. One
// function for items of many chunks and for merging, so that both round alike.
#pragma once

#include <cstdint>

namespace fork_attn::cpu {

// Folds a normalised state (next, next_lse) into another; lse = -inf marks an empty one. (0, -inf)
// folded with a state is that state.
void fold_state(float* out, float* lse, const float* next, float next_lse, int32_t dim);

}  // namespace fork_attn::cpu
