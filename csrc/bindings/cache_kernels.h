#pragma once

#include <pybind11/pybind11.h>

namespace fork_attn {

void bind_cache_kernels(pybind11::module_& m);

}  // namespace fork_attn
