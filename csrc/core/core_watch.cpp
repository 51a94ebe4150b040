// Watches: branches that see what others write, while they write it.
//
// A watch stands at a place of its watcher's context, as a link without slots. What it shows is
// laid there, so everything behind it moves as the other branch grows. Nothing is written for that:
// the watcher's own tokens stay at the positions of its context alone, and what it sees before them
// is shifted back instead (ViewPart::shift), by as much as has come in between.
#include <algorithm>
#include <string>

#include "cache_core.h"

namespace fork_attn {

namespace {

// A shift may take positions of the view out of the range of a plan, whose positions are 32 bits.
bool fits(int64_t value) { return value >= INT32_MIN && value <= INT32_MAX; }

}  // namespace

void CacheCore::require_unwatched(Index branch, const char* verb) const {
  if (store_.watches.count() == 0) return;
  for (Index w = 0; w < store_.watches.size(); ++w) {
    if (store_.watches.taken(w) && store_.watches[w].other == branch) {
      fail(ErrorKind::kValue, std::string(verb) + ": branch " +
                                  std::to_string(branches_[branch].serial) +
                                  " is watched, and may only grow, fork or be freed; got " + verb);
    }
  }
}

std::size_t CacheCore::seal_links(Index branch) const {
  if (store_.watches.count() == 0) return 0;
  std::size_t count = 0;
  for (Index w = 0; w < store_.watches.size(); ++w) {
    if (!store_.watches.taken(w) || store_.watches[w].other != branch) continue;
    for (Index at = branches_[branch].head; at != kNone; at = store_.links[at].parent) ++count;
  }
  return count;
}

// A watched branch is about to go: what it wrote stays with its watchers.
void CacheCore::seal(Index branch) noexcept {
  if (store_.watches.count() == 0) return;
  for (Index i = 0; i < store_.watches.size(); ++i) {
    if (!store_.watches.taken(i) || store_.watches[i].other != branch) continue;
    Watch& w = store_.watches[i];
    // Youngest first, as chains are walked: each new link becomes the parent of the one before.
    Index head = kNone;
    Index child = kNone;
    for (Index at = branches_[branch].head; at != kNone; at = store_.links[at].parent) {
      const Link l = store_.links[at];
      if (l.length <= w.start) break;
      if (l.watch != kNone) continue;
      const auto lo = static_cast<int32_t>(std::max<int64_t>(l.lo, l.hi - (l.length - w.start)));
      const Index copy = store_.add_link(kNone, l.segment, lo, l.hi, l.position_shift);
      store_.retain(copy);
      if (child == kNone) {
        head = copy;
      } else {
        store_.links[child].parent = copy;
      }
      child = copy;
    }
    if (child != kNone) {
      store_.links[child].parent = w.sealed;
      w.sealed = head;
      store_.settle_chain(head);
    }
    w.other = kNone;
  }
}

void CacheCore::watch(Handle h, Handle other_handle, int64_t lag, bool rebase) {
  const Index i = require(h);
  const Index other = require(other_handle);
  require_no_step("watch");
  require_unwatched_by(i, other);
  if (lag < 0 || lag > kMaxLength) {
    fail(ErrorKind::kValue, "lag: expected 0 to 2**31 - 1, got " + std::to_string(lag));
  }
  Branch& b = branches_[i];
  const std::vector<Link> unseen = links_unseen(b.head, branches_[other].head);
  store_.reserve(0, unseen.size() + 1);
  store_.watches.reserve(1);

  const Index w = store_.watches.take();
  Watch& watch = store_.watches[w];
  watch.other = other;
  watch.start = store_.length(branches_[other].head);
  watch.lag = static_cast<int32_t>(lag);
  watch.rebase = rebase;
  watch.refs = 0;
  watch.sealed = kNone;
  for (const Link& l : unseen) {
    watch.sealed = store_.add_link(watch.sealed, l.segment, l.lo, l.hi, l.position_shift);
  }
  store_.retain(watch.sealed);
  set_head(b, store_.add_watch_link(b.head, w, b.position));
}

void CacheCore::require_unwatched_by(Index branch, Index other) const {
  const std::string who = "branch " + std::to_string(branches_[other].serial);
  if (branch == other) {
    fail(ErrorKind::kValue, "other: " + who + " cannot watch itself");
  }
  for (Index at = branches_[branch].head; at != kNone; at = store_.links[at].parent) {
    const Index w = store_.links[at].watch;
    if (w != kNone && store_.watches[w].other == other) {
      fail(ErrorKind::kValue, "other: " + who + " is watched by branch " +
                                  std::to_string(branches_[branch].serial) + " already");
    }
  }
}

// The positions of what a watch shows between steps; empty: first > end.
CacheCore::Extent CacheCore::extent(const Watch& watch) const {
  Extent e{INT64_MAX, INT64_MIN};
  each_watched(watch, [&](const Link& l) {
    const int64_t first = store_.segments[l.segment].first_position + l.lo + l.position_shift;
    e.first = std::min(e.first, first);
    e.end = std::max(e.end, first + l.hi - l.lo);
  });
  return e;
}

// And with the first new tokens of the other branch in the open step.
CacheCore::Extent CacheCore::extent(const Watch& watch, const StepRow* other,
                                    int32_t num_new) const {
  Extent e = extent(watch);
  if (num_new > 0) {
    const int64_t position = branches_[other->branch].position;
    e.first = std::min(e.first, position);
    e.end = std::max(e.end, position + num_new);
  }
  return e.first > e.end ? Extent{0, 0} : e;
}

// What a watch shows to the tokens of `part`, whose shift is that of the watched block.
void CacheCore::watched_parts(const Watch& watch, ViewPart part, std::vector<ViewPart>& out) const {
  const int64_t shift = part.shift;
  each_watched(watch, [&](const Link& l) {
    part.shift = shift + l.position_shift;
    part.segment = l.segment;
    part.lo = l.lo;
    part.hi = l.hi;
    out.push_back(part);
  });
}

void CacheCore::view_of_row(const StepRow& row, std::vector<ViewPart>& out) const {
  out.clear();
  const Index head = branches_[row.branch].head;
  if (head == kNone || !store_.links[head].shifted) return;
  std::vector<Index> chain;
  store_.chain(head, chain);
  const auto other_row = [&](const Watch& w) {
    return w.other == kNone ? -1 : branches_[w.other].step_row;
  };
  const auto num_new = [&](const Watch& w, int32_t token) {
    const int32_t r = other_row(w);
    if (r < 0) return 0;
    return std::clamp(token - w.lag + 1, 0, step_.rows[r].num_tokens);
  };
  // Tokens between two bounds see the same.
  std::vector<int32_t> bounds{0, row.num_tokens};
  std::size_t num_rebased = 0;  // links up to the last watch that moves what stands before it
  for (std::size_t k = 0; k < chain.size(); ++k) {
    const Index at = store_.links[chain[k]].watch;
    if (at == kNone || !store_.watches[at].rebase) continue;
    const Watch& w = store_.watches[at];
    num_rebased = k + 1;
    for (int32_t t = std::max(w.lag, 1); t < row.num_tokens; ++t) {
      if (num_new(w, t) == num_new(w, t - 1)) break;
      bounds.push_back(t);
    }
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());

  for (std::size_t range = 0; range + 1 < bounds.size() && num_rebased > 0; ++range) {
    const int32_t first = bounds[range];
    int64_t ahead = 0;  // positions that watches from here on take in the view
    std::vector<Extent> extents(num_rebased);
    for (std::size_t k = 0; k < num_rebased; ++k) {
      const Index at = store_.links[chain[k]].watch;
      if (at == kNone || !store_.watches[at].rebase) continue;
      const Watch& w = store_.watches[at];
      const int32_t count = num_new(w, first);
      extents[k] = extent(w, count > 0 ? &step_.rows[other_row(w)] : nullptr, count);
      ahead += extents[k].end - extents[k].first;
    }
    for (std::size_t k = 0; k < num_rebased; ++k) {
      const Link& l = store_.links[chain[k]];
      ViewPart part{first,
                    bounds[range + 1] - first,
                    l.position_shift - ahead,
                    l.segment,
                    l.lo,
                    l.hi,
                    -1,
                    false,
                    0};
      if (l.watch == kNone) {
        out.push_back(part);
        continue;
      }
      const Watch& w = store_.watches[l.watch];
      if (!w.rebase) continue;
      part.shift -= extents[k].first;
      part.row = other_row(w);
      watched_parts(w, part, out);
      part.segment = kNone;
      part.lo = 0;
      part.hi = num_new(w, first);
      if (part.hi > 0) out.push_back(part);
      ahead -= extents[k].end - extents[k].first;
    }
  }
  for (std::size_t k = 0; k < chain.size(); ++k) {
    const Link& l = store_.links[chain[k]];
    ViewPart part{0, row.num_tokens, l.position_shift, l.segment, l.lo, l.hi, -1, false, 0};
    if (l.watch == kNone) {
      if (k >= num_rebased && l.position_shift != 0) out.push_back(part);
      continue;
    }
    const Watch& w = store_.watches[l.watch];
    if (w.rebase) continue;
    part.shift = 0;
    part.row = other_row(w);
    part.in_place = true;
    part.lag = w.lag;
    watched_parts(w, part, out);
    part.segment = kNone;
    part.shift = 0;
    part.lo = 0;
    part.hi = num_new(w, row.num_tokens - 1);
    if (part.hi > 0) out.push_back(part);
  }
}

// What cannot be planned is refused when the step opens.
void CacheCore::validate_watches() const {
  std::vector<ViewPart> parts;
  for (const StepRow& row : step_.rows) {
    const Index head = branches_[row.branch].head;
    if (head == kNone || !store_.links[head].shifted) continue;
    for (Index at = head; at != kNone; at = store_.links[at].parent) {
      const Index w = store_.links[at].watch;
      const Index other = w == kNone ? kNone : store_.watches[w].other;
      if (other == kNone || branches_[other].step_row < 0) continue;
      if (!row.draft && !step_.rows[branches_[other].step_row].draft) continue;
      fail(ErrorKind::kUnsupported,
           "tokens: branch " + std::to_string(branches_[row.branch].serial) + " watches branch " +
               std::to_string(branches_[other].serial) + "; neither may draft in a step of both");
    }
    view_of_row(row, parts);
    const int64_t position = branches_[row.branch].position;
    for (const ViewPart& p : parts) {
      if (!fits(p.shift) || !fits(position - p.shift) ||
          !fits(position + row.num_tokens - p.shift)) {
        fail(ErrorKind::kValue, "tokens: branch " + std::to_string(branches_[row.branch].serial) +
                                    " would see a token at a position beyond 32 bits, shifted by " +
                                    std::to_string(p.shift));
      }
    }
  }
}

void CacheCore::view(Handle h, std::vector<int64_t>& slots, std::vector<int64_t>& positions) const {
  std::vector<Index> chain;
  store_.chain(branches_[require(h)].head, chain);
  slots.clear();
  positions.clear();
  int64_t moved = 0;  // by the watches so far
  const auto add = [&](const Link& l, int64_t shift) {
    const Segment& s = store_.segments[l.segment];
    for (int32_t slot = l.lo; slot < l.hi; ++slot) {
      slots.push_back(static_cast<int64_t>(s.pages[slot / page_size()]) * page_size() +
                      slot % page_size());
      positions.push_back(s.first_position + slot + l.position_shift + shift);
    }
  };
  int64_t total = 0;
  for (const Index at : chain) {
    const Index w = store_.links[at].watch;
    if (w == kNone || !store_.watches[w].rebase) continue;
    const Extent e = extent(store_.watches[w], nullptr, 0);
    total += e.end - e.first;
  }
  for (const Index at : chain) {
    const Link& l = store_.links[at];
    if (l.watch == kNone) {
      add(l, moved);
      continue;
    }
    const Watch& w = store_.watches[l.watch];
    const Extent e = extent(w, nullptr, 0);
    // In place: where it stands for the branch's own tokens, which all watches have moved.
    const int64_t shift = w.rebase ? moved + l.position_shift - e.first : total;
    each_watched(w, [&](const Link& seen) { add(seen, shift); });
    if (w.rebase) moved += e.end - e.first;
  }
}

std::vector<int64_t> CacheCore::watched(Handle h) const {
  std::vector<Index> chain;
  store_.chain(branches_[require(h)].head, chain);
  std::vector<int64_t> out;
  for (const Index at : chain) {
    const Index w = store_.links[at].watch;
    if (w == kNone) continue;
    const Index other = store_.watches[w].other;
    out.push_back(other == kNone ? -1 : static_cast<int64_t>(branches_[other].serial));
  }
  return out;
}

}  // namespace fork_attn
