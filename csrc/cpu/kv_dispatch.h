// From dtypes known at run time to types: what the caches may hold and what their rows may be.
#pragma once

#include "../core/error.h"
#include "kv_params.h"
#include "numeric.h"

namespace fork_attn::cpu {

// Calls f(Cache{}, Row{}). Rows have the cache's dtype, or are what an e4m3 cache quantises.
template <class F>
void for_cache_and_rows(DType cache, DType rows, const F& f) {
  if (cache == DType::kFloat8E4M3) {
    switch (rows) {
      case DType::kFloat32:
        return f(Float8E4M3{}, float{});
      case DType::kBFloat16:
        return f(Float8E4M3{}, BFloat16{});
      case DType::kFloat16:
        return f(Float8E4M3{}, Float16{});
      case DType::kFloat8E4M3:
        return f(Float8E4M3{}, Float8E4M3{});
    }
  }
  if (cache == rows) {
    switch (cache) {
      case DType::kFloat32:
        return f(float{}, float{});
      case DType::kBFloat16:
        return f(BFloat16{}, BFloat16{});
      case DType::kFloat16:
        return f(Float16{}, Float16{});
      default:
        break;
    }
  }
  fail(ErrorKind::kType, "dtype: expected rows of the cache's dtype, or an e4m3 cache");
}

template <class F>
void for_cache(DType cache, const F& f) {
  for_cache_and_rows(cache, cache, [&](auto type, auto) { f(type); });
}

}  // namespace fork_attn::cpu
