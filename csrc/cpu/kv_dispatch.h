// From dtypes known at run time to types: what the caches may hold and what their rows may be.
#pragma once

#include "../core/error.h"
#include "kv_params.h"
#include "numeric.h"

namespace fork_attn::cpu {

// Calls f with a value of the type: fp32, bf16 or fp16.
template <class F>
void for_rows(DType rows, const F& f) {
  switch (rows) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat8E4M3:
      break;
  }
  fail(ErrorKind::kType, "dtype: expected float32, bfloat16 or float16, got float8_e4m3fn");
}

template <class F>
void for_cache(DType cache, const F& f) {
  if (cache == DType::kFloat8E4M3) return f(Float8E4M3{});
  for_rows(cache, f);
}

// Calls f(Cache{}, Row{}). Rows have the cache's dtype, or are what an e4m3 cache quantises.
template <class F>
void for_cache_and_rows(DType cache, DType rows, const F& f) {
  if (cache == DType::kFloat8E4M3) {
    return for_rows(rows, [&](auto row) { f(Float8E4M3{}, row); });
  }
  if (cache != rows) {
    fail(ErrorKind::kType, "dtype: expected rows of the cache's dtype, or an e4m3 cache");
  }
  for_rows(rows, [&](auto row) { f(row, row); });
}

}  // namespace fork_attn::cpu
