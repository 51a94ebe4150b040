// How a plan's items are shared out among threads: large items are cut into stretches of slots, and
// every query row learns which partial results make it up, in a fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "unit.h"

namespace fork_attn::cpu {

class Schedule {
 public:
  // Partial rows first, first + stride, ... (count of them): one for each stretch of an item.
  struct Source {
    int64_t first = 0;
    int32_t count = 0;
    int32_t stride = 0;
  };

  explicit Schedule(const TreeAttentionParams& params);

  int threads() const { return threads_; }
  const std::vector<Unit>& units() const {
    return units_;
  }  // for KV head 0; every head does the same
  int64_t num_partial_rows() const { return num_partial_rows_; }

  // True if a unit writes the row's final output itself.
  bool written_by_unit(int64_t row) const { return own_source_[row] == kWritten; }

  // Calls visit(partial row) for every partial result of the row, in merge order.
  template <class Visit>
  void for_each_partial(int64_t row, const Visit& visit) const {
    const auto expand = [&](const Source& source) {
      for (int32_t i = 0; i < source.count; ++i) visit(source.first + int64_t{i} * source.stride);
    };
    if (own_source_[row] >= 0) expand(sources_[own_source_[row]]);
    for (int32_t i = plan_.merge_indptr()[row]; i < plan_.merge_indptr()[row + 1]; ++i) {
      expand(sources_[plan_.merge_rows()[i]]);
    }
  }

 private:
  static constexpr int32_t kNone = -1;
  static constexpr int32_t kWritten = -2;

  void add_item(int32_t index, int64_t num_slots, int64_t num_stretches);

  PlanView plan_;
  int threads_ = 1;
  std::vector<Unit> units_;
  int64_t num_partial_rows_ = 0;
  std::vector<Source> sources_;  // of the plan's partial rows, then of rows whose only item was cut
  std::vector<int32_t> own_source_;  // per query row: kNone, kWritten or an index of sources_
};

}  // namespace fork_attn::cpu
