// What a call to tree_attention has to do: how many threads it is worth, and which query rows are
// made up of partial results. The planner has cut the work into items of about equal cost already.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "unit.h"

namespace fork_attn::cpu {

class Schedule {
 public:
  explicit Schedule(const TreeAttentionParams& params);

  int threads() const { return threads_; }
  int64_t num_units() const { return int64_t{num_items_} * num_kv_heads_; }

  // One head after the other: items over the same keys are neighbours in a plan, and so run at the
  // same time.
  Unit unit(int64_t i) const {
    return {static_cast<int32_t>(i % num_items_), static_cast<int32_t>(i / num_items_)};
  }

  // The rows that no item writes itself: several items serve them, or none.
  const std::vector<int32_t>& rows_to_merge() const { return rows_to_merge_; }

 private:
  int32_t num_items_;
  int32_t num_kv_heads_;
  int threads_ = 1;
  std::vector<int32_t> rows_to_merge_;
};

}  // namespace fork_attn::cpu
