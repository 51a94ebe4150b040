// Short runs share tiles: a GPU computes whole tiles, and begins each run on one.
#include <algorithm>
#include <bit>

#include "planner.h"

namespace fork_attn {

namespace {

// Slots listed in a plan that is sent to a device every step: 12 bytes each, and the upload stays
// below 64 KiB.
constexpr std::size_t kMostGathered = 1792;

}  // namespace

// Page `at` of a source; see append_pages.
int32_t Planner::physical_page(const PageSource& source, int32_t at) const {
  if (source.segment != kNone) {
    const std::vector<int32_t>& pages = core_->store().segments[source.segment].pages;
    if (at < static_cast<int32_t>(pages.size())) return pages[at];
    at -= static_cast<int32_t>(pages.size());
  }
  return core_->step().pages[core_->step().rows[source.row].pages_begin + at];
}

// The tokens of the block being emitted that see slot j of a run.
uint64_t Planner::visibility(const PlanRun& run, int32_t j) const {
  uint64_t word = run.mask;
  if ((run.kind & kPerSlot) != 0) word &= words_[run.words_begin + j];
  const bool diagonal = (run.kind & kDiagonal) != 0;
  const bool windowed = (run.kind & kWindow) != 0;
  if (!diagonal && !windowed) return word;
  const int64_t newest = int64_t{run.first_position} + j + request_.window;
  for (uint64_t rest = word; rest != 0; rest &= rest - 1) {
    const int t = std::countr_zero(rest);
    const bool seen = (!diagonal || j < run.diag + t) &&
                      (!windowed || int64_t{position(block_first_[t])} < newest);
    if (!seen) word &= ~(uint64_t{1} << t);
  }
  return word;
}

// Appends the slots of a run from `from` on that some token sees, page by page.
void Planner::gather_slots(const PlanRun& run, int32_t source, int32_t from) {
  const int32_t page_size = core_->page_size();
  const bool all_see_all = run.kind == kFull;
  for (int32_t j = from; j < run.num_slots;) {
    const int32_t at = (run.first_slot + j) / page_size;
    const int32_t in_page = run.first_slot + j - at * page_size;
    const int32_t count = std::min(run.num_slots - j, page_size - in_page);
    const int32_t first =
        physical_page(sources_[source], run.page_begin + at) * page_size + in_page;
    for (int32_t k = 0; k < count; ++k) {
      const uint64_t word = all_see_all ? run.mask : visibility(run, j + k);
      if (word == 0) continue;
      gather_.push_back(first + k);
      words_.push_back(word);
    }
    j += count;
  }
}

// Of the item being emitted: what each run has beyond whole tiles goes, if it is short, to one run
// at the item's end that lists its slots. One such piece alone stays where it is.
void Planner::gather_short_runs(int32_t first_run) {
  const int32_t tile = request_.target->tile_slots;
  const int32_t most = request_.target->gather_slots;
  const auto is_short = [&](const PlanRun& run) {
    const int32_t rest = run.num_slots % tile;
    return rest != 0 && rest <= most;
  };
  std::size_t pieces = 0;
  std::size_t slots = 0;
  for (auto run = runs_.begin() + first_run; run != runs_.end(); ++run) {
    if (!is_short(*run)) continue;
    ++pieces;
    slots += run->num_slots % tile;
  }
  if (pieces < 2 || (request_.resident && gather_.size() + slots > kMostGathered)) return;
  const auto words_begin = static_cast<int32_t>(words_.size());
  const auto gather_begin = static_cast<int32_t>(gather_.size());
  auto kept = static_cast<std::size_t>(first_run);
  for (auto i = static_cast<std::size_t>(first_run); i < runs_.size(); ++i) {
    PlanRun run = runs_[i];
    if (is_short(run)) {
      const int32_t whole = run.num_slots / tile * tile;
      gather_slots(run, source_of_run_[i], whole);
      run.num_slots = whole;
      if (whole == 0) continue;
    }
    source_of_run_[kept] = source_of_run_[i];
    runs_[kept++] = run;
  }
  runs_.resize(kept);
  source_of_run_.resize(kept);
  uint64_t mask = 0;
  for (std::size_t w = words_begin; w < words_.size(); ++w) mask |= words_[w];
  const auto count = static_cast<int32_t>(gather_.size()) - gather_begin;
  if (count == 0) return;
  runs_.push_back({mask, gather_begin, 0, count, 0, kGather, 0, words_begin, 0});
  source_of_run_.push_back(-1);
}

}  // namespace fork_attn
