#include "planner.h"

#include <algorithm>

namespace fork_attn {

void Planner::reset(const CacheCore& core, const PlanRequest& request) {
  core_ = &core;
  request_ = request;
  max_tokens_ = std::clamp(request.target->max_rows / request.shape.group, 1, kMaxBlockTokens);
  counts_ = {};
  const std::size_t num_rows = core.step().rows.size();
  const auto num_segments = static_cast<std::size_t>(core.store().segments.size());
  order_of_row_.assign(num_rows, -1);
  pages_of_row_.assign(num_rows, -1);
  row_of_segment_.assign(num_segments, -1);
  pages_of_segment_.assign(num_segments, -1);
  for (std::size_t r = 0; r < num_rows; ++r) {
    const Index segment = core.step().rows[r].segment;
    if (segment != kNone) row_of_segment_[segment] = static_cast<int32_t>(r);
  }
  blocks_.clear();
  tokens_.clear();
  positions_.clear();
  items_.clear();
  runs_.clear();
  pages_.clear();
  words_.clear();
}

PlanData Planner::build(const CacheCore& core, const PlanRequest& request) {
  reset(core, request);
  groups_.build(core, request.window);
  lay_out_tokens();
  const CostModel costs(*request.target, request.shape);
  const BlockChoice choice = BlockChooser(groups_, costs, max_tokens_).choose();
  for (const Block& block : choice.blocks) emit_block(block, choice);
  count_unique();
  cut_into_spans();
  assign_partials();
  counts_.num_tokens = static_cast<int64_t>(core.step().positions.size());
  counts_.num_blocks = static_cast<int64_t>(blocks_.size());
  counts_.num_items = static_cast<int64_t>(items_.size());
  counts_.num_runs = static_cast<int64_t>(runs_.size());
  PlanData out;
  serialise(out);
  out.span_ns = span_ns_;
  out.counts = counts_;
  return out;
}

}  // namespace fork_attn
