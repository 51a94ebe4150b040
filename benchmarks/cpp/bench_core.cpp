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
  void print(const char* name, int64_t prefix, bool last = false) {
    std::sort(samples.begin(), samples.end());
    std::printf("  {\"name\": \"%s\", \"prefix\": %lld, \"median_ns\": %.0f, \"min_ns\": %.0f, \"p95_ns\": %.0f}%s\n",
                name, static_cast<long long>(prefix), samples[samples.size() / 2], samples.front(),
                samples[samples.size() * 95 / 100], last ? "" : ",");
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

void bench_step(int64_t prefix, bool last) {
  CacheCore core(80000, 16, fork_attn::TailPolicy::kSeal);
  const Handle root = core.new_branch();
  prefill(core, root, prefix);
  std::vector<fork_attn::StepRequest> requests;
  for (const Handle h : core.fork(root, kBranches)) requests.push_back({h, 1});
  fork_attn::Planner planner;
  Timing step, plan;
  for (int i = 0; i < 513; ++i) {  // 32 of these cross into new pages
    auto start = Clock::now();
    core.open_step(requests);
    const auto opened = Clock::now();
    const fork_attn::PlanData data = planner.build(core, {0, 4, 128});
    const auto planned = Clock::now();
    core.commit_step();
    step.samples.push_back(nanoseconds(start, opened) + nanoseconds(planned, Clock::now()));
    plan.samples.push_back(nanoseconds(opened, planned));
  }
  step.print("step of 256, bookkeeping", prefix);
  plan.print("step of 256, plan", prefix, last);
}

}  // namespace

int main() {
  std::printf("[\n");
  for (const int64_t prefix : {1000, 1000000}) {
    bench_forks(prefix);
    bench_step(prefix, prefix == 1000000);
  }
  std::printf("]\n");
}
