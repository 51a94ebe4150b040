#include "kernels.h"
#include "merge.h"

namespace fork_attn::cpu {

void merge_states(const float* out, const float* lse, int64_t num_states, int64_t rows,
                  int32_t num_heads, int32_t dim, float* merged_out, float* merged_lse) {
  constexpr int64_t kParallelWork = 1 << 16;
  const int64_t count = rows * num_heads;
#pragma omp parallel for schedule(static) if (count * num_states * dim > kParallelWork)
  for (int64_t i = 0; i < count; ++i) {
    const auto for_each = [&](const auto& visit) {
      for (int64_t s = 0; s < num_states; ++s)
        visit(out + (s * count + i) * dim, lse[s * count + i]);
    };
    float* acc = merged_out + i * dim;
    const RowEnd end = merge_head(for_each, dim, nullptr, acc);
    for (int32_t d = 0; d < dim; ++d) acc[d] *= end.scale;
    merged_lse[i] = end.lse;
  }
}

}  // namespace fork_attn::cpu
