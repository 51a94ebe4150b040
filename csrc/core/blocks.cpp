#include "blocks.h"

#include <algorithm>

namespace fork_attn {

double BlockChooser::block_cost(int64_t tokens, int64_t slots, bool partial) const {
  return costs_.item(tokens, slots) + (partial ? costs_.partials(tokens) : 0.0);
}

// One row's own tokens over everything before them; blocks of a long prefill see more and more of
// its own slots.
double BlockChooser::leaf_cost(const Group& group, int64_t slots_above, bool partial) const {
  const int64_t count = tokens(group);
  const int64_t context = slots_above + group.slots - count;
  double cost = 0;
  for (int64_t first = 0; first < count; first += max_tokens_) {
    const int64_t last = std::min(count, first + max_tokens_);
    cost += block_cost(last - first, context + last, partial);
  }
  return cost;
}

double BlockChooser::kept_cost(const Group& group, int64_t slots) const {
  const int64_t count = tokens(group);
  const int64_t full = count / max_tokens_;
  const int64_t rest = count % max_tokens_;
  return static_cast<double>(full) * block_cost(max_tokens_, slots, true) +
         (rest > 0 ? block_cost(rest, slots, true) : 0.0);
}

BlockChooser::Above BlockChooser::below(const Group& group, const Above& above, bool keep) const {
  return keep ? Above{group.depth + 1, 0} : Above{above.kept, above.slots + group.slots};
}

// Splits children into packs that one block serves each, greedily: a child joins its elder
// neighbours where one block costs less than two.
template <class F>
double BlockChooser::each_pack(std::span<const int32_t> children, const Above& above, F&& visit) {
  double total = 0;
  std::size_t first = 0;
  double pack_cost = 0;
  int64_t count = 0;
  int64_t slots = 0;
  for (std::size_t i = 0; i < children.size(); ++i) {
    const Group& child = groups_.groups[children[i]];
    const double alone = best(children[i], above).cost;
    if (i > first && count + tokens(child) <= max_tokens_) {
      const double joined =
          block_cost(count + tokens(child), slots + child.subtree_slots, partial(above, child));
      if (joined <= pack_cost + alone) {
        slots += child.subtree_slots;
        count += tokens(child);
        pack_cost = joined;
        continue;
      }
    }
    if (i > first) visit(children.subspan(first, i - first));
    total += pack_cost;
    first = i;
    slots = above.slots + child.subtree_slots;
    count = tokens(child);
    pack_cost = alone;
  }
  if (children.size() > first) visit(children.subspan(first));
  return total + pack_cost;
}

double BlockChooser::packs_cost(std::span<const int32_t> children, const Above& above) {
  return each_pack(children, above, [](std::span<const int32_t>) {});
}

BlockChooser::Best BlockChooser::best(int32_t index, const Above& above) {
  const Group& group = groups_.groups[index];
  Best& known = best_[first_best_[index] + above.kept];
  if (known.cost >= 0) return known;
  const bool writes_partials = partial(above, group);
  Best found;
  if (groups_.children(group).empty()) {
    found = {leaf_cost(group, above.slots, writes_partials), How::kWhole};
  } else {
    found = {packs_cost(groups_.children(group), below(group, above, false)), How::kPush};
    const double kept = kept_cost(group, above.slots + group.slots) +
                        packs_cost(groups_.children(group), below(group, above, true));
    if (kept < found.cost) found = {kept, How::kKeep};
    if (tokens(group) <= max_tokens_) {
      const double whole =
          block_cost(tokens(group), above.slots + group.subtree_slots, writes_partials);
      if (whole < found.cost) found = {whole, How::kWhole};
    }
  }
  return known = found;
}

BlockChoice BlockChooser::choose() {
  first_best_.clear();
  int32_t states = 0;
  for (const Group& group : groups_.groups) {
    first_best_.push_back(states);
    states += group.in_tree ? group.depth + 1 : 0;
  }
  best_.assign(states, {});
  out_ = {};
  kept_.assign(groups_.order.size(), 0);
  keep_below(groups_.roots, {0, 0});
  // Groups that cross the tree are read by themselves. Their blocks go by the hull of their rows,
  // so that a block's tokens stay a range; rows in between that do not see the group are masked.
  for (const int32_t g : groups_.outside) {
    const Group& group = groups_.groups[g];
    out_.cost += kept_cost(group, group.slots);
    const auto streams_begin = static_cast<int32_t>(out_.streams.size());
    out_.streams.push_back(g);
    add_blocks(group.token_begin, group.token_end, streams_begin);
  }
  pack_rows();
  return std::move(out_);
}

// Cuts the range of tokens into blocks that read the streams from `streams_begin` on.
void BlockChooser::add_blocks(int32_t begin, int32_t end, int32_t streams_begin) {
  const auto streams_end = static_cast<int32_t>(out_.streams.size());
  for (int64_t at = begin; at < end; at += max_tokens_) {
    const auto to = static_cast<int32_t>(std::min<int64_t>(end, at + max_tokens_));
    out_.blocks.push_back({static_cast<int32_t>(at), to, streams_begin, streams_end});
  }
}

// Adds the ancestors of a group from depth `from` on, and itself, oldest first, as far as row
// `seen_by` does not see them too.
void BlockChooser::add_path(int32_t group, int32_t from, int32_t seen_by) {
  const auto begin = static_cast<std::ptrdiff_t>(out_.streams.size());
  for (int32_t g = group; g >= 0 && groups_.groups[g].depth >= from; g = groups_.groups[g].parent) {
    if (groups_.rows(groups_.groups[g])[0].begin <= seen_by) break;
    out_.streams.push_back(g);
  }
  std::reverse(out_.streams.begin() + begin, out_.streams.end());
}

void BlockChooser::keep_below(std::span<const int32_t> children, const Above& above) {
  each_pack(children, above, [&](std::span<const int32_t> pack) {
    if (pack.size() == 1) keep(pack[0], above);
  });
}

void BlockChooser::keep(int32_t index, const Above& above) {
  const Group& group = groups_.groups[index];
  const How how = best(index, above).how;
  if (how == How::kWhole) return;
  if (how == How::kKeep) {  // it reads what was pushed down to it, too
    out_.cost += kept_cost(group, above.slots + group.slots);
    const auto streams_begin = static_cast<int32_t>(out_.streams.size());
    add_path(index, above.kept, -1);
    add_blocks(group.token_begin, group.token_end, streams_begin);
    const RowRange rows = groups_.rows(group)[0];
    std::fill(kept_.begin() + rows.begin, kept_.begin() + rows.end, group.depth + 1);
  }
  keep_below(groups_.children(group), below(group, above, how == How::kKeep));
}

// With the ancestors settled that are read apart, the cheapest packs of neighbouring rows, whatever
// their parents. Rows below different such ancestors never share a block.
void BlockChooser::pack_rows() {
  const std::size_t num_rows = groups_.order.size();
  std::vector<RowReads> reads(num_rows);
  int64_t before = 0;
  for (std::size_t i = 0; i < num_rows; ++i) {
    const int32_t next = static_cast<int32_t>(i) + 1;
    RowReads& row = reads[i];
    row.before = before;
    for (int32_t g = static_cast<int32_t>(i); g >= 0; g = groups_.groups[g].parent) {
      const Group& group = groups_.groups[g];
      if (group.depth < kept_[i]) break;
      row.slots += group.slots;
      if (groups_.rows(group)[0].end <= next) before += group.slots;
    }
  }
  for (std::size_t first = 0; first < num_rows;) {
    std::size_t last = first + 1;
    while (last < num_rows && same_kept(first, last)) ++last;
    pack_range(reads, first, last);
    first = last;
  }
}

// Whether two rows have the same ancestor read apart above them, or none.
bool BlockChooser::same_kept(std::size_t a, std::size_t b) const {
  if (kept_[a] != kept_[b]) return false;
  if (kept_[a] == 0) return true;
  int32_t g = static_cast<int32_t>(a);
  while (groups_.groups[g].depth >= kept_[a]) g = groups_.groups[g].parent;
  return static_cast<std::size_t>(groups_.rows(groups_.groups[g])[0].end) > b;
}

void BlockChooser::pack_range(const std::vector<RowReads>& reads, std::size_t begin,
                              std::size_t end) {
  struct Split {
    double cost;
    std::size_t first;  // of the last pack
  };
  std::vector<Split> best_of(end - begin + 1, {0, 0});
  for (std::size_t last = begin; last < end; ++last) {
    const Group& row = groups_.groups[last];
    bool writes_partials = kept_[last] > 0 || groups_.crossed[last] != 0;
    Split found = {
        best_of[last - begin].cost + leaf_cost(row, reads[last].slots - row.slots, writes_partials),
        last};
    for (std::size_t first = last; first-- > begin;) {
      const int64_t count = row.token_end - groups_.token_begin[first];
      if (count > max_tokens_) break;
      writes_partials |= groups_.crossed[first] != 0;
      const int64_t slots = reads[last].slots + reads[last].before - reads[first].before;
      const double cost = best_of[first - begin].cost + block_cost(count, slots, writes_partials);
      if (cost <= found.cost) found = {cost, first};
    }
    best_of[last + 1 - begin] = found;
  }
  out_.cost += best_of[end - begin].cost;
  std::vector<std::size_t> bounds = {end};
  while (bounds.back() > begin) bounds.push_back(best_of[bounds.back() - begin].first);
  for (std::size_t k = bounds.size(); k-- > 1;) add_pack(bounds[k], bounds[k - 1]);
}

void BlockChooser::add_pack(std::size_t first, std::size_t last) {
  const auto streams_begin = static_cast<int32_t>(out_.streams.size());
  for (auto row = static_cast<int32_t>(first); row < static_cast<int32_t>(last); ++row) {
    add_path(row, kept_[row], row == static_cast<int32_t>(first) ? -1 : row - 1);
  }
  add_blocks(groups_.token_begin[first], groups_.token_begin[last], streams_begin);
}

}  // namespace fork_attn
