#include "planner.h"

#include <algorithm>
#include <bit>
#include <climits>

namespace fork_attn {

void Planner::reset(const CacheCore& core, const PlanRequest& request) {
  core_ = &core;
  request_ = request;
  counts_ = {};
  nodes_.clear();
  roots_.clear();
  order_.clear();
  groups_.clear();
  group_of_interval_.clear();
  group_of_set_.clear();
  const std::size_t num_rows = core.step().rows.size();
  const auto num_segments = static_cast<std::size_t>(core.store().segments.size());
  node_of_link_.assign(core.store().links.size(), -1);
  group_of_row_.assign(num_rows, -1);
  pages_of_row_.assign(num_rows, -1);
  row_of_segment_.assign(num_segments, -1);
  pages_of_segment_.assign(num_segments, -1);
  blocks_.clear();
  tokens_.clear();
  positions_.clear();
  items_.clear();
  item_pairs_.clear();
  runs_.clear();
  pages_.clear();
  words_.clear();
}

PlanData Planner::build(const CacheCore& core, const PlanRequest& request) {
  reset(core, request);
  collect_nodes();
  order_rows();
  collect_pieces();
  emit_groups();
  assign_partials();
  PlanData out;
  serialise(out);
  out.item_pairs = item_pairs_;
  counts_.num_tokens = static_cast<int64_t>(core.step().positions.size());
  counts_.num_blocks = static_cast<int64_t>(blocks_.size());
  counts_.num_items = static_cast<int64_t>(items_.size());
  counts_.num_runs = static_cast<int64_t>(runs_.size());
  out.counts = counts_;
  return out;
}

int32_t Planner::add_node(Index link, int32_t row) {
  nodes_.push_back({link, row, -1, -1, -1, 0, 0, 0});
  return static_cast<int32_t>(nodes_.size() - 1);
}

void Planner::append_child(int32_t parent, int32_t child) {
  Node& p = nodes_[parent];
  if (p.last_child < 0) {
    p.first_child = child;
  } else {
    nodes_[p.last_child].next_sibling = child;
  }
  p.last_child = child;
}

// The forest of links that the step's rows see, with the rows as leaves.
void Planner::collect_nodes() {
  const Step& step = core_->step();
  for (std::size_t r = 0; r < step.rows.size(); ++r) {
    const StepRow& row = step.rows[r];
    if (row.segment != kNone) row_of_segment_[row.segment] = static_cast<int32_t>(r);
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
    if (link == kNone) roots_.push_back(child);
  }
}

// Depth first, so that the rows below any node are a range.
void Planner::order_rows() {
  std::vector<int32_t> stack(roots_.rbegin(), roots_.rend());
  int32_t rank = 0;
  while (!stack.empty()) {
    const int32_t top = stack.back();
    stack.pop_back();
    if (top < 0) {
      nodes_[~top].end = static_cast<int32_t>(order_.size());
      continue;
    }
    Node& node = nodes_[top];
    node.begin = static_cast<int32_t>(order_.size());
    node.rank = rank++;
    if (node.row >= 0) order_.push_back(node.row);
    stack.push_back(~top);
    const std::size_t base = stack.size();
    for (int32_t c = node.first_child; c >= 0; c = nodes_[c].next_sibling) stack.push_back(c);
    std::reverse(stack.begin() + static_cast<std::ptrdiff_t>(base), stack.end());
  }
}

int32_t Planner::group_of(const std::vector<Interval>& rows) {
  int32_t* slot;
  if (rows.size() == 1 && rows[0].end == rows[0].begin + 1) {
    slot = &group_of_row_[rows[0].begin];
  } else if (rows.size() == 1) {
    const uint64_t key =
        (static_cast<uint64_t>(rows[0].begin) << 32) | static_cast<uint32_t>(rows[0].end);
    slot = &group_of_interval_.try_emplace(key, -1).first->second;
  } else {
    slot = &group_of_set_.try_emplace(rows, -1).first->second;
  }
  if (*slot < 0) {
    *slot = static_cast<int32_t>(groups_.size());
    groups_.push_back({rows, {}});
  }
  return *slot;
}

void Planner::add_piece(const std::vector<Interval>& rows, const Node& node, int32_t lo,
                        int32_t hi) {
  const Link& l = core_->store().links[node.link];
  const int64_t first = core_->store().segments[l.segment].first_position + lo + l.position_shift;
  groups_[group_of(rows)].pieces.push_back({node.rank, l.segment, lo, hi, first});
}

void Planner::collect_pieces() {
  const ContextStore& store = core_->store();
  std::vector<int32_t> by_segment;
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].link != kNone) by_segment.push_back(static_cast<int32_t>(n));
  }
  const auto segment_of = [&](int32_t n) { return store.links[nodes_[n].link].segment; };
  std::sort(by_segment.begin(), by_segment.end(), [&](int32_t a, int32_t b) {
    return segment_of(a) != segment_of(b) ? segment_of(a) < segment_of(b)
                                          : nodes_[a].rank < nodes_[b].rank;
  });
  for (std::size_t first = 0; first < by_segment.size();) {
    std::size_t last = first + 1;
    while (last < by_segment.size() &&
           segment_of(by_segment[last]) == segment_of(by_segment[first]))
      ++last;
    const Node& node = nodes_[by_segment[first]];
    if (last == first + 1) {
      const Link& l = store.links[node.link];
      add_piece({{node.begin, node.end}}, node, l.lo, l.hi);
    } else {
      sweep(by_segment.data() + first, by_segment.data() + last);
    }
    first = last;
  }
}

// Several links on one segment: cut it where the set of readers changes.
void Planner::sweep(const int32_t* first, const int32_t* last) {
  const ContextStore& store = core_->store();
  std::vector<int32_t> bounds;
  for (const int32_t* n = first; n != last; ++n) {
    bounds.push_back(store.links[nodes_[*n].link].lo);
    bounds.push_back(store.links[nodes_[*n].link].hi);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<Interval> rows;
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
    add_piece(rows, *reader, bounds[i], bounds[i + 1]);
  }
}

void Planner::assign_partials() {
  const std::size_t num_tokens = core_->step().positions.size();
  merge_indptr_.assign(num_tokens + 1, 0);
  for (const PlanItem& item : items_) {
    const PlanBlock& b = blocks_[item.block];
    for (int32_t t = 0; t < b.num_tokens; ++t) ++merge_indptr_[tokens_[b.token_begin + t] + 1];
  }
  int32_t next = 0;
  for (PlanItem& item : items_) {
    const PlanBlock& b = blocks_[item.block];
    bool shared = false;
    for (int32_t t = 0; t < b.num_tokens; ++t)
      shared |= merge_indptr_[tokens_[b.token_begin + t] + 1] > 1;
    item.partial_begin = shared ? next : -1;
    if (shared) {
      next += b.num_tokens;
      continue;
    }
    for (int32_t t = 0; t < b.num_tokens; ++t) merge_indptr_[tokens_[b.token_begin + t] + 1] = 0;
  }
  counts_.num_partial_rows = next;
  for (std::size_t t = 0; t < num_tokens; ++t) merge_indptr_[t + 1] += merge_indptr_[t];
  merge_rows_.assign(merge_indptr_[num_tokens], 0);
  std::vector<int32_t> at(merge_indptr_.begin(), merge_indptr_.end() - 1);
  for (const PlanItem& item : items_) {
    if (item.partial_begin < 0) continue;
    const PlanBlock& b = blocks_[item.block];
    for (int32_t t = 0; t < b.num_tokens; ++t) {
      merge_rows_[at[tokens_[b.token_begin + t]]++] = item.partial_begin + t;
    }
  }
}

namespace {

class Writer {
 public:
  explicit Writer(std::vector<int64_t>& buffer) : buffer_(buffer) {}
  template <class T>
  int32_t section(const std::vector<T>& data) {
    const auto offset = static_cast<int32_t>(buffer_.size());
    const std::size_t bytes = data.size() * sizeof(T);
    buffer_.resize(buffer_.size() + (bytes + 7) / 8, 0);
    if (bytes != 0)
      std::copy_n(reinterpret_cast<const char*>(data.data()), bytes,
                  reinterpret_cast<char*>(buffer_.data() + offset));
    return offset;
  }

 private:
  std::vector<int64_t>& buffer_;
};

}  // namespace

void Planner::serialise(PlanData& out) const {
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.version = kPlanVersion;
  h.num_tokens = static_cast<int32_t>(core_->step().positions.size());
  h.num_blocks = static_cast<int32_t>(blocks_.size());
  h.num_block_tokens = static_cast<int32_t>(tokens_.size());
  h.num_items = static_cast<int32_t>(items_.size());
  h.num_runs = static_cast<int32_t>(runs_.size());
  h.num_pages = static_cast<int32_t>(pages_.size());
  h.num_words = static_cast<int32_t>(words_.size());
  h.num_partial_rows = static_cast<int32_t>(counts_.num_partial_rows);
  h.num_merge_rows = static_cast<int32_t>(merge_rows_.size());
  h.group = request_.group;
  h.page_size = core_->page_size();
  h.window = request_.window;
  h.page_limit = pages_.empty() ? 0 : 1 + *std::max_element(pages_.begin(), pages_.end());
  for (const PlanBlock& b : blocks_)
    h.max_block_tokens = std::max(h.max_block_tokens, b.num_tokens);

  out.buffer.assign(sizeof(PlanHeader) / 8, 0);
  Writer writer(out.buffer);
  h.off_blocks = writer.section(blocks_);
  h.off_tokens = writer.section(tokens_);
  h.off_positions = writer.section(positions_);
  h.off_items = writer.section(items_);
  h.off_runs = writer.section(runs_);
  h.off_pages = writer.section(pages_);
  h.off_words = writer.section(words_);
  h.off_merge_indptr = writer.section(merge_indptr_);
  h.off_merge_rows = writer.section(merge_rows_);
  h.total_words = static_cast<int32_t>(out.buffer.size());
  std::copy_n(reinterpret_cast<const char*>(&h), sizeof(h),
              reinterpret_cast<char*>(out.buffer.data()));
}

}  // namespace fork_attn
