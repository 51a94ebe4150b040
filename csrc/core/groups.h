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

// Query tokens that groups count as one: a branch's new tokens; or some of them once more, for what
// they see at a shift.
struct Leaf {
  int32_t row;           // of the step
  int32_t first, count;  // of its new tokens
  int64_t shift;
  bool own;                  // all of them, with what they see where it was written
  int32_t first_fresh = -1;  // see Groups::fresh
};

// New tokens of a watched row that a leaf sees: token t of its row sees the first `count` of them,
// in place only the first t - lag + 1.
struct FreshTokens {
  int32_t row;
  int32_t count;
  bool in_place;
  int32_t lag;
  int32_t next;  // of the leaf's, -1: none
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
  int64_t own = 0;    // of these a leaf's own new tokens
  int64_t fresh = 0;  // and those that it watches
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

  // The step's rows, so that those which share most are neighbours; once for each leaf.
  std::vector<int32_t> order;
  std::vector<Leaf> leaves;        // of each of `order`
  std::vector<FreshTokens> fresh;  // lists of what leaves watch
  // Of each of `order`, and the end: new tokens laid out in that order.
  std::vector<int32_t> token_begin;
  // Group i < order.size() is leaf i's own, new tokens included in slots.
  std::vector<Group> groups;
  std::vector<int32_t> roots;          // of the tree
  std::vector<int32_t> parents_first;  // the tree
  std::vector<int32_t> outside;        // groups that cross others
  // Per entry of order: some group outside the tree holds it, or its row has other leaves too.
  std::vector<uint8_t> crossed;

 private:
  struct Node {  // a link that some row sees; or, as a leaf, a row
    Index link;
    int32_t row;
    int32_t first_child, last_child, next_sibling;
    int32_t begin, end;
    int32_t rank;
  };

  struct Reader {  // of slots of a segment: leaves [begin, end)
    Index segment;
    int32_t lo, hi;
    int32_t begin, end;
    int32_t rank;
  };

  struct LeafPart {  // what a leaf reads that is not in the tree of links
    int32_t leaf;    // of made_
    Index segment;
    int32_t lo, hi;
  };

  struct Shifted {  // a leaf that is not a row's own, and where it is best placed
    int32_t leaf;   // of made_
    int32_t near_row;
    Index near_segment;
  };

  void collect_nodes();
  void collect_shifted(int32_t row);
  int32_t leaf_of(int32_t row, const ViewPart& part, std::size_t first_of_row);
  void sort_shifted();
  void add_leaf(int32_t made);
  void place_shifted_near(std::size_t order_begin);
  void place_shifted_left();
  int32_t add_node(Index link, int32_t row);
  void append_child(int32_t parent, int32_t child);
  void order_rows();
  void collect_pieces();
  void collect_readers();
  void sweep(std::span<const Reader> readers);
  void add_piece(int32_t group, const Reader& reader, int32_t lo, int32_t hi);
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
  std::vector<Leaf> made_;      // each row's own, then the shifted ones
  std::vector<int32_t> place_;  // of each of made_, in `order`
  std::vector<LeafPart> parts_;
  std::vector<Shifted> shifted_;
  std::vector<ViewPart> view_;
  std::vector<Reader> readers_;
  std::vector<RowRange> ranges_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> children_;
  // Of the groups of one range, by the row they begin with: the last made.
  std::vector<int32_t> last_of_begin_;
  std::map<std::vector<RowRange>, int32_t> group_of_set_;
};

}  // namespace fork_attn
