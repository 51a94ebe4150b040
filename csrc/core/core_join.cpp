// Join: the union of contexts.
#include <algorithm>
#include <string>

#include "cache_core.h"

namespace fork_attn {

namespace {

// A run of tokens by identity: slots [lo, hi) under the uid of the segment that first held them.
struct Held {
  uint64_t uid;
  int64_t lo, hi;
  int64_t shift;
  bool operator<(const Held& other) const {
    return uid != other.uid ? uid < other.uid : lo < other.lo;
  }
};

struct NewLink {
  Index segment;
  int32_t lo, hi;
  int64_t shift;
};

// What a context holds, by token identity, and the links that a union adds to it.
class Union {
 public:
  explicit Union(const ContextStore& store) : store_(store) {}

  void hold(const Link& link) {
    each_identity(link, [&](const Held& h, int32_t) { held_.push_back(h); });
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

  const std::vector<NewLink>& links() const { return links_; }
  int64_t num_tokens() const { return num_tokens_; }

 private:
  template <class F>
  void each_identity(const Link& link, F&& f) const {
    const Segment& s = store_.segments[link.segment];
    int32_t slot = link.lo;
    for (const Origin& o : s.origins) {
      const int32_t end = std::min(o.end, link.hi);
      if (end <= slot) continue;
      f(Held{o.uid, slot + o.offset, end + o.offset, link.position_shift}, slot);
      slot = end;
    }
    if (slot < link.hi) f(Held{s.uid, slot, link.hi, link.position_shift}, slot);
  }

  void add_missing(const Link& link, const Held& h, int32_t slot, std::vector<Held>& fresh) {
    int64_t at = h.lo;
    auto it = std::upper_bound(held_.begin(), held_.end(), h);
    if (it != held_.begin() && std::prev(it)->uid == h.uid && std::prev(it)->hi > at) --it;
    for (; at < h.hi; ++it) {
      const bool overlaps = it != held_.end() && it->uid == h.uid && it->lo < h.hi;
      const int64_t gap_end = overlaps ? std::max(it->lo, at) : h.hi;
      if (gap_end > at)
        append(link, slot + (at - h.lo), slot + (gap_end - h.lo), {h.uid, at, gap_end, h.shift},
               fresh);
      if (!overlaps) break;
      if (it->shift != h.shift) {
        fail(ErrorKind::kValue, "children: a token stands at two different position shifts, " +
                                    std::to_string(it->shift) + " and " + std::to_string(h.shift));
      }
      at = std::max(at, it->hi);
    }
  }

  void append(const Link& link, int64_t lo, int64_t hi, const Held& h, std::vector<Held>& fresh) {
    fresh.push_back(h);
    num_tokens_ += hi - lo;
    if (!links_.empty()) {
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
  int64_t num_tokens_ = 0;
};

}  // namespace

void CacheCore::join(Handle h, std::span<const Handle> children, JoinPosition mode,
                     int64_t position) {
  const Index i = require(h);
  require_no_step("join");
  require_distinct(children);
  if (std::find(children.begin(), children.end(), h) != children.end()) {
    fail(ErrorKind::kValue,
         "children: branch " + std::to_string(serial(h)) + " cannot be joined with itself");
  }
  if (children.empty()) fail(ErrorKind::kValue, "children: expected at least one branch, got none");

  Union all(store_);
  std::vector<Index> chain;
  const uint64_t mark = store_.next_mark();
  for (Index at = branches_[i].head; at != kNone; at = store_.links[at].parent) {
    store_.links[at].mark = mark;
    all.hold(store_.links[at]);
  }
  all.sort();
  int64_t largest = branches_[i].position;
  for (const Handle child_handle : children) {
    const Branch& child = branches_[find(child_handle)];
    largest = std::max(largest, child.position);
    // Links above a marked one are held already: the chain behind it was walked before.
    chain.clear();
    for (Index at = child.head; at != kNone && store_.links[at].mark != mark;
         at = store_.links[at].parent) {
      store_.links[at].mark = mark;
      chain.push_back(at);
    }
    for (std::size_t k = chain.size(); k-- > 0;) all.add(store_.links[chain[k]]);
  }

  Branch& b = branches_[i];
  if (mode == JoinPosition::kMax) position = largest;
  if (mode == JoinPosition::kSum) position = b.position + all.num_tokens();
  if (position < 0 || position > kMaxLength ||
      store_.length(b.head) + all.num_tokens() > kMaxLength) {
    fail(ErrorKind::kValue,
         "position: expected position and length of the joined branch within 0 to 2**31 - 1, got " +
             std::to_string(position) + " and " +
             std::to_string(store_.length(b.head) + all.num_tokens()));
  }
  store_.reserve(0, all.links().size());

  Index head = b.head;
  for (const auto& l : all.links()) head = store_.add_link(head, l.segment, l.lo, l.hi, l.shift);
  set_head(b, head);
  b.position = position;
  for (const Handle child : children) drop_branch(find(child));
}

}  // namespace fork_attn
