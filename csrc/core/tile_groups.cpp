// Groups for batch-invariant plans. A row's context is cut into tiles and chunks at multiples of
// their sizes, counted in its own order; who shares it changes nothing about that.
#include <algorithm>
#include <cstddef>
#include <unordered_map>

#include "groups.h"

namespace fork_attn {

namespace {

struct TrieNode {  // slots [lo, hi) of a segment; or, as a leaf, a row
  Index segment;
  int32_t lo, hi;
  int64_t first_position;
  int64_t at;  // of slot lo in the context
  int32_t row;
  int32_t parent;
  int32_t first_child = -1, last_child = -1, next_sibling = -1;
  int32_t begin = 0, end = 0;  // rows below, in depth-first order
  int32_t group = -1;          // the lowest that holds tiles of it or of its ancestors

  int64_t end_at() const { return at + hi - lo; }
};

// Contexts by what they hold, whichever links say so: a branch that was cropped shares what is
// left.
class ContextTrie {
 public:
  explicit ContextTrie(const CacheCore& core) : store_(core.store()) {
    nodes_.push_back({kNone, 0, 0, 0, 0, -1, -1});  // the empty context
    node_of_link_.assign(store_.links.size(), -1);
    for (std::size_t r = 0; r < core.step().rows.size(); ++r) {
      const int32_t end = insert(core.branches()[core.step().rows[r].branch].head);
      append(end, {kNone, 0, 0, 0, nodes_[end].end_at(), static_cast<int32_t>(r), end});
    }
  }

  std::vector<TrieNode>& nodes() { return nodes_; }

  // Depth first; sets the rows below each node.
  std::vector<int32_t> parents_first() {
    std::vector<int32_t> out;
    std::vector<int32_t> stack = {0};
    int32_t rows = 0;
    while (!stack.empty()) {
      const int32_t top = stack.back();
      stack.pop_back();
      if (top < 0) {
        nodes_[~top].end = rows;
        continue;
      }
      TrieNode& node = nodes_[top];
      node.begin = rows;
      if (node.row >= 0) ++rows;
      out.push_back(top);
      stack.push_back(~top);
      const std::size_t base = stack.size();
      for (int32_t c = node.first_child; c >= 0; c = nodes_[c].next_sibling) stack.push_back(c);
      std::reverse(stack.begin() + static_cast<std::ptrdiff_t>(base), stack.end());
    }
    return out;
  }

 private:
  struct Key {  // a child by its parent and its first slot
    int32_t parent;
    Index segment;
    int32_t lo;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Key& k) const {
      uint64_t h = (uint64_t{static_cast<uint32_t>(k.parent)} << 32) ^
                   static_cast<uint64_t>(k.segment) * 0x9e3779b97f4a7c15u;
      h = (h ^ static_cast<uint32_t>(k.lo)) * 0xff51afd7ed558ccdu;
      return static_cast<std::size_t>(h ^ (h >> 29));
    }
  };

  int32_t append(int32_t parent, const TrieNode& node) {
    const auto added = static_cast<int32_t>(nodes_.size());
    nodes_.push_back(node);
    TrieNode& p = nodes_[parent];
    (p.last_child < 0 ? p.first_child : nodes_[p.last_child].next_sibling) = added;
    p.last_child = added;
    return added;
  }

  // The node at which a context ends.
  int32_t insert(Index head) {
    way_.clear();
    int32_t node = 0;
    for (Index link = head; link != kNone; link = store_.links[link].parent) {
      if (node_of_link_[link] >= 0) {
        node = node_of_link_[link];
        break;
      }
      way_.push_back(link);
    }
    for (std::size_t i = way_.size(); i-- > 0;) {
      node = descend(node, store_.links[way_[i]]);
      node_of_link_[way_[i]] = node;
    }
    return node;
  }

  int32_t descend(int32_t node, const Link& link) {
    if (link.position_shift != 0) {
      fail(ErrorKind::kUnsupported,
           "batch_invariant: contexts that see tokens at shifted positions are not part of this "
           "version");
    }
    for (int32_t lo = link.lo; lo < link.hi;) {
      const auto [found, added] = child_.try_emplace({node, link.segment, lo}, -1);
      if (added) {
        const int64_t first = store_.segments[link.segment].first_position + lo;
        found->second =
            append(node, {link.segment, lo, link.hi, first, nodes_[node].end_at(), -1, node});
      }
      node = found->second;
      if (nodes_[node].hi > link.hi) node = split(node, link.hi);
      lo = nodes_[node].hi;
    }
    return node;
  }

  // Cuts a node in two; it stays the lower one, so that contexts that end in it still do.
  int32_t split(int32_t lower, int32_t slot) {
    const auto upper = static_cast<int32_t>(nodes_.size());
    nodes_.push_back(nodes_[lower]);
    TrieNode& u = nodes_[upper];
    TrieNode& l = nodes_[lower];
    TrieNode& p = nodes_[u.parent];
    u.hi = l.lo = slot;
    l.first_position += slot - u.lo;
    l.at += slot - u.lo;
    u.first_child = u.last_child = lower;
    l.parent = upper;
    l.next_sibling = -1;
    int32_t* at = &p.first_child;
    while (*at != lower) at = &nodes_[*at].next_sibling;
    *at = upper;
    if (p.last_child == lower) p.last_child = upper;
    child_[{u.parent, u.segment, u.lo}] = upper;
    child_[{upper, l.segment, slot}] = lower;
    return upper;
  }

  const ContextStore& store_;
  std::vector<TrieNode> nodes_;
  std::vector<int32_t> node_of_link_;  // the node that ends where the link ends
  std::vector<Index> way_;
  std::unordered_map<Key, int32_t, Hash> child_;
};

}  // namespace

// Every row's own group, once their order is known.
void Groups::lay_out_rows() {
  token_begin.push_back(0);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto at = static_cast<int32_t>(i);
    const int32_t count = core_->step().rows[order[i]].num_tokens;
    leaves.push_back({order[i], 0, count, 0, true});
    add_group({{RowRange{at, at + 1}}});
    groups.back().own = count;
    token_begin.push_back(token_begin.back() + count);
  }
  crossed.assign(order.size(), 0);
}

// Slots that the window leaves visible, as in count_slots.
void Groups::count_group(int32_t g) {
  Group& group = groups[g];
  group.in_tree = true;
  group.token_begin = token_begin[rows(group)[0].begin];
  group.token_end = token_begin[rows(group)[0].end];
  const int64_t visible_from = window_ == 0 ? INT64_MIN / 2 : least_position(group) - window_ + 1;
  for (const Piece& p : pieces(group)) {
    const int64_t slots = p.hi - p.lo;
    group.slots += slots - std::clamp<int64_t>(visible_from - p.first_position, 0, slots);
  }
}

void Groups::build_tiles(const CacheCore& core, int32_t window, int32_t tile_slots,
                         int32_t chunk_slots) {
  clear(core, window);
  ContextTrie trie(core);
  const std::vector<int32_t> preorder = trie.parents_first();
  std::vector<TrieNode>& nodes = trie.nodes();
  for (const int32_t n : preorder) {
    if (nodes[n].row >= 0) order.push_back(nodes[n].row);
  }
  lay_out_rows();
  // Slots [from, to) of the contexts that go through `node`.
  const auto fill = [&](int32_t g, int32_t node, int64_t from, int64_t to) {
    groups[g].pieces_begin = static_cast<int32_t>(pieces_.size());
    for (; node >= 0 && nodes[node].end_at() > from; node = nodes[node].parent) {
      const TrieNode& part = nodes[node];
      const int64_t lo = std::max(from, part.at);
      const int64_t hi = std::min(to, part.end_at());
      if (lo >= hi) continue;
      const auto skipped = static_cast<int32_t>(lo - part.at);
      pieces_.push_back({g, 0, part.segment, part.lo + skipped,
                         part.lo + static_cast<int32_t>(hi - part.at),
                         part.first_position + skipped, lo});
    }
    std::reverse(pieces_.begin() + groups[g].pieces_begin, pieces_.end());
    groups[g].pieces_end = static_cast<int32_t>(pieces_.size());
  };
  const auto place = [&](int32_t g, int32_t parent) {
    count_group(g);
    groups[g].parent = parent;
    groups[g].depth = parent < 0 ? 0 : groups[parent].depth + 1;
    if (parent < 0) roots.push_back(g);
    parents_first.push_back(g);
  };
  for (const int32_t n : preorder) {
    TrieNode& node = nodes[n];
    if (node.parent >= 0) node.group = nodes[node.parent].group;
    if (node.row >= 0) {  // what only this row sees, from the tile on in which that begins
      int32_t shared = node.parent;
      while (shared >= 0 && nodes[shared].end - nodes[shared].begin < 2)
        shared = nodes[shared].parent;
      const int64_t from = shared < 0 ? 0 : nodes[shared].end_at() / tile_slots * tile_slots;
      fill(node.begin, n, from, node.at);
      place(node.begin, node.group);
      groups[node.begin].slots += core.step().rows[node.row].num_tokens;
      continue;
    }
    if (node.end - node.begin < 2) continue;
    const int64_t from = node.at / tile_slots * tile_slots;
    const int64_t to = node.end_at() / tile_slots * tile_slots;
    const int64_t closed = std::max(from, node.end_at() / chunk_slots * chunk_slots);
    for (const auto& [lo, hi] : {std::pair{from, closed}, std::pair{closed, to}}) {
      if (lo >= hi) continue;
      const RowRange range{node.begin, node.end};
      const int32_t g = add_group({&range, 1});
      groups[g].may_be_apart = hi % chunk_slots == 0;
      fill(g, n, lo, hi);
      place(g, node.group);
      node.group = g;
    }
  }
  link_children();
}

}  // namespace fork_attn
