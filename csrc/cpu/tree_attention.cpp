// Attention over a plan on the cores of the machine: units of work run in any order and leave
// partial results, which are then merged per query row in a fixed order. Results depend on the plan
// alone, not on the number of threads.
#include <omp.h>

#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "merge.h"
#include "numeric.h"
#include "schedule.h"
#include "scratch.h"
#include "unit.h"

namespace fork_attn::cpu {

namespace {

// Memory that a calling thread keeps from one call to the next: fresh pages would cost more than
// small steps take.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { release(); }

  float* floats(std::size_t count) {
    if (count > capacity_) {
      release();
      data_ = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
      capacity_ = count;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    capacity_ = 0;
  }

  float* data_ = nullptr;
  std::size_t capacity_ = 0;
};

void check(const TreeAttentionParams& params) {
  const PlanHeader& h = PlanView(params.plan).header();
  if (h.magic != kPlanMagic || h.version != kPlanVersion) {
    throw std::invalid_argument("plan: expected a plan buffer of version " +
                                std::to_string(kPlanVersion) + ", got magic " +
                                std::to_string(h.magic) + ", version " + std::to_string(h.version));
  }
  if (h.tile_slots != 0 && h.tile_slots != kTileSlots) {
    throw std::invalid_argument("plan: expected tiles of " + std::to_string(kTileSlots) +
                                " slots, got " + std::to_string(h.tile_slots));
  }
  if (params.num_q_heads != params.num_kv_heads * h.group) {
    throw std::invalid_argument("num_q_heads: expected num_kv_heads x the plan's group = " +
                                std::to_string(params.num_kv_heads) + " x " +
                                std::to_string(h.group) + ", got " +
                                std::to_string(params.num_q_heads));
  }
  if (params.dtype == DType::kFloat8E4M3 ||
      (params.kv_dtype != params.dtype && params.kv_dtype != DType::kFloat8E4M3)) {
    throw std::invalid_argument("dtype: expected caches of the dtype of q, or of e4m3");
  }
}

template <class T>
void merge_row(const TreeAttentionParams& p, const Partials& partials, int64_t row, float* acc) {
  const PlanView plan(p.plan);
  const int32_t* first = plan.merge_rows() + plan.merge_indptr()[row];
  const int32_t* end_of_row = plan.merge_rows() + plan.merge_indptr()[row + 1];
  const bool fold = plan.header().tile_slots > 0;
  for (int32_t head = 0; head < p.num_q_heads; ++head) {
    const auto for_each = [&](const auto& visit) {
      for (const int32_t* partial = first; partial != end_of_row; ++partial) {
        const int64_t slot = int64_t{*partial} * p.num_q_heads + head;
        visit(partials.out + slot * p.head_dim_v, partials.lse[slot]);
      }
    };
    const float* sink = p.sinks == nullptr ? nullptr : p.sinks + head;
    const RowEnd end = fold ? fold_head(for_each, p.head_dim_v, sink, acc)
                            : merge_head(for_each, p.head_dim_v, sink, acc);
    T* out = static_cast<T*>(p.out.data) + row * p.out.row_stride + head * p.out.head_stride;
    for (int32_t d = 0; d < p.head_dim_v; ++d) from_float(acc[d] * end.scale, out[d]);
    p.lse[row * p.num_q_heads + head] = end.lse;
  }
}

void merge_row(const TreeAttentionParams& p, const Partials& partials, int64_t row, float* acc) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_row<float>(p, partials, row, acc);
    case DType::kBFloat16:
      return merge_row<BFloat16>(p, partials, row, acc);
    case DType::kFloat16:
      return merge_row<Float16>(p, partials, row, acc);
    case DType::kFloat8E4M3:
      break;
  }
}

}  // namespace

std::size_t scratch_floats(const TreeAttentionParams& params) {
  const PlanHeader& h = PlanView(params.plan).header();
  return ScratchLayout(int64_t{h.max_block_tokens} * h.group, params.head_dim, params.head_dim_v)
      .total;
}

void tree_attention_at(SimdLevel level, const TreeAttentionParams& params) {
  check(params);
  static thread_local Workspace workspace;
  const Schedule schedule(params);
  const UnitBody body = unit_body(level);
  const int64_t num_partials =
      int64_t{PlanView(params.plan).header().num_partial_rows} * params.num_q_heads;
  const std::size_t each = scratch_floats(params);
  const std::size_t all = each * schedule.threads();
  float* scratch = workspace.floats(all + num_partials * (params.head_dim_v + 1));
  const Partials partials{scratch + all, scratch + all + num_partials * params.head_dim_v};
  const std::vector<int32_t>& rows = schedule.rows_to_merge();
  const int64_t num_rows = static_cast<int64_t>(rows.size());
#pragma omp parallel num_threads(schedule.threads())
  {
    float* own = scratch + each * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < schedule.num_units(); ++i) {
      body(params, schedule.unit(i), partials, own);
    }
    if (num_rows > 0) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < num_rows; ++i) merge_row(params, partials, rows[i], own);
    }
  }
}

void tree_attention(const TreeAttentionParams& params) { tree_attention_at(simd_level(), params); }

}  // namespace fork_attn::cpu
