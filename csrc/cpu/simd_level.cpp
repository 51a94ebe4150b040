#include "unit.h"

namespace fork_attn::cpu {

SimdLevel simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return SimdLevel::kAvx512;
  if (avx2) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kBase;
}

UnitBody unit_body(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return &avx512::run_unit;
  if (level == SimdLevel::kAvx2) return &avx2::run_unit;
#endif
  (void)level;
  return &base::run_unit;
}

}  // namespace fork_attn::cpu
