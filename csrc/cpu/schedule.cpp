#include "schedule.h"

#include <omp.h>

#include <algorithm>

#include "tile_reader.h"

namespace fork_attn::cpu {

namespace {

constexpr int64_t kLoadRows = 8;  // loading and transposing a slot costs as much as this many rows
constexpr int64_t kSerialWork =
    1 << 13;  // (row, slot) pairs below which threads cost more than they give

}  // namespace

Schedule::Schedule(const TreeAttentionParams& params) : num_kv_heads_(params.num_kv_heads) {
  const PlanView plan(params.plan);
  const PlanHeader& h = plan.header();
  num_items_ = h.num_items;
  std::vector<bool> written(h.num_tokens, false);
  int64_t work = 0;
  for (int32_t i = 0; i < h.num_items; ++i) {
    const PlanItem& item = plan.items()[i];
    const PlanBlock& block = plan.blocks()[item.block];
    work += num_slots(plan, item) * (int64_t{block.num_tokens} * h.group + kLoadRows);
    if (item.partial_begin >= 0) continue;
    for (int32_t t = 0; t < block.num_tokens; ++t) {
      written[plan.tokens()[block.token_begin + t]] = true;
    }
  }
  if (work * num_kv_heads_ > kSerialWork) {
    threads_ = static_cast<int>(std::clamp<int64_t>(num_units(), 1, omp_get_max_threads()));
  }
  for (int32_t row = 0; row < h.num_tokens; ++row) {
    if (!written[row]) rows_to_merge_.push_back(row);
  }
}

}  // namespace fork_attn::cpu
