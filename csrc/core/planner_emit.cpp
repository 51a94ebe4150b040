// From chosen blocks to row blocks, items and runs.
#include <algorithm>
#include <bit>
#include <climits>

#include "planner.h"

namespace fork_attn {

namespace {

uint64_t bits(int32_t first, int32_t count) {
  const uint64_t ones = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  return count == 0 ? 0 : ones << first;
}

// Slots of one segment mostly have one word: it is counted once.
int64_t count_bits(const uint64_t* words, int32_t count) {
  uint64_t last = 0;
  int64_t bits_of_last = 0;
  int64_t total = 0;
  for (int32_t j = 0; j < count; ++j) {
    if (words[j] != last) {
      last = words[j];
      bits_of_last = std::popcount(last);
    }
    total += bits_of_last;
  }
  return total;
}

}  // namespace

void Planner::lay_out_tokens() {
  all_tokens_.clear();
  for (const Leaf& leaf : groups_.leaves) {
    const int32_t first = core_->step().rows[leaf.row].row_begin + leaf.first;
    for (int32_t t = 0; t < leaf.count; ++t) {
      int32_t rotation = -1;
      if (leaf.shift != 0) {
        rotation = static_cast<int32_t>(rotations_.size());
        rotations_.push_back({first + t, static_cast<int32_t>(leaf.shift)});
      }
      all_tokens_.push_back({leaf.row, leaf.first + t, rotation});
    }
  }
}

// Of the query that the token reads.
int32_t Planner::position(const Token& token) const {
  const int64_t position =
      core_->step().positions[core_->step().rows[token.row].row_begin + token.index];
  return static_cast<int32_t>(token.rotation < 0 ? position
                                                 : position - rotations_[token.rotation].shift);
}

int32_t Planner::source_of_segment(Index segment) {
  int32_t& source = source_of_segment_[segment];
  if (source < 0) {
    source = static_cast<int32_t>(sources_.size());
    sources_.push_back({segment, row_of_segment_[segment]});
  }
  return source;
}

int32_t Planner::source_of_row(int32_t r) {
  const StepRow& row = core_->step().rows[r];
  if (row.segment != kNone) return source_of_segment(row.segment);
  int32_t& source = source_of_row_[r];
  if (source < 0) {
    source = static_cast<int32_t>(sources_.size());
    sources_.push_back({kNone, r});
  }
  return source;
}

// Now that it is known which pages runs name: where they are in the plan.
void Planner::lay_out_pages() {
  if (request_.resident) return place_lists();
  int32_t next = 0;
  for (PageSource& source : sources_) {
    source.begin = next;
    next += std::max(0, source.end - source.first);
  }
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    if ((runs_[i].kind & kGather) != 0) continue;
    const PageSource& source = sources_[source_of_run_[i]];
    runs_[i].page_begin += source.begin - source.first;
  }
}

// Runs index the arena; the device is told of list entries that it does not have yet.
void Planner::place_lists() {
  PageArena& arena = core_->store().arena;
  const Step& step = core_->step();
  arena.begin_step(step.serial);
  for (PageSource& source : sources_) {
    if (source.end <= source.first) continue;
    const Segment* segment =
        source.segment == kNone ? nullptr : &core_->store().segments[source.segment];
    const StepRow* row = source.row < 0 ? nullptr : &step.rows[source.row];
    ArenaPlace& place = segment != nullptr ? segment->place : row->place;
    const auto held = segment == nullptr ? 0 : static_cast<int32_t>(segment->pages.size());
    const int32_t count = held + (row == nullptr ? 0 : row->pages_end - row->pages_begin);
    arena.fit(place, count);
    arena.tell(place, count, [&](int32_t i) {
      return i < held ? segment->pages[i] : step.pages[row->pages_begin + i - held];
    });
    source.begin = place.begin;
  }
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    if ((runs_[i].kind & kGather) == 0) runs_[i].page_begin += sources_[source_of_run_[i]].begin;
  }
}

// The pages that the source's runs name.
void Planner::append_pages(const PageSource& source, std::vector<int32_t>& out) const {
  int32_t at = source.first;
  if (source.segment != kNone) {
    const std::vector<int32_t>& pages = core_->store().segments[source.segment].pages;
    const int32_t end = std::min(source.end, static_cast<int32_t>(pages.size()));
    if (at < end) {
      out.insert(out.end(), pages.begin() + at, pages.begin() + end);
      at = end;
    }
    at -= static_cast<int32_t>(pages.size());
  }
  if (source.row < 0) return;
  const StepRow& row = core_->step().rows[source.row];
  const auto first = core_->step().pages.begin() + row.pages_begin;
  const int32_t end =
      source.end -
      (source.segment == kNone
           ? 0
           : static_cast<int32_t>(core_->store().segments[source.segment].pages.size()));
  if (at < end) out.insert(out.end(), first + at, first + end);
}

// The tokens of the block being emitted that see a group.
uint64_t Planner::mask_of(const Group& group) const {
  const auto block_begin = static_cast<int32_t>(block_first_ - all_tokens_.data());
  uint64_t mask = 0;
  for (const RowRange& rows : groups_.rows(group)) {
    const int32_t first = std::max(groups_.token_begin[rows.begin] - block_begin, 0);
    const int32_t last = std::min(groups_.token_begin[rows.end] - block_begin, block_count_);
    if (last > first) mask |= bits(first, last - first);
  }
  return mask;
}

void Planner::emit_block(const Block& block, const BlockChoice& choice) {
  block_first_ = all_tokens_.data() + block.token_begin;
  block_count_ = block.token_end - block.token_begin;
  const auto first_run = static_cast<int32_t>(runs_.size());
  items_.push_back({static_cast<int32_t>(blocks_.size()), first_run, first_run, -1});
  for (int32_t s = block.streams_begin; s < block.streams_end; ++s) {
    const int32_t g = choice.streams[s];
    const Group& group = groups_.groups[g];
    const uint64_t mask = mask_of(group);
    if (mask == 0) continue;
    for (const Piece& piece : groups_.pieces(group)) emit_piece(piece, mask);
    if (g >= static_cast<int32_t>(groups_.order.size())) continue;
    const Leaf& leaf = groups_.leaves[g];
    if (leaf.first_fresh >= 0) emit_fresh(g);
    if (leaf.own) emit_own(g);
  }
  if (runs_.size() == static_cast<std::size_t>(first_run)) {  // the window passed everything by
    items_.pop_back();
    return;
  }
  gather_short_runs(first_run);
  items_.back().run_end = static_cast<int32_t>(runs_.size());
  for (int32_t i = first_run; i < items_.back().run_end; ++i) {
    count_run(runs_[i]);
    if ((runs_[i].kind & kGather) == 0) name_pages(runs_[i], source_of_run_[i]);
  }
  add_block_tokens();
}

void Planner::add_block_tokens() {
  blocks_.push_back({static_cast<int32_t>(tokens_.size()), block_count_});
  for (int32_t t = 0; t < block_count_; ++t) {
    const Token& token = block_first_[t];
    const int32_t row = core_->step().rows[token.row].row_begin + token.index;
    tokens_.push_back(row);
    positions_.push_back(position(token));
    if (rotations_.empty()) continue;
    const auto num_tokens = static_cast<int32_t>(core_->step().positions.size());
    q_rows_.push_back(token.rotation < 0 ? row : num_tokens + token.rotation);
  }
}

void Planner::emit_piece(const Piece& piece, uint64_t mask) {
  const int32_t page_size = core_->page_size();
  push_run(
      {mask, piece.lo / page_size, piece.lo % page_size, piece.hi - piece.lo, 0, kFull, 0, 0, 0},
      source_of_segment(piece.segment), piece.first_position);
}

// A branch's new tokens up to the block's last of them: each sees those before it and itself.
void Planner::emit_own(int32_t order_index) {
  const int32_t r = groups_.order[order_index];
  const StepRow& row = core_->step().rows[r];
  const auto block_begin = static_cast<int32_t>(block_first_ - all_tokens_.data());
  const int32_t at = groups_.token_begin[order_index] - block_begin;  // bit of the branch's token 0
  const int32_t first = std::max(0, -at);
  const int32_t last = std::min(row.num_tokens, block_count_ - at);
  if (row.draft) return emit_draft(row, first, last - first, at + first);
  const int32_t page_size = core_->page_size();
  const PlanRun run{
      bits(at + first, last - first),
      row.first_slot / page_size,
      row.first_slot % page_size,
      last,
      0,
      last - first > 1 ? kDiagonal : kFull,
      1 - at,  // token `bit` is the branch's token bit - at, and sees bit - at + 1 slots
      0,
      0};
  push_run(run, source_of_row(r), core_->step().positions[row.row_begin]);
}

// The new tokens of other rows that a leaf watches.
void Planner::emit_fresh(int32_t order_index) {
  const Leaf& leaf = groups_.leaves[order_index];
  const auto block_begin = static_cast<int32_t>(block_first_ - all_tokens_.data());
  const int32_t at = groups_.token_begin[order_index] - block_begin;  // bit of the leaf's token 0
  const int32_t page_size = core_->page_size();
  for (int32_t f = leaf.first_fresh; f >= 0; f = groups_.fresh[f].next) {
    const FreshTokens& seen = groups_.fresh[f];
    const int32_t last = std::min(leaf.count, block_count_ - at);
    const int32_t first = std::max({0, -at, seen.in_place ? seen.lag : 0});
    const int32_t count = seen.in_place ? std::min(seen.count, last - seen.lag) : seen.count;
    if (first >= last || count <= 0) continue;
    const StepRow& row = core_->step().rows[seen.row];
    const bool diagonal = seen.in_place && first - seen.lag + 1 < count;
    const PlanRun run{bits(at + first, last - first),
                      row.first_slot / page_size,
                      row.first_slot % page_size,
                      count,
                      0,
                      diagonal ? kDiagonal : kFull,
                      1 - seen.lag - at,  // token `bit` sees bit - at - lag + 1 slots
                      0,
                      0};
    push_run(run, source_of_row(seen.row), core_->step().positions[row.row_begin]);
  }
}

// A draft token sees its ancestors in the draft and itself: one word per slot, the window worked
// in.
void Planner::emit_draft(const StepRow& row, int32_t first, int32_t count, int32_t bit) {
  const Step& step = core_->step();
  const auto words_begin = static_cast<int32_t>(words_.size());
  words_.resize(words_.size() + first + count, 0);
  const int64_t* positions = step.positions.data() + row.row_begin;
  for (int32_t t = 0; t < count; ++t) {
    for (int32_t j = first + t; j >= 0; j = step.parents[row.parents_begin + j]) {
      if (request_.window > 0 && positions[first + t] - positions[j] >= request_.window) break;
      words_[words_begin + j] |= uint64_t{1} << (bit + t);
    }
  }
  const int32_t page_size = core_->page_size();
  const int32_t r = block_first_[bit].row;
  add_run({bits(bit, count), row.first_slot / page_size, row.first_slot % page_size, first + count,
           static_cast<int32_t>(positions[0]), kPerSlot, 0, words_begin, 0},
          source_of_row(r));
}

// Adds a run to the item under construction, without the slots that its window hides from all
// tokens that see the run.
void Planner::push_run(PlanRun run, int32_t source, int64_t first_position) {
  if (request_.window > 0) {
    int64_t least = INT64_MAX;
    int64_t most = INT64_MIN;
    for (uint64_t mask = run.mask; mask != 0; mask &= mask - 1) {
      const int64_t p = position(block_first_[std::countr_zero(mask)]);
      least = std::min(least, p);
      most = std::max(most, p);
    }
    const int64_t dropped =
        std::clamp<int64_t>(least - request_.window + 1 - first_position, 0, run.num_slots);
    if (dropped == run.num_slots) return;
    const int64_t slot = run.first_slot + dropped;
    run.page_begin += static_cast<int32_t>(slot / core_->page_size());
    run.first_slot = static_cast<int32_t>(slot % core_->page_size());
    run.num_slots -= static_cast<int32_t>(dropped);
    run.diag -= static_cast<int32_t>(dropped);
    first_position += dropped;
    if (first_position <= most - request_.window) run.kind |= kWindow;
  }
  run.first_position = static_cast<int32_t>(first_position);
  if (!merge_run(run, source)) add_run(run, source);
}

void Planner::add_run(const PlanRun& run, int32_t source) {
  runs_.push_back(run);
  source_of_run_.push_back(source);
}

void Planner::name_pages(const PlanRun& run, int32_t source) {
  PageSource& pages = sources_[source];
  pages.first = std::min(pages.first, run.page_begin);
  pages.end = std::max(pages.end,
                       run.page_begin + (run.first_slot + run.num_slots + core_->page_size() - 1) /
                                            core_->page_size());
}

// Joins a run to the one before it where slots, positions and readers go on and the first is seen
// whole.
bool Planner::merge_run(const PlanRun& run, int32_t source) {
  if (runs_.size() == static_cast<std::size_t>(items_.back().run_begin)) return false;
  PlanRun& last = runs_.back();
  if ((last.kind & (kDiagonal | kPerSlot)) != 0 || last.mask != run.mask) return false;
  if (source_of_run_.back() != source) return false;
  const int64_t page_size = core_->page_size();
  const int64_t last_end = last.page_begin * page_size + last.first_slot + last.num_slots;
  if (last_end != run.page_begin * page_size + run.first_slot) return false;
  if (last.first_position + last.num_slots != run.first_position) return false;
  last.diag = run.diag + last.num_slots;
  last.num_slots += run.num_slots;
  last.kind |= run.kind;
  return true;
}

void Planner::count_run(const PlanRun& run) {
  counts_.read_slots += run.num_slots;
  counts_.executed_pairs += int64_t{block_count_} * run.num_slots;
  if (run.kind == kFull) {
    counts_.visible_pairs += int64_t{std::popcount(run.mask)} * run.num_slots;
    return;
  }
  if ((run.kind & (kPerSlot | kGather)) != 0) {
    counts_.visible_pairs += count_bits(words_.data() + run.words_begin, run.num_slots);
    return;
  }
  for (uint64_t mask = run.mask; mask != 0; mask &= mask - 1) {
    const int32_t t = std::countr_zero(mask);
    int64_t first = 0;
    int64_t end = run.num_slots;
    if ((run.kind & kDiagonal) != 0) end = std::min<int64_t>(end, run.diag + t);
    if ((run.kind & kWindow) != 0) {
      first = std::max<int64_t>(
          0, int64_t{position(block_first_[t])} - request_.window + 1 - run.first_position);
    }
    counts_.visible_pairs += std::max<int64_t>(0, end - first);
  }
}

void Planner::count_unique(const Groups& groups) {
  for (const Group& group : groups.groups) {
    const int64_t slots = group.slots - group.fresh;
    counts_.unique_slots += slots;
    int64_t tokens = 0;
    for (const RowRange& rows : groups.rows(group))
      tokens += groups.token_begin[rows.end] - groups.token_begin[rows.begin];
    counts_.tile_unique_slots += (tokens + max_tokens_ - 1) / max_tokens_ * slots;
  }
  if (!groups_.fresh.empty()) count_fresh();
}

// Watched new tokens are counted with those who wrote them; here for how many more see each.
void Planner::count_fresh() {
  const Step& step = core_->step();
  std::vector<int64_t> readers(step.positions.size(), 0);
  for (const Leaf& leaf : groups_.leaves) {
    for (int32_t f = leaf.first_fresh; f >= 0; f = groups_.fresh[f].next) {
      const FreshTokens& seen = groups_.fresh[f];
      for (int32_t j = 0; j < seen.count; ++j) {
        readers[step.rows[seen.row].row_begin + j] +=
            seen.in_place ? leaf.count - seen.lag - j : leaf.count;
      }
    }
  }
  for (const StepRow& row : step.rows) {
    const int64_t own = row.num_tokens;
    for (int32_t j = 0; j < row.num_tokens; ++j) {
      const int64_t all = own + readers[row.row_begin + j];
      counts_.tile_unique_slots +=
          (all + max_tokens_ - 1) / max_tokens_ - (own + max_tokens_ - 1) / max_tokens_;
    }
  }
}

}  // namespace fork_attn
