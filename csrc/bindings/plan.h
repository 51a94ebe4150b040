// Costs of targets, and what a plan holds.
#pragma once

#include <pybind11/pybind11.h>

namespace fork_attn {

void bind_plan(pybind11::module_& m);

}  // namespace fork_attn
