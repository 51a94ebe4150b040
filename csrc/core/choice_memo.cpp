#include "choice_memo.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace fork_attn {

// Which tokens stand where, and who reads each group: blocks and streams mean the same while this
// is the same.
void ChoiceMemo::describe(const Groups& groups) {
  readers_.assign(groups.token_begin.begin(), groups.token_begin.end());
  for (const Group& group : groups.groups) {
    readers_.push_back(group.in_tree ? -1 : -2);  // no row: parts the lists of ranges
    for (const RowRange& rows : groups.rows(group)) {
      readers_.push_back(rows.begin);
      readers_.push_back(rows.end);
    }
  }
}

const BlockChoice* ChoiceMemo::find(const Kind& kind, const Groups& groups) {
  const auto entry = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& e) { return e.kind == kind; });
  if (entry == entries_.end() || entry->slots.size() != groups.groups.size()) return nullptr;
  for (std::size_t g = 0; g < groups.groups.size(); ++g) {
    const int64_t then = entry->slots[g];
    if (std::abs(groups.groups[g].slots - then) > std::max(kSlack, then / 16)) return nullptr;
  }
  describe(groups);
  return readers_ == entry->readers ? &entry->choice : nullptr;
}

const BlockChoice& ChoiceMemo::keep(const Kind& kind, const Groups& groups, BlockChoice choice) {
  describe(groups);
  std::vector<int64_t> slots;
  slots.reserve(groups.groups.size());
  for (const Group& group : groups.groups) slots.push_back(group.slots);
  auto entry = std::find_if(entries_.begin(), entries_.end(),
                            [&](const Entry& e) { return e.kind == kind; });
  if (entry == entries_.end() && entries_.size() < kMostKinds) {
    entries_.push_back({});
    entry = entries_.end() - 1;
  } else if (entry == entries_.end()) {
    entry = entries_.begin() + static_cast<std::ptrdiff_t>(oldest_);
    oldest_ = (oldest_ + 1) % kMostKinds;
  }
  entry->kind = kind;
  entry->readers = readers_;
  entry->slots = std::move(slots);
  entry->choice = std::move(choice);
  return entry->choice;
}

}  // namespace fork_attn
