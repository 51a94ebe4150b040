// Where each segment's page list lies in one array on the device. A list has a place with room to
// grow; the device is told of entries that are new (PageEntry) and of lists that outgrew their
// place (PageMove: to twice the room). Nothing here is state that a branch could see.
//
// Where other streams than the cache's own were announced, their queued work may still read a place
// that was given up, or entries that were dropped: the place waits for the end of the epoch it was
// given up in, as pages do (page_pool.h), and a list that dropped entries moves before it gets
// others.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace fork_attn {

struct ArenaPlace {
  int32_t begin = 0;
  int32_t capacity = 0;     // 0: none yet
  int32_t known = 0;        // leading entries that the device has, or is told of in this step
  int32_t told = 0;         // leading entries that queued work may read, dropped ones among them
  uint32_t generation = 0;  // of the device's array that it has them in
};

struct PageEntry {
  int32_t at;
  int32_t page;
};

struct PageMove {  // all are read before any is written, and before the new entries are
  int32_t from;
  int32_t to;
  int32_t count;
};

class PageArena {
 public:
  PageArena() { free_.fill(-1); }

  // News that nobody took belong to an older step: the device never got them.
  void begin_step(uint64_t step) noexcept {
    if (step != step_ && !(entries_.empty() && moves_.empty())) forget();
    step_ = step;
  }

  // Room for `count` entries. May throw, and then has changed nothing.
  void fit(ArenaPlace& place, int32_t count) {
    if (place.generation != generation_) {
      place.known = 0;
      place.generation = generation_;
    }
    const bool rewrites = deferring_ && place.known < std::min(count, place.told);
    if (count <= place.capacity && !rewrites) return;
    reserve_extra(moves_, 1);
    const int32_t capacity =
        std::max(kSmallest, static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(count))));
    const int32_t begin = take(capacity);
    if (place.known > 0) moves_.push_back({place.begin, begin, place.known});
    release(place.begin, place.capacity);
    place.begin = begin;
    place.capacity = capacity;
    place.told = place.known;
  }

  // Tells the device of entries known..count; `page_at(i)` is entry i.
  template <class PageAt>
  void tell(ArenaPlace& place, int32_t count, const PageAt& page_at) {
    if (count <= place.known) return;
    reserve_extra(entries_, static_cast<std::size_t>(count - place.known));
    for (int32_t i = place.known; i < count; ++i) entries_.push_back({place.begin + i, page_at(i)});
    place.known = count;
    place.told = std::max(place.told, count);
  }

  void give(ArenaPlace& place) noexcept {
    release(place.begin, place.capacity);
    place = {};
  }

  // From now on places wait for the end of the epoch they were given up in.
  void defer() noexcept { deferring_ = true; }
  bool epoch_empty() const noexcept { return epoch_empty_; }
  void close_epoch() noexcept {
    ++epoch_;
    epoch_empty_ = true;
  }
  void end_epoch(int64_t epoch) noexcept {
    int32_t* link = &pending_;
    while (*link >= 0) {
      const int32_t begin = *link;
      if (next_[begin + kEpoch] == static_cast<int32_t>(epoch)) {
        *link = next_[begin];
        push(begin, next_[begin + kSize]);
      } else {
        link = &next_[begin];
      }
    }
  }
  // Calls f(begin, capacity) for the places that wait.
  template <class F>
  void each_pending(F&& f) const {
    for (int32_t begin = pending_; begin >= 0; begin = next_[begin]) {
      f(begin, int32_t{1} << next_[begin + kSize]);
    }
  }

  // The device's array is lost or behind: all that is named from now on is told again.
  void forget() noexcept {
    ++generation_;
    entries_.clear();
    moves_.clear();
  }

  // The news were handed to the device.
  void told() noexcept {
    entries_.clear();
    moves_.clear();
  }

  const std::vector<PageEntry>& entries() const noexcept { return entries_; }
  const std::vector<PageMove>& moves() const noexcept { return moves_; }
  int32_t size() const noexcept { return static_cast<int32_t>(next_.size()); }

 private:
  static constexpr int32_t kSmallest = 4;
  static constexpr int32_t kSize = 1;   // of a place that waits, behind its link in next_: log2 of
  static constexpr int32_t kEpoch = 2;  // its capacity, and the low bits of its epoch

  // Free places of one size are a list through next_; a larger one is halved.
  int32_t take(int32_t capacity) {
    const int wanted = std::countr_zero(static_cast<uint32_t>(capacity));
    int size = wanted;
    while (size < kSizes && free_[size] < 0) ++size;
    if (size == kSizes) {
      const std::size_t begin = next_.size();
      reserve_extra(next_, static_cast<std::size_t>(capacity));
      next_.resize(begin + capacity);
      return static_cast<int32_t>(begin);
    }
    const int32_t begin = free_[size];
    free_[size] = next_[begin];
    while (size > wanted) {
      --size;
      push(begin + (int32_t{1} << size), size);
    }
    return begin;
  }

  void release(int32_t begin, int32_t capacity) noexcept {
    if (capacity == 0) return;
    const int size = std::countr_zero(static_cast<uint32_t>(capacity));
    if (!deferring_) return push(begin, size);
    next_[begin] = pending_;
    next_[begin + kSize] = size;
    next_[begin + kEpoch] = static_cast<int32_t>(epoch_);
    pending_ = begin;
    epoch_empty_ = false;
  }

  void push(int32_t begin, int size) noexcept {
    next_[begin] = free_[size];
    free_[size] = begin;
  }

  static constexpr int kSizes = 31;
  std::vector<int32_t>
      next_;  // as long as the array; read at the begins of free places, pending ones
  std::array<int32_t, kSizes> free_;
  int32_t pending_ = -1;  // places that wait, a list through next_
  int64_t epoch_ = 1;     // as the page pool counts them
  bool deferring_ = false;
  bool epoch_empty_ = true;
  std::vector<PageEntry> entries_;
  std::vector<PageMove> moves_;
  uint64_t step_ = 0;
  uint32_t generation_ = 1;
};

}  // namespace fork_attn
