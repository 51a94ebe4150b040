// Looking at a cache: lengths, slots, statistics.
#include <algorithm>
#include <string>

#include "cache_core.h"

namespace fork_attn {

int64_t CacheCore::length(Handle h) const { return store_.length(branches_[require(h)].head); }

int64_t CacheCore::position(Handle h) const { return branches_[require(h)].position; }

int64_t CacheCore::parent_serial(Handle h) const {
  const Index parent = branches_[require(h)].parent;
  return parent == kNone ? -1 : static_cast<int64_t>(branches_[parent].serial);
}

int64_t CacheCore::num_pages(Handle h) const {
  std::vector<Index> chain;
  store_.chain(branches_[require(h)].head, chain);
  struct PageRange {
    Index segment;
    int32_t first, past;
  };
  std::vector<PageRange> ranges;
  ranges.reserve(chain.size());
  for (const Index at : chain) {
    const Link& l = store_.links[at];
    if (l.watch != kNone) continue;
    ranges.push_back({l.segment, l.lo / page_size(), store_.num_page_slots(l.hi)});
  }
  std::sort(ranges.begin(), ranges.end(), [](const PageRange& a, const PageRange& b) {
    return a.segment != b.segment ? a.segment < b.segment : a.first < b.first;
  });
  int64_t count = 0;
  Index segment = kNone;
  int32_t past = 0;
  for (const PageRange& r : ranges) {
    if (r.segment != segment) past = 0;
    segment = r.segment;
    count += std::max(0, r.past - std::max(r.first, past));
    past = std::max(past, r.past);
  }
  return count;
}

void CacheCore::slots(Handle h, std::vector<int64_t>& out) const {
  std::vector<Index> chain;
  store_.chain(branches_[require(h)].head, chain);
  out.clear();
  for (const Index at : chain) {
    const Link& l = store_.links[at];
    if (l.watch != kNone) continue;
    const Segment& s = store_.segments[l.segment];
    for (int32_t slot = l.lo; slot < l.hi; ++slot) {
      out.push_back(static_cast<int64_t>(s.pages[slot / page_size()]) * page_size() +
                    slot % page_size());
    }
  }
}

void CacheCore::positions(Handle h, std::vector<int64_t>& out) const {
  std::vector<ContextPart> parts;
  context(h, parts);
  out.clear();
  for (const ContextPart& p : parts) {
    for (int32_t slot = p.lo; slot < p.hi; ++slot) out.push_back(p.first_position + (slot - p.lo));
  }
}

void CacheCore::context(Handle h, std::vector<ContextPart>& out) const {
  std::vector<Index> chain;
  store_.chain(branches_[require(h)].head, chain);
  out.clear();
  for (const Index at : chain) {
    const Link& l = store_.links[at];
    if (l.watch != kNone) continue;
    const Segment& s = store_.segments[l.segment];
    out.push_back({s.uid, l.lo, l.hi, s.first_position + l.lo + l.position_shift});
  }
}

void CacheCore::page_table(Handle h, std::vector<int32_t>& out) const {
  std::vector<Index> chain;
  store_.chain(branches_[require(h)].head, chain);
  out.clear();
  int64_t token = 0;
  for (const Index at : chain) {
    const Link& l = store_.links[at];
    if (l.watch != kNone || l.position_shift != 0) {
      fail(ErrorKind::kNotDense, "branch " + std::to_string(serial(h)) +
                                     (l.watch != kNone ? " watches another branch"
                                                       : ": token " + std::to_string(token) +
                                                             " is seen at a position shifted by " +
                                                             std::to_string(l.position_shift)));
    }
    const Segment& s = store_.segments[l.segment];
    if (l.lo % page_size() != token % page_size()) {
      fail(ErrorKind::kNotDense,
           "branch " + std::to_string(serial(h)) + ": token " + std::to_string(token) +
               " lies in slot " + std::to_string(l.lo % page_size()) +
               " of its page, expected slot " + std::to_string(token % page_size()));
    }
    int32_t page = l.lo / page_size();
    if (l.lo % page_size() != 0) {  // goes on in the page that the link before ended in
      if (out.back() != s.pages[page]) {
        fail(ErrorKind::kNotDense,
             "branch " + std::to_string(serial(h)) + ": token " + std::to_string(token) +
                 " starts in mid-page, but not in the page of the token before it");
      }
      ++page;
    }
    for (; page < store_.num_page_slots(l.hi); ++page) out.push_back(s.pages[page]);
    token += l.hi - l.lo;
  }
}

void CacheCore::unseen_slots(std::vector<int64_t>& out) const {
  std::vector<bool> seen(static_cast<std::size_t>(store_.pages.num_pages()) * page_size());
  const auto see = [&](int32_t page, int32_t offset) {
    seen[static_cast<std::size_t>(page) * page_size() + offset] = true;
  };
  for (Index at = 0; at < store_.links.size(); ++at) {
    if (!store_.links.taken(at)) continue;
    const Link& l = store_.links[at];
    const Segment& s = store_.segments[l.segment];
    for (int32_t slot = l.lo; slot < l.hi; ++slot)
      see(s.pages[slot / page_size()], slot % page_size());
  }
  for (const PendingPage& p : store_.pages.pending()) {
    for (int32_t offset = 0; offset < page_size(); ++offset) see(p.page, offset);
  }
  out.clear();
  for (std::size_t slot = 0; slot < seen.size(); ++slot) {
    if (!seen[slot]) out.push_back(static_cast<int64_t>(slot));
  }
}

CoreStats CacheCore::stats() const {
  CoreStats stats{};
  stats.pages_total = store_.pages.num_pages();
  stats.pages_free = store_.pages.num_free();
  stats.pages_pending = store_.pages.num_pending();
  stats.pages_live = stats.pages_total - stats.pages_free - stats.pages_pending;
  stats.segments = static_cast<int64_t>(store_.segments.count());
  stats.links = static_cast<int64_t>(store_.links.count());
  stats.branches = static_cast<int64_t>(branches_.count());

  // Owner of a link, then of a page: 0 = none yet, i + 1 = branch i alone, -1 = several branches.
  std::vector<int32_t> link_owner(store_.links.size(), 0);
  std::vector<int32_t> page_owner(store_.pages.num_pages(), 0);
  const auto own = [&](const Link& l, int32_t who) {
    const Segment& s = store_.segments[l.segment];
    for (int32_t p = l.lo / page_size(); p < store_.num_page_slots(l.hi); ++p) {
      int32_t& owner = page_owner[s.pages[p]];
      if (owner != -1 && owner != who) owner = owner == 0 ? who : -1;
    }
  };
  for (Index i = 0; i < branches_.size(); ++i) {
    if (!branches_.taken(i)) continue;
    for (Index at = branches_[i].head; at != kNone; at = store_.links[at].parent) {
      const Link& l = store_.links[at];
      if (l.watch != kNone) {
        each_watched(store_.watches[l.watch], [&](const Link& seen) { own(seen, i + 1); });
        continue;
      }
      if (link_owner[at] == -1 && !l.shifted) break;
      link_owner[at] = link_owner[at] == 0 ? i + 1 : -1;
    }
  }
  for (Index at = 0; at < store_.links.size(); ++at) {
    if (store_.links.taken(at) && link_owner[at] != 0) own(store_.links[at], link_owner[at]);
  }
  stats.pages_shared = std::count(page_owner.begin(), page_owner.end(), -1);
  return stats;
}

}  // namespace fork_attn
