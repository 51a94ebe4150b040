#include "fold_state.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fork_attn::cpu {

void fold_state(float* out, float* lse, const float* next, float next_lse, int32_t dim) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  if (next_lse == kEmpty) return;
  if (*lse == kEmpty) {
    std::copy_n(next, dim, out);
    *lse = next_lse;
    return;
  }
  const float top = next_lse > *lse ? next_lse : *lse;
  const float kept = std::exp(*lse - top);
  const float added = std::exp(next_lse - top);
  const float total = kept + added;
  const float a = kept / total;
  const float b = added / total;
  for (int32_t d = 0; d < dim; ++d) out[d] = a * out[d] + b * next[d];
  *lse = top + std::log(total);
}

}  // namespace fork_attn::cpu
