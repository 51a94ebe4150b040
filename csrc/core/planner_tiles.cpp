// Items of batch-invariant plans. Tile i of a row is slots [i * tile, (i + 1) * tile) of its
// context, whatever lies where and whoever else reads it; a run begins a tile and lies in one
// chunk.
#include <algorithm>
#include <bit>
#include <climits>
#include <numeric>

#include "planner.h"

namespace fork_attn {

void Planner::emit_tiled_block(const Block& block, const BlockChoice& choice) {
  block_first_ = all_tokens_.data() + block.token_begin;
  block_count_ = block.token_end - block.token_begin;
  const auto first_run = static_cast<int32_t>(runs_.size());
  for (int32_t s = block.streams_begin; s < block.streams_end; ++s) {
    const int32_t g = choice.streams[s];
    const uint64_t mask = mask_of(groups_.groups[g]);
    if (mask == 0) continue;
    const auto pieces = groups_.pieces(groups_.groups[g]);
    parts_.assign(pieces.begin(), pieces.end());
    if (g < static_cast<int32_t>(groups_.order.size())) {
      emit_own_tiles(g, mask);
    } else {
      emit_tiles({mask, -1, INT64_MAX, INT64_MAX});
    }
  }
  const auto end_run = static_cast<int32_t>(runs_.size());
  if (end_run == first_run) return;  // the window passed everything by
  sort_by_chunk(first_run);
  const bool from_start = groups_.groups[choice.streams[block.streams_begin]].parent < 0;
  for (int32_t r = first_run; r < end_run; ++r) {
    count_run(runs_[r]);
    if ((runs_[r].kind & kGather) == 0) name_pages(runs_[r], source_of_run_[r]);
    if (r == first_run || runs_[r].chunk != runs_[r - 1].chunk) {
      items_.push_back({static_cast<int32_t>(blocks_.size()), r, r, -1});
      goes_on_.push_back(r > first_run && from_start);
    }
    items_.back().run_end = r + 1;
  }
  add_block_tokens();
}

void Planner::sort_by_chunk(int32_t first_run) {
  const auto by_chunk = [](const PlanRun& a, const PlanRun& b) { return a.chunk < b.chunk; };
  if (std::is_sorted(runs_.begin() + first_run, runs_.end(), by_chunk)) return;
  std::vector<int32_t> at(runs_.size() - first_run);
  std::iota(at.begin(), at.end(), first_run);
  std::stable_sort(at.begin(), at.end(),
                   [&](int32_t a, int32_t b) { return by_chunk(runs_[a], runs_[b]); });
  std::vector<PlanRun> runs;
  std::vector<int32_t> sources;
  for (const int32_t r : at) {
    runs.push_back(runs_[r]);
    sources.push_back(source_of_run_[r]);
  }
  std::copy(runs.begin(), runs.end(), runs_.begin() + first_run);
  std::copy(sources.begin(), sources.end(), source_of_run_.begin() + first_run);
}

// A branch's own part of its context, with its new tokens up to the block's last of them.
void Planner::emit_own_tiles(int32_t order_index, uint64_t mask) {
  const int32_t r = groups_.order[order_index];
  const StepRow& row = core_->step().rows[r];
  const auto block_begin = static_cast<int32_t>(block_first_ - all_tokens_.data());
  const int32_t at = groups_.token_begin[order_index] - block_begin;  // bit of the branch's token 0
  const int32_t first = std::max(0, -at);
  const int32_t last = std::min(row.num_tokens, block_count_ - at);
  const int64_t length = core_->store().length(core_->branches()[row.branch].head);
  if (row.draft) return emit_draft_tiles(row, first, last, at, mask, length);
  const int64_t position = core_->step().positions[row.row_begin];
  parts_.push_back({0, 0, row.segment, row.first_slot, row.first_slot + last, position, length});
  emit_tiles({mask, r, length + first + 1, length + 1 - at});
}

// Tiles over parts_, which begin at a tile.
void Planner::emit_tiles(const TileReaders& readers) {
  const int32_t tile = request_.target->tile_slots;
  std::size_t kept = 0;  // neighbours in one segment become one
  for (std::size_t i = 1; i < parts_.size(); ++i) {
    Piece& last = parts_[kept];
    const Piece& next = parts_[i];
    if (last.segment == next.segment && next.segment != kNone && last.hi == next.lo &&
        last.first_position + (last.hi - last.lo) == next.first_position) {
      last.hi = next.hi;
    } else {
      parts_[++kept] = next;
    }
  }
  parts_.resize(std::min(parts_.size(), kept + 1));
  int32_t into = 0;
  for (std::size_t i = 0; i < parts_.size();) {
    const int32_t left = parts_[i].hi - parts_[i].lo - into;
    if (left == 0) {
      ++i;
      into = 0;
    } else if (left >= tile || i + 1 == parts_.size()) {
      const int32_t count = i + 1 == parts_.size() ? left : left / tile * tile;
      emit_stretch(parts_[i], into, count, readers);
      into += count;
    } else {
      lanes_.clear();
      const int64_t at = parts_[i].at + into;
      while (i < parts_.size() && static_cast<int32_t>(lanes_.size()) < tile) {
        const Piece& p = parts_[i];
        const int32_t lane =
            std::min<int32_t>(p.hi - p.lo - into, tile - static_cast<int32_t>(lanes_.size()));
        for (int32_t j = into; j < into + lane; ++j)
          lanes_.push_back({slot_address(p, p.lo + j, readers.row), p.first_position + j,
                            mask_at(at + static_cast<int64_t>(lanes_.size()), readers)});
        into += lane;
        if (into == p.hi - p.lo) {
          ++i;
          into = 0;
        }
      }
      emit_lanes(at, readers.mask);
    }
  }
}

// The readers that see place `at` of their context, by order alone.
uint64_t Planner::mask_at(int64_t at, const TileReaders& readers) const {
  if (at < readers.seen_by_all) return readers.mask;
  const int64_t hidden = std::clamp<int64_t>(at - readers.diagonal + 1, 0, 64);
  return hidden == 64 ? 0 : readers.mask >> hidden << hidden;
}

// Whole tiles of one segment, or the last of a context.
void Planner::emit_stretch(const Piece& p, int32_t into, int32_t count,
                           const TileReaders& readers) {
  const int32_t tile = request_.target->tile_slots;
  const int32_t chunk = request_.target->chunk_slots;
  const int32_t page_size = core_->page_size();
  const int32_t source =
      p.segment != kNone ? source_of_segment(p.segment) : source_of_row(readers.row);
  const auto [least, most] = positions_of(readers.mask);
  for (const int32_t end = into + count; into < end;) {
    const int64_t at = p.at + into;
    int32_t slots = static_cast<int32_t>(std::min<int64_t>(end - into, chunk - at % chunk));
    int64_t position = p.first_position + into;
    int32_t dropped = 0;
    if (request_.window > 0) {
      dropped = static_cast<int32_t>(
          std::clamp<int64_t>(least - request_.window + 1 - position, 0, slots));
      if (dropped < slots) dropped -= dropped % tile;
    }
    const int32_t slot = p.lo + into + dropped;
    into += slots;
    slots -= dropped;
    position += dropped;
    if (slots == 0) continue;
    PlanRun run{readers.mask,
                slot / page_size,
                slot % page_size,
                slots,
                static_cast<int32_t>(position),
                kFull,
                0,
                0,
                static_cast<int32_t>(at / chunk)};
    if (request_.window > 0 && position <= most - request_.window) run.kind |= kWindow;
    if (at + dropped + slots > readers.seen_by_all) {
      run.kind |= kDiagonal;
      run.diag = static_cast<int32_t>(readers.diagonal - at - dropped);
    }
    add_run(run, source);
  }
}

// One tile whose slots lie anywhere: lanes_, from place `at` of the context on.
void Planner::emit_lanes(int64_t at, uint64_t mask) {
  const auto [least, most] = positions_of(mask);
  uint64_t seen = 0;
  for (Lane& lane : lanes_) {
    if (request_.window > 0 && lane.position <= most - request_.window) {
      for (uint64_t rest = lane.seen; rest != 0; rest &= rest - 1) {
        const int64_t newest = position(block_first_[std::countr_zero(rest)]);
        if (lane.position <= newest - request_.window) lane.seen &= ~(rest & -rest);
      }
    }
    seen |= lane.seen;
  }
  if (seen == 0) return;
  const PlanRun run{mask,
                    static_cast<int32_t>(gather_.size()),
                    0,
                    static_cast<int32_t>(lanes_.size()),
                    static_cast<int32_t>(lanes_[0].position),
                    kGather,
                    0,
                    static_cast<int32_t>(words_.size()),
                    static_cast<int32_t>(at / request_.target->chunk_slots)};
  for (const Lane& lane : lanes_) {
    gather_.push_back(lane.slot);
    words_.push_back(lane.seen);
  }
  runs_.push_back(run);
  source_of_run_.push_back(-1);
}

// A draft token's context goes on with its ancestors: one path of tiles for each leaf of the draft.
void Planner::emit_draft_tiles(const StepRow& row, int32_t first, int32_t last, int32_t at,
                               uint64_t mask, int64_t length) {
  const Step& step = core_->step();
  const int32_t tile = request_.target->tile_slots;
  const int64_t shared = length / tile * tile;
  std::vector<Piece> tail;  // of the context, in the tile that the draft goes on in
  for (Piece& p : parts_) {
    const int64_t end = p.at + p.hi - p.lo;
    if (end <= shared) continue;
    const auto skipped = static_cast<int32_t>(std::max<int64_t>(0, shared - p.at));
    tail.push_back({0, 0, p.segment, p.lo + skipped, p.hi, p.first_position + skipped, 0});
    p.hi = p.lo + skipped;
  }
  emit_tiles({mask, -1, INT64_MAX, INT64_MAX});
  uint64_t left = mask;
  std::vector<int32_t> path;
  for (int32_t leaf = last; leaf-- > first;) {
    if ((left >> (at + leaf) & 1) == 0) continue;
    path.clear();
    for (int32_t j = leaf; j >= 0; j = step.parents[row.parents_begin + j]) path.push_back(j);
    std::reverse(path.begin(), path.end());
    uint64_t readers = 0;
    for (const int32_t j : path) readers |= j >= first ? left & uint64_t{1} << (at + j) : 0;
    left &= ~readers;
    lanes_.clear();
    int64_t place = shared;
    const auto add = [&](int32_t slot, int64_t position, uint64_t seen) {
      lanes_.push_back({slot, position, seen});
      if (++place % tile != 0) return;
      emit_lanes(place - tile, readers);
      lanes_.clear();
    };
    for (const Piece& p : tail) {
      for (int32_t s = p.lo; s < p.hi; ++s)
        add(slot_address(p, s, -1), p.first_position + (s - p.lo), readers);
    }
    uint64_t below = readers;  // this token and those after it on the path
    for (const int32_t j : path) {
      add(static_cast<int32_t>(step.slot_mapping[row.row_begin + j]),
          step.positions[row.row_begin + j], below);
      if (j >= first) below &= ~(uint64_t{1} << (at + j));
    }
    if (!lanes_.empty()) emit_lanes(place - static_cast<int64_t>(lanes_.size()), readers);
  }
}

// Where a slot of a part lies in the cache; `r`: the row whose new tokens may be meant, -1: none.
int32_t Planner::slot_address(const Piece& p, int32_t slot, int32_t r) const {
  if (r >= 0) {
    const StepRow& row = core_->step().rows[r];
    if (p.segment == row.segment && slot >= row.first_slot)
      return static_cast<int32_t>(
          core_->step().slot_mapping[row.row_begin + slot - row.first_slot]);
  }
  const int32_t page_size = core_->page_size();
  return core_->store().segments[p.segment].pages[slot / page_size] * page_size + slot % page_size;
}

Planner::PositionRange Planner::positions_of(uint64_t mask) const {
  PositionRange range{INT64_MAX, INT64_MIN};
  if (request_.window == 0) return range;
  for (; mask != 0; mask &= mask - 1) {
    const int64_t p = position(block_first_[std::countr_zero(mask)]);
    range.least = std::min(range.least, p);
    range.most = std::max(range.most, p);
  }
  return range;
}

}  // namespace fork_attn
