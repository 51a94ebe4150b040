#include "schedule.h"

#include <omp.h>

#include <algorithm>

#include "tile_reader.h"

namespace fork_attn::cpu {

namespace {

constexpr int64_t kStretchSlots = 2 * kTileSlots;  // the shortest stretch worth a partial result
constexpr int64_t kUnitsPerThread = 4;             // of equal size, for an even finish
constexpr int64_t kLoadRows = 8;  // loading and transposing a slot costs as much as this many rows
constexpr int64_t kSerialWork =
    1 << 13;  // (row, slot) pairs below which threads cost more than they give

int64_t count_slots(const PlanView& plan, const PlanItem& item) {
  int64_t slots = 0;
  for (int32_t r = item.run_begin; r < item.run_end; ++r) slots += plan.runs()[r].num_slots;
  return slots;
}

}  // namespace

Schedule::Schedule(const TreeAttentionParams& params) : plan_(params.plan) {
  const PlanHeader& h = plan_.header();
  sources_.resize(h.num_partial_rows);
  own_source_.assign(h.num_tokens, kNone);
  std::vector<int64_t> slots(h.num_items);
  std::vector<int64_t> work(h.num_items);  // for one KV head
  int64_t total = 0;
  for (int32_t i = 0; i < h.num_items; ++i) {
    const PlanItem& item = plan_.items()[i];
    slots[i] = count_slots(plan_, item);
    work[i] = slots[i] * (int64_t{plan_.blocks()[item.block].num_tokens} * h.group + kLoadRows);
    total += work[i];
  }
  total *= params.num_kv_heads;
  if (total > kSerialWork) threads_ = omp_get_max_threads();
  const int64_t limit = std::max<int64_t>(1, total / (threads_ * kUnitsPerThread));
  for (int32_t i = 0; i < h.num_items; ++i) {
    const int64_t wanted = threads_ == 1 ? 1 : (work[i] + limit - 1) / limit;
    add_item(i, slots[i],
             std::clamp<int64_t>(slots[i] / kStretchSlots, 1, std::max<int64_t>(wanted, 1)));
  }
}

void Schedule::add_item(int32_t index, int64_t num_slots, int64_t num_stretches) {
  const PlanItem& item = plan_.items()[index];
  const PlanBlock& block = plan_.blocks()[item.block];
  const int64_t tiles = (num_slots + kTileSlots - 1) / kTileSlots;
  const bool partial = item.partial_begin >= 0 || num_stretches > 1;
  for (int64_t s = 0; s < num_stretches; ++s) {
    const int64_t begin = tiles * s / num_stretches * kTileSlots;
    const int64_t end = std::min(num_slots, tiles * (s + 1) / num_stretches * kTileSlots);
    units_.push_back(
        {index, 0, begin, end, partial ? num_partial_rows_ + s * block.num_tokens : -1});
  }
  for (int32_t t = 0; t < block.num_tokens; ++t) {
    const int32_t row = plan_.tokens()[block.token_begin + t];
    if (!partial) {
      own_source_[row] = kWritten;
      continue;
    }
    const Source source{num_partial_rows_ + t, static_cast<int32_t>(num_stretches),
                        block.num_tokens};
    if (item.partial_begin >= 0) {
      sources_[item.partial_begin + t] = source;
    } else {
      own_source_[row] = static_cast<int32_t>(sources_.size());
      sources_.push_back(source);
    }
  }
  if (partial) num_partial_rows_ += num_stretches * block.num_tokens;
}

}  // namespace fork_attn::cpu
