// Fails the k-th host allocation of every verb, for all k until the verb succeeds: no failure may
// leave a trace. `test_alloc_failure [seed] [operations]`.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <random>
#include <string>

#include "core_walk.h"

namespace {

bool armed = false;
int64_t allocations_left = 0;

void* allocate(std::size_t size) {
  if (armed && allocations_left-- == 0) throw std::bad_alloc();
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

namespace {

using namespace fork_attn;
using namespace fork_attn::test;

// A world whose every call of the core is tried with 0, 1, 2 ... allocations before it succeeds.
class FailingWorld : public World {
 public:
  using World::World;
  std::map<std::string, int64_t> failures;  // of each verb

 protected:
  void invoke(const char* verb, const std::function<void()>& call) override {
    for (int64_t k = 0;; ++k) {
      const uint64_t before = core.digest();
      if (run(k, call)) return;
      EXPECT(core.digest() == before);
      ++failures[verb];
      // The memory that a failed call reserved is no change of state, but must be sound.
      if (k % 4 == 0) core.check();
    }
  }

  // Reserving is over when a step is open: what follows must not allocate.
  void accept(int64_t row, const std::vector<int32_t>& path) override {
    EXPECT(run(0, [&] { core.accept(row, path); }));
  }
  void commit() override {
    EXPECT(run(0, [&] { core.commit_step(); }));
  }

 private:
  static bool run(int64_t k, const std::function<void()>& call) {
    allocations_left = k;
    armed = true;
    try {
      call();
      armed = false;
      return true;
    } catch (const std::bad_alloc&) {
      armed = false;
      return false;
    } catch (...) {
      armed = false;
      throw;
    }
  }
};

// Every verb once, in a world that is new each time, so that no earlier call has reserved for it.
void scripted(TailPolicy tail, std::map<std::string, int64_t>& failures) {
  FailingWorld w(40, 3, tail);
  const auto none = std::nullopt;
  Handle root = 0, at = 0;
  std::vector<Handle> kids;
  w.expect(
      "new_branch", none, [&] { root = w.core.new_branch(); }, [&] { w.model.new_branch(root); });
  w.step({{root, 7}}, true, [] {});
  w.compare();
  w.expect(
      "fork", none, [&] { kids = w.core.fork(root, 5); },
      [&] {
        for (const Handle kid : kids) w.model.fork(root, kid);
      });
  w.step({{kids[0], 4}, {kids[1], 5}, {root, 1}}, true, [] {});
  w.step({{kids[2], 3, true, {-1, 0, -1}, std::vector<int32_t>{2}}}, true, [] {});
  w.compare();
  w.expect(
      "fork_at", none, [&] { at = w.core.fork_at(kids[0], 5); },
      [&] { w.model.fork_at(kids[0], at, 5); });
  w.expect("crop", none, [&] { w.core.crop(kids[0], 9); }, [&] { w.model.crop(kids[0], 9); });
  w.expect(
      "excise", none, [&] { w.core.excise(kids[1], 2, 5); },
      [&] { w.model.excise(kids[1], 2, 5); });
  w.compare();
  const std::vector<Handle> two{kids[0], kids[2]};
  const std::vector<int64_t> swapped{1, 0};
  w.expect(
      "reorder", none, [&] { w.core.reorder(two, swapped); },
      [&] { w.model.reorder(two, swapped); });
  const std::vector<Handle> joined{kids[1], kids[2]};
  w.expect(
      "join", none, [&] { w.core.join(kids[0], joined, {JoinPosition::kSum}); },
      [&] { w.model.join(kids[0], joined, JoinPosition::kSum, 0); });
  w.compare();
  w.expect(
      "select", none, [&] { w.core.select(root, kids[0]); },
      [&] { w.model.select(root, kids[0]); });
  w.compare();
  drain(w);
  for (const auto& [verb, count] : w.failures) failures[verb] += count;
}

// Steps in which every row needs all that a row can need: two links, a segment, a copy, moves. The
// counts vary so that some meet a pool whose capacity is used up.
void wide_steps() {
  for (int64_t n = 1; n <= 70; ++n) {
    FailingWorld w(400, 3, TailPolicy::kCopy);
    const Handle root = w.core.new_branch();
    w.model.new_branch(root);
    w.step({{root, 8}}, true, [] {});
    std::vector<RowPlan> rows;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t length = i % 3 == 0 ? 5 : 8;
      const Handle at = w.core.fork_at(root, length);
      w.model.fork_at(root, at, length);
      rows.push_back({at, 4, true, {-1, -1, 1, 2}, std::vector<int32_t>{1, 2, 3}});
    }
    w.step(rows, true, [] {});
    w.compare();
    drain(w);
  }
}

void random_walk(uint64_t seed, int64_t operations, std::map<std::string, int64_t>& failures) {
  for (int64_t episode = 0; episode * 200 < operations; ++episode) {
    std::mt19937_64 rng(seed + static_cast<uint64_t>(episode));
    const int32_t page_size = std::vector<int32_t>{1, 3, 16}[episode % 3];
    const TailPolicy tail = episode % 2 == 0 ? TailPolicy::kSeal : TailPolicy::kCopy;
    FailingWorld world(static_cast<int32_t>(4 + rng() % 37), page_size, tail);
    Walk walk(world, rng(), episode % 5 == 0);
    for (int64_t i = 0; i < 200; ++i) {
      context_of_failure() = "seed " + std::to_string(seed) + ", episode " +
                             std::to_string(episode) + ", operation " + std::to_string(i);
      walk.operate();
      world.compare();
    }
    drain(world);
    for (const auto& [verb, count] : world.failures) failures[verb] += count;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed =
      argc > 1 ? std::strtoull(argv[1], nullptr, 10) : uint64_t{std::random_device()()};
  const int64_t operations = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 20'000;
  std::map<std::string, int64_t> failures;
  context_of_failure() = "the script";
  scripted(TailPolicy::kSeal, failures);
  scripted(TailPolicy::kCopy, failures);
  wide_steps();
  for (const char* verb :
       {"new_branch", "fork", "fork_at", "excise", "reorder", "join", "select", "step"}) {
    if (failures[verb] == 0) die(__FILE__, __LINE__, std::string(verb) + ": no allocation failed");
  }
  random_walk(seed, operations, failures);
  std::printf("seed %llu: failed allocations:", static_cast<unsigned long long>(seed));
  for (const auto& [verb, count] : failures) {
    std::printf(" %s %lld", verb.c_str(), static_cast<long long>(count));
  }
  std::printf("\n");
  return 0;
}
