// The cache's kernels in a build without device code: each says so.
#include "core/error.h"
#include "cuda/cache_kernels.h"

namespace fork_attn::cuda {

namespace {

[[noreturn]] void refuse(const char* name) {
  fail(ErrorKind::kUnsupported, std::string(name) +
                                    " on a GPU: this build has no device code: nvcc was not found "
                                    "when it was made, or FORK_ATTN_CUDA=OFF");
}

}  // namespace

void store_kv(const cpu::StoreKvParams&, Stream) { refuse("store_kv"); }
void gather_kv(const cpu::GatherKvParams&, Stream) { refuse("gather_kv"); }
void shift_rope(const cpu::ShiftRopeParams&, Stream) { refuse("shift_rope"); }
void copy_pages(const cpu::PageSpan*, int64_t, const int32_t*, const int32_t*, int64_t, Stream) {
  refuse("copy_pages");
}
void move_slots(const cpu::SlotSpan*, int64_t, int32_t, const int64_t*, const int64_t*, int64_t,
                Stream) {
  refuse("move_slots");
}
void merge_states(const void*, const float*, cpu::DType, int64_t, int64_t, int32_t, int32_t, void*,
                  float*, Stream) {
  refuse("merge_states");
}

}  // namespace fork_attn::cuda
