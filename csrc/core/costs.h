// What work costs on a target, as far as the planner needs to know: from datasheets, or as measured
// by `fork-attn calibrate`.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "plan.h"

namespace fork_attn {

struct TargetCosts {
  const char* name;
  int32_t workers;           // SMs; 0: the caller says (cores)
  int32_t max_rows;          // rows (tokens x group) of a row block
  int32_t spans_per_worker;  // equal pieces to aim at: 1 where workers run in step, more where they
                             // drift
  double bytes_per_ns;       // memory bandwidth of one worker when all stream
  // One worker's rate on tiles below 32 rows, and from 32, 64 and 128 rows on.
  std::array<double, 4> flops_per_ns;
  int32_t row_quantum;  // rows are padded to a multiple of this
  double load_rows;     // reading a slot into the core costs as much arithmetic as this many rows
  double ns_per_exp;    // per score
  double item_ns;       // fixed cost of a work item
  int32_t tile_slots;   // items are cut at multiples of this
  int32_t
      gather_slots;     // pieces and ends of runs up to this long share tiles; 0: kernels see to it
  int32_t chunk_slots;  // batch-invariant plans cut contexts at multiples of this: whole tiles
  double partial_bytes_per_ns;  // a worker's rate of writing partial rows and reading them back
  double launch_ns;             // of a call, whatever it holds; no choice depends on it
  bool overlaps;  // memory's time passes beside arithmetic's, as with asynchronous copies; else
                  // after it
};

// "cpu", "sm_80", "sm_90", "sm_100"; kValue for any other. What comes back never changes and lives
// as long as the process: other costs are another table.
const TargetCosts& target_costs(std::string_view name);

// From now on `target_costs` gives these for their name. kValue for an unknown name, rates and
// sizes that are not positive, or costs that are negative, by the name of the field.
void set_target_costs(const TargetCosts& costs);

// Back to the datasheet's.
void reset_target_costs(std::string_view name);

// The shape of one layer, all heads alike.
struct LayerShape {
  int32_t num_kv_heads;
  int32_t group;  // query heads per KV head
  int32_t head_dim;
  int32_t head_dim_v;
  int32_t itemsize;  // bytes of a K or V element
  bool operator==(const LayerShape&) const = default;
};

// Nanoseconds for one KV head. Tables by the number of query tokens: a plan asks thousands of
// times.
class CostModel {
 public:
  CostModel(const TargetCosts& target, const LayerShape& shape);

  // `tokens` query tokens over `slots` slots of KV.
  double item(int64_t tokens, int64_t slots) const {
    return target_.item_ns + static_cast<double>(slots) * slot(tokens);
  }
  double slot(int64_t tokens) const { return slot_[tokens]; }
  // Writing the partial rows of that many tokens, and reading them back to merge.
  double partials(int64_t tokens) const { return static_cast<double>(tokens) * partial_; }
  const TargetCosts& target() const { return target_; }

 private:
  const TargetCosts& target_;
  std::array<double, kMaxBlockTokens + 1> slot_;
  double partial_;
};

}  // namespace fork_attn
