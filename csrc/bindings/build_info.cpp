#include "build_info.h"

#include "../cpu/unit.h"
#include "../cuda/device_info.h"

namespace py = pybind11;

namespace fork_attn {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef _OPENMP
constexpr int kOpenMP = _OPENMP;
#else
constexpr int kOpenMP = 0;
#endif

#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

const char* simd_name(cpu::SimdLevel level) {
  switch (level) {
    case cpu::SimdLevel::kBase:
      return "baseline";
    case cpu::SimdLevel::kAvx2:
      return "avx2";
    case cpu::SimdLevel::kAvx512:
      return "avx512";
  }
  return "unknown";
}

py::dict build_info() {
  py::dict out;
  out["compiler"] = kCompiler;
  out["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  out["openmp"] = kOpenMP;
  out["simd"] = simd_name(cpu::simd_level());
  out["sanitized"] = kSanitized;
  return out;
}

py::dict device_dict(const cuda::Device& device) {
  py::dict out;
  out["name"] = device.name;
  out["capability"] = py::make_tuple(device.major, device.minor);
  out["multiprocessors"] = device.multiprocessors;
  out["memory_bytes"] = device.memory_bytes;
  out["binary_version"] = device.binary_version;
  return out;
}

py::dict cuda_info() {
  cuda::DeviceInfo info;
  {
    py::gil_scoped_release release;  // the first call starts the driver, which can take seconds
    info = cuda::device_info();
  }
  py::dict out;
  out["built"] = info.built;
  out["architectures"] = info.architectures;
  out["runtime_version"] = info.runtime_version;
  out["driver_version"] = info.driver_version;
  py::list devices;
  for (const cuda::Device& device : info.devices) devices.append(device_dict(device));
  out["devices"] = devices;
  out["reason"] = info.reason;
  return out;
}

}  // namespace

void bind_build_info(py::module_& m) {
  m.def(
      "build_info", &build_info,
      "Compiler, C++ standard, OpenMP date (0 = none) and sanitizers of this module, and the SIMD "
      "level its CPU kernels use on this machine.");
  m.def("cuda_info", &cuda_info,
        "Device code in this module, the CUDA driver, the devices, or the reason why there are "
        "none.");
}

}  // namespace fork_attn
