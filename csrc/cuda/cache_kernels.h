// The cache's kernels on a GPU: csrc/cpu/kv_params.h describes what each does. They run in order on
// the given stream, allocate nothing and never wait, so CUDA graphs can capture them.
#pragma once

#include <cstdint>

#include "cpu/kv_params.h"

namespace fork_attn::cuda {

struct Stream {
  int32_t device;
  void* handle;  // cudaStream_t
};

// Each throws Error: kDevice if a launch fails, kUnsupported in a build without device code.
void store_kv(const cpu::StoreKvParams& params, Stream stream);
void gather_kv(const cpu::GatherKvParams& params, Stream stream);
void shift_rope(const cpu::ShiftRopeParams& params, Stream stream);

// One launch for up to 256 caches.
void copy_pages(const cpu::PageSpan* caches, int64_t num_caches, const int32_t* from,
                const int32_t* to, int64_t count, Stream stream);

// One launch for up to 64 caches. At most kMaxMoves slots: all lie in shared memory at once.
constexpr int64_t kMaxMoves = 3072;
void move_slots(const cpu::SlotSpan* caches, int64_t num_caches, int32_t page_size,
                const int64_t* from, const int64_t* to, int64_t count, Stream stream);

// As cpu::merge_states, with outputs of any of fp32, bf16 and fp16.
void merge_states(const void* out, const float* lse, cpu::DType dtype, int64_t num_states,
                  int64_t rows, int32_t num_heads, int32_t dim, void* merged_out, float* merged_lse,
                  Stream stream);

}  // namespace fork_attn::cuda
