// What GPUs this process can use, or why none. Safe on a machine without a driver.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fork_attn::cuda {

struct Device {
  std::string name;
  int32_t major;  // compute capability
  int32_t minor;
  int32_t multiprocessors;
  int64_t memory_bytes;
  // The architecture (10 * major + minor) of the machine code in this build that the device would
  // run, from PTX where that is what it takes; 0 if the build holds none for it.
  int32_t binary_version;
};

struct DeviceInfo {
  bool built;                 // this build has device code
  std::string architectures;  // CMake's names, for example "80-real 90a-real"; empty without
  int32_t runtime_version;    // 1000 * major + 10 * minor of the CUDA runtime linked in, 0 without
  int32_t driver_version;     // the newest CUDA the driver serves, 0 without a driver
  std::vector<Device> devices;
  std::string reason;  // why `devices` is empty; empty otherwise
};

// Never throws for a missing driver or device: that is what `reason` is for.
DeviceInfo device_info();

}  // namespace fork_attn::cuda
