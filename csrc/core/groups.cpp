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
  const Step& step = core.step();
  last_of_begin_.assign(order.size(), -1);
  token_begin.push_back(0);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto at = static_cast<int32_t>(i);
    last_of_begin_[i] = add_group({{RowRange{at, at + 1}}});
    token_begin.push_back(token_begin.back() + step.rows[order[i]].num_tokens);
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

// The forest of links that the step's rows see, with the rows as leaves.
void Groups::collect_nodes() {
  const Step& step = core_->step();
  for (std::size_t r = 0; r < step.rows.size(); ++r) {
    const StepRow& row = step.rows[r];
    int32_t child = add_node(kNone, static_cast<int32_t>(r));
    Index link = core_->branches()[row.branch].head;
    for (; link != kNone; link = core_->store().links[link].parent) {
      if (node_of_link_[link] >= 0) {
        append_child(node_of_link_[link], child);
        break;
      }
      const int32_t node = add_node(link, -1);
      node_of_link_[link] = node;
      append_child(node, child);
      child = node;
    }
    if (link == kNone) node_roots_.push_back(child);
  }
}

// Depth first, so that the rows below any node are a range.
void Groups::order_rows() {
  std::vector<int32_t> stack(node_roots_.rbegin(), node_roots_.rend());
  int32_t rank = 0;
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
    if (node.row >= 0) order.push_back(node.row);
    stack.push_back(~top);
    const std::size_t base = stack.size();
    for (int32_t c = node.first_child; c >= 0; c = nodes_[c].next_sibling) stack.push_back(c);
    std::reverse(stack.begin() + static_cast<std::ptrdiff_t>(base), stack.end());
  }
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

void Groups::add_piece(int32_t group, const Node& node, int32_t lo, int32_t hi) {
  const Link& l = core_->store().links[node.link];
  const int64_t first = core_->store().segments[l.segment].first_position + lo + l.position_shift;
  pieces_.push_back({group, node.rank, l.segment, lo, hi, first});
}

void Groups::collect_pieces() {
  const ContextStore& store = core_->store();
  // The nodes of each segment, linked; segments in order, so that a step has one plan.
  last_of_segment_.assign(store.segments.size(), -1);
  before_in_segment_.assign(nodes_.size(), -1);
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].link == kNone) continue;
    int32_t& last = last_of_segment_[store.links[nodes_[n].link].segment];
    before_in_segment_[n] = last;
    last = static_cast<int32_t>(n);
  }
  std::vector<int32_t> nodes;
  for (const int32_t last : last_of_segment_) {
    if (last < 0) continue;
    if (before_in_segment_[last] < 0) {
      const Node& node = nodes_[last];
      const Link& l = store.links[node.link];
      add_piece(group_of(RowRange{node.begin, node.end}), node, l.lo, l.hi);
      continue;
    }
    nodes.clear();
    for (int32_t n = last; n >= 0; n = before_in_segment_[n]) nodes.push_back(n);
    std::sort(nodes.begin(), nodes.end(),
              [&](int32_t a, int32_t b) { return nodes_[a].rank < nodes_[b].rank; });
    sweep(nodes.data(), nodes.data() + nodes.size());
  }
}

// Several links on one segment: cut it where the set of readers changes.
void Groups::sweep(const int32_t* first, const int32_t* last) {
  const ContextStore& store = core_->store();
  std::vector<int32_t> bounds;
  for (const int32_t* n = first; n != last; ++n) {
    bounds.push_back(store.links[nodes_[*n].link].lo);
    bounds.push_back(store.links[nodes_[*n].link].hi);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<RowRange> rows;
  for (std::size_t i = 0; i + 1 < bounds.size(); ++i) {
    rows.clear();
    const Node* reader = nullptr;
    for (const int32_t* n = first; n != last; ++n) {
      const Node& node = nodes_[*n];
      const Link& l = store.links[node.link];
      if (l.lo > bounds[i] || l.hi < bounds[i + 1]) continue;
      if (reader == nullptr) reader = &node;
      rows.push_back({node.begin, node.end});
    }
    if (reader == nullptr) continue;
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
    add_piece(group_of(rows), *reader, bounds[i], bounds[i + 1]);
  }
}

// Of the group's new tokens; the first row's position is a branch's least.
int64_t Groups::least_position(const Group& group) const {
  int64_t least = INT64_MAX;
  for (const RowRange& range : rows(group)) {
    for (int32_t i = range.begin; i < range.end; ++i) {
      least = std::min(least, core_->step().positions[core_->step().rows[order[i]].row_begin]);
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
    if (g < order.size()) group.slots += group.token_end - group.token_begin;
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
