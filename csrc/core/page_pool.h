// The free list of pages: last in, first out, one state bit per page. Where other streams than the
// cache's own may still read a freed page, it waits: pages freed in one epoch are reusable once the
// caller says that the epoch is over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace fork_attn {

struct PendingPage {
  int32_t page;
  int64_t epoch;
};

class PagePool {
 public:
  explicit PagePool(int32_t num_pages) : live_(num_pages, false) {
    free_.reserve(num_pages);
    for (int32_t page = num_pages; page-- > 0;) free_.push_back(page);
  }

  int32_t take() noexcept {
    const int32_t page = free_.back();
    free_.pop_back();
    live_[page] = true;
    limit_ = std::max(limit_, page + 1);
    return page;
  }

  void give(int32_t page) noexcept {
    live_[page] = false;
    // Neither list ever reallocates: the capacity of each is the whole pool.
    if (deferring_) {
      pending_.push_back({page, epoch_});
    } else {
      put(page);
    }
  }

  // From now on freed pages wait for the end of the epoch they were freed in. May throw.
  void defer() {
    pending_.reserve(live_.size());
    deferring_ = true;
  }
  // From now on the caller is told which pages became reusable (take_reusable). May throw.
  void report_reusable() {
    reusable_.reserve(live_.size());
    reporting_ = true;
  }
  bool deferring() const noexcept { return deferring_; }
  // Whether no page was freed in the current epoch.
  bool epoch_empty() const noexcept { return pending_.empty() || pending_.back().epoch != epoch_; }
  // Closes the current epoch and names it.
  int64_t close_epoch() noexcept { return epoch_++; }
  // The pages of a closed epoch become free; how many.
  int32_t end_epoch(int64_t epoch) noexcept {
    const std::size_t before = pending_.size();
    std::size_t kept = 0;
    for (const PendingPage& p : pending_) {
      if (p.epoch == epoch) {
        put(p.page);
      } else {
        pending_[kept++] = p;
      }
    }
    pending_.resize(kept);
    return static_cast<int32_t>(before - kept);
  }
  // The pages that became free since the last call, and were not taken again.
  std::vector<int32_t> take_reusable() {
    std::vector<int32_t> out;
    out.reserve(reusable_.size());
    for (const int32_t page : reusable_) {
      if (!live_[page]) out.push_back(page);
    }
    reusable_.clear();
    return out;
  }

  int32_t num_free() const noexcept { return static_cast<int32_t>(free_.size()); }
  int32_t num_pending() const noexcept { return static_cast<int32_t>(pending_.size()); }
  int32_t num_pages() const noexcept { return static_cast<int32_t>(live_.size()); }
  int32_t limit() const noexcept { return limit_; }  // 1 + the largest page ever taken
  bool live(int32_t page) const noexcept { return live_[page]; }
  const std::vector<int32_t>& free_list() const noexcept { return free_; }
  const std::vector<PendingPage>& pending() const noexcept { return pending_; }

 private:
  void put(int32_t page) noexcept {
    free_.push_back(page);
    if (!reporting_) return;
    if (reusable_.size() < live_.size()) {
      reusable_.push_back(page);
    } else {  // freed, taken and freed again, all unreported: every page is as good as named
      for (std::size_t i = 0; i < live_.size(); ++i) reusable_[i] = static_cast<int32_t>(i);
    }
  }

  std::vector<int32_t> free_;
  std::vector<PendingPage> pending_;
  std::vector<int32_t> reusable_;
  std::vector<bool> live_;
  int64_t epoch_ = 1;
  bool deferring_ = false;
  bool reporting_ = false;
  int32_t limit_ = 0;
};

// What a verb throws that needs more pages than are free. `remedy` is what would help where pending
// pages would do.
inline Error out_of_pages(const PagePool& pages, int64_t needed, const std::string& verb,
                          const char* remedy) {
  const int64_t free = pages.num_free();
  const int64_t pending = pages.num_pending();
  std::string what = verb + " needs " + std::to_string(needed) + " pages, " + std::to_string(free) +
                     " of " + std::to_string(pages.num_pages()) + " are free";
  if (pending != 0) {
    what += " and " + std::to_string(pending) + " wait for other streams to finish with them";
  }
  what += needed <= free + pending ? remedy : "; free or crop branches, or make the cache larger";
  Error e(ErrorKind::kOutOfPages, std::move(what));
  e.needed = needed;
  e.free = free;
  e.pending = pending;
  return e;
}

}  // namespace fork_attn
