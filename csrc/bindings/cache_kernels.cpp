// The kernels that move K and V. Each call names where it runs: (-1, 0) for the CPU, or a device
// and its stream.
#include "cache_kernels.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "../cuda/cache_kernels.h"

namespace py = pybind11;

namespace fork_attn {

namespace {

using std::uintptr_t;
using WhereArg = std::tuple<int32_t, uintptr_t>;
using PagedArg = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using RowArg = std::tuple<uintptr_t, int64_t, int64_t>;
using ShapeArg = std::tuple<int64_t, int32_t, int32_t, int32_t, int32_t>;
using RopeArg = std::tuple<uintptr_t, uintptr_t, uintptr_t, int32_t, bool>;
using ScalesArg = std::tuple<uintptr_t, uintptr_t>;
using DTypesArg = std::tuple<int32_t, int32_t>;  // of the cache and of its rows
using PageSpanArg = std::tuple<uintptr_t, int64_t, int64_t>;
using SlotSpanArg = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int32_t, int32_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cpu::PagedTensor paged(const PagedArg& a) {
  const auto& [data, page, slot, head] = a;
  return {pointer<void>(data), page, slot, head};
}

cpu::RowTensor rows(const RowArg& a) {
  const auto& [data, row, head] = a;
  return {pointer<void>(data), row, head};
}

cpu::KvShape shape(const ShapeArg& a) {
  const auto& [num_rows, num_heads, head_dim, head_dim_v, page_size] = a;
  return {num_rows, num_heads, head_dim, head_dim_v, page_size};
}

cpu::Rope rope(const RopeArg& a) {
  const auto& [cos, sin, table_rows, rotary_dim, interleaved] = a;
  return {pointer<const float>(cos), pointer<const float>(sin), pointer<const int64_t>(table_rows),
          rotary_dim, interleaved};
}

cpu::DType dtype(int32_t code) { return static_cast<cpu::DType>(code); }

// Runs one of two functions of the same name without the GIL.
template <class OnCpu, class OnGpu>
void launch(const WhereArg& where, const OnCpu& on_cpu, const OnGpu& on_gpu) {
  const auto [device, stream] = where;
  py::gil_scoped_release release;
  if (device < 0) {
    on_cpu();
  } else {
    on_gpu(cuda::Stream{device, pointer<void>(stream)});
  }
}

void store_kv(const WhereArg& where, const RowArg& k, const RowArg& v, const PagedArg& k_cache,
              const PagedArg& v_cache, uintptr_t slots, const ScalesArg& scales,
              const RopeArg& rope_arg, const ShapeArg& shape_arg, const DTypesArg& dtypes) {
  const cpu::StoreKvParams p{.shape = shape(shape_arg),
                             .k = rows(k),
                             .v = rows(v),
                             .k_cache = paged(k_cache),
                             .v_cache = paged(v_cache),
                             .slots = pointer<const int64_t>(slots),
                             .k_scale = pointer<const float>(std::get<0>(scales)),
                             .v_scale = pointer<const float>(std::get<1>(scales)),
                             .rope = rope(rope_arg),
                             .rows_dtype = dtype(std::get<1>(dtypes)),
                             .cache_dtype = dtype(std::get<0>(dtypes))};
  launch(where, [&] { cpu::store_kv(p); }, [&](cuda::Stream s) { cuda::store_kv(p, s); });
}

void gather_kv(const WhereArg& where, const PagedArg& k_cache, const PagedArg& v_cache,
               const RowArg& k, const RowArg& v, uintptr_t slots, const ScalesArg& scales,
               const ShapeArg& shape_arg, const DTypesArg& dtypes) {
  const cpu::GatherKvParams p{.shape = shape(shape_arg),
                              .k_cache = paged(k_cache),
                              .v_cache = paged(v_cache),
                              .k = rows(k),
                              .v = rows(v),
                              .slots = pointer<const int64_t>(slots),
                              .k_scale = pointer<const float>(std::get<0>(scales)),
                              .v_scale = pointer<const float>(std::get<1>(scales)),
                              .cache_dtype = dtype(std::get<0>(dtypes)),
                              .rows_dtype = dtype(std::get<1>(dtypes))};
  launch(where, [&] { cpu::gather_kv(p); }, [&](cuda::Stream s) { cuda::gather_kv(p, s); });
}

void shift_rope(const WhereArg& where, const PagedArg& k_cache, const PagedArg& v_cache,
                uintptr_t from, uintptr_t to, const RopeArg& rope_arg, const ShapeArg& shape_arg,
                int32_t cache_dtype) {
  const cpu::ShiftRopeParams p{.shape = shape(shape_arg),
                               .k_cache = paged(k_cache),
                               .v_cache = paged(v_cache),
                               .from = pointer<const int64_t>(from),
                               .to = pointer<const int64_t>(to),
                               .rope = rope(rope_arg),
                               .dtype = dtype(cache_dtype)};
  launch(where, [&] { cpu::shift_rope(p); }, [&](cuda::Stream s) { cuda::shift_rope(p, s); });
}

void copy_pages(const WhereArg& where, const std::vector<PageSpanArg>& caches, uintptr_t from,
                uintptr_t to, int64_t count) {
  std::vector<cpu::PageSpan> spans;
  for (const auto& [data, stride, bytes] : caches) {
    spans.push_back({pointer<char>(data), stride, bytes});
  }
  const auto* src = pointer<const int32_t>(from);
  const auto* dst = pointer<const int32_t>(to);
  const auto n = static_cast<int64_t>(spans.size());
  launch(
      where, [&] { cpu::copy_pages(spans.data(), n, src, dst, count); },
      [&](cuda::Stream s) { cuda::copy_pages(spans.data(), n, src, dst, count, s); });
}

void move_slots(const WhereArg& where, const std::vector<SlotSpanArg>& caches, int32_t page_size,
                uintptr_t from, uintptr_t to, int64_t count) {
  std::vector<cpu::SlotSpan> spans;
  for (const auto& [data, page, slot, head, num_heads, row_bytes] : caches) {
    spans.push_back({pointer<char>(data), page, slot, head, num_heads, row_bytes});
  }
  const auto* src = pointer<const int64_t>(from);
  const auto* dst = pointer<const int64_t>(to);
  const auto n = static_cast<int64_t>(spans.size());
  launch(
      where, [&] { cpu::move_slots(spans.data(), n, page_size, src, dst, count); },
      [&](cuda::Stream s) { cuda::move_slots(spans.data(), n, page_size, src, dst, count, s); });
}

void merge_states_cuda(const WhereArg& where, uintptr_t out, uintptr_t lse, int32_t out_dtype,
                       int64_t num_states, int64_t num_rows, int32_t num_heads, int32_t dim,
                       uintptr_t merged_out, uintptr_t merged_lse) {
  const auto [device, stream] = where;
  py::gil_scoped_release release;
  cuda::merge_states(pointer<const void>(out), pointer<const float>(lse), dtype(out_dtype),
                     num_states, num_rows, num_heads, dim, pointer<void>(merged_out),
                     pointer<float>(merged_lse), cuda::Stream{device, pointer<void>(stream)});
}

}  // namespace

void bind_cache_kernels(py::module_& m) {
  m.def("store_kv", &store_kv);
  m.def("gather_kv", &gather_kv);
  m.def("shift_rope", &shift_rope);
  m.def("copy_pages", &copy_pages);
  m.def("move_slots", &move_slots);
  m.def("merge_states_cuda", &merge_states_cuda);
}

}  // namespace fork_attn
