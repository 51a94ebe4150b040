// Batch-invariant plans at every instruction set level that this processor has: a branch's bits
// alone, among others, and with its last tokens in one step. `test_invariant_levels [seed]`.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "core/planner.h"
#include "cpu/unit.h"

namespace {

using namespace fork_attn;
using namespace fork_attn::cpu;

constexpr int kHeads = 2;
constexpr int kDim = 40;
constexpr int kDimV = 24;

struct Shape {
  int group, window;
};

// A cache of one layer in fp32, and which token (a row of `tokens`) each slot holds.
class World {
 public:
  World(int page_size, const Shape& shape, const std::vector<float>& tokens)
      : core(8000 / page_size, page_size, TailPolicy::kSeal),
        shape_(shape),
        tokens_(tokens),
        page_size_(page_size),
        k_(std::size_t{8000} * kHeads * kDim),
        v_(std::size_t{8000} * kHeads * kDimV) {}

  // New tokens `first`, first + 1, ... of a branch each; returns out and lse of the step's rows.
  std::vector<float> step(const std::vector<std::pair<Handle, int>>& rows,
                          const std::vector<int>& first, const std::vector<float>& q_of_token,
                          int workers, SimdLevel level) {
    std::vector<StepRequest> requests;
    for (const auto& [branch, count] : rows) {
      StepRequest request{};
      request.branch = branch;
      request.num_tokens = count;
      requests.push_back(request);
    }
    core.open_step(requests);
    const int heads = kHeads * shape_.group;
    std::vector<float> q;
    for (std::size_t r = 0, row = 0; r < rows.size(); ++r) {
      for (int i = 0; i < rows[r].second; ++i, ++row) {
        const int token = first[r] + i;
        store(core.step().slot_mapping[row], token);
        const float* from = q_of_token.data() + std::size_t(token) * heads * kDim;
        q.insert(q.end(), from, from + heads * kDim);
      }
    }
    const PlanRequest request{
        shape_.window, {kHeads, shape_.group, kDim, kDimV, 4}, &target_costs("cpu"), workers, true};
    const PlanData plan = planner_.build(core, request);
    const std::size_t num_rows = core.step().positions.size();
    std::vector<float> out(num_rows * heads * (kDimV + 1));
    TreeAttentionParams p{};
    p.plan = plan.buffer.data();
    p.q = {q.data(), heads * kDim, kDim};
    p.k_cache = {k_.data(), int64_t{page_size_} * kHeads * kDim, kHeads * kDim, kDim};
    p.v_cache = {v_.data(), int64_t{page_size_} * kHeads * kDimV, kHeads * kDimV, kDimV};
    p.out = {out.data(), heads * kDimV, kDimV};
    p.lse = out.data() + num_rows * heads * kDimV;
    p.dtype = DType::kFloat32;
    p.num_q_heads = heads;
    p.num_kv_heads = kHeads;
    p.head_dim = kDim;
    p.head_dim_v = kDimV;
    p.softmax_scale = 0.3f;
    tree_attention_at(level, p);
    core.commit_step();
    return out;
  }

  CacheCore core;

 private:
  void store(int64_t slot, int token) {
    const float* from = tokens_.data() + std::size_t(token) * kHeads * (kDim + kDimV);
    std::memcpy(k_.data() + slot * kHeads * kDim, from, sizeof(float) * kHeads * kDim);
    std::memcpy(v_.data() + slot * kHeads * kDimV, from + kHeads * kDim,
                sizeof(float) * kHeads * kDimV);
  }

  Shape shape_;
  const std::vector<float>& tokens_;
  int page_size_;
  std::vector<float> k_, v_;
  Planner planner_;
};

int failures = 0;

// Row `row` of a step's result against row `other` of another's.
void compare(const std::vector<float>& a, std::size_t row, const std::vector<float>& b,
             std::size_t other, const Shape& shape, SimdLevel level, const char* what) {
  const int heads = kHeads * shape.group;
  const std::size_t rows_a = a.size() / (heads * (kDimV + 1));
  const std::size_t rows_b = b.size() / (heads * (kDimV + 1));
  const bool out = std::memcmp(&a[row * heads * kDimV], &b[other * heads * kDimV],
                               sizeof(float) * heads * kDimV) == 0;
  const bool lse = std::memcmp(&a[(rows_a * kDimV + row) * heads],
                               &b[(rows_b * kDimV + other) * heads], sizeof(float) * heads) == 0;
  if (out && lse) return;
  ++failures;
  std::printf("level %d, group %d, window %d, %s: other bits in%s%s\n", static_cast<int>(level),
              shape.group, shape.window, what, out ? "" : " out", lse ? "" : " lse");
}

void check(std::mt19937_64& rng, const Shape& shape, SimdLevel level) {
  constexpr int kRoot = 700;
  constexpr int kOwn = 150;
  constexpr int kBranches = 6;
  constexpr int kTokens = kRoot + kBranches * kOwn;
  std::normal_distribution<float> normal;
  std::vector<float> tokens(std::size_t{kTokens} * kHeads * (kDim + kDimV));
  std::vector<float> q(std::size_t{kTokens} * kHeads * shape.group * kDim);
  for (float& x : tokens) x = normal(rng);
  for (float& x : q) x = normal(rng);
  // A token of the last branch overflowed: no other branch may take another path for that.
  tokens[(kTokens - 5) * kHeads * (kDim + kDimV) + kDim + 3] =
      std::numeric_limits<float>::infinity();

  World crowd(16, shape, tokens);
  const Handle root = crowd.core.new_branch();
  crowd.step({{root, kRoot}}, {0}, q, 1, level);
  std::vector<std::pair<Handle, int>> rows;
  std::vector<int> first;
  for (const Handle child : crowd.core.fork(root, kBranches)) {
    rows.push_back({child, kOwn - 1});
    first.push_back(kRoot + static_cast<int>(rows.size() - 1) * kOwn);
  }
  const std::vector<float> prefill = crowd.step(rows, first, q, 3, level);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i].second = 1;
    first[i] += kOwn - 1;
  }
  const std::vector<float> decoded = crowd.step(rows, first, q, 16, level);

  for (const int which : {0, 3}) {
    const int own = kRoot + which * kOwn;
    World alone(5, shape, tokens);
    const Handle branch = alone.core.new_branch();
    alone.step({{branch, kRoot}}, {0}, q, 2, level);
    alone.step({{branch, kOwn - 2}}, {own}, q, 40, level);
    compare(alone.step({{branch, 1}}, {own + kOwn - 2}, q, 1, level), 0, prefill,
            (which + 1) * (kOwn - 1) - 1, shape, level, "decoded alone, prefilled among others");
    compare(alone.step({{branch, 1}}, {own + kOwn - 1}, q, 7, level), 0, decoded, which, shape,
            level, "decoded alone, decoded among others");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937_64 rng(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}());
  for (int level = 0; level <= static_cast<int>(simd_level()); ++level) {
    for (const Shape& shape : {Shape{1, 0}, Shape{3, 0}, Shape{4, 90}, Shape{8, 400}}) {
      check(rng, shape, static_cast<SimdLevel>(level));
    }
  }
  if (failures == 0) std::puts("ok");
  return failures == 0 ? 0 : 1;
}
