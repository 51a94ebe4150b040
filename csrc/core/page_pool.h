// The free list of pages: last in, first out, one state bit per page.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fork_attn {

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
    free_.push_back(page);  // never reallocates: capacity is the whole pool
  }

  int32_t num_free() const noexcept { return static_cast<int32_t>(free_.size()); }
  int32_t num_pages() const noexcept { return static_cast<int32_t>(live_.size()); }
  int32_t limit() const noexcept { return limit_; }  // 1 + the largest page ever taken
  bool live(int32_t page) const noexcept { return live_[page]; }
  const std::vector<int32_t>& free_list() const noexcept { return free_; }

 private:
  std::vector<int32_t> free_;
  std::vector<bool> live_;
  int32_t limit_ = 0;
};

}  // namespace fork_attn
