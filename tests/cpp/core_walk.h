// A random walk over all verbs of a World, bad arguments included.
#pragma once

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core_world.h"

namespace fork_attn::test {

class Walk {
 public:
  // A deep walk forks the youngest branch nearly always, and seldom frees.
  Walk(World& world, uint64_t seed, bool deep) : w_(world), rng_(seed), deep_(deep) {}

  int deepest = 0;

  // One operation. Weighted to forks, steps and crops, with more frees as the pool gets crowded.
  // Where another stream was announced, it marks and finishes epochs in between, in any order.
  void operate() {
    if (w_.deferring) {
      if (chance(40)) w_.close_epoch();
      const bool crowded = w_.core.stats().pages_free < 4;
      while (!w_.epochs.empty() && chance(crowded ? 70 : 20)) {
        w_.end_epoch(static_cast<std::size_t>(pick(static_cast<int64_t>(w_.epochs.size()))));
      }
    } else if (chance(1)) {
      w_.announce();
    }
    const auto count = static_cast<int64_t>(w_.model.branches.size());
    if (count == 0) return new_branch();
    if (count > (deep_ ? 2 * kMaxBranches : kMaxBranches)) return free_some();
    if (w_.core.stats().pages_free < 2 && chance(70)) return free_some();
    const int64_t dice = pick(100);
    if (dice < 38) return step();
    if (dice < 52) return fork();
    if (dice < 57) return fork_at();
    if (dice < 65) return join();
    if (dice < 68) return select();
    if (dice < 73) return reorder();
    if (dice < 82) return crop();
    if (dice < 86) return excise();
    if (dice < 89) return set_position();
    if (dice < 92) return watch();
    if (dice < 98) return deep_ ? fork() : free_some();
    if (dice < 99) return new_branch();
    stale();
  }

 private:
  static constexpr int64_t kMaxBranches = 24;

  int64_t pick(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(rng_); }
  bool chance(int percent) { return pick(100) < percent; }

  Handle any_branch() {
    const auto n = static_cast<int64_t>(w_.model.branches.size());
    const int64_t i = chance(deep_ ? 95 : 30) ? n - 1 : pick(n);
    return std::next(w_.model.branches.begin(), i)->first;
  }

  std::vector<Handle> some_branches(int64_t most) {
    std::vector<Handle> all;
    for (const auto& [h, b] : w_.model.branches) all.push_back(h);
    std::shuffle(all.begin(), all.end(), rng_);
    all.resize(std::min<std::size_t>(all.size(), 1 + pick(most)));
    return all;
  }

  // A length within [0, max], at times just outside.
  int64_t length_near(int64_t max) {
    if (chance(4)) return chance(50) ? -1 - pick(3) : max + 1 + pick(3);
    if (chance(30)) return max - std::min<int64_t>(max, pick(4));
    return pick(max + 1);
  }

  void new_branch() {
    Handle h = 0;
    w_.expect(
        "new_branch", std::nullopt, [&] { h = w_.core.new_branch(); },
        [&] { w_.model.new_branch(h); });
  }

  void fork() {
    const Handle parent = any_branch();
    const int64_t n = chance(3) ? -pick(2) : 1 + pick(3);
    std::vector<Handle> out;
    w_.expect(
        "fork", n < 1 ? std::optional(ErrorKind::kValue) : std::nullopt,
        [&] { out = w_.core.fork(parent, n); },
        [&] {
          EXPECT_EQ(out.size(), static_cast<std::size_t>(n));
          for (const Handle child : out) w_.model.fork(parent, child);
          deepest = std::max(deepest, w_.model.depth(out[0]));
        });
  }

  std::optional<ErrorKind> unless(bool valid) {
    return valid ? std::nullopt : std::optional(ErrorKind::kValue);
  }

  void fork_at() {
    const Handle parent = any_branch();
    const int64_t total = w_.model.branches.at(parent).length();
    const int64_t length = length_near(total);
    Handle child = 0;
    w_.expect(
        "fork_at", unless(length >= 0 && length <= total),
        [&] { child = w_.core.fork_at(parent, length); },
        [&] { w_.model.fork_at(parent, child, length); });
  }

  void crop() {
    const Handle h = any_branch();
    const int64_t total = w_.model.branches.at(h).length();
    const int64_t length = length_near(total);
    w_.expect(
        "crop", unless(length >= 0 && length <= total && !w_.model.watched(h)),
        [&] { w_.core.crop(h, length); }, [&] { w_.model.crop(h, length); });
  }

  void excise() {
    const Handle h = any_branch();
    const int64_t total = w_.model.branches.at(h).length();
    int64_t start = length_near(total);
    int64_t end = length_near(total);
    const bool rebase = chance(50);
    if (start > end && !chance(5)) std::swap(start, end);
    bool valid = 0 <= start && start <= end && end <= total && !w_.model.watched(h);
    if (valid && rebase && start < end) valid = w_.model.can_close(h, start, end);
    w_.expect(
        "excise", unless(valid), [&] { w_.core.excise(h, start, end, rebase); },
        [&] { w_.model.excise(h, start, end, rebase); });
  }

  void watch() {
    const Handle h = any_branch();
    const Handle other = some_branches(1)[0];
    const int64_t lag = chance(5) ? -1 : pick(3);
    const bool rebase = chance(70);
    w_.expect(
        "watch", unless(h != other && !w_.model.watches(h, other) && lag >= 0),
        [&] { w_.core.watch(h, other, lag, rebase); }, [&] { w_.model.watch(h, other, rebase); });
  }

  void set_position() {
    const Handle h = any_branch();
    const int64_t now = w_.model.branches.at(h).position;
    int64_t position = chance(30) ? w_.model.branches.at(h).end_position() : now + pick(9) - 4;
    if (chance(2)) position = kMaxLength + pick(3) - 1;
    w_.expect(
        "position", unless(position >= 0 && position <= kMaxLength),
        [&] { w_.core.set_position(h, position); }, [&] { w_.model.set_position(h, position); });
  }

  void join() {
    std::vector<Handle> all = some_branches(4);
    const Handle parent = chance(3) ? all[0] : any_branch();
    std::erase(all, chance(3) ? Handle{0} : parent);
    if (chance(2) && !all.empty()) all.push_back(all[0]);
    const auto mode = static_cast<JoinPosition>(pick(3));
    const int64_t given = chance(3) ? -1 - pick(2) : pick(100);
    const auto rebase = static_cast<Rebase>(chance(40) ? 1 + pick(2) : 0);
    const std::set<Handle> distinct(all.begin(), all.end());
    std::optional<ErrorKind> want;
    if (distinct.size() != all.size()) {
      want = ErrorKind::kDuplicateBranch;
    } else if (w_.model.watched(parent) || all.empty() || distinct.count(parent) != 0 ||
               w_.model.conflict(parent, all)) {
      want = ErrorKind::kValue;
    } else {
      const int64_t position = w_.model.join_position(parent, all, mode, given, rebase);
      int64_t end = 0;
      if (rebase != Rebase::kNo) w_.model.laid(parent, all, rebase, end);
      want = unless(position >= 0 && std::max(position, end) <= kMaxLength);
    }
    const JoinRequest request{mode, given, rebase,
                              [&](const std::vector<RotatedCopy>& copies) { w_.copy(copies); }};
    if (!want && rebase == Rebase::kCopy && !w_.fits(parent, all)) want = ErrorKind::kOutOfPages;
    w_.expect(
        "join", want, [&] { w_.core.join(parent, all, request); },
        [&] { w_.model.join(parent, all, mode, given, rebase); });
  }

  void select() {
    const Handle h = any_branch();
    const std::vector<Handle> below = w_.model.descendants(h);
    const bool valid = !below.empty() && !chance(10);
    Handle child = valid ? below[pick(static_cast<int64_t>(below.size()))] : any_branch();
    std::vector<Handle> freed;
    w_.expect(
        "select", unless(w_.model.descends(child, h) && !w_.model.watched(h)),
        [&] { freed = w_.core.select(h, child); },
        [&] {
          std::sort(freed.begin(), freed.end());
          EXPECT(freed == below);
          w_.model.select(h, child);
        });
  }

  void reorder() {
    std::vector<Handle> all = some_branches(5);
    std::vector<int64_t> indices;
    const auto n = static_cast<int64_t>(all.size());
    std::optional<ErrorKind> want;
    for (int64_t i = 0; i < n; ++i) indices.push_back(pick(n));
    if (chance(3)) {
      indices[0] = chance(50) ? n : -1;
      want = ErrorKind::kValue;
    } else if (chance(3)) {
      indices.push_back(0);
      want = ErrorKind::kValue;
    } else if (chance(3)) {
      all.push_back(all[0]);
      indices.push_back(0);
      want = ErrorKind::kDuplicateBranch;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        if (indices[i] != i && w_.model.watched(all[i])) want = ErrorKind::kValue;
      }
    }
    w_.expect(
        "reorder", want, [&] { w_.core.reorder(all, indices); },
        [&] { w_.model.reorder(all, indices); });
  }

  void free_some() {
    std::vector<Handle> all = some_branches(deep_ ? 2 : 4);
    const bool twice = chance(4);
    if (twice) all.push_back(all[0]);
    w_.expect(
        "free", twice ? std::optional(ErrorKind::kDuplicateBranch) : std::nullopt,
        [&] { w_.core.free(all); },
        [&] {
          for (const Handle h : all) {
            w_.model.free(h);
            last_freed_ = h;
          }
        });
  }

  void stale() {
    if (!last_freed_) return;
    const Handle h = *last_freed_;
    const auto want = std::optional(ErrorKind::kStaleBranch);
    const auto nothing = [] {};
    const std::vector<Handle> list{h};
    const std::vector<StepRequest> request{{h, 1}};
    EXPECT(!w_.core.alive(h));
    w_.expect("fork", want, [&] { w_.core.fork(h, 1); }, nothing);
    w_.expect("fork_at", want, [&] { w_.core.fork_at(h, 0); }, nothing);
    w_.expect("crop", want, [&] { w_.core.crop(h, 0); }, nothing);
    w_.expect("excise", want, [&] { w_.core.excise(h, 0, 0); }, nothing);
    w_.expect("position", want, [&] { w_.core.set_position(h, 0); }, nothing);
    w_.expect("free", want, [&] { w_.core.free(list); }, nothing);
    w_.expect("step", want, [&] { w_.core.open_step(request); }, nothing);
    const Handle live = any_branch();
    w_.expect("join", want, [&] { w_.core.join(live, list, {JoinPosition::kMax}); }, nothing);
    w_.expect("select", want, [&] { w_.core.select(live, h); }, nothing);
    w_.expect("watch", want, [&] { w_.core.watch(live, h, 0, true); }, nothing);
  }

  // Mostly a few tokens, at times up to a share of the pool.
  int64_t token_count() {
    if (chance(60)) return 1 + pick(3);
    if (chance(85)) return 1 + pick(w_.core.page_size() + 2);
    return 1 + pick(static_cast<int64_t>(w_.memory.size()) / 5 + 1);
  }

  RowPlan row_of(Handle h) {
    if (!chance(25)) return {h, token_count()};
    RowPlan row{h, 1 + pick(7), true};
    for (int64_t i = 0; i < row.num_tokens; ++i) {
      row.parents.push_back(static_cast<int32_t>(pick(i + 1)) - 1);
    }
    if (chance(15)) return row;
    row.path.emplace();
    int32_t at = static_cast<int32_t>(pick(row.num_tokens + 1)) - 1;
    for (; at >= 0; at = row.parents[at]) row.path->insert(row.path->begin(), at);
    return row;
  }

  static const int32_t* parents_of(const RowPlan& row) {
    return row.draft ? row.parents.data() : nullptr;
  }

  void step() {
    if (chance(4)) return bad_step();
    std::vector<RowPlan> rows;
    for (const Handle h : some_branches(4)) {
      const RowPlan row = row_of(h);
      if (w_.model.branches.at(h).position + row.num_tokens <= kMaxLength) rows.push_back(row);
    }
    if (rows.empty()) return;
    for (RowPlan& a : rows) {  // neither may draft in a step of a watcher and whom it watches
      for (RowPlan& b : rows) {
        if (!w_.model.watches(a.branch, b.branch) || (!a.draft && !b.draft)) continue;
        const std::vector<StepRequest> request{{a.branch, a.num_tokens, parents_of(a)},
                                               {b.branch, b.num_tokens, parents_of(b)}};
        w_.expect("step", ErrorKind::kUnsupported, [&] { w_.core.open_step(request); }, [] {});
        return;
      }
    }
    w_.step(rows, !chance(12), [&] {
      if (chance(10)) during_step(rows);
    });
  }

  void bad_step() {
    const Handle h = any_branch();
    const std::vector<int32_t> forward{-1, 1};
    const auto nothing = [] {};
    const auto refuse = [&](ErrorKind kind, const std::vector<StepRequest>& requests) {
      w_.expect("step", kind, [&] { w_.core.open_step(requests); }, nothing);
    };
    refuse(ErrorKind::kValue, {});
    refuse(ErrorKind::kValue, {{h, pick(2) - 1}});
    refuse(ErrorKind::kValue, {{h, kMaxLength + 1}});
    refuse(ErrorKind::kValue, {{h, 2, forward.data()}});
    if (w_.model.branches.at(h).position < kMaxLength)
      refuse(ErrorKind::kDuplicateBranch, {{h, 1}, {h, 1}});
    w_.expect("commit", ErrorKind::kStalePlan, [&] { w_.core.commit_step(); }, nothing);
    w_.expect("rollback", ErrorKind::kStalePlan, [&] { w_.core.rollback_step(); }, nothing);
  }

  // Every verb refuses while a step is open, and bad paths are no accepts.
  void during_step(const std::vector<RowPlan>& rows) {
    const Handle h = rows[0].branch;
    const std::vector<Handle> list{h};
    const std::vector<int64_t> zero{0};
    const std::vector<StepRequest> request{{h, 1}};
    const auto nothing = [] {};
    const auto refuse = [&](const std::function<void()>& call) {
      w_.expect("during a step", ErrorKind::kStepOpen, call, nothing);
    };
    refuse([&] { w_.core.new_branch(); });
    refuse([&] { w_.core.fork(h, 1); });
    refuse([&] { w_.core.fork_at(h, 0); });
    refuse([&] { w_.core.join(h, list, {JoinPosition::kMax}); });
    refuse([&] { w_.core.select(h, h); });
    refuse([&] { w_.core.watch(h, h, 0, true); });
    refuse([&] { w_.core.reorder(list, zero); });
    refuse([&] { w_.core.crop(h, 0); });
    refuse([&] { w_.core.excise(h, 0, 0); });
    refuse([&] { w_.core.set_position(h, 0); });
    refuse([&] { w_.core.free(list); });
    refuse([&] { w_.core.open_step(request); });
    const std::vector<int32_t> beyond{static_cast<int32_t>(rows[0].num_tokens)};
    w_.expect("accept", ErrorKind::kValue, [&] { w_.core.accept(0, beyond); }, nothing);
    w_.expect("accept", ErrorKind::kValue, [&] { w_.core.accept(99, {}); }, nothing);
  }

  World& w_;
  std::mt19937_64 rng_;
  bool deep_;
  std::optional<Handle> last_freed_;
};

// Frees every branch; the pool must then be whole.
inline void drain(World& w) {
  std::vector<Handle> all;
  for (const auto& [h, b] : w.model.branches) all.push_back(h);
  w.core.free(all);
  w.model.branches.clear();
  w.compare();
  w.close_epoch();
  while (!w.epochs.empty()) w.end_epoch(w.epochs.size() - 1);
  w.compare();
  const CoreStats stats = w.core.stats();
  EXPECT_EQ(stats.pages_free, stats.pages_total);
  EXPECT_EQ(stats.segments, 0);
  EXPECT_EQ(stats.links, 0);
}

}  // namespace fork_attn::test
