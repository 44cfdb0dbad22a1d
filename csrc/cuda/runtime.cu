// Devices, as the runtime that is linked into the extension sees them.

#include "launch.h"
#include "operators.h"

namespace fastvq {

int device_count(const char** error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  *error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  return status == cudaSuccess ? count : 0;
}

void set_device(int index) {
  check(cudaSetDevice(index));
}

}  // namespace fastvq
