#include "cache_core.h"

#include <algorithm>
#include <string>
#include <utility>

namespace fork_attn {

namespace {

constexpr int64_t kMaxFork = 1 << 24;

std::string quoted(uint32_t serial) { return "branch " + std::to_string(serial); }

}  // namespace

CacheCore::CacheCore(int32_t num_pages, int32_t page_size, TailPolicy tail)
    : store_(num_pages, page_size), tail_(tail) {}

Index CacheCore::find(Handle h) const noexcept {
  const auto slot = static_cast<Index>(h & 0xffffffffu);
  return branches_.taken(slot) && branches_[slot].serial == serial(h) ? slot : kNone;
}

Index CacheCore::require(Handle h) const {
  const Index i = find(h);
  if (i == kNone) {
    fail(ErrorKind::kStaleBranch,
         quoted(serial(h)) + " was freed, or consumed by a join or select");
  }
  return i;
}

void CacheCore::require_distinct(std::span<const Handle> handles) const {
  const uint64_t mark = store_.next_mark();
  for (std::size_t i = 0; i < handles.size(); ++i) {
    const Branch& b = branches_[require(handles[i])];
    if (b.mark == mark) {
      const auto first = std::find(handles.begin(), handles.end(), handles[i]) - handles.begin();
      fail(ErrorKind::kDuplicateBranch, quoted(serial(handles[i])) +
                                            " was given twice, at indices " +
                                            std::to_string(first) + " and " + std::to_string(i));
    }
    b.mark = mark;
  }
}

void CacheCore::require_no_step(const char* verb) const {
  if (step_open_) {
    fail(ErrorKind::kStepOpen,
         std::string(verb) + ": a step is open; commit or roll it back first");
  }
}

void CacheCore::reserve_branches(std::size_t n) {
  if (next_serial_ + n > static_cast<std::size_t>(INT32_MAX)) {
    fail(ErrorKind::kUnsupported, "a cache can make at most 2**31 - 1 branches in its life");
  }
  branches_.reserve(n);
}

Index CacheCore::add_branch(Index parent, Index head, int64_t position) noexcept {
  const Index i = branches_.take();
  Branch& b = branches_[i];
  b.serial = next_serial_++;
  b.head = head;
  b.position = position;
  b.parent = parent;
  b.step_row = -1;
  b.first_child = kNone;
  b.prev_sibling = kNone;
  b.next_sibling = kNone;
  if (parent != kNone) {
    b.next_sibling = branches_[parent].first_child;
    if (b.next_sibling != kNone) branches_[b.next_sibling].prev_sibling = i;
    branches_[parent].first_child = i;
  }
  store_.retain(head);
  return i;
}

// The children of a freed branch stay descendants of its own ancestors.
void CacheCore::detach_lineage(Index i) noexcept {
  Branch& b = branches_[i];
  Index last = kNone;
  for (Index c = b.first_child; c != kNone; c = branches_[c].next_sibling) {
    branches_[c].parent = b.parent;
    last = c;
  }
  // The children take the branch's place among its siblings.
  const Index first = b.first_child != kNone ? b.first_child : b.next_sibling;
  if (last != kNone) {
    if (b.parent == kNone) {  // roots are not linked to each other
      for (Index c = b.first_child; c != kNone;) {
        const Index next = branches_[c].next_sibling;
        branches_[c].prev_sibling = branches_[c].next_sibling = kNone;
        c = next;
      }
      return;
    }
    branches_[last].next_sibling = b.next_sibling;
    branches_[b.first_child].prev_sibling = b.prev_sibling;
  }
  if (b.next_sibling != kNone)
    branches_[b.next_sibling].prev_sibling = last != kNone ? last : b.prev_sibling;
  if (b.prev_sibling != kNone) {
    branches_[b.prev_sibling].next_sibling = first;
  } else if (b.parent != kNone) {
    branches_[b.parent].first_child = first;
  }
}

void CacheCore::drop_branch(Index i) noexcept {
  detach_lineage(i);
  seal(i);
  store_.release(branches_[i].head);
  branches_.give(i);
}

void CacheCore::set_head(Branch& b, Index head) noexcept {
  store_.retain(head);
  const Index old = b.head;
  b.head = head;
  store_.release(old);
}

Index CacheCore::find_cut(Index head, int64_t length, int32_t& kept) const noexcept {
  kept = 0;
  while (head != kNone) {
    const Link& l = store_.links[head];
    const int64_t start = l.length - (l.hi - l.lo);
    if (start < length || (l.watch != kNone && l.length == length)) {
      kept = static_cast<int32_t>(length - start);
      return head;
    }
    head = l.parent;
  }
  return kNone;
}

Index CacheCore::cut(Index head, int64_t length) noexcept {
  int32_t kept = 0;
  const Index at = find_cut(head, length, kept);
  if (at == kNone) return kNone;
  const Link l = store_.links[at];
  if (kept >= l.hi - l.lo) return at;
  return store_.add_link(l.parent, l.segment, l.lo, l.lo + kept, l.position_shift);
}

Index CacheCore::split_tail(Index head) noexcept {
  if (tail_ != TailPolicy::kCopy || head == kNone) return head;
  const Link l = store_.links[head];
  if (l.watch != kNone) return head;
  const int32_t page_start = l.hi / page_size() * page_size();
  if (l.refs != 1 || page_start == l.hi || l.lo >= page_start) return head;
  const Index front = store_.add_link(l.parent, l.segment, l.lo, page_start, l.position_shift);
  Link& tail = store_.links[head];
  store_.retain(front);
  tail.parent = front;
  tail.lo = page_start;
  store_.release(l.parent);  // front holds it now
  return head;
}

Handle CacheCore::new_branch() {
  require_no_step("new_branch");
  reserve_branches(1);
  return handle(add_branch(kNone, kNone, 0));
}

std::vector<Handle> CacheCore::fork(Handle h, int64_t n) {
  const Index parent = require(h);
  require_no_step("fork");
  if (n < 1 || n > kMaxFork) {
    fail(ErrorKind::kValue,
         "n: expected 1 to " + std::to_string(kMaxFork) + " branches, got " + std::to_string(n));
  }
  std::vector<Handle> out(static_cast<std::size_t>(n));
  reserve_branches(out.size());
  store_.reserve(0, 1);
  const Index head = split_tail(branches_[parent].head);
  const int64_t position = branches_[parent].position;
  for (Handle& child : out) child = handle(add_branch(parent, head, position));
  return out;
}

Handle CacheCore::fork_at(Handle h, int64_t length) {
  const Index parent = require(h);
  require_no_step("fork_at");
  const int64_t total = store_.length(branches_[parent].head);
  if (length < 0 || length > total) {
    fail(ErrorKind::kValue, "length: expected 0 to the branch's " + std::to_string(total) +
                                " tokens, got " + std::to_string(length));
  }
  reserve_branches(1);
  store_.reserve(0, 1);
  const Index head = cut(branches_[parent].head, length);
  return handle(add_branch(parent, head, store_.end_position(head)));
}

void CacheCore::crop(Handle h, int64_t length) {
  const Index i = require(h);
  require_no_step("crop");
  require_unwatched(i, "crop");
  const int64_t total = store_.length(branches_[i].head);
  if (length < 0 || length > total) {
    fail(ErrorKind::kValue, "length: expected 0 to the branch's " + std::to_string(total) +
                                " tokens, got " + std::to_string(length));
  }
  store_.reserve(0, 1);
  Branch& b = branches_[i];
  set_head(b, cut(b.head, length));
  b.position = store_.end_position(b.head);
}

void CacheCore::excise(Handle h, int64_t start, int64_t end, bool rebase) {
  const Index i = require(h);
  require_no_step("excise");
  require_unwatched(i, "excise");
  Branch& b = branches_[i];
  const int64_t total = store_.length(b.head);
  if (start < 0 || end > total || start > end) {
    fail(ErrorKind::kValue, "start, end: expected 0 <= start <= end <= " + std::to_string(total) +
                                ", got " + std::to_string(start) + ", " + std::to_string(end));
  }
  if (start == end) return;
  std::vector<Index> chain;
  store_.chain(b.head, chain);
  const int64_t shift = rebase ? closing_shift(chain, b.position, start, end) : 0;
  store_.reserve(0, chain.size() + 1);
  Index head = cut(b.head, start);
  for (const Index at : chain) {
    const Link l = store_.links[at];
    if (l.watch != kNone) {
      if (l.length >= end) head = store_.add_watch_link(head, l.watch, l.position_shift + shift);
      continue;
    }
    if (l.length <= end) continue;
    const int64_t begin = l.length - (l.hi - l.lo);
    const auto skipped = static_cast<int32_t>(std::max<int64_t>(0, end - begin));
    head = store_.add_link(head, l.segment, l.lo + skipped, l.hi, l.position_shift + shift);
  }
  set_head(b, head);
  b.position += shift;
}

// By how much what follows [start, end) moves so that its first token stands where the first of
// these stood.
int64_t CacheCore::closing_shift(const std::vector<Index>& chain, int64_t position, int64_t start,
                                 int64_t end) const {
  int64_t from = position;
  int64_t to = 0;
  int64_t least = position;
  int64_t most = position;
  for (const Index at : chain) {
    const Link& l = store_.links[at];
    const int64_t begin = l.length - (l.hi - l.lo);
    if (l.watch != kNone) {
      if (l.length >= end) least = std::min(least, l.position_shift);
      continue;
    }
    const int64_t first = store_.segments[l.segment].first_position + l.lo + l.position_shift;
    if (begin <= start && start < l.length) to = first + (start - begin);
    if (begin <= end && end < l.length) from = first + (end - begin);
    if (l.length <= end) continue;
    least = std::min(least, first + std::max<int64_t>(0, end - begin));
    most = std::max(most, first + (l.hi - l.lo));
  }
  const int64_t shift = to - from;
  if (least + shift < 0 || most + shift > kMaxLength) {
    fail(ErrorKind::kValue, "rebase: what follows would stand at positions " +
                                std::to_string(least + shift) + " to " +
                                std::to_string(most + shift) + ", expected 0 to 2**31 - 1");
  }
  return shift;
}

void CacheCore::set_position(Handle h, int64_t position) {
  const Index i = require(h);
  require_no_step("position");
  if (position < 0 || position > kMaxLength) {
    fail(ErrorKind::kValue, "position: expected 0 to 2**31 - 1, got " + std::to_string(position));
  }
  branches_[i].position = position;
}

void CacheCore::free(std::span<const Handle> handles) {
  require_no_step("free");
  require_distinct(handles);
  std::size_t sealed = 0;
  for (const Handle h : handles) sealed += seal_links(find(h));
  store_.reserve(0, sealed);
  for (const Handle h : handles) drop_branch(find(h));
}

std::vector<Handle> CacheCore::select(Handle h, Handle child_handle) {
  const Index i = require(h);
  const Index child = require(child_handle);
  require_no_step("select");
  Index up = branches_[child].parent;
  while (up != kNone && up != i) up = branches_[up].parent;
  if (up == kNone) {
    fail(ErrorKind::kValue, "child: expected a descendant of " + quoted(serial(h)) + ", got " +
                                quoted(serial(child_handle)));
  }
  require_unwatched(i, "select");
  std::vector<Index> below;  // every descendant, parents before children
  below.push_back(i);
  for (std::size_t k = 0; k < below.size(); ++k) {
    for (Index c = branches_[below[k]].first_child; c != kNone; c = branches_[c].next_sibling)
      below.push_back(c);
  }
  std::vector<Handle> freed;
  freed.reserve(below.size() - 1);
  std::size_t sealed = 0;
  for (const Index gone : below) sealed += seal_links(gone);
  store_.reserve(0, sealed);
  Branch& b = branches_[i];
  set_head(b, branches_[child].head);
  b.position = branches_[child].position;
  for (std::size_t k = below.size(); --k > 0;) {
    freed.push_back(handle(below[k]));
    drop_branch(below[k]);
  }
  return freed;
}

void CacheCore::reorder(std::span<const Handle> handles, std::span<const int64_t> indices) {
  require_no_step("reorder");
  require_distinct(handles);
  if (indices.size() != handles.size()) {
    fail(ErrorKind::kValue, "indices: expected one per branch (" + std::to_string(handles.size()) +
                                "), got " + std::to_string(indices.size()));
  }
  struct Source {
    Index head;
    int64_t position;
  };
  std::vector<Source> sources(handles.size());
  std::vector<int32_t> uses(handles.size(), 0);
  for (const int64_t index : indices) {
    if (index < 0 || index >= static_cast<int64_t>(handles.size())) {
      fail(ErrorKind::kValue, "indices: expected 0 to " + std::to_string(handles.size() - 1) +
                                  ", got " + std::to_string(index));
    }
    ++uses[index];
  }
  for (std::size_t k = 0; k < handles.size(); ++k) {
    if (indices[k] != static_cast<int64_t>(k)) require_unwatched(find(handles[k]), "reorder");
  }
  store_.reserve(0, handles.size());
  for (std::size_t k = 0; k < handles.size(); ++k) {
    const Branch& b = branches_[find(handles[k])];
    sources[k] = {uses[k] > 1 ? split_tail(b.head) : b.head, b.position};
  }
  for (const int64_t index : indices) store_.retain(sources[index].head);
  for (std::size_t k = 0; k < handles.size(); ++k) {
    Branch& b = branches_[find(handles[k])];
    const Index old = b.head;
    b.head = sources[indices[k]].head;
    b.position = sources[indices[k]].position;
    store_.release(old);
  }
}

}  // namespace fork_attn
