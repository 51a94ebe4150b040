// Join: the union of contexts.
#include <algorithm>
#include <string>

#include "cache_core.h"
#include "token_union.h"

namespace fork_attn {

namespace {

// Where the links of a union that have a shift are copied to: segments in which they have none.
class Copies {
 public:
  struct Copied {
    int64_t first_position;
    int32_t length = 0;
    std::vector<int32_t> pages;
    std::vector<Origin> origins;
  };

  explicit Copies(const ContextStore& store) : store_(store) {}

  // May throw kOutOfPages; takes no pages, but names those that the pool would give next.
  void plan(const Union& all) {
    int64_t needed = 0;
    for (const NewLink& l : all.links()) {
      if (l.shift != 0) add(all, l);
    }
    for (const Copied& c : segments_) needed += store_.num_page_slots(c.length);
    if (needed > store_.pages.num_free()) {
      throw out_of_pages(store_.pages, needed, "join: rebase=\"copy\"",
                         "; call again once they have");
    }
    auto next = store_.pages.free_list().rbegin();
    for (Copied& c : segments_) {
      for (int32_t n = store_.num_page_slots(c.length); n > 0; --n) c.pages.push_back(*next++);
    }
    address(all);
  }

  std::vector<Copied>& segments() { return segments_; }
  const std::vector<RotatedCopy>& slots() const { return slots_; }

 private:
  void add(const Union& all, const NewLink& l) {
    const int64_t first = store_.segments[l.segment].first_position + l.lo + l.shift;
    const bool goes_on = !segments_.empty() && last_ == &l - 1 &&
                         segments_.back().first_position + segments_.back().length == first;
    if (!goes_on) segments_.push_back({first, 0, {}, {}});
    last_ = &l;
    Copied& c = segments_.back();
    const Link link = link_of(l);
    all.each_identity(link, [&](const Held& h, int32_t slot) {
      const int32_t at = c.length + (slot - l.lo);
      const auto count = static_cast<int32_t>(h.hi - h.lo);
      c.origins.push_back({at + count, h.uid, h.lo - at});
    });
    c.length += l.hi - l.lo;
  }

  void address(const Union& all) {
    const int64_t size = store_.page_size();
    auto into = segments_.begin();
    int32_t at = 0;
    for (const NewLink& l : all.links()) {
      if (l.shift == 0) continue;
      const Segment& s = store_.segments[l.segment];
      for (int32_t slot = l.lo; slot < l.hi; ++slot, ++at) {
        if (at == into->length) {
          ++into;
          at = 0;
        }
        slots_.push_back({s.pages[slot / size] * size + slot % size,
                          into->pages[at / size] * size + at % size, l.shift});
      }
    }
  }

  const ContextStore& store_;
  std::vector<Copied> segments_;
  std::vector<RotatedCopy> slots_;
  const NewLink* last_ = nullptr;
};

}  // namespace

std::vector<Link> CacheCore::links_unseen(Index head, Index other) const {
  Union all(store_);
  for (Index at = head; at != kNone; at = store_.links[at].parent) {
    const Link& l = store_.links[at];
    const auto hold = [&](const Link& seen) { all.hold(seen, true); };
    if (l.watch == kNone) {
      hold(l);
    } else {
      each_watched(store_.watches[l.watch], hold);
    }
  }
  all.sort();
  std::vector<Index> chain;
  store_.chain(other, chain);
  for (const Index at : chain) {
    if (store_.links[at].watch == kNone) all.add(store_.links[at]);
  }
  std::vector<Link> out;
  for (const NewLink& l : all.links()) out.push_back(link_of(l));
  return out;
}

void CacheCore::check_join(Handle h, std::span<const Handle> children) const {
  require_distinct(children);
  require_unwatched(require(h), "join");
  if (std::find(children.begin(), children.end(), h) != children.end()) {
    fail(ErrorKind::kValue,
         "children: branch " + std::to_string(serial(h)) + " cannot be joined with itself");
  }
  if (children.empty()) fail(ErrorKind::kValue, "children: expected at least one branch, got none");
}

void CacheCore::join(Handle h, std::span<const Handle> children, const JoinRequest& request) {
  const Index i = require(h);
  require_no_step("join");
  check_join(h, children);

  Union all(store_);
  std::vector<Index> chain;
  const uint64_t mark = store_.next_mark();
  for (Index at = branches_[i].head; at != kNone; at = store_.links[at].parent) {
    const Link& l = store_.links[at];
    l.mark = mark;
    if (l.watch == kNone) {
      all.hold(l);
    } else {
      each_watched(store_.watches[l.watch], [&](const Link& seen) { all.hold(seen, true); });
    }
  }
  all.sort();
  int64_t largest = branches_[i].position;
  int64_t end = largest;
  for (const Handle child_handle : children) {
    const Branch& child = branches_[find(child_handle)];
    largest = std::max(largest, child.position);
    // Links above a marked one are held already: the chain behind it was walked before.
    chain.clear();
    for (Index at = child.head; at != kNone && store_.links[at].mark != mark;
         at = store_.links[at].parent) {
      store_.links[at].mark = mark;
      if (store_.links[at].watch == kNone) chain.push_back(at);
    }
    for (std::size_t k = chain.size(); k-- > 0;) all.add(store_.links[chain[k]]);
    if (request.rebase != Rebase::kNo) end = all.lay(end);
  }

  Branch& b = branches_[i];
  int64_t position = request.position;
  if (request.mode == JoinPosition::kMax) position = request.rebase == Rebase::kNo ? largest : end;
  if (request.mode == JoinPosition::kSum) position = b.position + all.num_tokens();
  const int64_t length = store_.length(b.head) + all.num_tokens();
  if (position < 0 || std::max(position, end) > kMaxLength || length > kMaxLength) {
    fail(ErrorKind::kValue,
         "position: expected position and length of the joined branch within 0 to 2**31 - 1, got " +
             std::to_string(position) + " and " + std::to_string(length));
  }
  Copies copies(store_);
  if (request.rebase == Rebase::kCopy) copies.plan(all);
  std::size_t num_links = all.links().size();
  for (const Handle child : children) num_links += seal_links(find(child));
  store_.reserve(copies.segments().size(), num_links);
  if (!copies.slots().empty()) request.copy(copies.slots());

  Index head = b.head;
  auto copied = copies.segments().begin();
  Index into = kNone;  // the segment that takes the copies, filled as far as `filled`
  int32_t filled = 0;
  for (const auto& l : all.links()) {
    if (request.rebase != Rebase::kCopy || l.shift == 0) {
      head = store_.add_link(head, l.segment, l.lo, l.hi, l.shift);
      continue;
    }
    if (into == kNone) {
      into = store_.new_segment(copied->first_position);
      for (std::size_t n = copied->pages.size(); n > 0; --n) store_.pages.take();
      store_.segments[into].pages.swap(copied->pages);
      store_.segments[into].origins.swap(copied->origins);
      head = store_.add_link(head, into, 0, copied->length, 0);
    }
    Segment& source = store_.segments[l.segment];
    source.copied_end = std::max(source.copied_end, l.hi);
    filled += l.hi - l.lo;
    if (filled == copied->length) {
      into = kNone;
      filled = 0;
      ++copied;
    }
  }
  set_head(b, head);
  b.position = position;
  for (const Handle child : children) drop_branch(find(child));
}

}  // namespace fork_attn
