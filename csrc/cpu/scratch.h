// Where a unit of work keeps its fp32 tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "plan_view.h"
#include "tile_reader.h"

namespace fork_attn::cpu {

constexpr int kChunkRows = 48;  // rows whose scores are held at once: one L1 cache with the K tile
constexpr int kScratchLanes = 16;  // the widest vector, in floats

inline int64_t padded(int64_t n) { return (n + kScratchLanes - 1) / kScratchLanes * kScratchLanes; }

// Sections of one thread's scratch, in floats; each begins on 64 bytes. Rows are tokens x query
// heads of a group.
struct ScratchLayout {
  int64_t q, out, max, sum, decay, scores, k_rows, k_columns, v_rows, folded, folded_lse, total;

  ScratchLayout(int64_t num_rows, int64_t head_dim, int64_t head_dim_v) {
    const int64_t dim = padded(head_dim);
    const int64_t dim_v = padded(head_dim_v);
    q = 0;
    out = q + num_rows * dim;
    max = out + num_rows * dim_v;
    sum = max + padded(num_rows);
    decay = sum + padded(num_rows);
    scores = decay + kChunkRows;
    k_rows = scores + kChunkRows * kTileSlots;
    k_columns = k_rows + kTileSlots * dim;
    v_rows = k_columns + kTileSlots * dim;
    folded = v_rows + kTileSlots * dim_v;
    folded_lse = folded + num_rows * dim_v;
    total = folded_lse + padded(num_rows);
  }
};

}  // namespace fork_attn::cpu
