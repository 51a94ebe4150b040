// Turns the open step of a cache into a plan (see plan.h for the format): who is served together
// (blocks.h), in items that are cut into spans of equal cost.
#pragma once

#include <climits>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "cache_core.h"
#include "choice_memo.h"
#include "costs.h"
#include "groups.h"
#include "plan.h"

namespace fork_attn {

struct PlanRequest {
  int32_t window;  // sliding window in positions, 0 = none
  LayerShape shape;
  const TargetCosts* target;
  int32_t workers;
  bool batch_invariant = false;
  bool resident = false;  // runs index the arena of page lists (page_arena.h), not the plan's own
};

// Exact counts; multiply slots by the bytes of one slot's K and V over all KV heads.
struct PlanCounts {
  int64_t unique_slots;       // slots that some row sees, each once
  int64_t tile_unique_slots;  // slots once per block's worth of tokens that see them
  int64_t read_slots;         // slots that the items read
  int64_t visible_pairs;      // (query row, slot) pairs that attend
  int64_t executed_pairs;  // (query row, slot) pairs that the items compute, masked ones included
  int64_t num_tokens, num_blocks, num_items, num_runs, num_partial_rows;
  int64_t max_block_tokens;  // that a row block may hold on the target
};

struct PlanData {
  std::vector<int64_t> buffer;
  std::vector<double> span_ns;  // predicted cost of each span, one KV head
  double cost_ns = 0;  // of the chosen blocks before they are cut, one KV head, when chosen
  PlanCounts counts{};
};

class Planner {
 public:
  // kStalePlan: the core has no open step. kValue: a request out of range.
  PlanData build(const CacheCore& core, const PlanRequest& request);

 private:
  struct Token {
    int32_t row;       // of the step: a branch
    int32_t index;     // within the branch's new tokens
    int32_t rotation;  // which copy of its query it reads, -1: the query itself
  };

  // A page table that runs index: a segment's, with what the step adds, or a new segment's. The
  // plan takes over the part that some run names.
  struct PageSource {
    Index segment;                       // kNone: a new one
    int32_t row;                         // whose reserved pages follow; -1: none
    int32_t first = INT32_MAX, end = 0;  // pages named
    int32_t begin = 0;                   // where `first` is in the plan
  };

  // Who reads consecutive places of a context (batch-invariant plans).
  struct TileReaders {
    uint64_t mask;
    int32_t row;          // of the step, whose new tokens end the context; -1: none do
    int64_t seen_by_all;  // places below this one; from there on, token t those below diagonal + t
    int64_t diagonal;
  };

  struct Lane {  // of a tile whose slots lie anywhere
    int32_t slot;
    int64_t position;
    uint64_t seen;
  };

  struct PositionRange {
    int64_t least, most;
  };

  struct Load {  // of an item before it is cut
    int64_t slots;
    double ns_per_slot;
    double partials;  // batch-invariant plans: writing and merging its partial rows
  };

  void reset(const CacheCore& core, const PlanRequest& request);
  const BlockChoice& choose(const CostModel& costs);
  // planner_emit.cpp
  void lay_out_tokens();
  void emit_block(const Block& block, const BlockChoice& choice);
  void emit_piece(const Piece& piece, uint64_t mask);
  void emit_own(int32_t order_index);
  void emit_fresh(int32_t order_index);
  void emit_draft(const StepRow& row, int32_t first, int32_t count, int32_t bit);
  void push_run(PlanRun run, int32_t source, int64_t first_position);
  bool merge_run(const PlanRun& run, int32_t source);
  void add_run(const PlanRun& run, int32_t source);
  void name_pages(const PlanRun& run, int32_t source);
  // planner_gather.cpp
  void gather_short_runs(int32_t first_run);
  void gather_slots(const PlanRun& run, int32_t source, int32_t from);
  uint64_t visibility(const PlanRun& run, int32_t j) const;
  int32_t physical_page(const PageSource& source, int32_t at) const;
  uint64_t mask_of(const Group& group) const;
  void count_run(const PlanRun& run);
  void count_unique(const Groups& groups);
  void count_fresh();
  int32_t source_of_segment(Index segment);
  int32_t source_of_row(int32_t row);
  void lay_out_pages();
  void add_block_tokens();
  void place_lists();
  void append_pages(const PageSource& source, std::vector<int32_t>& out) const;
  int32_t position(const Token& token) const;
  // planner_tiles.cpp
  void emit_tiled_block(const Block& block, const BlockChoice& choice);
  void sort_by_chunk(int32_t first_run);
  void emit_own_tiles(int32_t order_index, uint64_t mask);
  void emit_tiles(const TileReaders& readers);
  uint64_t mask_at(int64_t at, const TileReaders& readers) const;
  void emit_stretch(const Piece& p, int32_t into, int32_t count, const TileReaders& readers);
  void emit_lanes(int64_t at, uint64_t mask);
  void emit_draft_tiles(const StepRow& row, int32_t first, int32_t last, int32_t at, uint64_t mask,
                        int64_t length);
  int32_t slot_address(const Piece& p, int32_t slot, int32_t r) const;
  PositionRange positions_of(uint64_t mask) const;
  // planner_cut.cpp
  double weigh_items(const CostModel& costs);
  void cut_into_spans(const CostModel& costs);
  void share_out_chunks(const CostModel& costs);
  template <class Take, class Close>
  int64_t each_chunk(double budget, int64_t most, Take&& take, Close&& close) const;
  int64_t num_spans_for(double total) const;
  double span_budget(double total, int64_t num_spans) const;
  int64_t count_spans(double budget, int64_t most) const;
  int64_t piece_slots(int64_t left, double room, double ns_per_slot, bool first) const;
  void assign_partials();
  void serialise(PlanData& out) const;

  ChoiceMemo memo_;
  BlockChoice passing_;  // one that the memo does not keep
  const CacheCore* core_ = nullptr;
  PlanRequest request_{};
  int32_t max_tokens_ = 0;
  PlanCounts counts_{};
  Groups groups_;
  Groups shared_slots_;                 // batch-invariant plans: what the accounting counts
  std::vector<Token> all_tokens_;       // in the order of groups_
  const Token* block_first_ = nullptr;  // the block being emitted
  int32_t block_count_ = 0;
  std::vector<int32_t> row_of_segment_;     // the row that writes on in it, -1: none
  std::vector<int32_t> source_of_segment_;  // -1: none yet
  std::vector<int32_t> source_of_row_;
  std::vector<PageSource> sources_;
  std::vector<int32_t> source_of_run_;  // -1: a tile of gathered slots
  std::vector<Piece> parts_;
  std::vector<Lane> lanes_;
  std::vector<uint8_t> goes_on_;  // per item: in one item with the one before it, if it likes

  std::vector<Load> loads_;
  std::vector<PlanBlock> blocks_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> q_rows_;
  std::vector<PlanRotation> rotations_;
  std::vector<int32_t> positions_;
  std::vector<PlanItem> items_;
  std::vector<PlanRun> runs_;
  std::vector<PlanItem> uncut_items_;
  std::vector<PlanRun> uncut_runs_;
  std::vector<uint64_t> words_;
  std::vector<int32_t> gather_;
  std::vector<int32_t> spans_;
  std::vector<double> span_ns_;
  std::vector<int32_t> merge_indptr_;
  std::vector<int32_t> merge_rows_;
};

}  // namespace fork_attn
