// Page lists at random, beside a device's array that the news are applied to: every list that a
// step names is there, and where other streams were announced, so is every list that their queued
// work still reads. `test_page_arena [seed] [steps]`.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "core/page_arena.h"
#include "core_world.h"

namespace {

using namespace fork_attn;
using namespace fork_attn::test;

struct List {
  ArenaPlace place;
  std::vector<int32_t> pages;  // -1: nobody reads it
};

struct Reader {  // queued work, which saw these pages at `begin`
  int32_t begin;
  std::vector<int32_t> pages;
  int64_t queued;
};

struct Epoch {
  int64_t name;
  int64_t closed;  // when
};

class Walk {
 public:
  explicit Walk(uint64_t seed) : rng_(seed) {}

  void run(int64_t steps) {
    const int64_t announced = pick(steps / 2);
    for (int64_t i = 0; i < steps; ++i) {
      if (i == announced) {
        arena_.defer();
        deferring_ = true;
      }
      context_of_failure() = "step " + std::to_string(i);
      change();
      step(i + 1);
      if (deferring_) finish_some();
    }
  }

 private:
  int64_t pick(int64_t n) { return static_cast<int64_t>(rng_() % static_cast<uint64_t>(n)); }
  bool chance(int64_t percent) { return pick(100) < percent; }

  // Lists come, lose their ends or entries in the middle, and go.
  void change() {
    while (lists_.size() < 3 || (lists_.size() < 12 && chance(30))) lists_.emplace_back();
    for (std::size_t i = lists_.size(); i-- > 0;) {
      List& list = lists_[i];
      if (chance(15)) {
        arena_.give(list.place);
        EXPECT_EQ(list.place.capacity, 0);
        lists_.erase(lists_.begin() + static_cast<std::ptrdiff_t>(i));
      } else if (chance(25) && !list.pages.empty()) {
        list.pages.resize(static_cast<std::size_t>(pick(static_cast<int64_t>(list.pages.size()))));
        list.place.known = std::min(list.place.known, static_cast<int32_t>(list.pages.size()));
      } else if (chance(10) && !list.pages.empty()) {
        list.pages[static_cast<std::size_t>(pick(static_cast<int64_t>(list.pages.size())))] = -1;
      }
    }
  }

  void step(int64_t serial) {
    arena_.begin_step(static_cast<uint64_t>(serial));
    std::vector<std::size_t> named;
    for (std::size_t i = 0; i < lists_.size(); ++i) {
      List& list = lists_[i];
      if (chance(40)) continue;
      for (int64_t n = pick(chance(20) ? 20 : 3); n > 0; --n) list.pages.push_back(next_page_++);
      const auto count = static_cast<int32_t>(list.pages.size());
      arena_.fit(list.place, count);
      arena_.tell(list.place, count, [&](int32_t at) { return list.pages[at]; });
      named.push_back(i);
    }
    if (chance(5)) return;  // planned and never sent
    if (chance(5)) return arena_.forget();
    apply();
    for (const std::size_t i : named) {
      readers_.push_back({lists_[i].place.begin, lists_[i].pages, ++now_});
    }
    for (const Reader& reader : readers_) check(reader);
    if (!deferring_) readers_.clear();
  }

  void apply() {
    array_.resize(static_cast<std::size_t>(arena_.size()), -2);
    const std::vector<int32_t> before = array_;
    for (const PageMove& m : arena_.moves()) {
      for (int32_t i = 0; i < m.count; ++i) array_[m.to + i] = before[m.from + i];
    }
    for (const PageEntry& e : arena_.entries()) array_[e.at] = e.page;
    arena_.told();
  }

  void check(const Reader& reader) const {
    for (std::size_t i = 0; i < reader.pages.size(); ++i) {
      if (reader.pages[i] >= 0) EXPECT_EQ(array_[reader.begin + i], reader.pages[i]);
    }
  }

  // Closes an epoch, and ends some in any order: what was queued before they closed is done.
  void finish_some() {
    if (chance(50) && !arena_.epoch_empty()) {
      arena_.close_epoch();
      epochs_.push_back({++last_epoch_, now_});
    }
    while (!epochs_.empty() && chance(40)) {
      const auto at = epochs_.begin() + pick(static_cast<int64_t>(epochs_.size()));
      std::erase_if(readers_, [&](const Reader& r) { return r.queued <= at->closed; });
      arena_.end_epoch(at->name);
      epochs_.erase(at);
    }
    int64_t waiting = 0;
    arena_.each_pending([&](int32_t, int32_t) { ++waiting; });
    EXPECT(waiting > 0 || arena_.epoch_empty());
    most_waiting_ = std::max(most_waiting_, waiting);
  }

 public:
  int64_t most_waiting_ = 0;

 private:
  std::mt19937_64 rng_;
  PageArena arena_;
  std::vector<List> lists_;
  std::vector<Reader> readers_;
  std::vector<Epoch> epochs_;
  std::vector<int32_t> array_;
  int64_t now_ = 0;
  int64_t last_epoch_ = 0;
  int32_t next_page_ = 0;
  bool deferring_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  const int64_t steps = argc > 2 ? std::atoll(argv[2]) : 2000;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  for (uint64_t i = 0; i < 20; ++i) {
    Walk walk(seed + i);
    walk.run(steps / 10);
    EXPECT(walk.most_waiting_ > 0);
  }
}
