#include "context_store.h"

#include <algorithm>

namespace fork_attn {

void ContextStore::reserve(std::size_t num_segments, std::size_t num_links) {
  segments.reserve(num_segments);
  links.reserve(num_links);
}

Index ContextStore::new_segment(int64_t first_position) noexcept {
  const Index i = segments.take();
  Segment& s = segments[i];
  s.uid = next_uid_++;
  s.first_position = first_position;
  s.length = 0;
  s.copied_end = 0;
  s.first_link = kNone;
  s.frozen = false;
  return i;
}

Index ContextStore::add_link(Index parent, Index segment, int32_t lo, int32_t hi,
                             int64_t shift) noexcept {
  const Index i = links.take();
  Link& l = links[i];
  Segment& s = segments[segment];
  l.parent = parent;
  l.segment = segment;
  l.watch = kNone;
  l.lo = lo;
  l.hi = hi;
  l.position_shift = shift;
  l.length = length(parent) + (hi - lo);
  l.refs = 0;
  l.shifted = shift != 0 || (parent != kNone && links[parent].shifted);
  l.prev = kNone;
  l.next = s.first_link;
  if (l.next != kNone) links[l.next].prev = i;
  s.first_link = i;
  s.length = std::max(s.length, hi);
  retain(parent);
  return i;
}

Index ContextStore::add_watch_link(Index parent, Index watch, int64_t position) noexcept {
  const Index i = links.take();
  Link& l = links[i];
  l.parent = parent;
  l.segment = kNone;
  l.watch = watch;
  l.lo = l.hi = 0;
  l.position_shift = position;
  l.length = length(parent);
  l.refs = 0;
  l.shifted = true;
  l.prev = l.next = kNone;
  ++watches[watch].refs;
  retain(parent);
  return i;
}

void ContextStore::unlink(const Link& l) noexcept {
  if (l.prev != kNone) {
    links[l.prev].next = l.next;
  } else {
    segments[l.segment].first_link = l.next;
  }
  if (l.next != kNone) links[l.next].prev = l.prev;
}

void ContextStore::release(Index link) noexcept {
  while (link != kNone && --links[link].refs == 0) {
    const Link& l = links[link];
    const Index parent = l.parent;
    if (l.watch != kNone) {
      const Index watch = l.watch;
      links.give(link);
      release_watch(watch);
    } else {
      unlink(l);
      reclaim(l.segment, l.lo, l.hi);
      links.give(link);
    }
    link = parent;
  }
}

void ContextStore::release_watch(Index watch) noexcept {
  if (--watches[watch].refs > 0) return;
  const Index sealed = watches[watch].sealed;
  watches.give(watch);
  release(sealed);  // holds no watches
}

void ContextStore::extend(Index link, int32_t num_slots) noexcept {
  Link& l = links[link];
  l.hi += num_slots;
  l.length += num_slots;
  segments[l.segment].length = l.hi;
}

void ContextStore::settle_chain(Index head) noexcept {
  int64_t total = 0;
  for (Index i = head; i != kNone; i = links[i].parent) total += links[i].hi - links[i].lo;
  for (Index i = head; i != kNone; i = links[i].parent) {
    links[i].length = total;
    links[i].shifted = true;
    total -= links[i].hi - links[i].lo;
  }
}

Index ContextStore::coalesce(Index head) noexcept {
  while (head != kNone && links[head].refs == 1 && links[head].parent != kNone) {
    const Link& l = links[head];
    const Index parent = l.parent;
    Link& p = links[parent];
    const bool continues = l.watch == kNone && p.segment == l.segment && p.hi == l.lo &&
                           p.position_shift == l.position_shift;
    if (p.refs != 1 || !continues) break;
    p.hi = l.hi;
    p.length = l.length;
    unlink(l);
    links.give(head);  // the reference that the link held to its parent becomes the branch's
    head = parent;
  }
  return head;
}

int64_t ContextStore::end_position(Index head) const noexcept {
  while (head != kNone && links[head].watch != kNone) head = links[head].parent;
  if (head == kNone) return 0;
  const Link& l = links[head];
  return segments[l.segment].first_position + l.hi + l.position_shift;
}

bool ContextStore::can_extend(Index head, int64_t position) const noexcept {
  if (head == kNone || links[head].watch != kNone) return false;
  const Link& l = links[head];
  const Segment& s = segments[l.segment];
  return l.hi == s.length && l.position_shift == 0 && !s.frozen && end_position(head) == position;
}

void ContextStore::chain(Index head, std::vector<Index>& out) const {
  out.clear();
  for (Index i = head; i != kNone; i = links[i].parent) out.push_back(i);
  std::reverse(out.begin(), out.end());
}

void ContextStore::defer() {
  pages.defer();
  arena.defer();
}

int64_t ContextStore::close_epoch() noexcept {
  if (pages.epoch_empty() && arena.epoch_empty()) return 0;
  arena.close_epoch();
  return pages.close_epoch();
}

int32_t ContextStore::end_epoch(int64_t epoch) noexcept {
  arena.end_epoch(epoch);
  return pages.end_epoch(epoch);
}

void ContextStore::truncate(Segment& s, int32_t length) noexcept {
  const auto keep = static_cast<std::size_t>(num_page_slots(length));
  while (s.pages.size() > keep) {
    if (s.pages.back() != kNone) pages.give(s.pages.back());
    s.pages.pop_back();
  }
  s.place.known = std::min(s.place.known, static_cast<int32_t>(s.pages.size()));
  s.length = length;
  if (length < s.copied_end) s.frozen = true;
  drop_tail(s);
  while (!s.origins.empty() && s.origins.back().end > length) {
    const int32_t begin = s.origins.size() > 1 ? s.origins[s.origins.size() - 2].end : 0;
    if (begin < length) {
      s.origins.back().end = length;
    } else {
      s.origins.pop_back();
    }
  }
}

// Gives back the pages of slots [lo, hi) that no link of the segment reaches any more.
void ContextStore::reclaim(Index segment, int32_t lo, int32_t hi) noexcept {
  Segment& s = segments[segment];
  if (s.first_link == kNone) {
    truncate(s, 0);
    constexpr std::size_t kKeepCapacity = 64;
    if (s.pages.capacity() > kKeepCapacity) std::vector<int32_t>().swap(s.pages);
    arena.give(s.place);
    segments.give(segment);
    return;
  }
  int32_t end = 0;
  for (Index i = s.first_link; i != kNone; i = links[i].next) end = std::max(end, links[i].hi);
  if (end < s.length) truncate(s, end);
  int32_t page = lo / page_size_;
  const int32_t last = std::min(num_page_slots(hi), num_page_slots(s.length));
  while (page < last) {
    // The link that covers this page and reaches furthest, or else the nearest page that some link
    // covers.
    int32_t covered_to = page;
    int32_t next_covered = last;
    for (Index i = s.first_link; i != kNone; i = links[i].next) {
      const int32_t first = links[i].lo / page_size_;
      const int32_t past = num_page_slots(links[i].hi);
      if (first <= page && past > page) covered_to = std::max(covered_to, past);
      if (first > page) next_covered = std::min(next_covered, first);
    }
    if (covered_to > page) {
      page = covered_to;
      continue;
    }
    for (; page < next_covered; ++page) {
      if (s.pages[page] == kNone) continue;
      pages.give(s.pages[page]);
      s.pages[page] = kNone;
    }
  }
}

}  // namespace fork_attn
