// Copies of pages and slots, as bytes.
#include <cstring>
#include <memory>

#include "kv_params.h"

namespace fork_attn::cpu {

namespace {

constexpr int64_t kParallelBytes = 1 << 18;  // below this, threads cost more than they give

char* slot_head(const SlotSpan& t, int64_t slot, int32_t head, int32_t page_size) {
  return t.data + slot / page_size * t.page_stride + slot % page_size * t.slot_stride +
         head * t.head_stride;
}

void move_slots(const SlotSpan& cache, int32_t page_size, const int64_t* from, const int64_t* to,
                int64_t count, char* held) {
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t h = 0; h < cache.num_heads; ++h) {
      std::memcpy(held + (i * cache.num_heads + h) * cache.row_bytes,
                  slot_head(cache, from[i], h, page_size), cache.row_bytes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t h = 0; h < cache.num_heads; ++h) {
      std::memcpy(slot_head(cache, to[i], h, page_size),
                  held + (i * cache.num_heads + h) * cache.row_bytes, cache.row_bytes);
    }
  }
}

}  // namespace

void copy_pages(const PageSpan* caches, int64_t num_caches, const int32_t* from, const int32_t* to,
                int64_t count) {
  int64_t bytes = 0;
  for (int64_t c = 0; c < num_caches; ++c) bytes += caches[c].page_bytes * count;
#pragma omp parallel for schedule(static) collapse(2) if (bytes > kParallelBytes)
  for (int64_t c = 0; c < num_caches; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const PageSpan& cache = caches[c];
      std::memcpy(cache.data + to[i] * cache.page_stride, cache.data + from[i] * cache.page_stride,
                  cache.page_bytes);
    }
  }
}

void move_slots(const SlotSpan* caches, int64_t num_caches, int32_t page_size, const int64_t* from,
                const int64_t* to, int64_t count) {
  int64_t most = 0;
  for (int64_t c = 0; c < num_caches; ++c) {
    const int64_t bytes = int64_t{caches[c].num_heads} * caches[c].row_bytes;
    most = bytes > most ? bytes : most;
  }
  const std::unique_ptr<char[]> held(new char[most * count]);
  for (int64_t c = 0; c < num_caches; ++c) {
    move_slots(caches[c], page_size, from, to, count, held.get());
  }
}

}  // namespace fork_attn::cpu
