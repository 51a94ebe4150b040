// The unit of work on one core: a work item for one KV head. Its body is compiled once for each
// instruction set level; the widest that the processor has is chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "plan_view.h"

namespace fork_attn::cpu {

// Results that wait for others of the same query row: the plan's partial row r holds num_q_heads x
// head_dim_v normalised values and num_q_heads natural-log LSEs.
struct Partials {
  float* out;
  float* lse;
};

struct Unit {
  int32_t item;
  int32_t kv_head;
};

using UnitBody = void (*)(const TreeAttentionParams& params, const Unit& unit,
                          const Partials& partials, float* scratch);

// Levels in rising order of width; kBase runs on every processor.
enum class SimdLevel { kBase, kAvx2, kAvx512 };

SimdLevel simd_level();  // the widest level that this processor has
UnitBody unit_body(SimdLevel level);

// Floats of 64-byte aligned scratch that one thread needs.
std::size_t scratch_floats(const TreeAttentionParams& params);

// tree_attention at a given level; tests compare the levels.
void tree_attention_at(SimdLevel level, const TreeAttentionParams& params);

namespace base {
void run_unit(const TreeAttentionParams&, const Unit&, const Partials&, float*);
}
#if defined(__x86_64__)
namespace avx2 {
void run_unit(const TreeAttentionParams&, const Unit&, const Partials&, float*);
}
namespace avx512 {
void run_unit(const TreeAttentionParams&, const Unit&, const Partials&, float*);
}
#endif

}  // namespace fork_attn::cpu
