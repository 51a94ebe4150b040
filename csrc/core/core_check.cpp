// Invariants, recounted from scratch, and a digest of the whole state.
#include <algorithm>
#include <string>

#include "cache_core.h"

namespace fork_attn {

namespace {

void expect(bool holds, const char* what, int64_t index) {
  if (!holds)
    fail(ErrorKind::kInvariant, std::string(what) + " (index " + std::to_string(index) + ")");
}

struct Fnv {
  uint64_t value = 1469598103934665603ull;
  template <class T>
  void add(T x) {
    value = (value ^ static_cast<uint64_t>(x)) * 1099511628211ull;
    value ^= value >> 29;
  }
};

void check_links(const CacheCore& core) {
  const ContextStore& store = core.store();
  std::vector<int32_t> refs(store.links.size(), 0);
  std::vector<int32_t> watch_refs(store.watches.size(), 0);
  for (Index i = 0; i < core.branches().size(); ++i) {
    if (!core.branches().taken(i)) continue;
    const Index head = core.branches()[i].head;
    if (head == kNone) continue;
    expect(store.links.taken(head), "a branch's head is not a live link", i);
    ++refs[head];
  }
  for (Index i = 0; i < store.links.size(); ++i) {
    if (!store.links.taken(i)) continue;
    const Link& l = store.links[i];
    const bool shifted = l.parent != kNone && store.links[l.parent].shifted;
    expect(l.shifted || (!shifted && l.position_shift == 0 && l.watch == kNone),
           "a link does not know of a shift before it", i);
    if (l.parent != kNone) ++refs[l.parent];
    if (l.watch != kNone) {
      expect(store.watches.taken(l.watch), "a link names a freed watch", i);
      expect(l.segment == kNone && l.lo == 0 && l.hi == 0 && l.length == store.length(l.parent),
             "a watch's link holds slots", i);
      ++watch_refs[l.watch];
      continue;
    }
    expect(store.segments.taken(l.segment), "a link names a freed segment", i);
    expect(l.lo >= 0 && l.lo < l.hi && l.hi <= store.segments[l.segment].length,
           "a link leaves its segment", i);
    expect(l.length == store.length(l.parent) + (l.hi - l.lo),
           "a link's length is not the sum of its context", i);
    expect(store.segments[l.segment].first_position + l.lo + l.position_shift >= 0,
           "a token stands at a negative position", i);
    if (l.parent == kNone) continue;
    expect(store.links.taken(l.parent), "a link's parent was freed", i);
  }
  for (Index i = 0; i < store.watches.size(); ++i) {
    if (!store.watches.taken(i)) continue;
    const Watch& w = store.watches[i];
    expect(w.refs == watch_refs[i] && w.refs > 0, "a watch's references", i);
    if (w.sealed != kNone) ++refs[w.sealed];
    if (w.other == kNone) continue;
    expect(core.branches().taken(w.other), "a watched branch was freed", i);
    expect(store.length(core.branches()[w.other].head) >= w.start, "a watched branch has shrunk",
           i);
  }
  for (Index i = 0; i < store.links.size(); ++i) {
    if (store.links.taken(i))
      expect(store.links[i].refs == refs[i] && refs[i] > 0, "a link's references", i);
  }
}

// Visible ends, covered pages, and the links' list of every segment.
void check_segments(const CacheCore& core, std::vector<uint8_t>& owned) {
  const ContextStore& store = core.store();
  std::size_t listed = 0;
  for (Index i = 0; i < store.segments.size(); ++i) {
    if (!store.segments.taken(i)) continue;
    const Segment& s = store.segments[i];
    std::vector<uint8_t> covered(s.pages.size(), 0);
    int32_t end = 0;
    Index prev = kNone;
    for (Index at = s.first_link; at != kNone; at = store.links[at].next) {
      const Link& l = store.links[at];
      expect(store.links.taken(at) && l.segment == i && l.prev == prev,
             "a segment's list of links is broken", i);
      end = std::max(end, l.hi);
      for (int32_t p = l.lo / core.page_size(); p < store.num_page_slots(l.hi); ++p) covered[p] = 1;
      prev = at;
      ++listed;
    }
    expect(s.first_link != kNone, "a segment without readers is alive", i);
    expect(end == s.length, "a segment is longer than its last visible slot", i);
    expect(s.pages.size() == static_cast<std::size_t>(store.num_page_slots(s.length)),
           "a segment's pages", i);
    expect(s.claimed == false || core.step_open(), "a segment is claimed without an open step", i);
    for (std::size_t p = 0; p < s.pages.size(); ++p) {
      expect((s.pages[p] != kNone) == (covered[p] != 0),
             "a page without readers is held, or one with readers is not", i);
      if (s.pages[p] == kNone) continue;
      expect(!owned[s.pages[p]], "a page belongs to two owners", s.pages[p]);
      owned[s.pages[p]] = 1;
    }
  }
  for (Index i = 0; i < store.links.size(); ++i)
    listed += store.links.taken(i) && store.links[i].watch != kNone;
  expect(listed == store.links.count(), "a link is missing from its segment's list",
         static_cast<int64_t>(listed));
}

// Page lists on the device: places within the array, none over another.
void check_places(const CacheCore& core) {
  const ContextStore& store = core.store();
  std::vector<uint8_t> owned(store.arena.size(), 0);
  const auto own = [&](int32_t begin, int32_t capacity, int64_t index) {
    expect(begin + capacity <= store.arena.size(), "a page list leaves the array", index);
    for (int32_t i = 0; i < capacity; ++i) {
      expect(!owned[begin + i], "two page lists in one place", index);
      owned[begin + i] = 1;
    }
  };
  const auto claim = [&](const ArenaPlace& place, int64_t index) {
    expect(place.known <= place.told && place.told <= place.capacity,
           "a page list is larger than its place", index);
    own(place.begin, place.capacity, index);
  };
  store.arena.each_pending([&](int32_t begin, int32_t capacity) { own(begin, capacity, begin); });
  for (Index i = 0; i < store.segments.size(); ++i) {
    if (store.segments.taken(i)) claim(store.segments[i].place, i);
  }
  for (const StepRow& row : core.step().rows) claim(row.place, row.row_begin);
}

void check_lineage(const CacheCore& core) {
  const Pool<Branch>& branches = core.branches();
  std::vector<uint8_t> listed(branches.size(), 0);
  for (Index i = 0; i < branches.size(); ++i) {
    if (!branches.taken(i)) continue;
    Index prev = kNone;
    for (Index c = branches[i].first_child; c != kNone; c = branches[c].next_sibling) {
      expect(branches.taken(c) && branches[c].parent == i && branches[c].prev_sibling == prev &&
                 !listed[c],
             "a branch's list of children is broken", i);
      expect(branches[c].serial > branches[i].serial, "a branch is older than its parent", c);
      listed[c] = 1;
      prev = c;
    }
  }
  for (Index i = 0; i < branches.size(); ++i) {
    if (branches.taken(i))
      expect(listed[i] == (branches[i].parent != kNone), "a branch's parent does not list it", i);
  }
}

}  // namespace

void CacheCore::check() const {
  check_links(*this);
  std::vector<uint8_t> owned(store_.pages.num_pages(), 0);
  check_segments(*this, owned);
  check_places(*this);
  check_lineage(*this);
  for (const int32_t page : step_.pages) {
    expect(!owned[page], "a page reserved by the open step belongs to a segment", page);
    owned[page] = 1;
  }
  for (const int32_t page : store_.pages.free_list()) {
    expect(!owned[page] && !store_.pages.live(page), "a free page is in use or listed twice", page);
    owned[page] = 1;
  }
  for (const PendingPage& p : store_.pages.pending()) {
    expect(!owned[p.page] && !store_.pages.live(p.page), "a pending page is in use or listed twice",
           p.page);
    owned[p.page] = 1;
  }
  for (int32_t page = 0; page < store_.pages.num_pages(); ++page)
    expect(owned[page] != 0, "a page leaked", page);
}

uint64_t CacheCore::digest() const {
  Fnv h;
  for (Index i = 0; i < branches_.size(); ++i) {
    if (!branches_.taken(i)) continue;
    const Branch& b = branches_[i];
    for (const int64_t x : {int64_t{i}, int64_t{b.serial}, int64_t{b.head}, b.position,
                            int64_t{b.parent}, int64_t{b.first_child}, int64_t{b.next_sibling}}) {
      h.add(x);
    }
  }
  for (Index i = 0; i < store_.links.size(); ++i) {
    if (!store_.links.taken(i)) continue;
    const Link& l = store_.links[i];
    for (const int64_t x :
         {int64_t{i}, int64_t{l.parent}, int64_t{l.segment}, int64_t{l.watch}, int64_t{l.lo},
          int64_t{l.hi}, l.position_shift, l.length, int64_t{l.refs}, int64_t{l.next}}) {
      h.add(x);
    }
  }
  for (Index i = 0; i < store_.watches.size(); ++i) {
    if (!store_.watches.taken(i)) continue;
    const Watch& w = store_.watches[i];
    for (const int64_t x : {int64_t{i}, int64_t{w.other}, int64_t{w.sealed}, w.start,
                            int64_t{w.lag}, int64_t{w.rebase}, int64_t{w.refs}}) {
      h.add(x);
    }
  }
  for (Index i = 0; i < store_.segments.size(); ++i) {
    if (!store_.segments.taken(i)) continue;
    const Segment& s = store_.segments[i];
    for (const int64_t x :
         {int64_t{i}, static_cast<int64_t>(s.uid), s.first_position, int64_t{s.length},
          int64_t{s.copied_end}, int64_t{s.frozen}, int64_t{s.claimed}, int64_t{s.first_link}}) {
      h.add(x);
    }
    for (const int32_t page : s.pages) h.add(page);
    for (const Origin& o : s.origins) {
      h.add(o.end);
      h.add(o.uid);
      h.add(o.offset);
    }
  }
  for (const int32_t page : store_.pages.free_list()) h.add(page);
  for (const PendingPage& p : store_.pages.pending()) {
    h.add(p.page);
    h.add(p.epoch);
  }
  h.add(next_serial_);
  h.add(step_open_);
  for (const int32_t page : step_.pages) h.add(page);
  for (const StepRow& row : step_.rows) h.add(row.accepted);
  return h.value;
}

}  // namespace fork_attn
