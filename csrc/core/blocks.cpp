#include "blocks.h"

#include <algorithm>

namespace fork_attn {

double BlockChooser::block_cost(int64_t tokens, int64_t slots, bool partial) const {
  return costs_.item(tokens, slots) + (partial ? costs_.partials(tokens) : 0.0) +
         (partial ? chunks_cost(tokens, slots) : 0.0);
}

// Items that do not begin where contexts begin hold a chunk each.
double BlockChooser::chunks_cost(int64_t tokens, int64_t slots) const {
  if (chunk_slots_ == 0) return 0;
  const auto more = static_cast<double>(slots / chunk_slots_);
  return more * (costs_.item(tokens, 0) + costs_.partials(tokens));
}

// One row's own tokens over everything before them; blocks of a long prefill see more and more of
// its own slots.
double BlockChooser::leaf_cost(const Group& group, int64_t slots_above, bool partial) const {
  const int64_t count = tokens(group);
  const int64_t context = slots_above + group.slots - group.own;
  double cost = 0;
  for (int64_t first = 0; first < count; first += max_tokens_) {
    const int64_t last = std::min(count, first + max_tokens_);
    cost += block_cost(last - first, context + std::min(last, group.own), partial);
  }
  return cost;
}

double BlockChooser::kept_cost(const Group& group, int64_t slots, bool from_start) const {
  const auto cost = [&](int64_t count) {
    return block_cost(count, slots, true) - (from_start ? chunks_cost(count, slots) : 0.0);
  };
  const int64_t count = tokens(group);
  const int64_t full = count / max_tokens_;
  const int64_t rest = count % max_tokens_;
  return static_cast<double>(full) * cost(max_tokens_) + (rest > 0 ? cost(rest) : 0.0);
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
  Best& known = best_[first_best_[index] + above.kept];
  if (known.cost >= 0) return known;
  const Group& group = groups_.groups[index];
  const bool writes_partials = partial(above, group);
  if (groups_.children(group).empty()) {
    return known = {leaf_cost(group, above.slots, writes_partials), How::kWhole};
  }
  Best found;
  if (tokens(group) <= max_tokens_) {
    const int64_t slots = above.slots + group.subtree_slots;
    found = {block_cost(tokens(group), slots, writes_partials), How::kWhole};
    // Anything else is two items at least, which read all this, at best for one token each.
    if (found.cost <= 2 * costs_.item(1, 0) + static_cast<double>(slots) * costs_.slot(1)) {
      return known = found;
    }
  }
  const double pushed = packs_cost(groups_.children(group), below(group, above, false));
  if (found.cost < 0 || pushed < found.cost) found = {pushed, How::kPush};
  if (!group.may_be_apart) return known = found;
  double kept = kept_cost(group, above.slots + group.slots, above.kept == 0);
  // What is below takes one item at least, reads each slot and writes each row's partial.
  const double least =
      costs_.item(1, group.subtree_slots - group.slots) + costs_.partials(tokens(group));
  if (kept + least >= found.cost) return known = found;
  kept += packs_cost(groups_.children(group), below(group, above, true));
  if (kept < found.cost) found = {kept, How::kKeep};
  return known = found;
}

BlockChoice BlockChooser::choose() {
  out_ = {};
  choose_apart();
  double cost = evaluate();
  if (groups_.order.size() <= kFewRows) cost = improve(cost);
  out_.cost = cost;
  for (const int32_t g : groups_.parents_first) {
    if (apart_[g] == 0) continue;
    const Group& group = groups_.groups[g];
    const auto streams_begin = static_cast<int32_t>(out_.streams.size());
    add_path(g, group.parent < 0 ? -1 : nearest_[group.parent], -1);
    add_blocks(group.token_begin, group.token_end, streams_begin);
  }
  // Groups that cross the tree are read by themselves. Their blocks go by the hull of their rows,
  // so that a block's tokens stay a range; rows in between that do not see the group are masked.
  for (const int32_t g : groups_.outside) {
    const Group& group = groups_.groups[g];
    out_.cost += kept_cost(group, group.slots, true);
    const auto streams_begin = static_cast<int32_t>(out_.streams.size());
    out_.streams.push_back(g);
    add_blocks(group.token_begin, group.token_end, streams_begin);
  }
  std::vector<int32_t> bounds = {static_cast<int32_t>(groups_.order.size())};
  while (bounds.back() > 0) bounds.push_back(packs_[bounds.back()].first);
  for (std::size_t k = bounds.size(); k-- > 1;) add_pack(bounds[k], bounds[k - 1]);
  return std::move(out_);
}

// The ancestors to read apart, by cost over the tree of groups, with packs within families only.
void BlockChooser::choose_apart() {
  apart_.assign(groups_.groups.size(), 0);
  first_best_.clear();
  int32_t states = 0;
  for (const Group& group : groups_.groups) {
    first_best_.push_back(states);
    states += group.in_tree ? group.depth + 1 : 0;
  }
  best_.assign(states, {});
  set_apart(groups_.roots, {0, 0});
}

void BlockChooser::set_apart(std::span<const int32_t> children, const Above& above) {
  each_pack(children, above, [&](std::span<const int32_t> pack) {
    if (pack.size() > 1) return;
    const Group& group = groups_.groups[pack[0]];
    const How how = best(pack[0], above).how;
    if (how == How::kWhole) return;
    apart_[pack[0]] = how == How::kKeep;
    set_apart(groups_.children(group), below(group, above, how == How::kKeep));
  });
}

// The cost with these ancestors read apart and the cheapest packs of neighbouring rows, whatever
// their parents. Rows below different such ancestors never share a block.
double BlockChooser::evaluate() {
  const std::size_t num_rows = groups_.order.size();
  nearest_.assign(groups_.groups.size(), -1);
  above_.assign(groups_.groups.size(), 0);
  last_reads_.assign(num_rows + 1, 0);
  double cost = 0;
  for (const int32_t g : groups_.parents_first) {
    const Group& group = groups_.groups[g];
    if (group.parent >= 0) {
      nearest_[g] = nearest_[group.parent];
      if (apart_[group.parent] == 0)
        above_[g] = above_[group.parent] + groups_.groups[group.parent].slots;
    }
    if (apart_[g] == 0) continue;
    const bool first = nearest_[g] < 0;
    nearest_[g] = g;
    cost += kept_cost(group, above_[g] + group.slots, first);
  }
  for (const int32_t g : groups_.parents_first) {  // who is the last of its rows to read it
    const Group& group = groups_.groups[g];
    const int32_t last = groups_.rows(group)[0].end - 1;
    if (group.depth >= kept_depth(last)) last_reads_[last + 1] += group.slots;
  }
  for (std::size_t i = 0; i < num_rows; ++i) last_reads_[i + 1] += last_reads_[i];
  return cost + pack_rows();
}

double BlockChooser::pack_rows() {
  const auto num_rows = static_cast<int32_t>(groups_.order.size());
  packs_.assign(num_rows + 1, {0, 0});
  for (int32_t last = 0; last < num_rows; ++last) {
    const Group& row = groups_.groups[last];
    bool writes_partials = nearest_[last] >= 0 || groups_.crossed[last] != 0;
    const int64_t reads = above_[last] + row.slots + last_reads_[last];
    Pack found = {packs_[last].cost + leaf_cost(row, above_[last], writes_partials), last};
    for (int32_t first = last; first-- > 0;) {
      const int64_t count = row.token_end - groups_.token_begin[first];
      if (count > max_tokens_ || nearest_[first] != nearest_[last]) break;
      writes_partials |= groups_.crossed[first] != 0;
      const double cost =
          packs_[first].cost + block_cost(count, reads - last_reads_[first], writes_partials);
      if (cost <= found.cost) found = {cost, first};
    }
    packs_[last + 1] = found;
  }
  return packs_[num_rows].cost;
}

// Turns single ancestors, or two at a time, while that pays: any two of few ancestors, else one and
// its parent. For few rows only, where one badly filled block weighs much.
double BlockChooser::improve(double cost) {
  std::vector<int32_t> inner;
  for (const int32_t g : groups_.parents_first) {
    const Group& group = groups_.groups[g];
    if (!groups_.children(group).empty() && group.may_be_apart) inner.push_back(g);
  }
  const auto flip = [&](int32_t g, int32_t h) {
    apart_[g] ^= 1;
    if (h != g) apart_[h] ^= 1;
  };
  for (bool better = true; better;) {
    better = false;
    for (std::size_t i = 0; i < inner.size(); ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        const bool related = j == i || groups_.groups[inner[i]].parent == inner[j];
        if (!related && inner.size() > kFewAncestors) continue;
        flip(inner[i], inner[j]);
        const double changed = evaluate();
        if (changed < cost * (1 - 1e-9)) {
          cost = changed;
          better = true;
        } else {
          flip(inner[i], inner[j]);
        }
      }
    }
  }
  return evaluate();
}

// Cuts the range of tokens into blocks that read the streams from `streams_begin` on.
void BlockChooser::add_blocks(int32_t begin, int32_t end, int32_t streams_begin) {
  const auto streams_end = static_cast<int32_t>(out_.streams.size());
  for (int64_t at = begin; at < end; at += max_tokens_) {
    const auto to = static_cast<int32_t>(std::min<int64_t>(end, at + max_tokens_));
    out_.blocks.push_back({static_cast<int32_t>(at), to, streams_begin, streams_end});
  }
}

// Adds a group and its ancestors below `stop`, oldest first, without those that row `seen_by` sees
// too.
void BlockChooser::add_path(int32_t group, int32_t stop, int32_t seen_by) {
  const auto begin = static_cast<std::ptrdiff_t>(out_.streams.size());
  for (int32_t g = group; g != stop && g >= 0; g = groups_.groups[g].parent) {
    if (groups_.rows(groups_.groups[g])[0].begin <= seen_by) break;
    out_.streams.push_back(g);
  }
  std::reverse(out_.streams.begin() + begin, out_.streams.end());
}

void BlockChooser::add_pack(int32_t first, int32_t last) {
  const auto streams_begin = static_cast<int32_t>(out_.streams.size());
  for (int32_t row = first; row < last; ++row) {
    add_path(row, nearest_[row], row == first ? -1 : row - 1);
  }
  add_blocks(groups_.token_begin[first], groups_.token_begin[last], streams_begin);
}

}  // namespace fork_attn
