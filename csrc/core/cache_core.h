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

#include <cstdint>
#include <span>
#include <vector>

#include "context_store.h"
#include "error.h"

namespace fork_attn {

using Handle = uint64_t;  // serial number << 32 | slot; a serial number is never used twice

enum class TailPolicy { kSeal, kCopy };
enum class JoinPosition { kMax, kSum, kGiven };

constexpr int64_t kMaxLength = INT32_MAX;  // of a context, and of a position

struct Branch {
  uint32_t serial = 0;
  Index head = kNone;
  int64_t position = 0;
  Index parent = kNone;  // lineage: who forked it, for select
  Index first_child = kNone;
  Index prev_sibling = kNone;
  Index next_sibling = kNone;
  mutable uint64_t mark = 0;  // scratch: duplicates in a list of branches
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
  int32_t parents_begin;  // into Step::parents, drafts only
  int32_t accepted;       // tokens that commit keeps; -1: a draft that nobody accepted yet
  Index cut_link;         // copy-on-write: the link in which the copied page begins, else kNone
  int32_t cut_slot;       // first slot of that page
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

class CacheCore {
 public:
  CacheCore(int32_t num_pages, int32_t page_size, TailPolicy tail);

  Handle new_branch();
  std::vector<Handle> fork(Handle branch, int64_t n);
  Handle fork_at(Handle branch, int64_t length);
  void join(Handle branch, std::span<const Handle> children, JoinPosition mode,
            int64_t position = 0);
  std::vector<Handle> select(Handle branch, Handle child);  // what it freed
  void reorder(std::span<const Handle> branches, std::span<const int64_t> indices);
  void crop(Handle branch, int64_t length);
  void excise(Handle branch, int64_t start, int64_t end);
  void set_position(Handle branch, int64_t position);
  void free(std::span<const Handle> branches);

  void open_step(std::span<const StepRequest> requests);
  void accept(int64_t row, std::span<const int32_t> path);
  void commit_step();
  void rollback_step();
  bool step_open() const noexcept { return step_open_; }

  // Pages freed from now on wait for other streams: see PagePool. None of these changes what any
  // branch sees.
  void defer_frees() { store_.pages.defer(); }
  int64_t close_epoch() noexcept { return store_.pages.close_epoch(); }
  int32_t end_epoch(int64_t epoch) noexcept { return store_.pages.end_epoch(epoch); }
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
  void set_head(Branch& branch, Index head) noexcept;
  // Under kCopy, gives the part-filled tail page a link of its own that all readers share (needs
  // one reserved link).
  Index split_tail(Index head) noexcept;

  // core_step.cpp
  void validate_request(const StepRequest& request, int64_t total) const;
  void lay_out(StepRow& row) noexcept;
  int64_t pages_needed(const StepRow& row) const noexcept;
  Error out_of_pages(int64_t needed) const;
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

}  // namespace fork_attn
