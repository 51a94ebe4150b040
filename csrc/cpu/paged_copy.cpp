// Copies of rows and pages; elements are moved as bytes.
#include <cstring>
#include <memory>

#include "kernels.h"

namespace fork_attn::cpu {

namespace {

constexpr int64_t kParallelBytes = 1 << 18;  // below this, threads cost more than they give

char* element(void* data, int64_t index, int32_t element_size) {
  return static_cast<char*>(data) + index * element_size;
}

char* slot_row(const PagedTensor& t, int64_t slot, int32_t head, int32_t page_size,
               int32_t element_size) {
  return element(
      t.data,
      slot / page_size * t.page_stride + slot % page_size * t.slot_stride + head * t.head_stride,
      element_size);
}

}  // namespace

void store_kv(const RowTensor& src, const PagedTensor& dst, const int64_t* slot_mapping,
              int64_t rows, int32_t num_heads, int32_t dim, int32_t page_size,
              int32_t element_size) {
  const int64_t bytes = int64_t{dim} * element_size;
#pragma omp parallel for schedule(static) if (rows * num_heads * bytes > kParallelBytes)
  for (int64_t t = 0; t < rows; ++t) {
    if (slot_mapping[t] < 0) continue;
    for (int32_t h = 0; h < num_heads; ++h) {
      std::memcpy(slot_row(dst, slot_mapping[t], h, page_size, element_size),
                  element(src.data, t * src.row_stride + h * src.head_stride, element_size), bytes);
    }
  }
}

void copy_pages(const PagedTensor& cache, const int32_t* src, const int32_t* dst, int64_t count,
                int32_t page_size, int32_t num_heads, int32_t dim, int32_t element_size) {
  const bool dense = cache.slot_stride == dim;  // one head's page is contiguous
  const int64_t rows = dense ? 1 : page_size;
  const int64_t bytes = int64_t{dim} * element_size * (dense ? page_size : 1);
#pragma omp parallel for schedule(static) \
    collapse(2) if (count * num_heads * rows * bytes > kParallelBytes)
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t h = 0; h < num_heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t within = r * cache.slot_stride + h * cache.head_stride;
        std::memcpy(element(cache.data, dst[i] * cache.page_stride + within, element_size),
                    element(cache.data, src[i] * cache.page_stride + within, element_size), bytes);
      }
    }
  }
}

void move_slots(const PagedTensor& cache, const int64_t* src, const int64_t* dst, int64_t count,
                int32_t page_size, int32_t num_heads, int32_t dim, int32_t element_size) {
  const int64_t bytes = int64_t{dim} * element_size;
  const std::unique_ptr<char[]> held(new char[count * num_heads * bytes]);
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t h = 0; h < num_heads; ++h) {
      std::memcpy(held.get() + (i * num_heads + h) * bytes,
                  slot_row(cache, src[i], h, page_size, element_size), bytes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t h = 0; h < num_heads; ++h) {
      std::memcpy(slot_row(cache, dst[i], h, page_size, element_size),
                  held.get() + (i * num_heads + h) * bytes, bytes);
    }
  }
}

}  // namespace fork_attn::cpu
