#pragma once

#include <pybind11/pybind11.h>

namespace fork_attn {

// _C.build_info() and _C.cuda_info(): what this module was built with, and the GPUs it can use.
void bind_build_info(pybind11::module_& m);

}  // namespace fork_attn
