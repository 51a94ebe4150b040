// The core beside its oracle, and a memory of token ids in place of K and V. Every verb runs on
// both; `compare` then finds any difference that a branch could see.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core_model.h"

namespace fork_attn::test {

constexpr uint64_t kPoison = ~uint64_t{0};  // stands in slots of free pages

inline std::string& context_of_failure() {
  static std::string text;
  return text;
}

[[noreturn]] inline void die(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n  in %s\n", file, line, what.c_str(),
               context_of_failure().c_str());
  std::exit(1);
}

#define EXPECT(condition)                                             \
  do {                                                                \
    if (!(condition)) die(__FILE__, __LINE__, "not so: " #condition); \
  } while (false)

#define EXPECT_EQ(got, want)                                                           \
  do {                                                                                 \
    const auto got_ = (got);                                                           \
    const auto want_ = (want);                                                         \
    if (!(got_ == want_))                                                              \
      die(__FILE__, __LINE__,                                                          \
          #got " is " + std::to_string(got_) + ", expected " + std::to_string(want_)); \
  } while (false)

struct RowPlan {  // what one branch does in a step
  Handle branch;
  int64_t num_tokens;
  bool draft = false;
  std::vector<int32_t> parents = {};
  std::optional<std::vector<int32_t>> path = std::nullopt;  // accepted; none: nobody accepts
};

class World {
 public:
  World(int32_t num_pages, int32_t page_size, TailPolicy tail)
      : core(num_pages, page_size, tail),
        memory(static_cast<std::size_t>(num_pages) * page_size, kPoison) {}
  virtual ~World() = default;

  CacheCore core;
  Model model;
  std::vector<uint64_t> memory;
  std::vector<int64_t> epochs;                         // closed, and their pages still pending
  std::map<int32_t, std::vector<uint64_t>> in_flight;  // what other streams read in pending pages
  bool deferring = false;
  int64_t allocating = 0;  // steps that asked for pages, and how many of them got none
  int64_t out_of_pages = 0;

  // Runs a verb of the core. An error must leave no trace; its kind is returned.
  std::optional<ErrorKind> attempt(const char* verb, const std::function<void()>& call) {
    const uint64_t before = core.digest();
    try {
      invoke(verb, call);
      return std::nullopt;
    } catch (const Error& e) {
      if (core.digest() != before) die(__FILE__, __LINE__, std::string("changed by: ") + e.what());
      EXPECT(e.what()[0] != '\0');
      last_error = e;
      return e.kind;
    }
  }

  void expect(const char* verb, std::optional<ErrorKind> want, const std::function<void()>& call,
              const std::function<void()>& then) {
    const std::optional<ErrorKind> got = attempt(verb, call);
    if (got != want) {
      die(__FILE__, __LINE__,
          std::string(verb) + ": error " + (got ? last_error->what() : "none") +
              ", expected kind " + (want ? std::to_string(static_cast<int>(*want)) : "none"));
    }
    if (!got) then();
  }

  // Opens a step, writes ids into its slots, and closes it. False if the pool could not hold it.
  bool step(const std::vector<RowPlan>& rows, bool commit, const std::function<void()>& inside) {
    std::vector<StepRequest> requests;
    for (const RowPlan& r : rows) {
      requests.push_back({r.branch, r.num_tokens, r.draft ? r.parents.data() : nullptr});
    }
    const uint64_t before = core.digest();
    ++allocating;
    if (const auto error = attempt("step", [&] { core.open_step(requests); })) {
      if (*error == ErrorKind::kValue) {
        EXPECT(is_far(rows));
        return false;
      }
      EXPECT(*error == ErrorKind::kOutOfPages);
      ++out_of_pages;
      check_shortage(rows);
      return false;
    }
    check_open_step(rows);
    for (const PageCopy& copy : core.step().copies) {
      std::copy_n(&memory[static_cast<std::size_t>(copy.src_page) * core.page_size()],
                  core.page_size(),
                  &memory[static_cast<std::size_t>(copy.dst_page) * core.page_size()]);
    }
    const uint64_t first_id = next_id_;
    for (const int64_t slot : core.step().slot_mapping) memory[slot] = next_id_++;
    inside();
    if (!commit) {
      core.rollback_step();
      EXPECT(deferring || core.digest() == before);  // pending pages are not free
      return true;
    }
    close_step(rows, first_id);
    return true;
  }

  // The slots that a join copies; nothing has changed yet.
  void copy(const std::vector<RotatedCopy>& copies) {
    for (const RotatedCopy& c : copies) {
      EXPECT(!core.store().pages.live(static_cast<int32_t>(c.dst_slot / core.page_size())));
      EXPECT(c.shift != 0);
      memory[c.dst_slot] = memory[c.src_slot];
    }
  }

  // Whether the pool holds the copies of a join.
  bool fits(Handle h, const std::vector<Handle>& children) const {
    int64_t end = 0;
    int64_t needed = 0;
    int64_t next = -1;
    int64_t length = 0;
    for (const Token& t : model.laid(h, children, Rebase::kShift, end)) {
      if (!t.shifted()) {
        next = -1;
        continue;
      }
      if (t.position != next) length = 0;
      if (length++ % core.page_size() == 0) ++needed;
      next = t.position + 1;
    }
    return needed <= core.stats().pages_free;
  }

  // Whether some row has positions so large that a shift may take them beyond 32 bits.
  bool is_far(const std::vector<RowPlan>& rows) const {
    for (const RowPlan& r : rows) {
      const ModelBranch& b = model.branches.at(r.branch);
      if (b.position > kMaxLength / 4) return true;
      for (const Token& t : model.view(r.branch)) {
        if (std::max(t.position, t.written) > kMaxLength / 4) return true;
      }
    }
    return false;
  }

  // Another stream is announced: what is freed from now on waits.
  void announce() {
    deferring = true;
    expect("defer_frees", std::nullopt, [&] { core.defer_frees(); }, [] {});
  }

  void close_epoch() {
    const int64_t epoch = core.close_epoch();
    if (epoch != 0) epochs.push_back(epoch);
    EXPECT_EQ(core.close_epoch(), 0);
  }

  // The other streams finish with the i-th closed epoch: they read what was there when it was
  // freed.
  void end_epoch(std::size_t i) {
    const int64_t epoch = epochs[i];
    epochs.erase(epochs.begin() + static_cast<std::ptrdiff_t>(i));
    std::vector<int32_t> pages;
    for (const PendingPage& p : core.store().pages.pending()) {
      if (p.epoch == epoch) pages.push_back(p.page);
    }
    EXPECT(!pages.empty());
    const int64_t free = core.stats().pages_free;
    core.end_epoch(epoch);
    EXPECT_EQ(core.stats().pages_free, free + static_cast<int64_t>(pages.size()));
    for (const int32_t page : pages) {
      EXPECT(bytes_of(page) == in_flight.at(page));
      in_flight.erase(page);
    }
  }

  void compare() {
    core.check();
    for (const PendingPage& p : core.store().pages.pending()) {
      in_flight.try_emplace(p.page, bytes_of(p.page));
    }
    EXPECT_EQ(core.stats().pages_pending, static_cast<int64_t>(in_flight.size()));
    std::map<int64_t, int> readers;  // of each page
    EXPECT_EQ(core.stats().branches, static_cast<int64_t>(model.branches.size()));
    for (const auto& [h, want] : model.branches) compare_branch(h, want, readers);
    const CoreStats stats = core.stats();
    EXPECT_EQ(stats.pages_live, static_cast<int64_t>(readers.size()));
    EXPECT_EQ(stats.pages_free + stats.pages_live + stats.pages_pending, stats.pages_total);
    int64_t shared = 0;
    for (const auto& [page, count] : readers) shared += count > 1;
    EXPECT_EQ(stats.pages_shared, shared);
    for (const int32_t page : core.store().pages.free_list()) {
      std::fill_n(&memory[static_cast<std::size_t>(page) * core.page_size()], core.page_size(),
                  kPoison);
    }
  }

 protected:
  virtual void invoke(const char* verb, const std::function<void()>& call) {
    (void)verb;
    call();
  }

  std::optional<Error> last_error;

 private:
  void compare_branch(Handle h, const ModelBranch& want, std::map<int64_t, int>& readers) {
    EXPECT(core.alive(h));
    EXPECT_EQ(core.length(h), want.length());
    EXPECT_EQ(core.position(h), want.position);
    EXPECT_EQ(core.parent_serial(h),
              want.has_parent ? int64_t{CacheCore::serial(want.parent)} : -1);
    core.slots(h, slots_);
    core.positions(h, positions_);
    EXPECT_EQ(slots_.size(), want.tokens.size());
    EXPECT_EQ(positions_.size(), want.tokens.size());
    std::set<int64_t> pages;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      EXPECT_EQ(memory[slots_[i]], want.tokens[i].id);
      EXPECT_EQ(positions_[i], want.tokens[i].position);
      pages.insert(slots_[i] / core.page_size());
    }
    EXPECT_EQ(core.num_pages(h), static_cast<int64_t>(pages.size()));
    compare_page_table(h, want);
    compare_view(h, want, pages);
    for (const int64_t page : pages) ++readers[page];
  }

  void compare_view(Handle h, const ModelBranch& want, std::set<int64_t>& pages) {
    const std::vector<int64_t> watched = core.watched(h);
    EXPECT_EQ(watched.size(), want.places.size());
    for (std::size_t i = 0; i < watched.size(); ++i) {
      const ModelWatch& w = *want.places[i].watch;
      EXPECT_EQ(watched[i], w.alive ? int64_t{CacheCore::serial(w.other)} : -1);
    }
    if (watched.empty()) return;
    const std::vector<Token> seen = model.view(h);
    core.view(h, slots_, positions_);
    EXPECT_EQ(slots_.size(), seen.size());
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      EXPECT_EQ(memory[slots_[i]], seen[i].id);
      EXPECT_EQ(positions_[i], seen[i].position);
      pages.insert(slots_[i] / core.page_size());
    }
  }

  // A page table exists exactly if every token lies where a dense one would have it.
  void compare_page_table(Handle h, const ModelBranch& want) {
    const int64_t size = core.page_size();
    bool dense = want.places.empty();
    for (const Token& t : want.tokens) dense &= !t.shifted();
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      const auto offset = static_cast<int64_t>(i) % size;
      dense &= slots_[i] % size == offset && (offset == 0 || slots_[i] == slots_[i - 1] + 1);
    }
    if (want.plain && core.tail() == TailPolicy::kCopy) EXPECT(dense);
    std::vector<int32_t> table;
    try {
      core.page_table(h, table);
      EXPECT(dense);
    } catch (const Error& e) {
      EXPECT(!dense && e.kind == ErrorKind::kNotDense);
      return;
    }
    EXPECT_EQ(static_cast<int64_t>(table.size()), (want.length() + size - 1) / size);
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      EXPECT_EQ(table[i / size] * size + static_cast<int64_t>(i) % size, slots_[i]);
    }
  }

  // Out of pages must be true, and no row may ask for more than its tokens can need.
  void check_shortage(const std::vector<RowPlan>& rows) {
    EXPECT(last_error->needed > core.stats().pages_free);
    EXPECT_EQ(last_error->free, core.stats().pages_free);
    EXPECT_EQ(last_error->pending, core.stats().pages_pending);
    const bool waiting_would_do = last_error->needed <= last_error->free + last_error->pending;
    EXPECT_EQ(std::string(last_error->what()).find("wait=True") != std::string::npos,
              waiting_would_do);
    const int64_t copied = core.tail() == TailPolicy::kCopy ? core.page_size() - 1 : 0;
    int64_t most = 0;
    for (const RowPlan& r : rows) {
      most += (r.num_tokens + copied + core.page_size() - 1) / core.page_size();
    }
    EXPECT(last_error->needed <= most);
  }

  // Under kSeal nothing is copied, and a row goes on in its tail's page exactly if its context ends
  // where that segment does, its position follows, and no row before it went on there.
  void check_places(const std::vector<RowPlan>& rows) {
    EXPECT(core.step().copies.empty());
    std::map<uint64_t, int32_t> ends;  // of each segment
    std::vector<ContextPart> parts;
    for (const auto& [h, b] : model.branches) {
      core.context(h, parts);
      for (const ContextPart& p : parts) ends[p.segment] = std::max(ends[p.segment], p.hi);
    }
    const ContextStore& store = core.store();
    for (Index s = 0; s < store.segments.size(); ++s) {  // watchers see ends that no context has
      if (!store.segments.taken(s)) continue;
      const Segment& segment = store.segments[s];
      if (store.watches.count() > 0) ends[segment.uid] = segment.length;
      if (segment.frozen) ends[segment.uid] = -1;
    }
    std::size_t row = 0;
    for (const RowPlan& r : rows) {
      const ModelBranch& b = model.branches.at(r.branch);
      const int64_t slot = core.step().slot_mapping[row];
      row += static_cast<std::size_t>(r.num_tokens);
      core.context(r.branch, parts);
      core.slots(r.branch, slots_);
      const bool open = !parts.empty() && ends[parts.back().segment] == parts.back().hi &&
                        b.position == b.end_position() && !b.tokens.back().shifted() &&
                        (b.places.empty() || b.places.back().before < b.length());
      if (open && (slots_.back() + 1) % core.page_size() != 0) {
        EXPECT_EQ(slot, slots_.back() + 1);
        ends[parts.back().segment] = -1;
      } else {
        EXPECT_EQ(slot % core.page_size(), 0);
      }
    }
  }

  void check_open_step(const std::vector<RowPlan>& rows) {
    core.check();
    const Step& step = core.step();
    if (core.tail() == TailPolicy::kSeal) check_places(rows);
    std::set<int64_t> taken;
    for (const auto& [h, b] : model.branches) {
      core.view(h, slots_, positions_);
      taken.insert(slots_.begin(), slots_.end());
    }
    for (const int64_t slot : step.slot_mapping) {
      EXPECT(slot >= 0 && slot < static_cast<int64_t>(memory.size()));
      EXPECT(taken.insert(slot).second);  // nobody sees it, and no other row writes it
    }
    for (const int32_t page : step.pages) EXPECT(in_flight.count(page) == 0);
    std::size_t row = 0;
    for (const RowPlan& r : rows) {
      const std::size_t first = row;
      for (int64_t t = 0; t < r.num_tokens; ++t, ++row) {
        int64_t want = model.branches.at(r.branch).position + t;
        if (r.draft) {
          want = r.parents[t] < 0 ? model.branches.at(r.branch).position
                                  : step.positions[first + r.parents[t]] + 1;
        }
        EXPECT_EQ(step.positions[row], want);
      }
    }
    EXPECT_EQ(row, step.positions.size());
    EXPECT_EQ(row, step.slot_mapping.size());
  }

  void close_step(const std::vector<RowPlan>& rows, uint64_t id) {
    std::vector<std::vector<uint64_t>> kept;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const RowPlan& r = rows[i];
      std::vector<uint64_t> ids;
      if (!r.draft) {
        for (int64_t t = 0; t < r.num_tokens; ++t) ids.push_back(id + t);
      } else if (r.path) {
        accept(static_cast<int64_t>(i), *r.path);
        for (const int32_t t : *r.path) ids.push_back(id + t);
      }
      kept.push_back(ids);
      id += r.num_tokens;
    }
    std::vector<uint64_t> moved;
    for (const SlotMove& move : core.step().moves) moved.push_back(memory[move.src_slot]);
    for (std::size_t i = 0; i < moved.size(); ++i) {
      memory[core.step().moves[i].dst_slot] = moved[i];
    }
    commit();
    for (std::size_t i = 0; i < rows.size(); ++i) model.append(rows[i].branch, kept[i]);
  }

  std::vector<uint64_t> bytes_of(int32_t page) const {
    const auto at = memory.begin() + static_cast<std::ptrdiff_t>(page) * core.page_size();
    return {at, at + core.page_size()};
  }

  virtual void accept(int64_t row, const std::vector<int32_t>& path) { core.accept(row, path); }
  virtual void commit() { core.commit_step(); }

  uint64_t next_id_ = 0;
  std::vector<int64_t> slots_, positions_;
};

}  // namespace fork_attn::test
