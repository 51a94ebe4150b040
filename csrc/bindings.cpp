// Python bindings. Pointers, sizes and integers only: neither Torch nor NumPy is linked or
// included.
#include <pybind11/pybind11.h>

#include "bindings/build_info.h"
#include "bindings/cache_kernels.h"
#include "bindings/core.h"
#include "bindings/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host core and kernels of fork-attn.";
  fork_attn::bind_core(m);
  fork_attn::bind_kernels(m);
  fork_attn::bind_cache_kernels(m);
  fork_attn::bind_build_info(m);
}
