// Which query tokens are served together, and what each block of them reads: absorb or keep, by
// cost.
//
// A block may stream a whole subtree of contexts, ancestors included, with no partial results; or
// an ancestor becomes an item of its own, read once for all below it, and everybody below writes
// partial results. The choice is the least cost over the tree of groups: bytes read again,
// arithmetic on masked slots, and partials all have their price.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "costs.h"
#include "groups.h"

namespace fork_attn {

struct Block {
  int32_t token_begin, token_end;  // in the order of Groups; a range of at most max_tokens tokens
  int32_t streams_begin, streams_end;  // into BlockChoice::streams: the groups that it reads
};

struct BlockChoice {
  std::vector<Block> blocks;  // ancestors first
  std::vector<int32_t> streams;
  double cost = 0;  // of all of them, one KV head, in ns
};

class BlockChooser {
 public:
  // chunk_slots: below a group that is read apart, every so many slots are an item (0: one item).
  BlockChooser(const Groups& groups, const CostModel& costs, int32_t max_tokens,
               int32_t chunk_slots)
      : groups_(groups), costs_(costs), max_tokens_(max_tokens), chunk_slots_(chunk_slots) {}

  BlockChoice choose();

 private:
  // What is above a subtree: groups on the way from below `kept` (a depth; everything above is read
  // elsewhere).
  struct Above {
    int32_t kept;  // how many of the ancestors are read by items of their own, or above one that is
    int64_t slots;  // of the ancestors that are not, which each block below reads itself
  };
  enum class How : uint8_t { kWhole, kKeep, kPush };
  struct Best {
    double cost = -1;
    How how = How::kWhole;
  };
  struct Pack {  // the cheapest packs of the first rows
    double cost;
    int32_t first;  // row of the last of them
  };
  static constexpr std::size_t kFewRows = 32;
  static constexpr std::size_t kFewAncestors = 8;

  Best best(int32_t group, const Above& above);
  double leaf_cost(const Group& group, int64_t slots_above, bool partial) const;
  double packs_cost(std::span<const int32_t> children, const Above& above);
  template <class F>
  double each_pack(std::span<const int32_t> children, const Above& above, F&& visit);
  double block_cost(int64_t tokens, int64_t slots, bool partial) const;
  double chunks_cost(int64_t tokens, int64_t slots) const;
  double kept_cost(const Group& group, int64_t slots, bool from_start) const;
  bool partial(const Above& above, const Group& group) const {
    return above.kept > 0 || groups_.crossed[groups_.rows(group)[0].begin] != 0;
  }
  static int64_t tokens(const Group& group) { return group.token_end - group.token_begin; }
  Above below(const Group& group, const Above& above, bool keep) const;

  void choose_apart();
  void set_apart(std::span<const int32_t> children, const Above& above);
  double evaluate();
  double pack_rows();
  double improve(double cost);
  // How many of a row's ancestors are settled by the nearest that is read apart.
  int32_t kept_depth(int32_t row) const {
    return nearest_[row] < 0 ? 0 : groups_.groups[nearest_[row]].depth + 1;
  }
  void add_pack(int32_t first, int32_t last);
  void add_path(int32_t group, int32_t stop, int32_t seen_by);
  void add_blocks(int32_t begin, int32_t end, int32_t streams_begin);

  const Groups& groups_;
  const CostModel& costs_;
  int64_t max_tokens_;
  int64_t chunk_slots_;
  std::vector<int32_t> first_best_;  // of each group in best_
  std::vector<Best> best_;           // per group, per number of kept ancestors
  std::vector<uint8_t> apart_;       // per group: it is read by an item of its own
  // Per group, from evaluate():
  std::vector<int32_t> nearest_;  // ancestor or itself that is read apart, -1: none
  std::vector<int64_t> above_;    // slots of its ancestors below that
  // Per row: slots that rows before it read, as far as the row after them does not read them too.
  std::vector<int64_t> last_reads_;
  std::vector<Pack> packs_;  // per number of rows
  BlockChoice out_;
};

}  // namespace fork_attn
