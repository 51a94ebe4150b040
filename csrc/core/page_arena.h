// Where each segment's page list lies in one array on the device. A list has a place with room to
// grow; the device is told of entries that are new (PageEntry) and of lists that outgrew their
// place (PageMove: to twice the room). Nothing here is state that a branch could see.
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
    if (count <= place.capacity) return;
    reserve_extra(moves_, 1);
    const int32_t capacity =
        std::max(kSmallest, static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(count))));
    const int32_t begin = take(capacity);
    if (place.known > 0) moves_.push_back({place.begin, begin, place.known});
    release(place.begin, place.capacity);
    place.begin = begin;
    place.capacity = capacity;
  }

  // Tells the device of entries known..count; `page_at(i)` is entry i.
  template <class PageAt>
  void tell(ArenaPlace& place, int32_t count, const PageAt& page_at) {
    if (count <= place.known) return;
    reserve_extra(entries_, static_cast<std::size_t>(count - place.known));
    for (int32_t i = place.known; i < count; ++i) entries_.push_back({place.begin + i, page_at(i)});
    place.known = count;
  }

  void give(ArenaPlace& place) noexcept {
    release(place.begin, place.capacity);
    place = {};
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
    if (capacity != 0) push(begin, std::countr_zero(static_cast<uint32_t>(capacity)));
  }

  void push(int32_t begin, int size) noexcept {
    next_[begin] = free_[size];
    free_[size] = begin;
  }

  static constexpr int kSizes = 31;
  std::vector<int32_t> next_;  // as long as the array; read at the begins of free places
  std::array<int32_t, kSizes> free_;
  std::vector<PageEntry> entries_;
  std::vector<PageMove> moves_;
  uint64_t step_ = 0;
  uint32_t generation_ = 1;
};

}  // namespace fork_attn
