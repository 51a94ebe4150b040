#include "costs.h"

#include <algorithm>
#include <array>
#include <string>

#include "error.h"

namespace fork_attn {

namespace {

// A100 SXM: 108 SMs, 2.0 TB/s, 312 TFLOP/s. H200: 132 SMs, 4.8 TB/s, 989 TFLOP/s. B200: 148 SMs, 8
// TB/s, 2250 TFLOP/s (dense bf16). Small tiles run on mma.sync, taken as 60 % of the rate. exp: 16
// a clock and SM. The CPU is one AVX-512 core at about 3 GHz, with its share of a server's memory.
constexpr std::array<TargetCosts, 4> kTargets = {{
    {"cpu", 0, 128, 4, 10.0, 130.0, 130.0, 1, 2, 0.3, 1000.0, 64, 0, 256},
    {"sm_80", 108, 128, 1, 18.5, 1730.0, 2890.0, 16, 0, 0.044, 1500.0, 64, 48, 512},
    {"sm_90", 132, 128, 1, 36.4, 4500.0, 7490.0, 16, 0, 0.036, 1500.0, 64, 48, 512},
    {"sm_100", 148, 128, 1, 54.0, 9100.0, 15200.0, 16, 0, 0.034, 1500.0, 64, 48, 512},
}};

}  // namespace

const TargetCosts& target_costs(std::string_view name) {
  for (const TargetCosts& t : kTargets) {
    if (name == t.name) return t;
  }
  fail(ErrorKind::kValue,
       "target: expected cpu, sm_80, sm_90 or sm_100, got '" + std::string(name) + "'");
}

namespace {

double slot_ns(const TargetCosts& target, const LayerShape& shape, int64_t tokens) {
  const int64_t quantum = target.row_quantum;
  const int64_t padded = (tokens * shape.group + quantum - 1) / quantum * quantum;
  const double flops = 2.0 * (shape.head_dim + shape.head_dim_v);
  const double rate = padded < 64 ? target.flops_per_ns_small : target.flops_per_ns;
  const double compute = static_cast<double>(padded + target.load_rows) * flops / rate +
                         static_cast<double>(padded) * target.ns_per_exp;
  const double bytes = static_cast<double>(shape.head_dim + shape.head_dim_v) * shape.itemsize;
  return std::max(compute, bytes / target.bytes_per_ns);
}

}  // namespace

CostModel::CostModel(const TargetCosts& target, const LayerShape& shape) : target_(target) {
  for (int64_t tokens = 0; tokens <= kMaxBlockTokens; ++tokens) {
    slot_[tokens] = slot_ns(target, shape, tokens);
  }
  const auto row_bytes = static_cast<double>((shape.head_dim_v + 1) * sizeof(float));
  partial_ = 2.0 * shape.group * row_bytes / target.bytes_per_ns;
}

}  // namespace fork_attn
