#include "core.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <tuple>

#include "../core/cache_core.h"
#include "../core/planner.h"
#include "plan.h"
#include "step_request.h"

namespace py = pybind11;

namespace fork_attn {

namespace {

const char* exception_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kStaleBranch:
      return "StaleBranch";
    case ErrorKind::kOutOfPages:
      return "OutOfPages";
    case ErrorKind::kDuplicateBranch:
      return "DuplicateBranch";
    case ErrorKind::kForeignBranch:
      return "ForeignBranch";
    case ErrorKind::kStepOpen:
      return "StepOpen";
    case ErrorKind::kNotDense:
      return "NotDense";
    case ErrorKind::kStalePlan:
      return "StalePlan";
    case ErrorKind::kPlanCapacityExceeded:
      return "PlanCapacityExceeded";
    case ErrorKind::kConcurrentUse:
      return "ConcurrentUse";
    case ErrorKind::kUnsupported:
      return "Unsupported";
    case ErrorKind::kDevice:
      return "DeviceError";
    case ErrorKind::kInvariant:
      return "InvariantError";
    case ErrorKind::kValue:
      return "ValueError";
    case ErrorKind::kType:
      return "TypeError";
  }
  return "ForkAttnError";
}

void translate(const Error& e) {
  if (e.kind == ErrorKind::kValue || e.kind == ErrorKind::kType) {
    PyErr_SetString(e.kind == ErrorKind::kValue ? PyExc_ValueError : PyExc_TypeError, e.what());
    return;
  }
  const py::object type = py::module_::import("fork_attn.errors").attr(exception_name(e.kind));
  const py::object value = e.kind == ErrorKind::kOutOfPages
                               ? type(e.what(), e.needed, e.free, e.pending)
                               : type(e.what());
  PyErr_SetObject(type.ptr(), value.ptr());
}

// A cache has one user at a time: kernels run without the GIL, so a second thread can get here
// while one is in use.
struct PyCore {
  PyCore(int32_t num_pages, int32_t page_size, bool copy_tails)
      : core(num_pages, page_size, copy_tails ? TailPolicy::kCopy : TailPolicy::kSeal) {}
  void enter() {
    if (busy.exchange(true)) {
      fail(ErrorKind::kConcurrentUse,
           "another thread is using this cache; give every thread its own, or a lock");
    }
  }
  void leave() noexcept { busy.store(false); }

  CacheCore core;
  Planner planner;
  std::atomic<bool> busy{false};
};

class Use {
 public:
  explicit Use(PyCore& core) : core_(core) { core_.enter(); }
  ~Use() { core_.leave(); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  PyCore& core_;
};

// Binds a member function of CacheCore as a method that takes the cache for its duration.
template <class R, class... Args>
auto verb(R (CacheCore::*method)(Args...)) {
  return [method](PyCore& self, Args... args) -> R {
    Use use(self);
    return (self.core.*method)(std::forward<Args>(args)...);
  };
}

template <class R, class... Args>
auto query(R (CacheCore::*method)(Args...) const) {
  return [method](const PyCore& self, Args... args) -> R {
    return (self.core.*method)(std::forward<Args>(args)...);
  };
}

template <class T>
auto list(void (CacheCore::*method)(Handle, std::vector<T>&) const) {
  return [method](const PyCore& self, Handle branch) {
    std::vector<T> out;
    (self.core.*method)(branch, out);
    return out;
  };
}

using CopySlots = std::function<void(const std::vector<std::array<int64_t, 3>>&)>;

void bind_verbs(py::class_<PyCore>& c) {
  c.def("enter", &PyCore::enter)
      .def("leave", &PyCore::leave)
      .def("new_branch", verb(&CacheCore::new_branch))
      .def("fork", verb(&CacheCore::fork))
      .def("fork_at", verb(&CacheCore::fork_at))
      .def("select", verb(&CacheCore::select))
      .def("crop", verb(&CacheCore::crop))
      .def("take_back", verb(&CacheCore::take_back))
      .def("excise", verb(&CacheCore::excise))
      .def("set_position", verb(&CacheCore::set_position))
      .def("join",
           [](PyCore& self, Handle branch, const std::vector<Handle>& children,
              const std::string& mode, int64_t position, bool rebase,
              const std::optional<CopySlots>& copy) {
             Use use(self);
             JoinRequest request;
             request.mode = mode == "max"   ? JoinPosition::kMax
                            : mode == "sum" ? JoinPosition::kSum
                                            : JoinPosition::kGiven;
             request.position = position;
             request.rebase = copy ? Rebase::kCopy : rebase ? Rebase::kShift : Rebase::kNo;
             request.copy = [&](const std::vector<RotatedCopy>& slots) {
               std::vector<std::array<int64_t, 3>> out;
               for (const RotatedCopy& s : slots) out.push_back({s.src_slot, s.dst_slot, s.shift});
               (*copy)(out);
             };
             self.core.join(branch, children, request);
           })
      .def("watch", verb(&CacheCore::watch))
      .def("reorder",
           [](PyCore& self, const std::vector<Handle>& branches,
              const std::vector<int64_t>& indices) {
             Use use(self);
             self.core.reorder(branches, indices);
           })
      .def("free", [](PyCore& self, const std::vector<Handle>& branches) {
        Use use(self);
        self.core.free(branches);
      });
}

void bind_queries(py::class_<PyCore>& c) {
  c.def("alive", [](const PyCore& self, Handle branch) { return self.core.alive(branch); })
      .def("length", query(&CacheCore::length))
      .def("position", query(&CacheCore::position))
      .def("num_pages", query(&CacheCore::num_pages))
      .def("parent_id", query(&CacheCore::parent_serial))
      .def("slots", list(&CacheCore::slots))
      .def("positions", list(&CacheCore::positions))
      .def("page_table", list(&CacheCore::page_table))
      .def("context",
           [](const PyCore& self, Handle branch) {
             std::vector<ContextPart> parts;
             self.core.context(branch, parts);
             py::list out;
             for (const ContextPart& p : parts)
               out.append(py::make_tuple(p.segment, p.lo, p.hi, p.first_position));
             return out;
           })
      .def("view",
           [](const PyCore& self, Handle branch) {
             std::vector<int64_t> slots;
             std::vector<int64_t> positions;
             self.core.view(branch, slots, positions);
             return py::make_tuple(slots, positions);
           })
      .def("watched", query(&CacheCore::watched))
      .def("stats",
           [](const PyCore& self) {
             const CoreStats s = self.core.stats();
             return py::make_tuple(s.pages_total, s.pages_free, s.pages_live, s.pages_shared,
                                   s.pages_pending, s.segments, s.branches);
           })
      .def("check", [](const PyCore& self) { self.core.check(); })
      .def("digest", [](const PyCore& self) { return self.core.digest(); })
      .def_property_readonly("step_open", [](const PyCore& self) { return self.core.step_open(); });
}

// Writes the open step's tensors to memory that the caller owns: (T,) int64 twice, (n,) int64,
// (n+1,) and (n,) int32.
void fill_step(const PyCore& self, std::uintptr_t position_ids, std::uintptr_t slot_mapping,
               std::uintptr_t last_indices, std::uintptr_t cu_seqlens_q, std::uintptr_t seqlens_k) {
  const Step& step = self.core.step();
  std::copy(step.positions.begin(), step.positions.end(), reinterpret_cast<int64_t*>(position_ids));
  std::copy(step.slot_mapping.begin(), step.slot_mapping.end(),
            reinterpret_cast<int64_t*>(slot_mapping));
  auto* last = reinterpret_cast<int64_t*>(last_indices);
  auto* cu = reinterpret_cast<int32_t*>(cu_seqlens_q);
  auto* seqlens = reinterpret_cast<int32_t*>(seqlens_k);
  *cu++ = 0;
  for (const StepRow& row : step.rows) {
    const int32_t end = row.row_begin + row.num_tokens;
    *last++ = end - 1;
    *cu++ = end;
    const int64_t length = self.core.store().length(self.core.branches()[row.branch].head);
    *seqlens++ = static_cast<int32_t>(length + row.num_tokens);
  }
}

// The open step's rows for a step of fixed width: positions, slots and last rows, (width,) int64
// each, padded with 0, -1 (stored nowhere) and 0.
void fill_padded_step(const PyCore& self, std::uintptr_t position_ids, std::uintptr_t slot_mapping,
                      std::uintptr_t last_indices, std::size_t width) {
  const Step& step = self.core.step();
  const auto pad = [width](std::uintptr_t to, std::size_t count, int64_t value) {
    std::fill(reinterpret_cast<int64_t*>(to) + count, reinterpret_cast<int64_t*>(to) + width,
              value);
  };
  std::copy(step.positions.begin(), step.positions.end(), reinterpret_cast<int64_t*>(position_ids));
  std::copy(step.slot_mapping.begin(), step.slot_mapping.end(),
            reinterpret_cast<int64_t*>(slot_mapping));
  auto* last = reinterpret_cast<int64_t*>(last_indices);
  for (const StepRow& row : step.rows) *last++ = row.row_begin + row.num_tokens - 1;
  pad(position_ids, step.positions.size(), 0);
  pad(slot_mapping, step.positions.size(), -1);
  pad(last_indices, step.rows.size(), 0);
}

void bind_step(py::class_<PyCore>& c) {
  c.def("open_step",
        [](PyCore& self, py::handle tokens, py::handle cache, py::handle branch_type,
           py::handle draft_type) {
          Use use(self);
          StepRequests requests(tokens, cache, branch_type, draft_type);
          self.core.open_step(requests.span());
          return py::make_tuple(self.core.step().positions.size(), self.core.step().rows.size());
        })
      .def("fill_step", &fill_step)
      .def("fill_padded_step", &fill_padded_step)
      .def("step_copies",
           [](const PyCore& self) {
             std::vector<std::pair<int32_t, int32_t>> out;
             for (const PageCopy& copy : self.core.step().copies)
               out.emplace_back(copy.src_page, copy.dst_page);
             return out;
           })
      .def("step_moves",
           [](const PyCore& self) {
             std::vector<std::pair<int64_t, int64_t>> out;
             for (const SlotMove& move : self.core.step().moves)
               out.emplace_back(move.src_slot, move.dst_slot);
             return out;
           })
      .def("draft_rows",
           [](const PyCore& self) {
             std::vector<int64_t> out;
             const std::vector<StepRow>& rows = self.core.step().rows;
             for (std::size_t i = 0; i < rows.size(); ++i) {
               if (rows[i].draft) out.push_back(static_cast<int64_t>(i));
             }
             return out;
           })
      .def("accept",
           [](PyCore& self, int64_t row, const std::vector<int32_t>& path) {
             Use use(self);
             self.core.accept(row, path);
           })
      .def("defer_frees", verb(&CacheCore::defer_frees))
      .def("close_epoch", [](PyCore& self) { return self.core.close_epoch(); })
      .def("end_epoch", [](PyCore& self, int64_t epoch) { return self.core.end_epoch(epoch); })
      .def("unseen_slots",
           [](const PyCore& self) {
             std::vector<int64_t> out;
             self.core.unseen_slots(out);
             return out;
           })
      .def("pending_pages",
           [](const PyCore& self) {
             std::vector<std::pair<int32_t, int64_t>> out;  // page, epoch
             for (const PendingPage& p : self.core.store().pages.pending())
               out.emplace_back(p.page, p.epoch);
             return out;
           })
      .def("report_reusable", verb(&CacheCore::report_reusable))
      .def("take_reusable", verb(&CacheCore::take_reusable))
      .def("commit_step", verb(&CacheCore::commit_step))
      .def("rollback_step", verb(&CacheCore::rollback_step))
      .def(
          "build_plan",
          [](PyCore& self, int32_t window,
             const std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t>& shape,
             const std::string& target, int32_t workers, bool batch_invariant, bool resident) {
            Use use(self);
            const auto [num_kv_heads, group, head_dim, head_dim_v, itemsize] = shape;
            const TargetCosts& costs = target_costs(target);
            return self.planner.build(self.core,
                                      {window,
                                       {num_kv_heads, group, head_dim, head_dim_v, itemsize},
                                       &costs,
                                       workers,
                                       batch_invariant,
                                       resident});
          },
          py::arg("window"), py::arg("shape"), py::arg("target"), py::arg("workers"),
          py::arg("batch_invariant") = false, py::arg("resident") = false);
}

// News of the page lists for the device: how many entries and moves, and the arrays themselves,
// int32: where (n,), the pages (n,), and from, to, count (m, 3).
void bind_arena(py::class_<PyCore>& c) {
  c.def("arena_news",
        [](const PyCore& self) {
          const PageArena& arena = self.core.store().arena;
          return py::make_tuple(arena.size(), arena.entries().size(), arena.moves().size());
        })
      .def("take_arena_news",
           [](PyCore& self, std::uintptr_t at, std::uintptr_t page, std::uintptr_t moves) {
             PageArena& arena = self.core.store().arena;
             auto* where = reinterpret_cast<int32_t*>(at);
             auto* what = reinterpret_cast<int32_t*>(page);
             for (const PageEntry& e : arena.entries()) {
               *where++ = e.at;
               *what++ = e.page;
             }
             auto* row = reinterpret_cast<int32_t*>(moves);
             for (const PageMove& m : arena.moves()) {
               *row++ = m.from;
               *row++ = m.to;
               *row++ = m.count;
             }
             arena.told();
           })
      .def("forget_arena", [](PyCore& self) { self.core.store().arena.forget(); });
}

}  // namespace

void bind_core(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      translate(e);
    }
  });
  py::class_<PyCore> core(m, "CacheCore");
  core.def(py::init<int32_t, int32_t, bool>(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("copy_tails"));
  bind_verbs(core);
  bind_queries(core);
  bind_step(core);
  bind_arena(core);
  bind_plan(m);
}

}  // namespace fork_attn
