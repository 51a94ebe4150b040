#if defined(__x86_64__)

#include "unit_headers.h"

#define FORK_ATTN_LANES 16
#define FORK_ATTN_F16C

#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,f16c")
#endif

#include "unit_body.h"

namespace fork_attn::cpu::avx512 {

void run_unit(const TreeAttentionParams& params, const Unit& unit, const Partials& partials,
              float* scratch) {
  run_unit_body(params, unit, partials, scratch);
}

}  // namespace fork_attn::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
