#include "costs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <string>

#include "error.h"

namespace fork_attn {

namespace {

// A100 SXM: 108 SMs, 2.0 TB/s, 312 TFLOP/s. H200: 132 SMs, 4.8 TB/s, 989 TFLOP/s. B200: 148 SMs, 8
// TB/s, 2250 TFLOP/s (dense bf16). Small tiles run on mma.sync, taken as 60 % of the rate. exp: 16
// a clock and SM. The CPU is one AVX-512 core at about 3 GHz, with its share of a server's memory.
constexpr std::array<TargetCosts, 4> kDatasheet = {{
    {.name = "cpu",
     .workers = 0,
     .max_rows = 128,
     .spans_per_worker = 4,
     .bytes_per_ns = 10.0,
     .flops_per_ns = {130.0, 130.0, 130.0, 130.0},
     .row_quantum = 1,
     .load_rows = 2,
     .ns_per_exp = 0.3,
     .item_ns = 1000.0,
     .tile_slots = 64,
     .gather_slots = 0,
     .chunk_slots = 256,
     .partial_bytes_per_ns = 10.0,
     .launch_ns = 0,
     .overlaps = false},
    {.name = "sm_80",
     .workers = 108,
     .max_rows = 128,
     .spans_per_worker = 1,
     .bytes_per_ns = 18.5,
     .flops_per_ns = {1730, 1730, 2890, 2890},
     .row_quantum = 16,
     .load_rows = 0,
     .ns_per_exp = 0.044,
     .item_ns = 1500,
     .tile_slots = 64,
     .gather_slots = 48,
     .chunk_slots = 512,
     .partial_bytes_per_ns = 18.5,
     .launch_ns = 0,
     .overlaps = true},
    {.name = "sm_90",
     .workers = 132,
     .max_rows = 128,
     .spans_per_worker = 1,
     .bytes_per_ns = 36.4,
     .flops_per_ns = {4500, 4500, 7490, 7490},
     .row_quantum = 16,
     .load_rows = 0,
     .ns_per_exp = 0.036,
     .item_ns = 1500,
     .tile_slots = 64,
     .gather_slots = 48,
     .chunk_slots = 512,
     .partial_bytes_per_ns = 36.4,
     .launch_ns = 0,
     .overlaps = true},
    {.name = "sm_100",
     .workers = 148,
     .max_rows = 128,
     .spans_per_worker = 1,
     .bytes_per_ns = 54.0,
     .flops_per_ns = {9100, 9100, 15200, 15200},
     .row_quantum = 16,
     .load_rows = 0,
     .ns_per_exp = 0.034,
     .item_ns = 1500,
     .tile_slots = 64,
     .gather_slots = 48,
     .chunk_slots = 512,
     .partial_bytes_per_ns = 54.0,
     .launch_ns = 0,
     .overlaps = true},
}};

std::size_t index_of(std::string_view name) {
  for (std::size_t i = 0; i < kDatasheet.size(); ++i) {
    if (name == kDatasheet[i].name) return i;
  }
  fail(ErrorKind::kValue,
       "target: expected cpu, sm_80, sm_90 or sm_100, got '" + std::string(name) + "'");
}

// Choices are remembered by the table that they were made with, so tables are kept and never
// written to.
std::deque<TargetCosts> kept;
std::array<const TargetCosts*, kDatasheet.size()> current = {&kDatasheet[0], &kDatasheet[1],
                                                             &kDatasheet[2], &kDatasheet[3]};

void require(bool ok, const char* field, const char* expected, double got) {
  if (ok) return;
  fail(ErrorKind::kValue,
       std::string(field) + ": expected " + expected + ", got " + std::to_string(got));
}

void check(const TargetCosts& t) {
  const auto positive = [](const char* field, double x) {
    require(std::isfinite(x) && x > 0, field, "a number above 0", x);
  };
  const auto at_least_0 = [](const char* field, double x) {
    require(std::isfinite(x) && x >= 0, field, "a number of at least 0", x);
  };
  positive("max_rows", t.max_rows);
  positive("spans_per_worker", t.spans_per_worker);
  positive("row_quantum", t.row_quantum);
  positive("tile_slots", t.tile_slots);
  positive("chunk_slots", t.chunk_slots);
  at_least_0("gather_slots", t.gather_slots);
  at_least_0("workers", t.workers);
  positive("bytes_per_ns", t.bytes_per_ns);
  for (const double rate : t.flops_per_ns) positive("flops_per_ns", rate);
  at_least_0("load_rows", t.load_rows);
  at_least_0("ns_per_exp", t.ns_per_exp);
  positive("item_ns", t.item_ns);
  positive("partial_bytes_per_ns", t.partial_bytes_per_ns);
  at_least_0("launch_ns", t.launch_ns);
}

}  // namespace

const TargetCosts& target_costs(std::string_view name) { return *current[index_of(name)]; }

void set_target_costs(const TargetCosts& costs) {
  const std::size_t i = index_of(costs.name);
  check(costs);
  kept.push_back(costs);
  kept.back().name = kDatasheet[i].name;
  current[i] = &kept.back();
}

void reset_target_costs(std::string_view name) {
  const std::size_t i = index_of(name);
  current[i] = &kDatasheet[i];
}

namespace {

double slot_ns(const TargetCosts& target, const LayerShape& shape, int64_t tokens) {
  const int64_t quantum = target.row_quantum;
  const int64_t padded = (tokens * shape.group + quantum - 1) / quantum * quantum;
  const double flops = 2.0 * (shape.head_dim + shape.head_dim_v);
  const std::size_t size = padded < 32 ? 0 : padded < 64 ? 1 : padded < 128 ? 2 : 3;
  const double rate = target.flops_per_ns[size];
  const double compute = (static_cast<double>(padded) + target.load_rows) * flops / rate +
                         static_cast<double>(padded) * target.ns_per_exp;
  const double bytes = static_cast<double>(shape.head_dim + shape.head_dim_v) * shape.itemsize;
  const double memory = bytes / target.bytes_per_ns;
  return target.overlaps ? std::max(compute, memory) : compute + memory;
}

}  // namespace

CostModel::CostModel(const TargetCosts& target, const LayerShape& shape) : target_(target) {
  for (int64_t tokens = 0; tokens <= kMaxBlockTokens; ++tokens) {
    slot_[tokens] = slot_ns(target, shape, tokens);
  }
  const auto row_bytes = static_cast<double>((shape.head_dim_v + 1) * sizeof(float));
  partial_ = 2.0 * shape.group * row_bytes / target.partial_bytes_per_ns;
}

}  // namespace fork_attn
