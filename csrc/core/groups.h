// Who reads what in an open step: its slots, grouped by the set of branches that see them.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "cache_core.h"

namespace fork_attn {

struct RowRange {
  int32_t begin, end;  // of Groups::order
  auto operator<=>(const RowRange&) const = default;
};

struct Piece {    // slots [lo, hi) of a segment
  int32_t group;  // who sees it
  int32_t rank;   // context order
  Index segment;
  int32_t lo, hi;
  int64_t first_position;
  int64_t at = 0;  // of slot lo in its readers' contexts; build_tiles only
};

struct Group {
  int32_t rows_begin, rows_end;  // who sees it: several ranges only where contexts were joined
  int32_t pieces_begin = 0, pieces_end = 0;
  int64_t slots = 0;
  // The tree of groups: a child's rows lie within its parent's. Groups that cross others stand
  // outside.
  bool in_tree = false;
  bool may_be_apart = true;  // an item may read it, with what is above, for all its readers
  int32_t depth = 0;
  int32_t parent = -1;
  int32_t children_begin = 0, children_end = 0;
  int64_t subtree_slots = 0;
  int32_t token_begin = 0, token_end = 0;  // of its rows, in order; of the hull outside the tree
  int32_t next_same_begin = -1;            // groups of one range that begin with the same row
};

class Groups {
 public:
  void build(const CacheCore& core, int32_t window);
  // For batch-invariant plans: groups hold whole tiles of their readers' contexts, and only one
  // that ends a chunk may be read apart. Contexts nest by what they hold, so no group crosses
  // another.
  void build_tiles(const CacheCore& core, int32_t window, int32_t tile_slots, int32_t chunk_slots);

  std::span<const RowRange> rows(const Group& g) const {
    return {ranges_.data() + g.rows_begin, ranges_.data() + g.rows_end};
  }
  std::span<const Piece> pieces(const Group& g) const {
    return {pieces_.data() + g.pieces_begin, pieces_.data() + g.pieces_end};
  }
  std::span<const int32_t> children(const Group& g) const {
    return {children_.data() + g.children_begin, children_.data() + g.children_end};
  }

  std::vector<int32_t> order;  // the step's rows, so that those which share most are neighbours
  // Of each of `order`, and the end: new tokens laid out in that order.
  std::vector<int32_t> token_begin;
  // Group i < order.size() is row order[i]'s own, new tokens included in slots.
  std::vector<Group> groups;
  std::vector<int32_t> roots;          // of the tree
  std::vector<int32_t> parents_first;  // the tree
  std::vector<int32_t> outside;        // groups that cross others
  std::vector<uint8_t> crossed;        // per entry of order: some group outside the tree holds it

 private:
  struct Node {  // a link that some row sees; or, as a leaf, a row
    Index link;
    int32_t row;
    int32_t first_child, last_child, next_sibling;
    int32_t begin, end;
    int32_t rank;
  };

  void collect_nodes();
  int32_t add_node(Index link, int32_t row);
  void append_child(int32_t parent, int32_t child);
  void order_rows();
  void collect_pieces();
  void sweep(const int32_t* first, const int32_t* last);
  void add_piece(int32_t group, const Node& node, int32_t lo, int32_t hi);
  int32_t group_of(RowRange rows);
  int32_t group_of(const std::vector<RowRange>& rows);
  int32_t add_group(std::span<const RowRange> rows);
  int64_t least_position(const Group& group) const;
  void count_slots();
  void build_tree();
  void link_children();
  // tile_groups.cpp
  void lay_out_rows();
  void count_group(int32_t g);

  void clear(const CacheCore& core, int32_t window);

  const CacheCore* core_ = nullptr;
  int32_t window_ = 0;
  std::vector<Node> nodes_;
  std::vector<int32_t> node_roots_;
  std::vector<int32_t> node_of_link_;
  std::vector<RowRange> ranges_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> children_;
  // Of the groups of one range, by the row they begin with: the last made.
  std::vector<int32_t> last_of_begin_;
  std::vector<int32_t> last_of_segment_;    // its last node
  std::vector<int32_t> before_in_segment_;  // per node: the one before it in its segment
  std::map<std::vector<RowRange>, int32_t> group_of_set_;
};

}  // namespace fork_attn
