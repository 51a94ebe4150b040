// Steps: reserve slots for new tokens, then commit or roll back as a whole.
#include <algorithm>
#include <string>

#include "cache_core.h"

namespace fork_attn {

void CacheCore::validate_request(const StepRequest& r, int64_t total) const {
  const Branch& b = branches_[require(r.branch)];
  const std::string who = "branch " + std::to_string(serial(r.branch));
  if (r.num_tokens < 1 || r.num_tokens > kMaxLength) {
    fail(ErrorKind::kValue,
         "tokens: expected 1 to 2**31 - 1 for " + who + ", got " + std::to_string(r.num_tokens));
  }
  const int64_t length = store_.length(b.head) + r.num_tokens;
  if (length > kMaxLength || b.position + r.num_tokens > kMaxLength ||
      total + r.num_tokens > kMaxLength) {
    fail(ErrorKind::kValue, "tokens: length, positions and rows must stay below 2**31, but " + who +
                                " would reach length " + std::to_string(length) + ", position " +
                                std::to_string(b.position + r.num_tokens) + " in a step of " +
                                std::to_string(total + r.num_tokens) + " rows");
  }
  if (r.parents == nullptr) return;
  for (int64_t i = 0; i < r.num_tokens; ++i) {
    if (r.parents[i] < -1 || r.parents[i] >= i) {
      fail(ErrorKind::kValue, "parents: expected -1 <= parents[i] < i for " + who +
                                  ", got parents[" + std::to_string(i) +
                                  "] = " + std::to_string(r.parents[i]));
    }
  }
}

// Decides where a row writes: on in the head's segment, into a copy of its part-filled page, or
// into fresh pages.
void CacheCore::lay_out(StepRow& row) noexcept {
  const Branch& b = branches_[row.branch];
  row.cut_link = kNone;
  row.first_slot = 0;
  row.segment = kNone;
  if (store_.can_extend(b.head, b.position) &&
      !store_.segments[store_.links[b.head].segment].claimed) {
    row.segment = store_.links[b.head].segment;
    Segment& s = store_.segments[row.segment];
    s.claimed = true;
    row.first_slot = s.length;
    return;
  }
  if (tail_ != TailPolicy::kCopy || b.head == kNone || store_.end_position(b.head) != b.position)
    return;
  const Link& tail = store_.links[b.head];
  const int32_t page_start = tail.hi / page_size() * page_size();
  if (tail.watch != kNone || page_start == tail.hi || tail.position_shift != 0) return;
  Index at = b.head;
  while (store_.links[at].lo > page_start) {
    const Link& l = store_.links[at];
    if (l.parent == kNone) return;
    const Link& p = store_.links[l.parent];
    if (p.segment != l.segment || p.hi != l.lo || p.position_shift != 0)
      return;  // not dense: nothing to keep dense
    at = l.parent;
  }
  row.cut_link = at;
  row.cut_slot = page_start;
  row.first_slot = tail.hi - page_start;
}

int64_t CacheCore::pages_needed(const StepRow& row) const noexcept {
  const int64_t end = static_cast<int64_t>(row.first_slot) + row.num_tokens;
  const int64_t have = row.segment != kNone ? store_.num_page_slots(row.first_slot) : 0;
  return (end + page_size() - 1) / page_size() - have;
}

void CacheCore::reserve_row(const StepRow& row) {
  const auto pages = static_cast<std::size_t>(pages_needed(row));
  if (row.segment != kNone) {
    reserve_extra(store_.segments[row.segment].pages, pages);
    return;
  }
  Staged& staged = staged_.emplace_back();
  staged.pages.reserve(pages);
  if (row.cut_link != kNone) collect_origins(row, staged.origins);
}

// The identities of the tokens that a copied page holds, so that a join counts them once.
void CacheCore::collect_origins(const StepRow& row, std::vector<Origin>& out) const {
  const Segment& s = store_.segments[store_.links[row.cut_link].segment];
  const int32_t end = row.cut_slot + row.first_slot;
  int32_t slot = row.cut_slot;
  for (const Origin& o : s.origins) {
    const int32_t piece_end = std::min(o.end, end);
    if (piece_end <= slot) continue;
    out.push_back({piece_end - row.cut_slot, o.uid, o.offset + row.cut_slot});
    slot = piece_end;
  }
  if (slot < end) out.push_back({end - row.cut_slot, s.uid, row.cut_slot});
}

int64_t CacheCore::slot_address(const StepRow& row, int32_t slot) const noexcept {
  const int32_t index = slot / page_size();
  int32_t page;
  if (row.segment != kNone) {
    const Segment& s = store_.segments[row.segment];
    const auto have = static_cast<int32_t>(s.pages.size());
    page = index < have ? s.pages[index] : step_.pages[row.pages_begin + index - have];
  } else {
    page = step_.pages[row.pages_begin + index];
  }
  return static_cast<int64_t>(page) * page_size() + slot % page_size();
}

// Takes the row's pages and writes down its tokens' slots and positions.
void CacheCore::fill_row(StepRow& row) noexcept {
  const Branch& b = branches_[row.branch];
  row.pages_begin = static_cast<int32_t>(step_.pages.size());
  for (int64_t n = pages_needed(row); n > 0; --n) step_.pages.push_back(store_.pages.take());
  row.pages_end = static_cast<int32_t>(step_.pages.size());
  if (row.cut_link != kNone) {
    const Segment& s = store_.segments[store_.links[row.cut_link].segment];
    step_.copies.push_back({s.pages[row.cut_slot / page_size()], step_.pages[row.pages_begin]});
  }
  const std::size_t first = step_.positions.size();
  for (int32_t t = 0; t < row.num_tokens; ++t) {
    int64_t position = b.position + t;
    if (row.draft) {
      const int32_t parent = step_.parents[row.parents_begin + t];
      position = parent < 0 ? b.position : step_.positions[first + parent] + 1;
    }
    step_.positions.push_back(position);
    step_.slot_mapping.push_back(slot_address(row, row.first_slot + t));
  }
}

void CacheCore::open_step(std::span<const StepRequest> requests) {
  require_no_step("step");
  if (requests.empty())
    fail(ErrorKind::kValue, "tokens: expected at least one branch, got an empty mapping");
  int64_t total = 0;
  int64_t drafted = 0;
  const uint64_t mark = store_.next_mark();
  for (const StepRequest& r : requests) {
    validate_request(r, total);
    const Branch& b = branches_[find(r.branch)];
    if (b.mark == mark) {
      fail(ErrorKind::kDuplicateBranch,
           "branch " + std::to_string(serial(r.branch)) + " was given twice in one step");
    }
    b.mark = mark;
    total += r.num_tokens;
    if (r.parents != nullptr) drafted += r.num_tokens;
  }

  struct Undo {  // until the step is open, an error leaves no trace
    CacheCore* core;
    ~Undo() {
      if (core != nullptr) core->close_step();
    }
  } undo{this};

  step_.rows.reserve(requests.size());
  step_.parents.reserve(drafted);
  int64_t needed = 0;
  int32_t row_begin = 0;
  for (const StepRequest& r : requests) {
    const auto n = static_cast<int32_t>(r.num_tokens);
    const bool draft = r.parents != nullptr;
    StepRow row{};
    row.branch = find(r.branch);
    branches_[row.branch].step_row = static_cast<int32_t>(step_.rows.size());
    row.draft = draft;
    row.num_tokens = n;
    row.row_begin = row_begin;
    row.parents_begin = static_cast<int32_t>(step_.parents.size());
    row.accepted = draft ? -1 : n;
    if (draft) step_.parents.insert(step_.parents.end(), r.parents, r.parents + n);
    lay_out(row);
    needed += pages_needed(row);
    row_begin += n;
    step_.rows.push_back(row);
  }
  validate_watches();
  if (needed > store_.pages.num_free()) {
    throw out_of_pages(store_.pages, needed, "step:", "; step(..., wait=True) waits for those");
  }
  staged_.reserve(requests.size());
  for (const StepRow& row : step_.rows) reserve_row(row);
  store_.reserve(staged_.size(), 2 * requests.size());
  step_.pages.reserve(needed);
  step_.positions.reserve(total);
  step_.slot_mapping.reserve(total);
  step_.copies.reserve(requests.size());
  step_.moves.reserve(drafted);

  undo.core = nullptr;
  step_open_ = true;
  ++step_.serial;
  for (StepRow& row : step_.rows) fill_row(row);
}

void CacheCore::accept(int64_t index, std::span<const int32_t> path) {
  if (!step_open_) fail(ErrorKind::kStalePlan, "accept: no step is open");
  if (index < 0 || index >= static_cast<int64_t>(step_.rows.size()) || !step_.rows[index].draft) {
    fail(ErrorKind::kValue, "branch: expected one that drafts in this step");
  }
  StepRow& row = step_.rows[index];
  if (row.accepted >= 0) fail(ErrorKind::kValue, "path: this draft was accepted already");
  int32_t last = -1;
  for (const int32_t token : path) {
    if (token < 0 || token >= row.num_tokens || step_.parents[row.parents_begin + token] != last) {
      fail(ErrorKind::kValue, "path: expected a chain from the branch's end along parents, got " +
                                  std::to_string(token) + " after " + std::to_string(last));
    }
    last = token;
  }
  row.accepted = static_cast<int32_t>(path.size());
  for (int32_t k = 0; k < row.accepted; ++k) {
    if (path[k] == k) continue;
    step_.moves.push_back(
        {slot_address(row, row.first_slot + path[k]), slot_address(row, row.first_slot + k)});
  }
}

// The context of a row that did not write in place, after its new segment's tokens.
Index CacheCore::new_head(const StepRow& row, Staged& staged, int32_t num_tokens) noexcept {
  const Branch& b = branches_[row.branch];
  const Index segment = store_.new_segment(b.position - row.first_slot);
  Segment& s = store_.segments[segment];
  s.pages.swap(staged.pages);
  s.origins.swap(staged.origins);
  s.place = row.place;
  s.place.known = std::min(s.place.known, static_cast<int32_t>(s.pages.size()));
  row.place = {};
  Index parent = b.head;
  if (row.cut_link != kNone) {
    const Link l = store_.links[row.cut_link];
    Segment& source = store_.segments[l.segment];
    source.copied_end = std::max(source.copied_end, row.cut_slot + row.first_slot);
    parent = l.lo == row.cut_slot
                 ? l.parent
                 : store_.add_link(l.parent, l.segment, l.lo, row.cut_slot, l.position_shift);
  }
  return store_.add_link(parent, segment, 0, row.first_slot + num_tokens, 0);
}

void CacheCore::commit_row(const StepRow& row, Staged* staged) noexcept {
  Branch& b = branches_[row.branch];
  const int32_t num_tokens = std::max(row.accepted, 0);
  StepRow kept = row;
  kept.num_tokens = num_tokens;
  const int32_t used = num_tokens == 0 ? 0 : static_cast<int32_t>(pages_needed(kept));
  for (int32_t k = row.pages_end; k-- > row.pages_begin + used;) store_.pages.give(step_.pages[k]);
  if (num_tokens == 0) {
    if (row.segment != kNone) store_.drop_tail(store_.segments[row.segment]);
    return;
  }
  const auto first = step_.pages.begin() + row.pages_begin;
  if (row.segment != kNone) {
    Segment& s = store_.segments[row.segment];
    s.pages.insert(s.pages.end(), first, first + used);
    if (store_.links[b.head].refs == 1) {
      store_.extend(b.head, num_tokens);
    } else {
      set_head(
          b, store_.add_link(b.head, row.segment, row.first_slot, row.first_slot + num_tokens, 0));
    }
  } else {
    staged->pages.assign(first, first + used);
    set_head(b, new_head(row, *staged, num_tokens));
  }
  b.head = store_.coalesce(b.head);
  b.position += num_tokens;
}

void CacheCore::commit_step() {
  if (!step_open_) fail(ErrorKind::kStalePlan, "commit: no step is open");
  std::size_t next = 0;
  for (std::size_t i = 0; i < step_.rows.size(); ++i) {
    const StepRow& row = step_.rows[i];
    commit_row(row, row.segment != kNone ? nullptr : &staged_[next++]);
  }
  close_step();
}

void CacheCore::rollback_step() {
  if (!step_open_) fail(ErrorKind::kStalePlan, "rollback: no step is open");
  for (std::size_t k = step_.pages.size(); k-- > 0;) store_.pages.give(step_.pages[k]);
  for (const StepRow& row : step_.rows) {
    if (row.segment != kNone) store_.drop_tail(store_.segments[row.segment]);
  }
  close_step();
}

void CacheCore::close_step() noexcept {
  for (const StepRow& row : step_.rows) {
    branches_[row.branch].step_row = -1;
    store_.arena.give(row.place);
    if (row.segment == kNone) continue;
    Segment& s = store_.segments[row.segment];
    s.claimed = false;
    s.place.known = std::min(s.place.known, static_cast<int32_t>(s.pages.size()));
  }
  step_.rows.clear();
  step_.pages.clear();
  step_.parents.clear();
  step_.positions.clear();
  step_.slot_mapping.clear();
  step_.copies.clear();
  step_.moves.clear();
  staged_.clear();
  step_open_ = false;
}

}  // namespace fork_attn
