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
      PlanRun part = *run;
      const int64_t n = std::min<int64_t>(slots, part.num_slots - into);
      const int64_t slot = part.first_slot + into;
      part.page_begin += static_cast<int32_t>(slot / page_size);
      part.first_slot = static_cast<int32_t>(slot % page_size);
      part.first_position += static_cast<int32_t>(into);
      part.diag -= static_cast<int32_t>(into);
      if ((part.kind & kPerSlot) != 0) part.words_begin += static_cast<int32_t>(into);
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

void Planner::cut_into_spans() {
  const CostModel costs(*request_.target, request_.shape);
  const auto slots_of = [](const std::vector<PlanRun>& runs, const PlanItem& item) {
    int64_t slots = 0;
    for (int32_t r = item.run_begin; r < item.run_end; ++r) slots += runs[r].num_slots;
    return slots;
  };
  double total = 0;
  for (const PlanItem& item : items_)
    total += costs.item(blocks_[item.block].num_tokens, slots_of(runs_, item));
  const int64_t num_spans = num_spans_for(total);
  total +=
      static_cast<double>(num_spans - 1) * request_.target->item_ns;  // a cut makes one item more
  const double span = total / static_cast<double>(num_spans);
  const double tile = request_.target->tile_slots;

  std::vector<PlanItem> items;
  std::vector<PlanRun> runs;
  items.swap(items_);
  runs.swap(runs_);
  spans_.assign(1, 0);
  span_ns_.clear();
  double done = 0;
  double closed = 0;
  for (const PlanItem& item : items) {
    const double ns_per_slot = costs.slot(blocks_[item.block].num_tokens);
    RunCursor cursor{runs.data() + item.run_begin, 0, core_->page_size()};
    for (int64_t left = slots_of(runs, item); left > 0;) {
      const auto spans_closed = static_cast<double>(span_ns_.size());
      const bool last_span = static_cast<int64_t>(span_ns_.size()) + 1 >= num_spans;
      done += request_.target->item_ns;
      int64_t take = left;
      if (!last_span) {  // whole tiles up to the end of the span, and no slivers
        const double room = ((spans_closed + 1) * span - done) / ns_per_slot;
        take = std::min(left, static_cast<int64_t>(std::max(1.0, std::round(room / tile)) * tile));
        if (left - take < static_cast<int64_t>(tile)) take = left;
      }
      const auto first_run = static_cast<int32_t>(runs_.size());
      cursor.take(take, runs_);
      items_.push_back({item.block, first_run, static_cast<int32_t>(runs_.size()), -1});
      done += static_cast<double>(take) * ns_per_slot;
      left -= take;
      if (last_span || done + 0.5 * tile * ns_per_slot < (spans_closed + 1) * span) continue;
      spans_.push_back(static_cast<int32_t>(items_.size()));
      span_ns_.push_back(done - closed);
      closed = done;
    }
  }
  if (spans_.back() == static_cast<int32_t>(items_.size())) return;
  spans_.push_back(static_cast<int32_t>(items_.size()));
  span_ns_.push_back(done - closed);
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
  h.num_pages = static_cast<int32_t>(pages_.size());
  h.num_words = static_cast<int32_t>(words_.size());
  h.num_partial_rows = static_cast<int32_t>(counts_.num_partial_rows);
  h.num_merge_rows = static_cast<int32_t>(merge_rows_.size());
  h.group = request_.shape.group;
  h.page_size = core_->page_size();
  h.window = request_.window;
  h.page_limit = pages_.empty() ? 0 : 1 + *std::max_element(pages_.begin(), pages_.end());
  for (const PlanBlock& b : blocks_)
    h.max_block_tokens = std::max(h.max_block_tokens, b.num_tokens);

  out.buffer.assign(sizeof(PlanHeader) / 8, 0);
  Writer writer(out.buffer);
  h.off_blocks = writer.section(blocks_);
  h.off_tokens = writer.section(tokens_);
  h.off_positions = writer.section(positions_);
  h.off_items = writer.section(items_);
  h.off_runs = writer.section(runs_);
  h.off_pages = writer.section(pages_);
  h.off_words = writer.section(words_);
  h.num_spans = static_cast<int32_t>(spans_.size()) - 1;
  h.off_spans = writer.section(spans_);
  h.off_merge_indptr = writer.section(merge_indptr_);
  h.off_merge_rows = writer.section(merge_rows_);
  h.total_words = static_cast<int32_t>(out.buffer.size());
  std::copy_n(reinterpret_cast<const char*>(&h), sizeof(h),
              reinterpret_cast<char*>(out.buffer.data()));
}

}  // namespace fork_attn
