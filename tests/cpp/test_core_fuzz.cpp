// 200 000 random operations on the core against a deep-copy oracle, in tight pools, with every
// invariant recounted after each. `test_core_fuzz [seed] [operations]`.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "core_walk.h"

namespace {

using namespace fork_attn;
using namespace fork_attn::test;

constexpr int64_t kPerEpisode = 400;
constexpr int32_t kPageSizes[] = {1, 3, 16, 64};

struct Totals {
  int64_t operations = 0;
  int64_t allocating = 0;
  int64_t out_of_pages = 0;
  int deepest = 0;
};

void run_episode(uint64_t seed, int64_t episode, Totals& totals) {
  std::mt19937_64 rng(seed + static_cast<uint64_t>(episode));
  const int32_t page_size = kPageSizes[episode % 4];
  const TailPolicy tail = episode / 4 % 2 == 0 ? TailPolicy::kSeal : TailPolicy::kCopy;
  const auto num_pages = static_cast<int32_t>(4 + rng() % 37);
  World world(num_pages, page_size, tail);
  Walk walk(world, rng(), episode / 8 % 3 == 0);
  for (int64_t i = 0; i < kPerEpisode; ++i) {
    context_of_failure() = "seed " + std::to_string(seed) + ", episode " + std::to_string(episode) +
                           ", operation " + std::to_string(i) + ", " + std::to_string(num_pages) +
                           " pages of " + std::to_string(page_size) +
                           (tail == TailPolicy::kSeal ? ", seal" : ", copy");
    try {
      walk.operate();
      world.compare();
    } catch (const Error& e) {
      die(__FILE__, __LINE__, std::string("unexpected error: ") + e.what());
    }
  }
  drain(world);
  totals.operations += kPerEpisode;
  totals.allocating += world.allocating;
  totals.out_of_pages += world.out_of_pages;
  totals.deepest = std::max(totals.deepest, walk.deepest);
}

// Chains stay short: what continues is one link, and copies of a tail share the link before it.
void check_chain_lengths() {
  for (const TailPolicy tail : {TailPolicy::kSeal, TailPolicy::kCopy}) {
    context_of_failure() = "chain lengths";
    World w(40, 4, tail);
    const Handle root = w.core.new_branch();
    w.model.new_branch(root);
    const auto step = [&](Handle h) { EXPECT(w.step({{h, 1}}, true, [] {})); };
    for (int i = 0; i < 50; ++i) step(root);
    EXPECT_EQ(w.core.stats().links, 1);
    const std::vector<Handle> kids = w.core.fork(root, 4);
    for (const Handle kid : kids) w.model.fork(root, kid);
    for (const Handle kid : kids) step(kid);
    w.compare();
    // seal: the prefix and one link each; copy: the last page's link on top of that.
    EXPECT_EQ(w.core.stats().links, tail == TailPolicy::kSeal ? 5 : 6);
    w.core.free(std::vector<Handle>(kids.begin(), kids.end()));
    for (const Handle kid : kids) w.model.free(kid);
    for (int i = 0; i < 5; ++i) step(root);
    w.compare();
    EXPECT_EQ(w.core.stats().links, 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed =
      argc > 1 ? std::strtoull(argv[1], nullptr, 10) : uint64_t{std::random_device()()};
  const int64_t operations = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 200'000;
  check_chain_lengths();
  Totals totals;
  for (int64_t e = 0; totals.operations < operations; ++e) run_episode(seed, e, totals);
  const double share =
      static_cast<double>(totals.out_of_pages) / static_cast<double>(totals.allocating);
  std::printf("seed %llu: %lld operations, %lld steps, %.1f %% out of pages, trees %d deep\n",
              static_cast<unsigned long long>(seed), static_cast<long long>(totals.operations),
              static_cast<long long>(totals.allocating), 100 * share, totals.deepest);
  if (operations >= 100'000) {  // else the walk has lost what it is for
    EXPECT(share > 0.12 && share < 0.35);
    EXPECT(totals.deepest >= 20);
  }
  return 0;
}
