// The end of an online softmax: how unnormalised sums become an output row and its log-sum-exp.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fork_attn::cpu {

struct RowEnd {
  float scale;  // multiplies the unnormalised output
  float lse;
};

// `sum` holds the sum of exp(score - max). A sink joins the denominator alone. An empty row gets
// scale 0.
FORK_ATTN_HD RowEnd end_row(float max, float sum, const float* sink) {
  constexpr float kInfinity = HUGE_VALF;
  if (sum == 0.0f) return {0.0f, sink == nullptr ? -kInfinity : *sink};
  if (sink == nullptr) return {1.0f / sum, max + std::log(sum)};
  const float top = *sink > max ? *sink : max;
  const float keep = std::exp(max - top);
  const float total = sum * keep + std::exp(*sink - top);
  return {keep / total, top + std::log(total)};
}

}  // namespace fork_attn::cpu
