#include "kernels.h"

#include <pybind11/stl.h>

#include <tuple>

#include "../cpu/kernels.h"

namespace py = pybind11;

namespace fork_attn {

namespace {

using PagedArg =
    std::tuple<std::uintptr_t, int64_t, int64_t, int64_t>;  // pointer, strides of page, slot, head
using RowArg = std::tuple<std::uintptr_t, int64_t, int64_t>;  // pointer, strides of row, head

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cpu::PagedTensor paged(const PagedArg& a) {
  return {pointer<void>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

cpu::RowTensor rows(const RowArg& a) {
  return {pointer<void>(std::get<0>(a)), std::get<1>(a), std::get<2>(a)};
}

void tree_attention_cpu(std::uintptr_t plan, const RowArg& q, const PagedArg& k_cache,
                        const PagedArg& v_cache, const RowArg& out, std::uintptr_t lse,
                        std::uintptr_t sinks, std::uintptr_t k_scale, std::uintptr_t v_scale,
                        int32_t dtype, int32_t kv_dtype, int32_t num_q_heads, int32_t num_kv_heads,
                        int32_t head_dim, int32_t head_dim_v, float softmax_scale, float softcap,
                        std::uintptr_t pages) {
  cpu::TreeAttentionParams p{};
  p.plan = pointer<const int64_t>(plan);
  p.pages = pointer<const int32_t>(pages);
  p.q = rows(q);
  p.k_cache = paged(k_cache);
  p.v_cache = paged(v_cache);
  p.out = rows(out);
  p.lse = pointer<float>(lse);
  p.sinks = pointer<const float>(sinks);
  p.k_scale = pointer<const float>(k_scale);
  p.v_scale = pointer<const float>(v_scale);
  p.dtype = static_cast<cpu::DType>(dtype);
  p.kv_dtype = static_cast<cpu::DType>(kv_dtype);
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  p.softmax_scale = softmax_scale;
  p.softcap = softcap;
  py::gil_scoped_release release;
  cpu::tree_attention(p);
}

void merge_states_cpu(std::uintptr_t out, std::uintptr_t lse, int64_t num_states, int64_t num_rows,
                      int32_t num_heads, int32_t dim, std::uintptr_t merged_out,
                      std::uintptr_t merged_lse) {
  py::gil_scoped_release release;
  cpu::merge_states(pointer<const float>(out), pointer<const float>(lse), num_states, num_rows,
                    num_heads, dim, pointer<float>(merged_out), pointer<float>(merged_lse));
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("tree_attention_cpu", &tree_attention_cpu, py::arg("plan_ptr"), py::arg("q"),
        py::arg("k_cache"), py::arg("v_cache"), py::arg("out"), py::arg("lse_ptr"),
        py::arg("sinks_ptr"), py::arg("k_scale_ptr"), py::arg("v_scale_ptr"), py::arg("dtype"),
        py::arg("kv_dtype"), py::arg("num_q_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
        py::arg("head_dim_v"), py::arg("softmax_scale"), py::arg("softcap"),
        py::arg("pages_ptr") = 0);
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t data, int64_t bytes) {
        cpu::advise_huge_pages(pointer<void>(data), bytes);
      },
      py::arg("data_ptr"), py::arg("num_bytes"));
  m.def("merge_states_cpu", &merge_states_cpu, py::arg("out_ptr"), py::arg("lse_ptr"),
        py::arg("num_states"), py::arg("rows"), py::arg("num_heads"), py::arg("dim"),
        py::arg("merged_out_ptr"), py::arg("merged_lse_ptr"));
}

}  // namespace fork_attn
