// The union of contexts, token by token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "context_store.h"
#include "error.h"

namespace fork_attn {

// A run of tokens by identity: slots [lo, hi) under the uid of the segment that first held them.
struct Held {
  uint64_t uid;
  int64_t lo, hi;
  int64_t base;  // the position of slot s is s + base
  bool watched;  // seen through a watch, wherever that lays it
  bool operator<(const Held& other) const {
    return uid != other.uid ? uid < other.uid : lo < other.lo;
  }
};

struct NewLink {
  Index segment;
  int32_t lo, hi;
  int64_t shift;
};

inline Link link_of(const NewLink& l) {
  Link link;
  link.segment = l.segment;
  link.lo = l.lo;
  link.hi = l.hi;
  link.position_shift = l.shift;
  return link;
}

// What a context holds, by token identity, and the links that a union adds to it.
class Union {
 public:
  explicit Union(const ContextStore& store) : store_(store) {}

  void hold(const Link& link, bool watched = false) {
    each_identity(link, [&](Held h, int32_t) {
      h.watched = watched;
      held_.push_back(h);
    });
  }
  void sort() { std::sort(held_.begin(), held_.end()); }

  // Adds what the link sees and the context does not hold yet.
  void add(const Link& link) {
    std::vector<Held> fresh;
    each_identity(link, [&](const Held& h, int32_t slot) { add_missing(link, h, slot, fresh); });
    if (fresh.empty()) return;
    held_.insert(held_.end(), fresh.begin(), fresh.end());
    sort();
  }

  // Lays what was added since the last call end to end: its first position becomes `position`.
  // Returns the position that follows.
  int64_t lay(int64_t position) {
    int64_t least = INT64_MAX;
    int64_t end = INT64_MIN;
    for (std::size_t i = laid_; i < links_.size(); ++i) {
      const int64_t first = first_position(links_[i]);
      least = std::min(least, first);
      end = std::max(end, first + links_[i].hi - links_[i].lo);
    }
    if (laid_ == links_.size()) return position;
    for (; laid_ < links_.size(); ++laid_) links_[laid_].shift += position - least;
    return position + end - least;
  }

  const std::vector<NewLink>& links() const { return links_; }
  int64_t num_tokens() const { return num_tokens_; }

  template <class F>
  void each_identity(const Link& link, F&& f) const {
    const Segment& s = store_.segments[link.segment];
    const int64_t base = s.first_position + link.position_shift;
    int32_t slot = link.lo;
    for (const Origin& o : s.origins) {
      const int32_t end = std::min(o.end, link.hi);
      if (end <= slot) continue;
      f(Held{o.uid, slot + o.offset, end + o.offset, base - o.offset, false}, slot);
      slot = end;
    }
    if (slot < link.hi) f(Held{s.uid, slot, link.hi, base, false}, slot);
  }

 private:
  int64_t first_position(const NewLink& l) const {
    return store_.segments[l.segment].first_position + l.lo + l.shift;
  }

  void add_missing(const Link& link, const Held& h, int32_t slot, std::vector<Held>& fresh) {
    int64_t at = h.lo;
    auto it = std::upper_bound(held_.begin(), held_.end(), h);
    if (it != held_.begin() && std::prev(it)->uid == h.uid && std::prev(it)->hi > at) --it;
    for (; at < h.hi; ++it) {
      const bool overlaps = it != held_.end() && it->uid == h.uid && it->lo < h.hi;
      const int64_t gap_end = overlaps ? std::max(it->lo, at) : h.hi;
      if (gap_end > at)
        append(link, slot + (at - h.lo), slot + (gap_end - h.lo),
               {h.uid, at, gap_end, h.base, false}, fresh);
      if (!overlaps) break;
      if (it->base != h.base && !it->watched) {
        const int64_t token = std::max(it->lo, at);
        fail(ErrorKind::kValue, "children: a token stands at two different positions, " +
                                    std::to_string(token + it->base) + " and " +
                                    std::to_string(token + h.base));
      }
      at = std::max(at, it->hi);
    }
  }

  void append(const Link& link, int64_t lo, int64_t hi, const Held& h, std::vector<Held>& fresh) {
    fresh.push_back(h);
    num_tokens_ += hi - lo;
    if (links_.size() > laid_) {
      NewLink& last = links_.back();
      if (last.segment == link.segment && last.hi == lo && last.shift == link.position_shift) {
        last.hi = static_cast<int32_t>(hi);
        return;
      }
    }
    links_.push_back(
        {link.segment, static_cast<int32_t>(lo), static_cast<int32_t>(hi), link.position_shift});
  }

  const ContextStore& store_;
  std::vector<Held> held_;
  std::vector<NewLink> links_;
  std::size_t laid_ = 0;  // links whose place is settled
  int64_t num_tokens_ = 0;
};

}  // namespace fork_attn
