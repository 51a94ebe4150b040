// Segments and the immutable chains of links over them.
//
// A context is the list of links from a chain's head back to its root. Chains share their older
// links, so a fork costs one reference whatever the length of its prefix. Segments are referenced
// by links, never by branches, and each knows its links: a page that no link reaches goes back to
// the pool at once.
//
// A link without a segment is the place of a watch in a context: what another branch writes is seen
// there. It counts no tokens, as the other branch may add some at any step.
#pragma once

#include <cstdint>
#include <vector>

#include "page_arena.h"
#include "page_pool.h"
#include "pool.h"

namespace fork_attn {

// Slots [previous end, end) of a copied segment hold the very tokens of another segment: slot s is
// (uid, s + offset).
struct Origin {
  int32_t end;
  uint64_t uid;
  int64_t offset;
};

struct Segment {
  std::vector<int32_t>
      pages;  // of slots [i * page_size, (i + 1) * page_size); kNone where no reader is left
  std::vector<Origin> origins;
  uint64_t uid = 0;  // names its tokens beyond the origins
  int64_t first_position = 0;
  int32_t length = 0;      // slots in use: the largest visible end
  int32_t copied_end = 0;  // some copy remembers slots below this one by our uid
  Index first_link = kNone;
  mutable ArenaPlace place;  // of `pages` on the device
  bool claimed = false;      // a row of the open step writes on in it
  // Slots behind the end are not written again: a copy remembers them by our uid, or work queued on
  // another stream may still read or write them.
  bool frozen = false;
};

struct Link {
  Index parent = kNone;  // the context before this link
  Index segment = kNone;
  Index watch = kNone;  // instead of a segment
  int32_t lo = 0;
  int32_t hi = 0;
  int64_t position_shift = 0;  // of a watch: the position at which it stands
  int64_t length = 0;          // of the context up to and including this link
  int32_t refs = 0;      // branches and watches whose head this is, plus links whose parent this is
  bool shifted = false;  // this link or one before it may have a shift or be a watch
  Index prev = kNone;    // among the links of the segment
  Index next = kNone;
  mutable uint64_t mark = 0;  // scratch of walks over chains
};

// What a context sees of another branch: first the links in `sealed`, then the tokens of the
// branch's own context from `start` on, as it grows.
struct Watch {
  Index other = kNone;   // the branch; kNone: it was freed, and all it had written is in `sealed`
  Index sealed = kNone;  // the head of a chain
  int64_t start = 0;
  int32_t lag = 0;
  bool rebase =
      true;          // laid end to end with the watcher's context, or at the tokens' own positions
  int32_t refs = 0;  // links that name it
};

class ContextStore {
 public:
  ContextStore(int32_t num_pages, int32_t page_size) : pages(num_pages), page_size_(page_size) {}

  // May throw; afterwards the given numbers of new_segment and add_link cannot.
  void reserve(std::size_t num_segments, std::size_t num_links);

  Index new_segment(int64_t first_position) noexcept;
  // The new link holds a reference to its parent and starts with none itself.
  Index add_link(Index parent, Index segment, int32_t lo, int32_t hi, int64_t shift) noexcept;
  // The place of a watch, at `position`; likewise.
  Index add_watch_link(Index parent, Index watch, int64_t position) noexcept;
  void retain(Index link) noexcept {
    if (link != kNone) ++links[link].refs;
  }
  void release(Index link) noexcept;
  // Lengthens a link that only one context holds; the segment must end where the link does.
  void extend(Index link, int32_t num_slots) noexcept;
  // Recounts the lengths of a chain whose links got other parents.
  void settle_chain(Index head) noexcept;
  // Folds the head link into its parent while both belong to one context and continue each other.
  Index coalesce(Index head) noexcept;

  // Slots behind the segment's end, which may have been used, are not written again where other
  // streams may still use them; those of fresh pages wait with their pages.
  void drop_tail(Segment& segment) noexcept {
    if (pages.deferring() && segment.length % page_size_ != 0) segment.frozen = true;
  }

  int64_t length(Index head) const noexcept { return head == kNone ? 0 : links[head].length; }
  // Position of the last token a head sees, plus one; 0 for an empty context.
  int64_t end_position(Index head) const noexcept;
  // Whether a context that ends in `head` may write its next token, at `position`, into the head's
  // segment.
  bool can_extend(Index head, int64_t position) const noexcept;
  // Links of a context, oldest first.
  void chain(Index head, std::vector<Index>& out) const;
  uint64_t next_mark() const noexcept { return ++mark_; }
  int32_t page_size() const noexcept { return page_size_; }
  int32_t num_page_slots(int64_t slots) const noexcept {
    return static_cast<int32_t>((slots + page_size_ - 1) / page_size_);
  }

  // Pages, and places of page lists, that are given up from now on wait for the end of an epoch.
  // May throw.
  void defer();
  int64_t close_epoch() noexcept;             // its name; 0 if nothing was given up in it
  int32_t end_epoch(int64_t epoch) noexcept;  // how many pages became free

  Pool<Segment> segments;
  Pool<Link> links;
  Pool<Watch> watches;
  PagePool pages;
  mutable PageArena arena;  // plans tell the device of page lists, and change nothing else

 private:
  void unlink(const Link& link) noexcept;
  void release_watch(Index watch) noexcept;
  void reclaim(Index segment, int32_t lo, int32_t hi) noexcept;
  void truncate(Segment& segment, int32_t length) noexcept;

  int32_t page_size_;
  uint64_t next_uid_ = 1;
  mutable uint64_t mark_ = 0;
};

}  // namespace fork_attn
