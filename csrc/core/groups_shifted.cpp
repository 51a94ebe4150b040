// Leaves of what the step's rows see at a shift, and where they stand among the others.
#include <algorithm>

#include "groups.h"

namespace fork_attn {

// The leaves of what a row sees at a shift, and what its own leaf sees beyond its links.
void Groups::collect_shifted(int32_t row) {
  core_->view_of_row(core_->step().rows[row], view_);
  const std::size_t first_of_row = made_.size();
  for (const ViewPart& p : view_) {
    const bool own = p.shift == 0 && p.count == made_[row].count;
    const int32_t leaf = own ? row : leaf_of(row, p, first_of_row);
    if (p.segment != kNone) {
      parts_.push_back({leaf, p.segment, p.lo, p.hi});
      continue;
    }
    fresh.push_back({p.row, p.hi, p.in_place, p.lag, made_[leaf].first_fresh});
    made_[leaf].first_fresh = static_cast<int32_t>(fresh.size() - 1);
  }
}

int32_t Groups::leaf_of(int32_t row, const ViewPart& part, std::size_t first_of_row) {
  for (std::size_t i = first_of_row; i < made_.size(); ++i) {
    if (made_[i].first == part.first && made_[i].shift == part.shift)
      return static_cast<int32_t>(i);
  }
  made_.push_back({row, part.first, part.count, part.shift, false});
  const auto leaf = static_cast<int32_t>(made_.size() - 1);
  shifted_.push_back({leaf, part.row, part.segment});
  return leaf;
}

void Groups::sort_shifted() {
  std::sort(shifted_.begin(), shifted_.end(), [](const Shifted& a, const Shifted& b) {
    return a.near_row != b.near_row ? a.near_row < b.near_row : a.leaf < b.leaf;
  });
}

void Groups::add_leaf(int32_t made) {
  place_[made] = static_cast<int32_t>(order.size());
  order.push_back(made_[made].row);
  leaves.push_back(made_[made]);
}

// What watches the rows placed from `order_begin` on reads what they read.
void Groups::place_shifted_near(std::size_t order_begin) {
  const std::size_t order_end = order.size();
  for (std::size_t i = order_begin; i < order_end; ++i) {
    const int32_t row = order[i];
    auto at = std::lower_bound(shifted_.begin(), shifted_.end(), row,
                               [](const Shifted& s, int32_t r) { return s.near_row < r; });
    for (; at != shifted_.end() && at->near_row == row; ++at) add_leaf(at->leaf);
  }
}

// The others: those that read the same first segment are neighbours.
void Groups::place_shifted_left() {
  std::vector<Shifted> left;
  for (const Shifted& s : shifted_) {
    if (s.near_row < 0) left.push_back(s);
  }
  const auto place = [&](const Shifted& s) { return place_[made_[s.leaf].row]; };
  std::sort(left.begin(), left.end(), [&](const Shifted& a, const Shifted& b) {
    if (a.near_segment != b.near_segment) return a.near_segment < b.near_segment;
    return place(a) != place(b) ? place(a) < place(b) : a.leaf < b.leaf;
  });
  for (const Shifted& s : left) add_leaf(s.leaf);
}

}  // namespace fork_attn
