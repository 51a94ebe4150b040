// Fixed-index object pools. `reserve` may throw and changes nothing that can be seen; everything
// after it is noexcept, which is what lets a verb validate, reserve, and then commit without a way
// to fail.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fork_attn {

using Index = int32_t;
constexpr Index kNone = -1;

// Grows geometrically: a plain reserve(size + n) per call would reallocate on every call.
template <class Vector>
void reserve_extra(Vector& v, std::size_t extra) {
  const std::size_t need = v.size() + extra;
  if (need > v.capacity()) v.reserve(std::max(need, 2 * v.capacity()));
}

template <class T>
class Pool {
 public:
  void reserve(std::size_t extra) {
    if (extra <= free_count_) return;
    reserve_extra(items_, extra - free_count_);
    reserve_extra(next_free_, extra - free_count_);
  }

  // Needs an earlier reserve.
  Index take() noexcept {
    if (free_head_ != kNone) {
      const Index i = free_head_;
      free_head_ = next_free_[i];
      next_free_[i] = kTaken;
      --free_count_;
      return i;
    }
    items_.emplace_back();
    next_free_.push_back(kTaken);
    return static_cast<Index>(items_.size() - 1);
  }

  void give(Index i) noexcept {
    next_free_[i] = free_head_;
    free_head_ = i;
    ++free_count_;
  }

  T& operator[](Index i) noexcept { return items_[i]; }
  const T& operator[](Index i) const noexcept { return items_[i]; }
  bool taken(Index i) const noexcept {
    return i >= 0 && static_cast<std::size_t>(i) < items_.size() && next_free_[i] == kTaken;
  }
  Index size() const noexcept { return static_cast<Index>(items_.size()); }  // indices ever used
  std::size_t count() const noexcept { return items_.size() - free_count_; }

 private:
  static constexpr Index kTaken = -2;
  std::vector<T> items_;
  std::vector<Index> next_free_;
  Index free_head_ = kNone;
  std::size_t free_count_ = 0;
};

}  // namespace fork_attn
