// A Python mapping {Branch: int | Draft} as step requests. Read here, not in Python: a decode step
// may hold hundreds.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <span>
#include <string>
#include <vector>

#include "../core/cache_core.h"

namespace fork_attn {

namespace py = pybind11;

class PYBIND11_EXPORT StepRequests {
 public:
  StepRequests(py::handle tokens, py::handle cache, py::handle branch_type, py::handle draft_type)
      : cache_(cache), branch_type_(branch_type), draft_type_(draft_type) {
    py::object owned = py::reinterpret_borrow<py::object>(tokens);
    if (!PyDict_Check(tokens.ptr())) {
      if (!PyMapping_Check(tokens.ptr()) || !py::hasattr(tokens, "keys")) {
        fail(ErrorKind::kType,
             "tokens: expected a mapping {Branch: int | Draft}, got " + type_name(tokens));
      }
      owned = py::dict(owned);
    }
    requests_.reserve(py::len(owned));
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    Py_ssize_t at = 0;
    while (PyDict_Next(owned.ptr(), &at, &key, &value)) add(key, value);
  }

  std::span<const StepRequest> span() const { return requests_; }

 private:
  static std::string type_name(py::handle h) { return Py_TYPE(h.ptr())->tp_name; }

  void add(py::handle branch, py::handle count) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(branch.ptr())) != branch_type_.ptr()) {
      fail(ErrorKind::kType, "tokens: expected Branch keys, got " + type_name(branch));
    }
    static PyObject* const cache_name = PyUnicode_InternFromString("cache");
    static PyObject* const handle_name = PyUnicode_InternFromString("_handle");
    const auto owner =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(branch.ptr(), cache_name));
    const auto handle =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(branch.ptr(), handle_name));
    if (!owner || !handle) throw py::error_already_set();
    StepRequest request{};
    request.branch = PyLong_AsUnsignedLongLong(handle.ptr());
    if (owner.ptr() != cache_.ptr()) {
      fail(ErrorKind::kForeignBranch, "tokens: branch " +
                                          std::to_string(CacheCore::serial(request.branch)) +
                                          " belongs to another cache");
    }
    if (py::isinstance(count, draft_type_)) {
      parents_.push_back(py::cast<std::vector<int32_t>>(count.attr("parents")));
      request.parents = parents_.back().data();
      request.num_tokens = static_cast<int64_t>(parents_.back().size());
    } else {
      request.num_tokens = integer(count);
    }
    requests_.push_back(request);
  }

  static int64_t integer(py::handle count) {
    const auto index = py::reinterpret_steal<py::object>(
        PyBool_Check(count.ptr()) ? nullptr : PyNumber_Index(count.ptr()));
    if (!index) {
      PyErr_Clear();
      fail(ErrorKind::kType,
           "tokens: expected an int or a Draft per branch, got " + type_name(count));
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0)
      fail(ErrorKind::kValue, "tokens: expected a count below 2**31, got one beyond 64 bits");
    return value;
  }

  py::handle cache_, branch_type_, draft_type_;
  std::vector<StepRequest> requests_;
  std::deque<std::vector<int32_t>> parents_;  // stable addresses
};

}  // namespace fork_attn
