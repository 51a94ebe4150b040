// tree_attention at every instruction set level that this processor has, against double arithmetic.
// `test_cpu_levels [seed]`.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/numeric.h"
#include "cpu/unit.h"

namespace {

using namespace fork_attn;
using namespace fork_attn::cpu;

constexpr int kNumKvHeads = 2;
constexpr int kPageSize = 16;
constexpr int kWindow = 50;
constexpr int kRuns = 5;
constexpr int kRunSlots[kRuns] = {150, 33, 40, 70, 9};
constexpr int kRunKinds[kRuns] = {kFull, kDiagonal, kPerSlot, kWindow, kFull};

struct Dims {
  int tokens, group, dim, dim_v;
};

// The sections of a plan for one block and one item, before they are laid out.
struct Lists {
  std::vector<int32_t> tokens, positions, pages;
  std::vector<PlanRun> runs;
  std::vector<uint64_t> words;
};

Lists make_lists(std::mt19937_64& rng, const Dims& dims) {
  Lists lists;
  for (int t = 0; t < dims.tokens; ++t) {
    lists.tokens.push_back(dims.tokens - 1 - t);
    lists.positions.push_back(static_cast<int32_t>(rng() % 100));
  }
  for (int r = 0; r < kRuns; ++r) {
    PlanRun run{~uint64_t{0},
                static_cast<int32_t>(lists.pages.size()),
                static_cast<int32_t>(rng() % kPageSize),
                kRunSlots[r],
                20,
                kRunKinds[r],
                static_cast<int32_t>(rng() % 20) - 10,
                static_cast<int32_t>(lists.words.size()),
                0};
    if (r == 4) run.mask = rng();
    for (int p = 0; p * kPageSize < run.first_slot + run.num_slots; ++p) {
      lists.pages.push_back(static_cast<int32_t>(lists.pages.size()));
    }
    for (int j = 0; run.kind == kPerSlot && j < run.num_slots; ++j)
      lists.words.push_back(rng() & rng());
    lists.runs.push_back(run);
  }
  return lists;
}

template <class T>
int32_t append(std::vector<int64_t>& buffer, const std::vector<T>& data) {
  const auto offset = static_cast<int32_t>(buffer.size());
  buffer.resize(buffer.size() + (data.size() * sizeof(T) + 7) / 8);
  if (!data.empty()) std::memcpy(buffer.data() + offset, data.data(), data.size() * sizeof(T));
  return offset;
}

std::vector<int64_t> serialise(const Lists& lists, const Dims& dims) {
  std::vector<int64_t> buffer(sizeof(PlanHeader) / 8);
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.version = kPlanVersion;
  h.num_tokens = h.num_block_tokens = h.max_block_tokens = dims.tokens;
  h.num_blocks = h.num_items = 1;
  const auto num_runs = static_cast<int32_t>(lists.runs.size());
  h.num_runs = num_runs;
  h.num_pages = h.page_limit = static_cast<int32_t>(lists.pages.size());
  h.num_words = static_cast<int32_t>(lists.words.size());
  h.group = dims.group;
  h.page_size = kPageSize;
  h.window = kWindow;
  h.off_blocks = append(buffer, std::vector<PlanBlock>{{0, dims.tokens}});
  h.off_tokens = h.off_q_rows = append(buffer, lists.tokens);
  h.off_positions = append(buffer, lists.positions);
  h.off_items = append(buffer, std::vector<PlanItem>{{0, 0, num_runs, -1}});
  h.off_runs = append(buffer, lists.runs);
  h.off_pages = append(buffer, lists.pages);
  h.off_words = append(buffer, lists.words);
  h.off_merge_indptr = append(buffer, std::vector<int32_t>(dims.tokens + 1, 0));
  h.off_merge_rows = h.total_words = static_cast<int32_t>(buffer.size());
  std::memcpy(buffer.data(), &h, sizeof(h));
  return buffer;
}

bool sees(const Lists& lists, const PlanRun& run, int t, int j) {
  bool seen = run.mask >> t & 1;
  if (run.kind & kDiagonal) seen &= j < run.diag + t;
  if (run.kind & kWindow) seen &= lists.positions[t] - (run.first_position + j) < kWindow;
  if (run.kind & kPerSlot) seen &= lists.words[run.words_begin + j] >> t & 1;
  return seen;
}

int64_t slot_of(const Lists& lists, const PlanRun& run, int j) {
  const int at = run.first_slot + j;
  return int64_t{lists.pages[run.page_begin + at / kPageSize]} * kPageSize + at % kPageSize;
}

template <class T>
struct Data {
  std::vector<T> q, k, v, out;
  std::vector<float> lse;
};

// Slots that no token sees hold NaN.
template <class T>
Data<T> make_data(std::mt19937_64& rng, const Lists& lists, const Dims& dims) {
  const int heads = kNumKvHeads * dims.group;
  const std::size_t slots = lists.pages.size() * kPageSize;
  Data<T> data;
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<T>& to, std::size_t count) {
    to.resize(count);
    for (T& x : to) from_float(normal(rng), x);
  };
  fill(data.q, std::size_t(dims.tokens) * heads * dims.dim);
  fill(data.k, slots * kNumKvHeads * dims.dim);
  fill(data.v, slots * kNumKvHeads * dims.dim_v);
  std::vector<bool> hidden(slots, true);
  for (const PlanRun& run : lists.runs) {
    for (int j = 0; j < run.num_slots; ++j) {
      for (int t = 0; t < dims.tokens; ++t) {
        if (sees(lists, run, t, j)) hidden[slot_of(lists, run, j)] = false;
      }
    }
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (std::size_t s = 0; s < slots; ++s) {
    if (!hidden[s]) continue;
    for (int d = 0; d < kNumKvHeads * dims.dim; ++d)
      from_float(nan, data.k[s * kNumKvHeads * dims.dim + d]);
    for (int d = 0; d < kNumKvHeads * dims.dim_v; ++d)
      from_float(nan, data.v[s * kNumKvHeads * dims.dim_v + d]);
  }
  data.out.resize(std::size_t(dims.tokens) * heads * dims.dim_v);
  data.lse.resize(std::size_t(dims.tokens) * heads);
  return data;
}

template <class T>
TreeAttentionParams make_params(const std::vector<int64_t>& plan, Data<T>& data, const Dims& dims,
                                DType dtype) {
  const int heads = kNumKvHeads * dims.group;
  const auto rows = [&](std::vector<T>& x, int d) {
    return RowTensor{x.data(), int64_t{heads} * d, d};
  };
  const auto paged = [&](std::vector<T>& x, int d) {
    const int64_t slot = int64_t{kNumKvHeads} * d;
    return PagedTensor{x.data(), slot * kPageSize, slot, d};
  };
  TreeAttentionParams p{};
  p.plan = plan.data();
  p.q = rows(data.q, dims.dim);
  p.k_cache = paged(data.k, dims.dim);
  p.v_cache = paged(data.v, dims.dim_v);
  p.out = rows(data.out, dims.dim_v);
  p.lse = data.lse.data();
  p.dtype = p.kv_dtype = dtype;
  p.num_q_heads = heads;
  p.num_kv_heads = kNumKvHeads;
  p.head_dim = dims.dim;
  p.head_dim_v = dims.dim_v;
  p.softmax_scale = 0.3f;
  p.softcap = 4.0f;
  return p;
}

// The largest error of out and lse of token t of the block and one query head; `unit` is one
// rounding of T.
template <class T>
double row_error(const Lists& lists, const Data<T>& data, const Dims& dims, int t, int head,
                 double unit) {
  const int heads = kNumKvHeads * dims.group;
  const int64_t row = int64_t{lists.tokens[t]} * heads + head;
  const int kv_head = head / dims.group;
  std::vector<double> sum(dims.dim_v, 0.0);
  double total = 0.0;
  for (const PlanRun& run : lists.runs) {
    for (int j = 0; j < run.num_slots; ++j) {
      if (!sees(lists, run, t, j)) continue;
      const int64_t at = slot_of(lists, run, j) * kNumKvHeads + kv_head;
      double score = 0.0;
      for (int d = 0; d < dims.dim; ++d) {
        score += double{to_float(data.q[row * dims.dim + d])} * to_float(data.k[at * dims.dim + d]);
      }
      const double weight = std::exp(4.0 * std::tanh(score * double{0.3f} / 4.0));  // at most e^4
      total += weight;
      for (int d = 0; d < dims.dim_v; ++d) sum[d] += weight * to_float(data.v[at * dims.dim_v + d]);
    }
  }
  double worst = std::abs(data.lse[row] - std::log(total));
  for (int d = 0; d < dims.dim_v; ++d) {
    const double expected = sum[d] / total;
    const double error = std::abs(to_float(data.out[row * dims.dim_v + d]) - expected);
    worst = std::fmax(worst, std::isfinite(error) ? error - unit * std::abs(expected) : INFINITY);
  }
  return std::isfinite(worst) ? worst : INFINITY;
}

template <class T>
void test(uint64_t seed, const Dims& dims, DType dtype, double unit) {
  std::mt19937_64 rng(seed);
  const Lists lists = make_lists(rng, dims);
  const std::vector<int64_t> plan = serialise(lists, dims);
  Data<T> data = make_data<T>(rng, lists, dims);
  for (int level = 0; level <= static_cast<int>(simd_level()); ++level) {
    tree_attention_at(static_cast<SimdLevel>(level), make_params(plan, data, dims, dtype));
    for (int t = 0; t < dims.tokens; ++t) {
      for (int head = 0; head < kNumKvHeads * dims.group; ++head) {
        const double error = row_error(lists, data, dims, t, head, unit);
        if (error < 5e-6) continue;
        std::fprintf(
            stderr,
            "level %d, dtype %d, %d tokens, group %d, dims %d %d: token %d, head %d: error %g\n",
            level, static_cast<int>(dtype), dims.tokens, dims.group, dims.dim, dims.dim_v, t, head,
            error);
        std::exit(1);
      }
    }
  }
}

// Every code of e4m3, as V of the only slot that a token sees, comes out as it is. `group` rows
// take V in place or from a widened copy.
void test_e4m3_codes(int group) {
  constexpr int kCodes = 256;
  const Dims dims{1, group, 16, kCodes};
  Lists lists;
  lists.tokens = lists.positions = lists.pages = {0};
  lists.runs = {{1, 0, 0, 1, 0, kFull, 0, 0, 0}};
  const std::vector<int64_t> plan = serialise(lists, dims);
  const int heads = kNumKvHeads * group;
  Data<float> data;
  data.q.resize(heads * dims.dim);
  data.out.resize(heads * kCodes);
  data.lse.resize(heads);
  std::vector<Float8E4M3> k(kPageSize * kNumKvHeads * dims.dim), v;
  for (int i = 0; i < kPageSize * kNumKvHeads * kCodes; ++i)
    v.push_back({static_cast<uint8_t>(i % kCodes)});
  TreeAttentionParams p = make_params(plan, data, dims, DType::kFloat32);
  const auto paged = [](std::vector<Float8E4M3>& x, int d) {
    const int64_t slot = int64_t{kNumKvHeads} * d;
    return PagedTensor{x.data(), slot * kPageSize, slot, d};
  };
  p.k_cache = paged(k, dims.dim);
  p.v_cache = paged(v, kCodes);
  p.kv_dtype = DType::kFloat8E4M3;
  for (int level = 0; level <= static_cast<int>(simd_level()); ++level) {
    tree_attention_at(static_cast<SimdLevel>(level), p);
    for (int i = 0; i < heads * kCodes; ++i) {
      const float expected = to_float(v[i % kCodes]);
      if (std::isnan(expected) ? std::isnan(data.out[i]) : data.out[i] == expected) continue;
      std::fprintf(stderr, "level %d, %d rows: e4m3 code %d: %g, expected %g\n", level, group,
                   i % kCodes, data.out[i], expected);
      std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed =
      argc > 1 ? std::strtoull(argv[1], nullptr, 10) : uint64_t{std::random_device()()};
  std::printf("seed %llu, levels 0 to %d\n", static_cast<unsigned long long>(seed),
              static_cast<int>(simd_level()));
  const Dims all[] = {{1, 1, 64, 64},  {1, 3, 64, 64}, {2, 3, 80, 8},
                      {8, 3, 64, 128}, {64, 1, 7, 33}, {64, 5, 96, 20}};
  for (const Dims& dims : all) {
    test<float>(seed, dims, DType::kFloat32, 0x1p-23);
    test<BFloat16>(seed, dims, DType::kBFloat16, 0x1p-8);
    test<Float16>(seed, dims, DType::kFloat16, 0x1p-11);
  }
  for (const int group : {1, 4, 8}) test_e4m3_codes(group);
  return 0;
}
