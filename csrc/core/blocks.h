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
  BlockChooser(const Groups& groups, const CostModel& costs, int32_t max_tokens)
      : groups_(groups), costs_(costs), max_tokens_(max_tokens) {}

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
  struct RowReads {      // what a row's block reads for it
    int64_t slots = 0;   // below the ancestors that are read apart
    int64_t before = 0;  // of the rows before it, as far as their next row does not read it too
  };

  Best best(int32_t group, const Above& above);
  double leaf_cost(const Group& group, int64_t slots_above, bool partial) const;
  double packs_cost(std::span<const int32_t> children, const Above& above);
  template <class F>
  double each_pack(std::span<const int32_t> children, const Above& above, F&& visit);
  double block_cost(int64_t tokens, int64_t slots, bool partial) const;
  double kept_cost(const Group& group, int64_t slots) const;
  bool partial(const Above& above, const Group& group) const {
    return above.kept > 0 || groups_.crossed[groups_.rows(group)[0].begin] != 0;
  }
  static int64_t tokens(const Group& group) { return group.token_end - group.token_begin; }
  Above below(const Group& group, const Above& above, bool keep) const;

  void keep(int32_t group, const Above& above);
  void keep_below(std::span<const int32_t> children, const Above& above);
  void pack_rows();
  bool same_kept(std::size_t a, std::size_t b) const;
  void pack_range(const std::vector<RowReads>& reads, std::size_t begin, std::size_t end);
  void add_pack(std::size_t first, std::size_t last);
  void add_path(int32_t group, int32_t from, int32_t seen_by);
  void add_blocks(int32_t begin, int32_t end, int32_t streams_begin);

  const Groups& groups_;
  const CostModel& costs_;
  int64_t max_tokens_;
  std::vector<int32_t> first_best_;  // of each group in best_
  std::vector<Best> best_;           // per group, per number of kept ancestors
  std::vector<int32_t> kept_;        // per row: how many of its ancestors are settled elsewhere
  BlockChoice out_;
};

}  // namespace fork_attn
