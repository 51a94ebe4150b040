// Cuts the runs of a work item into tiles of slots that at least one token of its block sees.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "plan_view.h"

namespace fork_attn::cpu {

constexpr int kTileSlots = 64;

struct Tile {
  int count;                  // slots in this tile
  int32_t chunk;              // of its first run
  uint64_t seen_by_all;       // tokens that see every slot of the tile
  const void* k[kTileSlots];  // rows of head_dim and head_dim_v elements
  const void* v[kTileSlots];
  uint64_t words[kTileSlots];  // bit t: token t of the block sees the slot; zero only in
                               // batch-invariant plans
};

// Slots that no token sees are left out of the tiles, so memory that was never written is never
// read. Short runs share tiles. In a batch-invariant plan every run begins a tile and all its slots
// keep their places, which were written.
class TileReader {
 public:
  TileReader(const TreeAttentionParams& params, const PlanItem& item, int kv_head);

  // Fills the next tile; false when there is none.
  bool next(Tile& tile);

 private:
  void enter_run();
  uint64_t visibility(const PlanRun& run, int64_t j) const;

  PlanView plan_;
  const int32_t* pages_;  // that runs index
  PagedTensor k_, v_;
  int64_t element_size_;
  int64_t head_k_, head_v_;  // element offset of the KV head
  bool fixed_;               // a batch-invariant plan
  uint64_t block_mask_;
  const int32_t* positions_;  // of the block's tokens
  int64_t max_position_;
  int32_t run_;
  int64_t left_;        // slots still to read, over all runs
  int64_t j_ = 0;       // next slot of the current run
  int32_t page_index_;  // where that slot lies
  int32_t offset_;
};

int element_size(DType dtype);
int64_t num_slots(const PlanView& plan, const PlanItem& item);  // of all its runs

}  // namespace fork_attn::cpu
