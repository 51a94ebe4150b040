// device_info() of a build without device code.
#include "cuda/device_info.h"

namespace fork_attn::cuda {

DeviceInfo device_info() {
  return {.built = false,
          .architectures = "",
          .runtime_version = 0,
          .driver_version = 0,
          .devices = {},
          .reason = "this build has no device code: nvcc was not found, or FORK_ATTN_CUDA=OFF"};
}

}  // namespace fork_attn::cuda
