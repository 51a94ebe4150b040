// The caches of all layers as a kernel's argument: no table has to be uploaded before the launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fork_attn::cuda {

struct alignas(16) Vector16 {
  uint32_t words[4];
};

// With CUDA 12.1 and later a kernel takes up to 32 KB of arguments.
template <class Span>
struct SpanTable {
  static constexpr int64_t kCapacity = 256;
  Span spans[kCapacity];
};

// Calls f(table, count) for every kCapacity spans.
template <class Span, class F>
void for_each_table(const Span* spans, int64_t count, const F& f) {
  for (int64_t first = 0; first < count; first += SpanTable<Span>::kCapacity) {
    SpanTable<Span> table{};
    const int64_t some = std::min(count - first, SpanTable<Span>::kCapacity);
    std::copy(spans + first, spans + first + some, table.spans);
    f(table, static_cast<int32_t>(some));
  }
}

inline bool on_16_bytes(const void* data, std::initializer_list<int64_t> sizes) {
  bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t size : sizes) all = all && size % 16 == 0;
  return all;
}

}  // namespace fork_attn::cuda
