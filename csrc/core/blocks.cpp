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

// Splits children into packs, greedily: a child joins its elder neighbours where one block costs
// less than two.
template <class F>
double BlockChooser::each_pack(const std::vector<int32_t>& children, const Above& above,
                               F&& visit) {
  double total = 0;
  Pack pack{0, 0, 0, 0};
  double pack_cost = 0;
  for (std::size_t i = 0; i < children.size(); ++i) {
    const Group& child = groups_.groups[children[i]];
    const double alone = best(children[i], above).cost;
    if (pack.last > pack.first && pack.tokens + tokens(child) <= max_tokens_) {
      const double joined =
          block_cost(pack.tokens + tokens(child), above.slots + pack.slots + child.subtree_slots,
                     partial(above, child));
      if (joined <= pack_cost + alone) {
        pack.last = i + 1;
        pack.slots += child.subtree_slots;
        pack.tokens += tokens(child);
        pack_cost = joined;
        continue;
      }
    }
    if (pack.last > pack.first) {
      visit(pack);
      total += pack_cost;
    }
    pack = {i, i + 1, child.subtree_slots, tokens(child)};
    pack_cost = alone;
  }
  if (pack.last > pack.first) {
    visit(pack);
    total += pack_cost;
  }
  return total;
}

double BlockChooser::packs_cost(const std::vector<int32_t>& children, const Above& above) {
  return each_pack(children, above, [](const Pack&) {});
}

const BlockChooser::Best& BlockChooser::best(int32_t index, const Above& above) {
  const Group& group = groups_.groups[index];
  if (best_[index].empty()) best_[index].resize(group.depth + 1);
  if (best_[index][above.kept].cost >= 0) return best_[index][above.kept];
  const bool writes_partials = partial(above, group);
  Best found;
  if (group.children.empty()) {
    found = {leaf_cost(group, above.slots, writes_partials), How::kWhole};
  } else {
    found = {packs_cost(group.children, below(group, above, false)), How::kPush};
    const double kept = kept_cost(group, above.slots + group.slots) +
                        packs_cost(group.children, below(group, above, true));
    if (kept < found.cost) found = {kept, How::kKeep};
    if (tokens(group) <= max_tokens_) {
      const double whole =
          block_cost(tokens(group), above.slots + group.subtree_slots, writes_partials);
      if (whole < found.cost) found = {whole, How::kWhole};
    }
  }
  return best_[index][above.kept] = found;
}

BlockChoice BlockChooser::choose() {
  best_.assign(groups_.groups.size(), {});
  out_ = {};
  const Above nothing{0, 0};
  out_.cost = packs_cost(groups_.roots, nothing);
  // Groups that cross the tree are read by themselves. Their blocks go by the hull of their rows,
  // so that a block's tokens stay a range; rows in between that do not see the group are masked.
  for (const int32_t g : groups_.outside) {
    const Group& group = groups_.groups[g];
    out_.cost += kept_cost(group, group.slots);
    emit_blocks(group.token_begin, group.token_end, 0, &g, &g + 1);
  }
  emit_packs(groups_.roots, nothing);
  return std::move(out_);
}

void BlockChooser::emit_blocks(int32_t begin, int32_t end, int32_t kept, const int32_t* first,
                               const int32_t* last) {
  const auto streams_begin = static_cast<int32_t>(out_.streams.size());
  if (kept < static_cast<int32_t>(path_.size())) {
    out_.streams.insert(out_.streams.end(), path_.begin() + kept, path_.end());
  }
  for (const int32_t* g = first; g != last; ++g) {
    if (groups_.groups[*g].in_tree && first != last) {
      add_subtree(*g);
    } else {
      out_.streams.push_back(*g);
    }
  }
  const auto streams_end = static_cast<int32_t>(out_.streams.size());
  for (int64_t at = begin; at < end; at += max_tokens_) {
    const auto to = static_cast<int32_t>(std::min<int64_t>(end, at + max_tokens_));
    out_.blocks.push_back({static_cast<int32_t>(at), to, streams_begin, streams_end});
  }
}

void BlockChooser::add_subtree(int32_t group) {
  out_.streams.push_back(group);
  for (const int32_t c : groups_.groups[group].children) add_subtree(c);
}

void BlockChooser::emit(int32_t index, const Above& above) {
  const Group& group = groups_.groups[index];
  const Best found = best(index, above);
  if (found.how == How::kWhole) {
    emit_blocks(group.token_begin, group.token_end, above.kept, &index, &index + 1);
    return;
  }
  path_.push_back(index);
  if (found.how ==
      How::kKeep) {  // path_ ends with the group itself: read it and what was pushed down to it
    emit_blocks(group.token_begin, group.token_end, above.kept, nullptr, nullptr);
    emit_packs(group.children, below(group, above, true));
  } else {
    emit_packs(group.children, below(group, above, false));
  }
  path_.pop_back();
}

void BlockChooser::emit_packs(const std::vector<int32_t>& children, const Above& above) {
  each_pack(children, above, [&](const Pack& pack) {
    if (pack.last == pack.first + 1) {
      emit(children[pack.first], above);
      return;
    }
    emit_blocks(groups_.groups[children[pack.first]].token_begin,
                groups_.groups[children[pack.last - 1]].token_end, above.kept,
                children.data() + pack.first, children.data() + pack.last);
  });
}

}  // namespace fork_attn
