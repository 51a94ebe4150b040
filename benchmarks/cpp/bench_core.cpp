// Times the core's verbs without Python: median and best nanoseconds per call, as JSON on stdout.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "core/cache_core.h"
#include "core/planner.h"

namespace {

using fork_attn::CacheCore;
using fork_attn::Handle;
using Clock = std::chrono::steady_clock;

constexpr int kRepeats = 2001;
constexpr int64_t kBranches = 256;

double nanoseconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::nano>(to - from).count();
}

struct Timing {
  std::vector<double> samples;
  void print(const char* name, int64_t prefix) {
    static bool first = true;
    std::sort(samples.begin(), samples.end());
    std::printf(
        "%s  {\"name\": \"%s\", \"prefix\": %lld, \"median_ns\": %.0f, \"min_ns\": %.0f, "
        "\"p95_ns\": %.0f}",
        first ? "" : ",\n", name, static_cast<long long>(prefix), samples[samples.size() / 2],
        samples.front(), samples[samples.size() * 95 / 100]);
    first = false;
  }
};

void prefill(CacheCore& core, Handle branch, int64_t tokens) {
  const fork_attn::StepRequest request{branch, tokens};
  core.open_step({&request, 1});
  core.commit_step();
}

void bench_forks(int64_t prefix) {
  CacheCore core(80000, 16, fork_attn::TailPolicy::kSeal);
  const Handle root = core.new_branch();
  prefill(core, root, prefix);
  Timing one, many, free_many;
  for (int i = 0; i < kRepeats; ++i) {
    auto start = Clock::now();
    const std::vector<Handle> child = core.fork(root, 1);
    one.samples.push_back(nanoseconds(start, Clock::now()));
    core.free(child);
    start = Clock::now();
    const std::vector<Handle> children = core.fork(root, kBranches);
    many.samples.push_back(nanoseconds(start, Clock::now()));
    start = Clock::now();
    core.free(children);
    free_many.samples.push_back(nanoseconds(start, Clock::now()));
  }
  one.print("fork(1)", prefix);
  many.print("fork(256)", prefix);
  free_many.print("free of 256", prefix);
}

// 256 branches over a nested tree: `levels` nodes per level, each with `tokens` tokens of its own.
std::vector<fork_attn::StepRequest> grow_tree(CacheCore& core, const std::vector<int64_t>& levels,
                                              const std::vector<int64_t>& tokens) {
  std::vector<Handle> nodes;
  for (int64_t i = 0; i < levels[0]; ++i) nodes.push_back(core.new_branch());
  for (const Handle node : nodes) prefill(core, node, tokens[0]);
  for (std::size_t level = 1; level < levels.size(); ++level) {
    std::vector<Handle> children;
    for (const Handle node : nodes) {
      for (const Handle child :
           core.fork(node, levels[level] / static_cast<int64_t>(nodes.size()))) {
        if (tokens[level] > 0) prefill(core, child, tokens[level]);
        children.push_back(child);
      }
    }
    nodes.swap(children);
  }
  std::vector<fork_attn::StepRequest> requests;
  for (const Handle node : nodes) requests.push_back({node, 1});
  return requests;
}

void bench_step(const char* shape, const std::vector<int64_t>& levels,
                const std::vector<int64_t>& tokens, const char* target, int32_t workers) {
  CacheCore core(80000, 16, fork_attn::TailPolicy::kSeal);
  const std::vector<fork_attn::StepRequest> requests = grow_tree(core, levels, tokens);
  fork_attn::Planner planner;
  Timing step, plan;
  const fork_attn::TargetCosts& costs = fork_attn::target_costs(target);
  for (int i = 0; i < 513; ++i) {  // 32 of these cross into new pages
    auto start = Clock::now();
    core.open_step(requests);
    const auto opened = Clock::now();
    const fork_attn::PlanData data = planner.build(core, {0, {8, 4, 128, 128, 2}, &costs, workers});
    const auto planned = Clock::now();
    core.commit_step();
    step.samples.push_back(nanoseconds(start, opened) + nanoseconds(planned, Clock::now()));
    plan.samples.push_back(nanoseconds(opened, planned));
  }
  char name[128];
  std::snprintf(name, sizeof name, "step of 256, bookkeeping, %s", shape);
  step.print(name, tokens[0]);
  std::snprintf(name, sizeof name, "step of 256, plan for %s, %s", target, shape);
  plan.print(name, tokens[0]);
}

}  // namespace

int main() {
  std::printf("[\n");
  for (const int64_t prefix : {1000, 1000000}) bench_forks(prefix);
  for (const char* target : {"sm_90", "cpu"}) {
    const int32_t workers = target[0] == 's' ? 132 : 16;
    bench_step("[1,256]x[1000,0]", {1, 256}, {1000, 0}, target, workers);
    bench_step("[1,256]x[1000000,0]", {1, 256}, {1000000, 0}, target, workers);
    bench_step("[1,4,16,256]x[1024,256,128,32]", {1, 4, 16, 256}, {1024, 256, 128, 32}, target,
               workers);
    bench_step("[8,16,32,256]x[512,512,256,32]", {8, 16, 32, 256}, {512, 512, 256, 32}, target,
               workers);
    bench_step("[1,2,4,...,256]x[16 each]", {1, 2, 4, 8, 16, 32, 64, 128, 256},
               std::vector<int64_t>(9, 16), target, workers);
  }
  std::printf("\n]\n");
}
