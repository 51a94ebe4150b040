#include "cuda/launch.h"
#include "cuda/span_table.h"

namespace fork_attn::cuda {

namespace {

using Table = SpanTable<cpu::SlotSpan>;
constexpr int32_t kSharedBytes = 48 << 10;  // what every GPU gives a block without asking
static_assert(kMaxMoves * sizeof(Vector16) <= kSharedBytes);

template <class Element>
__device__ Element* slot_column(const cpu::SlotSpan& cache, int64_t slot, int32_t page_size,
                                int32_t column) {
  const uint32_t page = static_cast<uint32_t>(slot) / static_cast<uint32_t>(page_size);
  const uint32_t offset = static_cast<uint32_t>(slot) - page * static_cast<uint32_t>(page_size);
  char* row = cache.data + page * cache.page_stride + offset * cache.slot_stride +
              blockIdx.y * cache.head_stride;
  return reinterpret_cast<Element*>(row) + column;
}

// A block holds some columns of one head of all the slots, so that it reads all before it writes
// any. Blocks x: columns, y: head, z: cache.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    move_kernel(const __grid_constant__ Table table, int32_t page_size, const int64_t* from,
                const int64_t* to, int32_t count, int32_t width) {
  FORK_ATTN_DYNAMIC_SHARED(shared);
  Element* held = reinterpret_cast<Element*>(shared);
  const cpu::SlotSpan& cache = table.spans[blockIdx.z];
  const int32_t columns = cache.row_bytes / static_cast<int32_t>(sizeof(Element));
  const int32_t first = static_cast<int32_t>(blockIdx.x) * width;
  if (static_cast<int32_t>(blockIdx.y) >= cache.num_heads || first >= columns) return;
  const int32_t mine = columns - first < width ? columns - first : width;
  for (int32_t i = threadIdx.x; i < count * mine; i += kThreads) {
    const int32_t move = i / mine;
    held[i] = *slot_column<Element>(cache, from[move], page_size, first + i - move * mine);
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < count * mine; i += kThreads) {
    const int32_t move = i / mine;
    *slot_column<Element>(cache, to[move], page_size, first + i - move * mine) = held[i];
  }
}

template <class Element>
void run(const Table& table, int32_t num_caches, int32_t page_size, const int64_t* from,
         const int64_t* to, int64_t count, Stream stream) {
  constexpr int32_t kSize = sizeof(Element);
  int32_t columns = 1, heads = 1;
  for (int32_t c = 0; c < num_caches; ++c) {
    columns = std::max(columns, table.spans[c].row_bytes / kSize);
    heads = std::max(heads, table.spans[c].num_heads);
  }
  const int32_t width = std::min(columns, kSharedBytes / (static_cast<int32_t>(count) * kSize));
  const dim3 grid(static_cast<unsigned>((columns + width - 1) / width),
                  static_cast<unsigned>(heads), static_cast<unsigned>(num_caches));
  launch("move_slots", move_kernel<Element>, grid, dim3(kThreads), count * width * kSize, stream,
         table, page_size, from, to, static_cast<int32_t>(count), width);
}

}  // namespace

void move_slots(const cpu::SlotSpan* caches, int64_t num_caches, int32_t page_size,
                const int64_t* from, const int64_t* to, int64_t count, Stream stream) {
  if (count == 0) return;
  if (count > kMaxMoves) {
    fail(ErrorKind::kValue, "move_slots: expected at most " + std::to_string(kMaxMoves) +
                                " slots on a GPU, got " + std::to_string(count));
  }
  const bool vectors = std::all_of(caches, caches + num_caches, [](const cpu::SlotSpan& c) {
    return on_16_bytes(c.data, {c.page_stride, c.slot_stride, c.head_stride, c.row_bytes});
  });
  for_each_table(caches, num_caches, [&](const Table& table, int32_t some) {
    if (vectors) return run<Vector16>(table, some, page_size, from, to, count, stream);
    run<uint8_t>(table, some, page_size, from, to, count, stream);
  });
}

}  // namespace fork_attn::cuda
