// The planner's second half: groups of rows become row blocks, items and runs.
#include <algorithm>
#include <bit>
#include <climits>

#include "planner.h"

namespace fork_attn {

namespace {

uint64_t full_mask(std::size_t num_tokens) {
  return num_tokens >= 64 ? ~uint64_t{0} : (uint64_t{1} << num_tokens) - 1;
}

}  // namespace

int32_t Planner::query_row(const Token& token) const {
  return core_->step().rows[token.row].row_begin + token.index;
}

int32_t Planner::position(const Token& token) const {
  return static_cast<int32_t>(core_->step().positions[query_row(token)]);
}

int32_t Planner::segment_pages(Index segment) {
  int32_t& begin = pages_of_segment_[segment];
  if (begin >= 0) return begin;
  begin = static_cast<int32_t>(pages_.size());
  for (const int32_t page : core_->store().segments[segment].pages)
    pages_.push_back(std::max(page, 0));
  if (row_of_segment_[segment] >= 0) {  // the pages that this step adds follow at once
    const StepRow& row = core_->step().rows[row_of_segment_[segment]];
    const auto first = core_->step().pages.begin();
    pages_.insert(pages_.end(), first + row.pages_begin, first + row.pages_end);
  }
  return begin;
}

int32_t Planner::row_pages(int32_t r) {
  const StepRow& row = core_->step().rows[r];
  if (row.segment != kNone) return segment_pages(row.segment);
  int32_t& begin = pages_of_row_[r];
  if (begin >= 0) return begin;
  begin = static_cast<int32_t>(pages_.size());
  const auto first = core_->step().pages.begin();
  pages_.insert(pages_.end(), first + row.pages_begin, first + row.pages_end);
  return begin;
}

void Planner::emit_groups() {
  const Step& step = core_->step();
  for (std::size_t r = 0; r < order_.size(); ++r) {  // every row sees its own new tokens
    group_of({{static_cast<int32_t>(r), static_cast<int32_t>(r) + 1}});
  }
  for (Group& group : groups_) {
    std::sort(group.pieces.begin(), group.pieces.end(), [](const Piece& a, const Piece& b) {
      return a.rank != b.rank ? a.rank < b.rank : a.lo < b.lo;
    });
  }
  // Ancestors first, so that partials merge in context order.
  std::vector<const Group*> groups;
  for (const Group& group : groups_) groups.push_back(&group);
  std::stable_sort(groups.begin(), groups.end(), [](const Group* a, const Group* b) {
    const auto width = [](const Group* g) { return g->rows.back().end - g->rows.front().begin; };
    return width(a) > width(b);
  });

  const auto block_tokens =
      static_cast<std::size_t>(std::clamp(request_.max_rows / request_.group, 1, kMaxBlockTokens));
  Tokens tokens;
  std::vector<int64_t> least_dropped;
  for (const Group* group : groups) {
    least_dropped.assign(group->pieces.size() + 1, INT64_MAX);
    tokens.clear();
    for (const Interval& rows : group->rows) {
      for (int32_t k = rows.begin; k < rows.end; ++k) {
        const int32_t r = order_[k];
        for (int32_t t = 0; t < step.rows[r].num_tokens; ++t) {
          tokens.push_back({r, t});
          if (tokens.size() < block_tokens) continue;
          emit_block(*group, tokens, least_dropped);
          tokens.clear();
        }
      }
    }
    if (!tokens.empty()) emit_block(*group, tokens, least_dropped);
    for (std::size_t p = 0; p < group->pieces.size(); ++p) {
      counts_.unique_slots += group->pieces[p].hi - group->pieces[p].lo - least_dropped[p];
    }
  }
  for (const StepRow& row : step.rows) counts_.unique_slots += row.num_tokens;
}

void Planner::emit_block(const Group& group, const Tokens& tokens,
                         std::vector<int64_t>& least_dropped) {
  const auto first_run = static_cast<int32_t>(runs_.size());
  min_position_ = INT32_MAX;
  max_position_ = INT32_MIN;
  for (const Token& token : tokens) {
    min_position_ = std::min(min_position_, position(token));
    max_position_ = std::max(max_position_, position(token));
  }
  items_.push_back({static_cast<int32_t>(blocks_.size()), first_run, first_run, -1});
  item_pairs_.push_back(0);
  const int32_t page_size = core_->page_size();
  for (std::size_t p = 0; p < group.pieces.size(); ++p) {
    const Piece& piece = group.pieces[p];
    const int32_t begin = segment_pages(piece.segment);
    PlanRun run{full_mask(tokens.size()),
                begin + piece.lo / page_size,
                piece.lo % page_size,
                piece.hi - piece.lo,
                0,
                kFull,
                0,
                0,
                0};
    least_dropped[p] = std::min(least_dropped[p], push_run(run, piece.first_position));
  }
  if (group.rows.size() == 1 && group.rows[0].end == group.rows[0].begin + 1) {
    const StepRow& row = core_->step().rows[tokens[0].row];
    row.draft ? emit_draft(row, tokens) : emit_own(row, tokens);
  }
  if (runs_.size() == static_cast<std::size_t>(first_run)) {  // the window passed everything by
    items_.pop_back();
    item_pairs_.pop_back();
    return;
  }
  items_.back().run_end = static_cast<int32_t>(runs_.size());
  for (int32_t i = first_run; i < items_.back().run_end; ++i) count_run(runs_[i], tokens);
  blocks_.push_back({static_cast<int32_t>(tokens_.size()), static_cast<int32_t>(tokens.size())});
  for (const Token& token : tokens) {
    tokens_.push_back(query_row(token));
    positions_.push_back(position(token));
  }
}

// The branch's new tokens up to the block's last: token t sees those before it and itself.
void Planner::emit_own(const StepRow& row, const Tokens& tokens) {
  const int32_t begin = row_pages(tokens[0].row);
  const int32_t first = tokens.front().index;
  const int32_t last = tokens.back().index;
  const int32_t page_size = core_->page_size();
  PlanRun run{full_mask(tokens.size()),
              begin + row.first_slot / page_size,
              row.first_slot % page_size,
              last + 1,
              0,
              last > first ? kDiagonal : kFull,
              first + 1,
              0,
              0};
  push_run(run, core_->step().positions[row.row_begin]);
}

// A draft token sees its ancestors in the draft and itself: one word per slot, the window worked
// in.
void Planner::emit_draft(const StepRow& row, const Tokens& tokens) {
  const Step& step = core_->step();
  const auto words_begin = static_cast<int32_t>(words_.size());
  words_.resize(words_.size() + row.num_tokens, 0);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    for (int32_t j = tokens[t].index; j >= 0; j = step.parents[row.parents_begin + j]) {
      const int64_t distance = position(tokens[t]) - step.positions[row.row_begin + j];
      if (request_.window > 0 && distance >= request_.window) break;
      words_[words_begin + j] |= uint64_t{1} << t;
    }
  }
  const int32_t page_size = core_->page_size();
  PlanRun run{full_mask(tokens.size()),
              row_pages(tokens[0].row) + row.first_slot / page_size,
              row.first_slot % page_size,
              tokens.back().index + 1,
              static_cast<int32_t>(step.positions[row.row_begin]),
              kPerSlot,
              0,
              words_begin,
              0};
  counts_.tile_unique_slots += run.num_slots;
  runs_.push_back(run);
}

// Adds a run to the item under construction, without the slots that its window hides from every
// token of the block. Returns how many slots those were.
int64_t Planner::push_run(PlanRun run, int64_t first_position) {
  int64_t dropped = 0;
  if (request_.window > 0) {
    const int64_t first_visible = static_cast<int64_t>(min_position_) - request_.window + 1;
    dropped = std::clamp<int64_t>(first_visible - first_position, 0, run.num_slots);
    if (dropped == run.num_slots) return dropped;
    const int64_t slot = run.first_slot + dropped;
    run.page_begin += static_cast<int32_t>(slot / core_->page_size());
    run.first_slot = static_cast<int32_t>(slot % core_->page_size());
    run.num_slots -= static_cast<int32_t>(dropped);
    run.diag -= static_cast<int32_t>(dropped);
    first_position += dropped;
    if (first_position <= static_cast<int64_t>(max_position_) - request_.window)
      run.kind |= kWindow;
  }
  run.first_position = static_cast<int32_t>(first_position);
  counts_.tile_unique_slots += run.num_slots;
  if (!merge_run(run)) runs_.push_back(run);
  return dropped;
}

// Joins a run to the one before it where slots and positions go on and the first is seen whole.
bool Planner::merge_run(const PlanRun& run) {
  if (runs_.size() == static_cast<std::size_t>(items_.back().run_begin)) return false;
  PlanRun& last = runs_.back();
  if ((last.kind & (kDiagonal | kPerSlot)) != 0) return false;
  const int64_t page_size = core_->page_size();
  const int64_t last_end = last.page_begin * page_size + last.first_slot + last.num_slots;
  if (last_end != run.page_begin * page_size + run.first_slot) return false;
  if (last.first_position + last.num_slots != run.first_position) return false;
  last.diag = run.diag + last.num_slots;
  last.num_slots += run.num_slots;
  last.kind |= run.kind;
  return true;
}

void Planner::count_run(const PlanRun& run, const Tokens& tokens) {
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  counts_.read_slots += run.num_slots;
  counts_.executed_pairs += num_tokens * run.num_slots;
  item_pairs_.back() += num_tokens * run.num_slots;
  if (run.kind == kFull) {
    counts_.visible_pairs += num_tokens * run.num_slots;
    return;
  }
  if ((run.kind & kPerSlot) != 0) {
    for (int32_t j = 0; j < run.num_slots; ++j)
      counts_.visible_pairs += std::popcount(words_[run.words_begin + j]);
    return;
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    int64_t first = 0;
    int64_t end = run.num_slots;
    if ((run.kind & kDiagonal) != 0) end = std::min<int64_t>(end, run.diag + t);
    if ((run.kind & kWindow) != 0) {
      first = std::max<int64_t>(
          0, int64_t{position(tokens[t])} - request_.window + 1 - run.first_position);
    }
    counts_.visible_pairs += std::max<int64_t>(0, end - first);
  }
}

}  // namespace fork_attn
