// Turns the open step of a cache into a plan: row blocks, work items, runs (see plan.h for the
// format).
//
// Query rows that see the same slots form a group. Every maximal stretch of slots is read once for
// each row block of the group that sees it, so a shared prefix is read once per block of tokens,
// whatever the number of branches.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "cache_core.h"
#include "plan.h"

namespace fork_attn {

struct PlanRequest {
  int32_t window;    // sliding window in positions, 0 = none
  int32_t group;     // query heads per KV head
  int32_t max_rows;  // rows (tokens x group) that one row block may hold
};

// Exact counts; multiply slots by the bytes of one slot's K and V over all KV heads.
struct PlanCounts {
  int64_t unique_slots;       // slots that some row sees, each once
  int64_t tile_unique_slots;  // slots once per row block's worth of tokens that see them
  int64_t read_slots;         // slots that the items read
  int64_t visible_pairs;      // (query row, slot) pairs that attend
  int64_t executed_pairs;  // (query row, slot) pairs that the items compute, masked ones included
  int64_t num_tokens, num_blocks, num_items, num_runs, num_partial_rows;
};

struct PlanData {
  std::vector<int64_t> buffer;
  std::vector<int64_t> item_pairs;  // executed pairs of each item
  PlanCounts counts;
};

class Planner {
 public:
  // The core must have an open step.
  PlanData build(const CacheCore& core, const PlanRequest& request);

 private:
  struct Node {  // a link that some row of the step sees; or, as a leaf, a row itself
    Index link;
    int32_t row;
    int32_t first_child, last_child, next_sibling;
    int32_t begin, end;  // the rows below it, as a range of order_
    int32_t rank;        // preorder: ancestors first
  };
  struct Interval {
    int32_t begin, end;  // of order_
    auto operator<=>(const Interval&) const = default;
  };
  struct Piece {  // slots [lo, hi) of a segment that one set of rows sees
    int32_t rank;
    Index segment;
    int32_t lo, hi;
    int64_t first_position;
  };
  struct Group {
    std::vector<Interval> rows;
    std::vector<Piece> pieces;
  };
  struct Token {
    int32_t row;    // of the step: a branch
    int32_t index;  // within the branch's new tokens
  };
  using Tokens = std::vector<Token>;

  void reset(const CacheCore& core, const PlanRequest& request);
  int32_t add_node(Index link, int32_t row);
  void append_child(int32_t parent, int32_t child);
  void collect_nodes();
  void order_rows();
  void collect_pieces();
  void sweep(const int32_t* first, const int32_t* last);
  void add_piece(const std::vector<Interval>& rows, const Node& node, int32_t lo, int32_t hi);
  int32_t group_of(const std::vector<Interval>& rows);

  void emit_groups();
  void emit_block(const Group& group, const Tokens& tokens, std::vector<int64_t>& least_dropped);
  void emit_own(const StepRow& row, const Tokens& tokens);
  void emit_draft(const StepRow& row, const Tokens& tokens);
  int64_t push_run(PlanRun run, int64_t first_position);
  bool merge_run(const PlanRun& run);
  void count_run(const PlanRun& run, const Tokens& tokens);
  int32_t segment_pages(Index segment);
  int32_t row_pages(int32_t row);
  int32_t position(const Token& token) const;
  int32_t query_row(const Token& token) const;

  void assign_partials();
  void serialise(PlanData& out) const;

  const CacheCore* core_ = nullptr;
  PlanRequest request_{};
  PlanCounts counts_{};
  int32_t min_position_ = 0, max_position_ = 0;  // of the block being emitted

  std::vector<Node> nodes_;
  std::vector<int32_t> roots_;
  std::vector<int32_t> node_of_link_;
  std::vector<int32_t> order_;  // rows of the step, so that every node's rows stand together
  std::vector<Group> groups_;
  std::vector<int32_t> group_of_row_;
  std::unordered_map<uint64_t, int32_t> group_of_interval_;
  std::map<std::vector<Interval>, int32_t> group_of_set_;
  std::vector<int32_t> row_of_segment_;    // the row that writes on in it, -1: none
  std::vector<int32_t> pages_of_segment_;  // where its pages begin in pages_, -1: not there
  std::vector<int32_t> pages_of_row_;

  std::vector<PlanBlock> blocks_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> positions_;
  std::vector<PlanItem> items_;
  std::vector<int64_t> item_pairs_;
  std::vector<PlanRun> runs_;
  std::vector<int32_t> pages_;
  std::vector<uint64_t> words_;
  std::vector<int32_t> merge_indptr_;
  std::vector<int32_t> merge_rows_;
};

}  // namespace fork_attn
