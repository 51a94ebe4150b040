// The bookkeeping of a forked KV cache: branches over shared contexts, and steps that append to
// them.
//
// Every verb validates, reserves, and then commits; the commit cannot fail, so an error of any kind
// (a full pool, bad input, a failed host allocation) leaves the state as it was. No CUDA, no Torch,
// no KV bytes: those belong to callers.
//
// A branch may write in place exactly when its context ends where its last segment ends and its
// next position follows. After a fork the first writer therefore goes on in the shared tail page,
// whose further slots nobody else sees; every other writer takes a fresh page (kSeal) or copies the
// part-filled one (kCopy).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "context_store.h"
#include "error.h"

namespace fork_attn {

using Handle = uint64_t;  // serial number << 32 | slot; a serial number is never used twice

enum class TailPolicy { kSeal, kCopy };
enum class JoinPosition { kMax, kSum, kGiven };
enum class Rebase { kNo, kShift, kCopy };

constexpr int64_t kMaxLength = INT32_MAX;  // of a context, and of a position

struct Branch {
  uint32_t serial = 0;
  Index head = kNone;
  int64_t position = 0;
  Index parent = kNone;  // lineage: who forked it, for select
  Index first_child = kNone;
  Index prev_sibling = kNone;
  Index next_sibling = kNone;
  int32_t step_row = -1;      // in the open step
  mutable uint64_t mark = 0;  // scratch: duplicates in a list of branches
};

struct RotatedCopy {  // of one slot, whose key moves `shift` positions on
  int64_t src_slot;   // page * page_size + offset
  int64_t dst_slot;
  int64_t shift;
};

struct JoinRequest {
  JoinPosition mode = JoinPosition::kMax;
  int64_t position = 0;  // kGiven only
  Rebase rebase = Rebase::kNo;
  // kCopy: called before anything changes; what it throws leaves no trace. The destinations are
  // free slots.
  std::function<void(const std::vector<RotatedCopy>&)> copy = nullptr;
};

struct StepRequest {
  Handle branch;
  int64_t num_tokens;
  const int32_t* parents =
      nullptr;  // a draft tree: parents[i] < i, -1 = the branch's end; null = plain tokens
};

struct StepRow {
  Index branch;
  bool draft;
  Index segment;  // written on in place; kNone: a new segment is made
  int32_t num_tokens;
  int32_t row_begin;    // first query row
  int32_t first_slot;   // slot of the first new token in the segment written
  int32_t pages_begin;  // reserved pages: [pages_begin, pages_end) of Step::pages
  int32_t pages_end;
  int32_t parents_begin;     // into Step::parents, drafts only
  int32_t accepted;          // tokens that commit keeps; -1: a draft that nobody accepted yet
  Index cut_link;            // copy-on-write: the link in which the copied page begins, else kNone
  int32_t cut_slot;          // first slot of that page
  mutable ArenaPlace place;  // of a new segment's page list on the device, until it has one
};

struct PageCopy {
  int32_t src_page;
  int32_t dst_page;
};

struct SlotMove {
  int64_t src_slot;  // page * page_size + offset
  int64_t dst_slot;
};

struct Step {
  uint64_t serial = 0;  // the step's own number
  std::vector<StepRow> rows;
  std::vector<int32_t> pages;
  std::vector<int32_t> parents;
  std::vector<int64_t> positions;     // per query row
  std::vector<int64_t> slot_mapping;  // per query row
  std::vector<PageCopy> copies;       // to be done before the step's first write
  std::vector<SlotMove> moves;        // of accepted drafts: read all, then write, before commit
};

struct CoreStats {
  int64_t pages_total, pages_free, pages_live, pages_shared, pages_pending, segments, links,
      branches;
};

// A part of a context for introspection: slots [lo, hi) of a segment, at these positions.
struct ContextPart {
  uint64_t segment;
  int32_t lo, hi;
  int64_t first_position;
};

// Slots that tokens [first, first + count) of a row of the open step see `shift` positions from
// where they were written, or through a watch. Of a row that another one watches also the new
// tokens.
struct ViewPart {
  int32_t first, count;
  int64_t shift;
  Index segment;   // kNone: new tokens of `row`, counted from its first
  int32_t lo, hi;  // slots
  int32_t row;     // of the step: the watched branch's; -1: not in the step, or not watched
  bool in_place;   // at its own positions: `lag` says which of the new tokens a token sees
  int32_t lag;
};

class CacheCore {
 public:
  CacheCore(int32_t num_pages, int32_t page_size, TailPolicy tail);

  Handle new_branch();
  std::vector<Handle> fork(Handle branch, int64_t n);
  Handle fork_at(Handle branch, int64_t length);
  void join(Handle branch, std::span<const Handle> children, const JoinRequest& request);
  void watch(Handle branch, Handle other, int64_t lag, bool rebase);
  std::vector<Handle> select(Handle branch, Handle child);  // what it freed
  void reorder(std::span<const Handle> branches, std::span<const int64_t> indices);
  void crop(Handle branch, int64_t length);
  // Undoes steps: a crop that watchers of the branch bear, as they began to watch before.
  void take_back(Handle branch, int64_t length, int64_t position);
  void excise(Handle branch, int64_t start, int64_t end, bool rebase = false);
  void set_position(Handle branch, int64_t position);
  void free(std::span<const Handle> branches);

  void open_step(std::span<const StepRequest> requests);
  void accept(int64_t row, std::span<const int32_t> path);
  void commit_step();
  void rollback_step();
  bool step_open() const noexcept { return step_open_; }

  // What is freed from now on waits for other streams: see PagePool and PageArena. None of these
  // changes what any branch sees.
  void defer_frees() { store_.defer(); }
  int64_t close_epoch() noexcept { return store_.close_epoch(); }
  int32_t end_epoch(int64_t epoch) noexcept { return store_.end_epoch(epoch); }
  void report_reusable() { store_.pages.report_reusable(); }
  std::vector<int32_t> take_reusable() { return store_.pages.take_reusable(); }
  const Step& step() const noexcept { return step_; }

  bool alive(Handle branch) const noexcept { return find(branch) != kNone; }
  int64_t length(Handle branch) const;
  int64_t position(Handle branch) const;
  int64_t num_pages(Handle branch) const;
  void slots(Handle branch, std::vector<int64_t>& out) const;
  void positions(Handle branch, std::vector<int64_t>& out) const;
  void page_table(Handle branch, std::vector<int32_t>& out) const;  // kNotDense
  void context(Handle branch, std::vector<ContextPart>& out) const;
  // Everything the branch sees, watched branches at their place: slots, and positions in its view.
  void view(Handle branch, std::vector<int64_t>& slots, std::vector<int64_t>& positions) const;
  std::vector<int64_t> watched(Handle branch) const;  // serials in context order, -1: freed
  // How a row of the open step sees what is not simply its own context: see ViewPart.
  void view_of_row(const StepRow& row, std::vector<ViewPart>& out) const;
  int64_t parent_serial(Handle branch) const;  // -1: not forked from a live branch
  // Slots that no branch sees, pending pages left out.
  void unseen_slots(std::vector<int64_t>& out) const;
  CoreStats stats() const;
  void check() const;  // kInvariant
  uint64_t digest() const;

  const ContextStore& store() const noexcept { return store_; }
  const Pool<Branch>& branches() const noexcept { return branches_; }
  int32_t page_size() const noexcept { return store_.page_size(); }
  TailPolicy tail() const noexcept { return tail_; }

  static uint32_t serial(Handle h) noexcept { return static_cast<uint32_t>(h >> 32); }

 private:
  struct Staged {  // what a row's new segment will own, allocated at open so that commit cannot
                   // fail
    std::vector<int32_t> pages;
    std::vector<Origin> origins;
  };

  Index find(Handle branch) const noexcept;
  Index require(Handle branch) const;  // kStaleBranch
  void require_distinct(std::span<const Handle> branches) const;
  void require_no_step(const char* verb) const;
  Handle handle(Index branch) const noexcept {
    return (static_cast<uint64_t>(branches_[branch].serial) << 32) | static_cast<uint32_t>(branch);
  }
  void reserve_branches(std::size_t n);
  Index add_branch(Index parent, Index head, int64_t position) noexcept;
  void drop_branch(Index branch) noexcept;
  void detach_lineage(Index branch) noexcept;
  // The ancestor-or-self of head in which token `length - 1` lies; how many of its slots stay.
  Index find_cut(Index head, int64_t length, int32_t& kept) const noexcept;
  Index cut(Index head, int64_t length) noexcept;  // needs one reserved link
  int64_t closing_shift(const std::vector<Index>& chain, int64_t position, int64_t start,
                        int64_t end) const;
  void set_head(Branch& branch, Index head) noexcept;
  // Under kCopy, gives the part-filled tail page a link of its own that all readers share (needs
  // one reserved link).
  Index split_tail(Index head) noexcept;

  // core_watch.cpp
  void require_unwatched(Index branch, const char* verb) const;
  void check_join(Handle branch, std::span<const Handle> children) const;
  void require_unwatched_by(Index branch, Index other) const;
  // What `other` sees and `head` does not, watches included.
  std::vector<Link> links_unseen(Index head, Index other) const;
  // The links of what a watch shows, oldest first, cut to what it shows.
  template <class F>
  void each_watched(const Watch& watch, F&& f) const;
  std::size_t seal_links(Index branch) const;  // to be reserved before it may be dropped
  void seal(Index branch) noexcept;
  struct Extent {  // of what a watch shows, in positions
    int64_t first, end;
  };
  Extent extent(const Watch& watch) const;
  Extent extent(const Watch& watch, const StepRow* other, int32_t num_new) const;
  void watched_parts(const Watch& watch, ViewPart part, std::vector<ViewPart>& out) const;
  void validate_watches() const;

  // core_step.cpp
  void validate_request(const StepRequest& request, int64_t total) const;
  void lay_out(StepRow& row) noexcept;
  int64_t pages_needed(const StepRow& row) const noexcept;
  void reserve_row(const StepRow& row);
  void collect_origins(const StepRow& row, std::vector<Origin>& out) const;
  void fill_row(StepRow& row) noexcept;
  int64_t slot_address(const StepRow& row, int32_t slot) const noexcept;
  void commit_row(const StepRow& row, Staged* staged) noexcept;
  Index new_head(const StepRow& row, Staged& staged, int32_t num_tokens) noexcept;
  void close_step() noexcept;

  ContextStore store_;
  Pool<Branch> branches_;
  TailPolicy tail_;
  uint32_t next_serial_ = 0;
  Step step_;
  bool step_open_ = false;
  std::vector<Staged> staged_;  // of the rows that make a segment, in row order
};

template <class F>
void CacheCore::each_watched(const Watch& watch, F&& f) const {
  std::vector<Index> chain;
  store_.chain(watch.sealed, chain);
  for (const Index at : chain) f(store_.links[at]);
  if (watch.other == kNone) return;
  chain.clear();
  for (Index at = branches_[watch.other].head; at != kNone; at = store_.links[at].parent) {
    if (store_.links[at].length <= watch.start) break;
    if (store_.links[at].watch == kNone) chain.push_back(at);
  }
  for (std::size_t k = chain.size(); k-- > 0;) {
    Link l = store_.links[chain[k]];
    l.lo = static_cast<int32_t>(std::max<int64_t>(l.lo, l.hi - (l.length - watch.start)));
    f(l);
  }
}

}  // namespace fork_attn
