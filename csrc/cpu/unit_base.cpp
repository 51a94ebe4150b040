// Four floats: SSE2 and NEON, which every x86-64 and every 64-bit Arm processor has.
#include "unit_headers.h"

#define FORK_ATTN_LANES 4

#include "unit_body.h"

namespace fork_attn::cpu::base {

void run_unit(const TreeAttentionParams& params, const Unit& unit, const Partials& partials,
              float* scratch) {
  run_unit_body(params, unit, partials, scratch);
}

}  // namespace fork_attn::cpu::base
