#include "planner.h"

#include <algorithm>
#include <string>
#include <utility>

namespace fork_attn {

namespace {

void require(bool ok, const char* what, int64_t got) {
  if (!ok) fail(ErrorKind::kValue, std::string(what) + ", got " + std::to_string(got));
}

void check(const PlanRequest& request) {
  const LayerShape& s = request.shape;
  require(request.workers >= 1, "workers: expected at least 1", request.workers);
  require(request.window >= 0, "window: expected 0 (none) or more", request.window);
  require(s.num_kv_heads >= 1, "num_kv_heads: expected at least 1", s.num_kv_heads);
  require(s.group >= 1, "group: expected at least 1 query head per KV head", s.group);
  require(s.head_dim >= 1, "head_dim: expected at least 1", s.head_dim);
  require(s.head_dim_v >= 1, "head_dim_v: expected at least 1", s.head_dim_v);
  require(s.itemsize >= 1, "itemsize: expected at least 1", s.itemsize);
}

}  // namespace

void Planner::reset(const CacheCore& core, const PlanRequest& request) {
  core_ = &core;
  request_ = request;
  max_tokens_ = std::clamp(request.target->max_rows / request.shape.group, 1, kMaxBlockTokens);
  counts_ = {};
  const std::size_t num_rows = core.step().rows.size();
  const auto num_segments = static_cast<std::size_t>(core.store().segments.size());
  source_of_row_.assign(num_rows, -1);
  row_of_segment_.assign(num_segments, -1);
  source_of_segment_.assign(num_segments, -1);
  for (std::size_t r = 0; r < num_rows; ++r) {
    const Index segment = core.step().rows[r].segment;
    if (segment != kNone) row_of_segment_[segment] = static_cast<int32_t>(r);
  }
  blocks_.clear();
  tokens_.clear();
  q_rows_.clear();
  rotations_.clear();
  positions_.clear();
  items_.clear();
  runs_.clear();
  sources_.clear();
  source_of_run_.clear();
  goes_on_.clear();
  words_.clear();
  gather_.clear();
}

// Batch-invariant plans, and those of watches, whose groups come and go with each token, are chosen
// anew.
const BlockChoice& Planner::choose(const CostModel& costs) {
  const int32_t chunk_slots = request_.batch_invariant ? request_.target->chunk_slots : 0;
  const ChoiceMemo::Kind kind{request_.window, request_.shape, request_.target};
  const bool lasting = !request_.batch_invariant && groups_.fresh.empty();
  if (const BlockChoice* known = lasting ? memo_.find(kind, groups_) : nullptr) return *known;
  BlockChoice choice = BlockChooser(groups_, costs, max_tokens_, chunk_slots).choose();
  if (lasting) return memo_.keep(kind, groups_, std::move(choice));
  return passing_ = std::move(choice);
}

PlanData Planner::build(const CacheCore& core, const PlanRequest& request) {
  if (!core.step_open()) fail(ErrorKind::kStalePlan, "plan: expected an open step");
  check(request);
  reset(core, request);
  const TargetCosts& target = *request.target;
  if (request.batch_invariant) {
    groups_.build_tiles(core, request.window, target.tile_slots, target.chunk_slots);
    shared_slots_.build(core, request.window);
    if (shared_slots_.leaves.size() != core.step().rows.size() || !shared_slots_.fresh.empty()) {
      fail(ErrorKind::kUnsupported,
           "batch_invariant: contexts that watch others, or see tokens at shifted positions, are "
           "not "
           "part of this version");
    }
  } else {
    groups_.build(core, request.window);
  }
  lay_out_tokens();
  const CostModel costs(target, request.shape);
  const BlockChoice& choice = choose(costs);
  for (const Block& block : choice.blocks) {
    request.batch_invariant ? emit_tiled_block(block, choice) : emit_block(block, choice);
  }
  lay_out_pages();
  count_unique(request.batch_invariant ? shared_slots_ : groups_);
  request.batch_invariant ? share_out_chunks(costs) : cut_into_spans(costs);
  assign_partials();
  counts_.num_tokens = static_cast<int64_t>(core.step().positions.size());
  counts_.max_block_tokens = max_tokens_;
  counts_.num_blocks = static_cast<int64_t>(blocks_.size());
  counts_.num_items = static_cast<int64_t>(items_.size());
  counts_.num_runs = static_cast<int64_t>(runs_.size());
  PlanData out;
  serialise(out);
  out.span_ns = span_ns_;
  out.cost_ns = choice.cost;
  out.counts = counts_;
  return out;
}

}  // namespace fork_attn
