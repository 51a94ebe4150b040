#include "groups.h"

#include <algorithm>
#include <climits>

namespace fork_attn {

void Groups::clear(const CacheCore& core, int32_t window) {
  core_ = &core;
  window_ = window;
  nodes_.clear();
  node_roots_.clear();
  order.clear();
  leaves.clear();
  fresh.clear();
  made_.clear();
  parts_.clear();
  shifted_.clear();
  token_begin.clear();
  groups.clear();
  roots.clear();
  outside.clear();
  ranges_.clear();
  pieces_.clear();
  group_of_set_.clear();
  parents_first.clear();
}

void Groups::build(const CacheCore& core, int32_t window) {
  clear(core, window);
  node_of_link_.assign(core.store().links.size(), -1);
  collect_nodes();
  order_rows();
  last_of_begin_.assign(order.size(), -1);
  token_begin.push_back(0);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto at = static_cast<int32_t>(i);
    last_of_begin_[i] = add_group({{RowRange{at, at + 1}}});
    token_begin.push_back(token_begin.back() + leaves[i].count);
  }
  collect_pieces();
  count_slots();
  build_tree();
}

int32_t Groups::add_node(Index link, int32_t row) {
  nodes_.push_back({link, row, -1, -1, -1, 0, 0, 0});
  return static_cast<int32_t>(nodes_.size() - 1);
}

void Groups::append_child(int32_t parent, int32_t child) {
  Node& p = nodes_[parent];
  if (p.last_child < 0) {
    p.first_child = child;
  } else {
    nodes_[p.last_child].next_sibling = child;
  }
  p.last_child = child;
}

// The forest of links that the step's rows see where they were written, with the rows as leaves.
void Groups::collect_nodes() {
  const ContextStore& store = core_->store();
  const Step& step = core_->step();
  for (std::size_t r = 0; r < step.rows.size(); ++r) {
    made_.push_back({static_cast<int32_t>(r), 0, step.rows[r].num_tokens, 0, true});
  }
  for (std::size_t r = 0; r < step.rows.size(); ++r) {
    const StepRow& row = step.rows[r];
    int32_t child = add_node(kNone, static_cast<int32_t>(r));
    Index link = core_->branches()[row.branch].head;
    if (link != kNone && store.links[link].shifted) collect_shifted(static_cast<int32_t>(r));
    bool below_visited = false;
    for (; link != kNone; link = store.links[link].parent) {
      const Link& l = store.links[link];
      if (l.watch != kNone) {
        if (store.watches[l.watch].rebase) break;  // everything older is shifted by its growth
        continue;
      }
      if (l.position_shift != 0) continue;
      if (node_of_link_[link] >= 0) {
        append_child(node_of_link_[link], child);
        below_visited = true;
        break;
      }
      const int32_t node = add_node(link, -1);
      node_of_link_[link] = node;
      append_child(node, child);
      child = node;
    }
    if (!below_visited) node_roots_.push_back(child);
  }
  sort_shifted();
}

// Depth first, so that the leaves below any node are a range. Shifted leaves stand behind whole
// trees.
void Groups::order_rows() {
  place_.assign(made_.size(), -1);
  std::vector<int32_t> stack;
  int32_t rank = 0;
  for (const int32_t root : node_roots_) {
    const std::size_t order_begin = order.size();
    stack.push_back(root);
    while (!stack.empty()) {
      const int32_t top = stack.back();
      stack.pop_back();
      if (top < 0) {
        nodes_[~top].end = static_cast<int32_t>(order.size());
        continue;
      }
      Node& node = nodes_[top];
      node.begin = static_cast<int32_t>(order.size());
      node.rank = rank++;
      if (node.row >= 0) add_leaf(node.row);
      stack.push_back(~top);
      const std::size_t base = stack.size();
      for (int32_t c = node.first_child; c >= 0; c = nodes_[c].next_sibling) stack.push_back(c);
      std::reverse(stack.begin() + static_cast<std::ptrdiff_t>(base), stack.end());
    }
    if (!shifted_.empty()) place_shifted_near(order_begin);
  }
  if (!shifted_.empty()) place_shifted_left();
}

int32_t Groups::add_group(std::span<const RowRange> rows) {
  const auto begin = static_cast<int32_t>(ranges_.size());
  ranges_.insert(ranges_.end(), rows.begin(), rows.end());
  groups.push_back({begin, static_cast<int32_t>(ranges_.size())});
  return static_cast<int32_t>(groups.size() - 1);
}

// Few groups begin with the same row: not more than the tree is deep.
int32_t Groups::group_of(RowRange rows) {
  int32_t& last = last_of_begin_[rows.begin];
  for (int32_t g = last; g >= 0; g = groups[g].next_same_begin) {
    if (ranges_[groups[g].rows_begin].end == rows.end) return g;
  }
  const int32_t added = add_group({&rows, 1});
  groups[added].next_same_begin = last;
  return last = added;
}

int32_t Groups::group_of(const std::vector<RowRange>& rows) {
  if (rows.size() == 1) return group_of(rows[0]);
  const auto [at, added] = group_of_set_.try_emplace(rows, -1);
  if (added) at->second = add_group(rows);
  return at->second;
}

void Groups::add_piece(int32_t group, const Reader& reader, int32_t lo, int32_t hi) {
  const int64_t first = core_->store().segments[reader.segment].first_position + lo;
  pieces_.push_back({group, reader.rank, reader.segment, lo, hi, first});
}

void Groups::collect_readers() {
  readers_.clear();
  for (const Node& node : nodes_) {
    if (node.link == kNone) continue;
    const Link& l = core_->store().links[node.link];
    readers_.push_back({l.segment, l.lo, l.hi, node.begin, node.end, node.rank});
  }
  auto rank = static_cast<int32_t>(nodes_.size());
  for (const LeafPart& p : parts_) {
    const int32_t at = place_[p.leaf];
    readers_.push_back({p.segment, p.lo, p.hi, at, at + 1, rank++});
  }
  std::sort(readers_.begin(), readers_.end(), [](const Reader& a, const Reader& b) {
    return a.segment != b.segment ? a.segment < b.segment : a.rank < b.rank;
  });
}

void Groups::collect_pieces() {
  collect_readers();
  for (std::size_t first = 0; first < readers_.size();) {
    std::size_t last = first + 1;
    while (last < readers_.size() && readers_[last].segment == readers_[first].segment) ++last;
    const Reader& reader = readers_[first];
    if (last == first + 1) {
      add_piece(group_of(RowRange{reader.begin, reader.end}), reader, reader.lo, reader.hi);
    } else {
      sweep({readers_.data() + first, last - first});
    }
    first = last;
  }
}

// Several readers of one segment: cut it where the set of leaves changes.
void Groups::sweep(std::span<const Reader> readers) {
  std::vector<int32_t> bounds;
  for (const Reader& r : readers) {
    bounds.push_back(r.lo);
    bounds.push_back(r.hi);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<RowRange> rows;
  for (std::size_t i = 0; i + 1 < bounds.size(); ++i) {
    rows.clear();
    const Reader* first = nullptr;
    for (const Reader& r : readers) {
      if (r.lo > bounds[i] || r.hi < bounds[i + 1]) continue;
      if (first == nullptr) first = &r;
      rows.push_back({r.begin, r.end});
    }
    if (first == nullptr) continue;
    std::sort(rows.begin(), rows.end());
    std::size_t kept = 0;  // neighbouring ranges become one
    for (std::size_t k = 1; k < rows.size(); ++k) {
      if (rows[k].begin <= rows[kept].end) {
        rows[kept].end = std::max(rows[kept].end, rows[k].end);
      } else {
        rows[++kept] = rows[k];
      }
    }
    rows.resize(kept + 1);
    add_piece(group_of(rows), *first, bounds[i], bounds[i + 1]);
  }
}

// Of the group's new tokens, shifts taken off; a leaf's first token has its least.
int64_t Groups::least_position(const Group& group) const {
  int64_t least = INT64_MAX;
  for (const RowRange& range : rows(group)) {
    for (int32_t i = range.begin; i < range.end; ++i) {
      const Leaf& leaf = leaves[i];
      const int32_t row = core_->step().rows[leaf.row].row_begin + leaf.first;
      least = std::min(least, core_->step().positions[row] - leaf.shift);
    }
  }
  return least;
}

// Counts the slots that the window leaves visible to some row of each group.
void Groups::count_slots() {
  std::sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) {
    if (a.group != b.group) return a.group < b.group;
    return a.rank != b.rank ? a.rank < b.rank : a.lo < b.lo;
  });
  int32_t piece = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    Group& group = groups[g];
    group.token_begin = token_begin[ranges_[group.rows_begin].begin];
    group.token_end = token_begin[ranges_[group.rows_end - 1].end];
    const int64_t visible_from = window_ == 0 ? INT64_MIN / 2 : least_position(group) - window_ + 1;
    group.pieces_begin = piece;
    for (; piece < static_cast<int32_t>(pieces_.size()); ++piece) {
      const Piece& p = pieces_[piece];
      if (p.group != static_cast<int32_t>(g)) break;
      const int64_t slots = p.hi - p.lo;
      group.slots += slots - std::clamp<int64_t>(visible_from - p.first_position, 0, slots);
    }
    group.pieces_end = piece;
    if (g >= order.size()) continue;
    const Leaf& leaf = leaves[g];
    if (leaf.own) group.own = group.token_end - group.token_begin;
    for (int32_t f = leaf.first_fresh; f >= 0; f = fresh[f].next) group.fresh += fresh[f].count;
    group.slots += group.own + group.fresh;
  }
}

// Nests the groups by their rows, widest first.
void Groups::build_tree() {
  crossed.assign(order.size(), 0);
  std::vector<int32_t> nested;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    if (rows(groups[g]).size() > 1) outside.push_back(static_cast<int32_t>(g));
  }
  const auto range = [&](int32_t g) { return ranges_[groups[g].rows_begin]; };
  for (const int32_t last : last_of_begin_) {
    const auto first = static_cast<std::ptrdiff_t>(nested.size());
    for (int32_t g = last; g >= 0; g = groups[g].next_same_begin) nested.push_back(g);
    std::sort(nested.begin() + first, nested.end(),
              [&](int32_t a, int32_t b) { return range(a).end > range(b).end; });
  }
  std::vector<int32_t> path;
  std::size_t kept = 0;
  for (const int32_t g : nested) {
    while (!path.empty() && range(path.back()).end <= range(g).begin) path.pop_back();
    if (!path.empty() && range(path.back()).end < range(g).end) {  // a joined range across a fork
      outside.push_back(g);
      continue;
    }
    groups[g].in_tree = true;
    groups[g].depth = static_cast<int32_t>(path.size());
    if (path.empty()) {
      roots.push_back(g);
    } else {
      groups[g].parent = path.back();
    }
    path.push_back(g);
    nested[kept++] = g;
  }
  nested.resize(kept);
  parents_first.swap(nested);
  link_children();
  if (!shifted_.empty()) {  // rows of several leaves have several results
    for (const Leaf& leaf : leaves) {
      if (!leaf.own) crossed[place_[leaf.row]] = 1;
    }
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      if (!leaves[i].own) crossed[i] = 1;
    }
  }
  for (const int32_t g : outside) {
    for (const RowRange& r : rows(groups[g])) {
      std::fill(crossed.begin() + r.begin, crossed.begin() + r.end, 1);
    }
  }
}

void Groups::link_children() {
  for (const int32_t g : parents_first) {
    if (groups[g].parent >= 0) ++groups[groups[g].parent].children_end;
  }
  int32_t next = 0;
  for (const int32_t g : parents_first) {
    const int32_t count = groups[g].children_end;
    groups[g].children_begin = groups[g].children_end = next;
    next += count;
  }
  children_.resize(next);
  for (const int32_t g : parents_first) {
    if (groups[g].parent >= 0) children_[groups[groups[g].parent].children_end++] = g;
  }
  for (std::size_t k = parents_first.size(); k-- > 0;) {
    Group& group = groups[parents_first[k]];
    group.subtree_slots += group.slots;
    if (group.parent >= 0) groups[group.parent].subtree_slots += group.subtree_slots;
  }
}

}  // namespace fork_attn
