// Cutting items into spans of equal cost, merging, and writing the plan down.
#include <algorithm>
#include <cmath>

#include "planner.h"

namespace fork_attn {

namespace {

// Takes an item's slots from the front, cutting runs where need be.
struct RunCursor {
  const PlanRun* run;
  int64_t into;  // slots of `run` already taken
  int32_t page_size;

  void take(int64_t slots, std::vector<PlanRun>& out) {
    while (slots > 0) {
      if (into == 0 && slots >= run->num_slots) {
        out.push_back(*run);
        slots -= run->num_slots;
        ++run;
        continue;
      }
      PlanRun part = *run;
      const int64_t n = std::min<int64_t>(slots, part.num_slots - into);
      const int64_t slot = part.first_slot + into;
      const bool gathered = (part.kind & kGather) != 0;
      part.page_begin += static_cast<int32_t>(gathered ? into : slot / page_size);
      part.first_slot = gathered ? 0 : static_cast<int32_t>(slot % page_size);
      part.first_position += static_cast<int32_t>(into);
      part.diag -= static_cast<int32_t>(into);
      if ((part.kind & (kPerSlot | kGather)) != 0) part.words_begin += static_cast<int32_t>(into);
      part.num_slots = static_cast<int32_t>(n);
      out.push_back(part);
      slots -= n;
      into += n;
      if (into == run->num_slots) {
        ++run;
        into = 0;
      }
    }
  }
};

}  // namespace

// How many spans to cut one KV head's work into, so that spans x heads fill all workers evenly.
int64_t Planner::num_spans_for(double total) const {
  const int64_t heads = request_.shape.num_kv_heads;
  const int64_t workers = request_.workers;
  const int64_t wanted = std::max<int64_t>(1, workers * request_.target->spans_per_worker / heads);
  const double shortest =
      4.0 *
      request_.target->item_ns;  // a span that costs less than its fixed share is not worth it
  const int64_t limit = std::max<int64_t>(1, static_cast<int64_t>(total / shortest));
  constexpr double kGoodEnough = 1.0 / 1.05;
  int64_t best = 1;
  double best_fill = 0;
  for (int64_t n = 1; n <= std::min(limit, 4 * wanted + 4); ++n) {
    const int64_t units = n * heads;
    const int64_t rounds = (units + workers - 1) / workers;
    const double fill = static_cast<double>(units) / static_cast<double>(rounds * workers);
    const bool enough = best_fill >= kGoodEnough && best >= wanted;
    if (!enough && (fill > best_fill || n == wanted)) {
      best = n;
      best_fill = fill;
    }
  }
  return best;
}

// How much of an item goes into what is left of a span: whole tiles, or all of it. 0: too little to
// be worth a piece of its own.
int64_t Planner::piece_slots(int64_t left, double room, double ns_per_slot, bool first) const {
  const double tile = request_.target->tile_slots;
  room -= request_.target->item_ns;
  if (static_cast<double>(left) * ns_per_slot <= room) return left;
  const double tiles = std::floor(std::max(room, 0.0) / (ns_per_slot * tile));
  if (tiles < 1) return first ? std::min(left, static_cast<int64_t>(tile)) : 0;
  return static_cast<int64_t>(tiles * tile);
}

// Fills spans of at most `budget` with items of a chunk each, one after another: take(item, fold),
// where `fold` puts it into the item before it, and close(cost of the span). Gives up beyond `most`
// spans; returns how many.
template <class Take, class Close>
int64_t Planner::each_chunk(double budget, int64_t most, Take&& take, Close&& close) const {
  int64_t spans = 0;
  double used = 0;
  bool open = false;  // the last item began where its block's contexts do
  for (std::size_t i = 0; i < items_.size() && spans <= most; ++i) {
    const Load& load = loads_[i];
    const bool first = i == 0 || items_[i].block != items_[i - 1].block;
    const double work = static_cast<double>(load.slots) * load.ns_per_slot;
    const double begin = request_.target->item_ns + load.partials;
    bool fold = open && goes_on_[i] != 0;
    if (used > 0 && used + work + (fold ? 0 : begin) > budget) {
      close(used);
      ++spans;
      used = 0;
      fold = false;
    }
    take(i, fold);
    used += work + (fold ? 0 : begin);
    open = first || fold;
  }
  if (used > 0) {
    close(used);
    ++spans;
  }
  return spans;
}

// Spans of at most `budget` that the items fill one after another; more than `most`: any such
// number.
int64_t Planner::count_spans(double budget, int64_t most) const {
  if (request_.batch_invariant) {
    return std::max<int64_t>(1, each_chunk(budget, most, [](std::size_t, bool) {}, [](double) {}));
  }
  int64_t spans = 1;
  double used = 0;
  for (const Load& load : loads_) {
    for (int64_t left = load.slots; left > 0;) {
      const int64_t take = piece_slots(left, budget - used, load.ns_per_slot, used == 0);
      if (take == 0) {
        if (++spans > most) return spans;
        used = 0;
        continue;
      }
      used += request_.target->item_ns + static_cast<double>(take) * load.ns_per_slot;
      left -= take;
    }
  }
  return spans;
}

// The least budget that so many spans meet.
double Planner::span_budget(double total, int64_t num_spans) const {
  constexpr int kHalvings = 12;
  double low = total / static_cast<double>(num_spans);
  double high = low;
  while (count_spans(high, num_spans) > num_spans) {
    low = high;
    high *= 1.25;
  }
  for (int i = 0; i < kHalvings; ++i) {
    const double middle = 0.5 * (low + high);
    (count_spans(middle, num_spans) > num_spans ? low : high) = middle;
  }
  return high;
}

// What each item takes; returns the sum.
double Planner::weigh_items(const CostModel& costs) {
  double total = 0;
  loads_.clear();
  for (const PlanItem& item : items_) {
    const int64_t tokens = blocks_[item.block].num_tokens;
    int64_t slots = 0;
    for (int32_t r = item.run_begin; r < item.run_end; ++r) slots += runs_[r].num_slots;
    loads_.push_back({slots, costs.slot(tokens), costs.partials(tokens)});
    total += costs.item(tokens, slots);
  }
  return total;
}

// Spans of whole chunks. Where cuts may fall depends on contexts alone: an item holds one chunk, or
// several from the first one on, whose results it folds in the order of merging.
void Planner::share_out_chunks(const CostModel& costs) {
  const double total = weigh_items(costs);
  const double budget = span_budget(total, num_spans_for(total));
  std::vector<PlanItem> items;
  spans_.assign(1, 0);
  span_ns_.clear();
  const auto take = [&](std::size_t i, bool fold) {
    if (fold) {
      items.back().run_end = items_[i].run_end;
    } else {
      items.push_back(items_[i]);
    }
  };
  each_chunk(budget, INT64_MAX, take, [&](double used) {
    spans_.push_back(static_cast<int32_t>(items.size()));
    span_ns_.push_back(used);
  });
  items_.swap(items);
}

void Planner::cut_into_spans(const CostModel& costs) {
  const double total = weigh_items(costs);
  const double budget = span_budget(total, num_spans_for(total));

  std::vector<PlanItem>& items = uncut_items_;
  std::vector<PlanRun>& runs = uncut_runs_;
  items.swap(items_);
  runs.swap(runs_);
  items_.clear();
  runs_.clear();
  spans_.assign(1, 0);
  span_ns_.clear();
  double used = 0;
  const auto close_span = [&] {
    spans_.push_back(static_cast<int32_t>(items_.size()));
    span_ns_.push_back(used);
    used = 0;
  };
  for (std::size_t i = 0; i < items.size(); ++i) {
    const Load& load = loads_[i];
    RunCursor cursor{runs.data() + items[i].run_begin, 0, core_->page_size()};
    for (int64_t left = load.slots; left > 0;) {
      const int64_t take = piece_slots(left, budget - used, load.ns_per_slot, used == 0);
      if (take == 0) {
        close_span();
        continue;
      }
      const auto first_run = static_cast<int32_t>(runs_.size());
      cursor.take(take, runs_);
      items_.push_back({items[i].block, first_run, static_cast<int32_t>(runs_.size()), -1});
      used += request_.target->item_ns + static_cast<double>(take) * load.ns_per_slot;
      left -= take;
    }
  }
  if (used > 0) close_span();
}

void Planner::assign_partials() {
  const std::size_t num_tokens = core_->step().positions.size();
  merge_indptr_.assign(num_tokens + 1, 0);
  for (const PlanItem& item : items_) {
    const PlanBlock& b = blocks_[item.block];
    for (int32_t t = 0; t < b.num_tokens; ++t) ++merge_indptr_[tokens_[b.token_begin + t] + 1];
  }
  int32_t next = 0;
  for (PlanItem& item : items_) {
    const PlanBlock& b = blocks_[item.block];
    bool shared = false;
    for (int32_t t = 0; t < b.num_tokens; ++t)
      shared |= merge_indptr_[tokens_[b.token_begin + t] + 1] > 1;
    item.partial_begin = shared ? next : -1;
    if (shared) next += b.num_tokens;
  }
  for (const PlanItem& item : items_) {
    if (item.partial_begin >= 0) continue;
    const PlanBlock& b = blocks_[item.block];
    for (int32_t t = 0; t < b.num_tokens; ++t) merge_indptr_[tokens_[b.token_begin + t] + 1] = 0;
  }
  counts_.num_partial_rows = next;
  for (std::size_t t = 0; t < num_tokens; ++t) merge_indptr_[t + 1] += merge_indptr_[t];
  merge_rows_.assign(merge_indptr_[num_tokens], 0);
  std::vector<int32_t> at(merge_indptr_.begin(), merge_indptr_.end() - 1);
  for (const PlanItem& item : items_) {
    if (item.partial_begin < 0) continue;
    const PlanBlock& b = blocks_[item.block];
    for (int32_t t = 0; t < b.num_tokens; ++t) {
      merge_rows_[at[tokens_[b.token_begin + t]]++] = item.partial_begin + t;
    }
  }
}

namespace {

class Writer {
 public:
  explicit Writer(std::vector<int64_t>& buffer) : buffer_(buffer) {}
  template <class T>
  int32_t section(const std::vector<T>& data) {
    const auto offset = static_cast<int32_t>(buffer_.size());
    const std::size_t bytes = data.size() * sizeof(T);
    buffer_.resize(buffer_.size() + (bytes + 7) / 8, 0);
    if (bytes != 0)
      std::copy_n(reinterpret_cast<const char*>(data.data()), bytes,
                  reinterpret_cast<char*>(buffer_.data() + offset));
    return offset;
  }

 private:
  std::vector<int64_t>& buffer_;
};

}  // namespace

void Planner::serialise(PlanData& out) const {
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.version = kPlanVersion;
  h.num_tokens = static_cast<int32_t>(core_->step().positions.size());
  h.num_blocks = static_cast<int32_t>(blocks_.size());
  h.num_block_tokens = static_cast<int32_t>(tokens_.size());
  h.num_items = static_cast<int32_t>(items_.size());
  h.num_runs = static_cast<int32_t>(runs_.size());
  if (!request_.resident) {
    for (const PageSource& source : sources_) h.num_pages += std::max(0, source.end - source.first);
  }
  h.num_words = static_cast<int32_t>(words_.size());
  h.num_partial_rows = static_cast<int32_t>(counts_.num_partial_rows);
  h.num_merge_rows = static_cast<int32_t>(merge_rows_.size());
  h.group = request_.shape.group;
  h.page_size = core_->page_size();
  h.window = request_.window;
  h.page_limit = core_->store().pages.limit();
  h.tile_slots = request_.batch_invariant ? request_.target->tile_slots : 0;
  for (const PlanBlock& b : blocks_) {
    h.max_block_tokens = std::max(h.max_block_tokens, b.num_tokens);
    int32_t merged = 0;
    for (int32_t t = 0; t < b.num_tokens; ++t) {
      const int32_t row = tokens_[b.token_begin + t];
      merged += merge_indptr_[row + 1] - merge_indptr_[row];
    }
    h.max_merge_rows = std::max(h.max_merge_rows, merged);
  }

  std::vector<int32_t> pages;
  pages.reserve(h.num_pages);
  if (!request_.resident) {
    for (const PageSource& source : sources_) append_pages(source, pages);
  }
  const std::size_t bytes =
      blocks_.size() * sizeof(PlanBlock) + items_.size() * sizeof(PlanItem) +
      runs_.size() * sizeof(PlanRun) + words_.size() * sizeof(uint64_t) +
      rotations_.size() * sizeof(PlanRotation) +
      (tokens_.size() + q_rows_.size() + positions_.size() + pages.size() + spans_.size() +
       merge_indptr_.size() + merge_rows_.size() + gather_.size()) *
          sizeof(int32_t);
  out.buffer.reserve((sizeof(PlanHeader) + bytes) / 8 + 16);  // 16: sections end on whole words
  out.buffer.assign(sizeof(PlanHeader) / 8, 0);
  Writer writer(out.buffer);
  h.off_blocks = writer.section(blocks_);
  h.off_tokens = writer.section(tokens_);
  h.off_q_rows = rotations_.empty() ? h.off_tokens : writer.section(q_rows_);
  h.off_positions = writer.section(positions_);
  h.off_items = writer.section(items_);
  h.off_runs = writer.section(runs_);
  h.off_pages = writer.section(pages);
  h.off_words = writer.section(words_);
  h.num_spans = static_cast<int32_t>(spans_.size()) - 1;
  h.off_spans = writer.section(spans_);
  h.off_merge_indptr = writer.section(merge_indptr_);
  h.off_merge_rows = writer.section(merge_rows_);
  h.num_rotations = static_cast<int32_t>(rotations_.size());
  h.off_rotations = writer.section(rotations_);
  h.num_gather = static_cast<int32_t>(gather_.size());
  h.off_gather = writer.section(gather_);
  h.total_words = static_cast<int32_t>(out.buffer.size());
  std::copy_n(reinterpret_cast<const char*>(&h), sizeof(h),
              reinterpret_cast<char*>(out.buffer.data()));
}

}  // namespace fork_attn
