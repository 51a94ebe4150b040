#include "tile_reader.h"

#include <algorithm>
#include <bit>

namespace fork_attn::cpu {

int element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2;
}

int64_t num_slots(const PlanView& plan, const PlanItem& item) {
  int64_t slots = 0;
  for (int32_t r = item.run_begin; r < item.run_end; ++r) slots += plan.runs()[r].num_slots;
  return slots;
}

TileReader::TileReader(const TreeAttentionParams& params, const PlanItem& item, int kv_head)
    : plan_(params.plan),
      pages_(params.pages != nullptr ? params.pages : plan_.pages()),
      k_(params.k_cache),
      v_(params.v_cache),
      element_size_(element_size(params.kv_dtype)),
      head_k_(kv_head * params.k_cache.head_stride),
      head_v_(kv_head * params.v_cache.head_stride),
      fixed_(plan_.header().tile_slots > 0),
      run_(item.run_begin),
      left_(num_slots(plan_, item)) {
  const PlanBlock& block = plan_.blocks()[item.block];
  block_mask_ = low_bits(block.num_tokens);
  positions_ = plan_.positions() + block.token_begin;
  max_position_ = *std::max_element(positions_, positions_ + block.num_tokens);
  if (left_ > 0) enter_run();
}

void TileReader::enter_run() {
  const PlanRun& run = plan_.runs()[run_];
  const int32_t page_size = plan_.header().page_size;
  if ((run.kind & kGather) != 0) {  // one slot at a time
    page_index_ = run.page_begin + static_cast<int32_t>(j_);
    offset_ = plan_.gather()[page_index_] % page_size;
    return;
  }
  const int64_t slot = run.first_slot + j_;
  page_index_ = run.page_begin + static_cast<int32_t>(slot / page_size);
  offset_ = static_cast<int32_t>(slot % page_size);
}

uint64_t TileReader::visibility(const PlanRun& run, int64_t j) const {
  uint64_t word = run.mask & block_mask_;
  if (run.kind & kDiagonal) {  // j < diag + t: all but the first j - diag + 1 tokens
    const int64_t hidden = std::clamp<int64_t>(j - run.diag + 1, 0, 64);
    word &= ~low_bits(static_cast<int>(hidden));
  }
  if (run.kind & kWindow) {
    const int64_t newest =
        plan_.header().window + run.first_position + j;  // the first position past the window
    if (max_position_ >= newest) {
      for (uint64_t rest = word; rest != 0; rest &= rest - 1) {
        if (positions_[std::countr_zero(rest)] >= newest) word &= ~(rest & -rest);
      }
    }
  }
  if (run.kind & (kPerSlot | kGather)) word &= plan_.words()[run.words_begin + j];
  return word;
}

bool TileReader::next(Tile& tile) {
  const int32_t page_size = plan_.header().page_size;
  tile.count = 0;
  tile.seen_by_all = block_mask_;
  while (left_ > 0 && tile.count < kTileSlots) {
    const PlanRun& run = plan_.runs()[run_];
    if (j_ == run.num_slots) {
      ++run_;
      j_ = 0;
      enter_run();
      if (fixed_ && tile.count > 0) break;
      continue;
    }
    if (tile.count == 0) tile.chunk = run.chunk;
    const bool gathered = (run.kind & kGather) != 0;
    if (gathered) enter_run();
    const int64_t page = gathered ? plan_.gather()[page_index_] / page_size : pages_[page_index_];
    const char* k = static_cast<const char*>(k_.data) +
                    (page * k_.page_stride + offset_ * k_.slot_stride + head_k_) * element_size_;
    const char* v = static_cast<const char*>(v_.data) +
                    (page * v_.page_stride + offset_ * v_.slot_stride + head_v_) * element_size_;
    const int64_t together = gathered ? 1 : page_size - offset_;
    const int64_t count =
        std::min<int64_t>({together, run.num_slots - j_, left_, kTileSlots - tile.count});
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t word = visibility(run, j_ + i);
      if (word == 0 && !fixed_) continue;
      tile.k[tile.count] = k + i * k_.slot_stride * element_size_;
      tile.v[tile.count] = v + i * v_.slot_stride * element_size_;
      tile.words[tile.count++] = word;
      tile.seen_by_all &= word;
    }
    j_ += count;
    left_ -= count;
    offset_ += static_cast<int32_t>(count);
    if (offset_ == page_size) {
      offset_ = 0;
      ++page_index_;
    }
  }
  return tile.count > 0;
}

}  // namespace fork_attn::cpu
