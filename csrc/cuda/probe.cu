// The first kernel of the CUDA backend: it shows that the build, the import without a driver and the error path work.

#include "probe.h"

namespace fastvq {
namespace {

__global__ void add_one_kernel(float* values, long long count) {
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i < count) values[i] += 1.0f;
}

}  // namespace

const char* add_one(std::uintptr_t values, long long count, std::uintptr_t stream) {
  if (count <= 0) return nullptr;
  constexpr int kThreads = 256;
  const long long blocks = (count + kThreads - 1) / kThreads;
  add_one_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<float*>(values), count);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

int device_count(const char** error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  *error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  return status == cudaSuccess ? count : 0;
}

}  // namespace fastvq
