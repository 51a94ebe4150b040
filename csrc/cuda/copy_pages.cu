#include "cuda/launch.h"
#include "cuda/span_table.h"

namespace fork_attn::cuda {

namespace {

using Table = SpanTable<cpu::PageSpan>;
constexpr int kAccesses = 4;  // of each thread, in flight together

// Blocks x: piece of a page, then page; y: cache.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ Table table, const int32_t* from, const int32_t* to,
                uint32_t pieces) {
  const cpu::PageSpan& cache = table.spans[blockIdx.y];
  const uint32_t copy = blockIdx.x / pieces;
  const uint32_t piece = blockIdx.x - copy * pieces;
  const int64_t size = cache.page_bytes / static_cast<int64_t>(sizeof(Element));
  const int64_t first = int64_t{piece} * kThreads * kAccesses + threadIdx.x;
  const Element* src =
      reinterpret_cast<const Element*>(cache.data + from[copy] * cache.page_stride);
  Element* dst = reinterpret_cast<Element*>(cache.data + to[copy] * cache.page_stride);
  Element held[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < size) held[i] = src[at];
  }
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < size) dst[at] = held[i];
  }
}

template <class Element>
void run(const Table& table, int32_t num_caches, const int32_t* from, const int32_t* to,
         int64_t count, Stream stream) {
  constexpr int64_t kPiece = int64_t{kThreads} * kAccesses * sizeof(Element);
  int64_t pieces = 1;
  for (int32_t c = 0; c < num_caches; ++c) {
    pieces = std::max(pieces, (table.spans[c].page_bytes + kPiece - 1) / kPiece);
  }
  const dim3 grid(static_cast<unsigned>(count * pieces), static_cast<unsigned>(num_caches));
  launch("copy_pages", copy_kernel<Element>, grid, dim3(kThreads), 0, stream, table, from, to,
         static_cast<uint32_t>(pieces));
}

}  // namespace

void copy_pages(const cpu::PageSpan* caches, int64_t num_caches, const int32_t* from,
                const int32_t* to, int64_t count, Stream stream) {
  if (count == 0) return;
  const bool vectors = std::all_of(caches, caches + num_caches, [](const cpu::PageSpan& c) {
    return on_16_bytes(c.data, {c.page_stride, c.page_bytes});
  });
  for_each_table(caches, num_caches, [&](const Table& table, int32_t some) {
    if (vectors) return run<Vector16>(table, some, from, to, count, stream);
    run<uint8_t>(table, some, from, to, count, stream);
  });
}

}  // namespace fork_attn::cuda
