#include "plan.h"

#include <pybind11/stl.h>

#include <set>
#include <string>
#include <type_traits>

#include "../core/planner.h"

namespace py = pybind11;

namespace fork_attn {

namespace {

// The costs that can be set, by name.
template <class Visit>
void each_cost(TargetCosts& t, Visit&& visit) {
  visit("max_rows", t.max_rows);
  visit("bytes_per_ns", t.bytes_per_ns);
  visit("flops_per_ns_16", t.flops_per_ns[0]);
  visit("flops_per_ns_32", t.flops_per_ns[1]);
  visit("flops_per_ns_64", t.flops_per_ns[2]);
  visit("flops_per_ns_128", t.flops_per_ns[3]);
  visit("load_rows", t.load_rows);
  visit("ns_per_exp", t.ns_per_exp);
  visit("item_ns", t.item_ns);
  visit("partial_bytes_per_ns", t.partial_bytes_per_ns);
  visit("launch_ns", t.launch_ns);
}

py::dict costs_of(const std::string& name) {
  TargetCosts t = target_costs(name);
  py::dict found(py::arg("workers") = t.workers, py::arg("spans_per_worker") = t.spans_per_worker,
                 py::arg("row_quantum") = t.row_quantum, py::arg("tile_slots") = t.tile_slots,
                 py::arg("chunk_slots") = t.chunk_slots, py::arg("gather_slots") = t.gather_slots,
                 py::arg("overlaps") = t.overlaps);
  each_cost(t, [&](const char* field, auto& value) { found[field] = value; });
  return found;
}

// What is not named stays.
void change_costs(const std::string& name, const py::dict& changes) {
  TargetCosts t = target_costs(name);
  std::set<std::string> unknown;
  for (const auto& [key, value] : changes) unknown.insert(key.cast<std::string>());
  each_cost(t, [&](const char* field, auto& value) {
    if (unknown.erase(field) != 0)
      value = changes[field].template cast<std::remove_reference_t<decltype(value)>>();
  });
  if (!unknown.empty())
    fail(ErrorKind::kValue,
         "costs: expected a cost that can be set, got '" + *unknown.begin() + "'");
  set_target_costs(t);
}

const PlanHeader& header(const PlanData& plan) {
  return *reinterpret_cast<const PlanHeader*>(plan.buffer.data());
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def("target_costs", &costs_of);
  m.def("set_target_costs", &change_costs);
  m.def("reset_target_costs", [](const std::string& name) { reset_target_costs(name); });
  py::class_<PlanData>(m, "PlanData", py::buffer_protocol())
      .def_buffer([](PlanData& self) {
        return py::buffer_info(self.buffer.data(), static_cast<py::ssize_t>(self.buffer.size()));
      })
      .def_property_readonly("page_limit",
                             [](const PlanData& self) { return header(self).page_limit; })
      .def("copy_to",
           [](const PlanData& self, std::uintptr_t words) {
             std::copy(self.buffer.begin(), self.buffer.end(), reinterpret_cast<int64_t*>(words));
           })
      .def_property_readonly("num_rotations",
                             [](const PlanData& self) { return header(self).num_rotations; })
      .def_property_readonly("num_words", [](const PlanData& self) { return self.buffer.size(); })
      .def_property_readonly("num_partial_rows",
                             [](const PlanData& self) { return self.counts.num_partial_rows; })
      .def_property_readonly("rotations",
                             [](const PlanData& self) {
                               const PlanHeader& h = header(self);
                               return py::make_tuple(h.off_rotations, h.num_rotations);
                             })
      .def_property_readonly("cost_ns", [](const PlanData& self) { return self.cost_ns; })
      .def_property_readonly("span_ns", [](const PlanData& self) { return self.span_ns; })
      .def_property_readonly("counts", [](const PlanData& self) {
        const PlanCounts& c = self.counts;
        return py::dict(
            py::arg("unique_slots") = c.unique_slots,
            py::arg("tile_unique_slots") = c.tile_unique_slots,
            py::arg("read_slots") = c.read_slots, py::arg("visible_pairs") = c.visible_pairs,
            py::arg("executed_pairs") = c.executed_pairs, py::arg("num_tokens") = c.num_tokens,
            py::arg("num_blocks") = c.num_blocks, py::arg("num_items") = c.num_items,
            py::arg("num_runs") = c.num_runs, py::arg("num_partial_rows") = c.num_partial_rows,
            py::arg("max_block_tokens") = c.max_block_tokens);
      });
}

}  // namespace fork_attn
