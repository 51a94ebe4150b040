// device_info() of a build with device code. Links the static CUDA runtime: no driver is needed to
// load the module.
#include <cuda_runtime.h>

#include "cuda/device_info.h"

namespace fork_attn::cuda {
namespace {

// Asking for its attributes tells whether the build holds code for the current device.
__global__ void probe() {}

Device describe(int index) {
  Device device{};
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    cudaGetLastError();
    device.name = "unreadable";
    return device;
  }
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);

  int previous = 0;
  cudaGetDevice(&previous);
  cudaFuncAttributes attributes{};
  if (cudaSetDevice(index) == cudaSuccess &&
      cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) {
    device.binary_version = attributes.binaryVersion;
  }
  cudaSetDevice(previous);
  cudaGetLastError();  // a device we have no code for must not leave its error to the next caller
  return device;
}

}  // namespace

DeviceInfo device_info() {
  DeviceInfo info{};
  info.built = true;
  info.architectures = FORK_ATTN_CUDA_ARCHS;
  info.runtime_version = CUDART_VERSION;
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess) info.driver_version = driver;

  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    info.reason = cudaGetErrorString(error);
    if (info.driver_version == 0)
      info.reason = "no CUDA driver on this machine (" + info.reason + ")";
    return info;
  }
  if (count == 0) info.reason = "the CUDA driver reports no devices";
  for (int index = 0; index < count; ++index) info.devices.push_back(describe(index));
  return info;
}

}  // namespace fork_attn::cuda
