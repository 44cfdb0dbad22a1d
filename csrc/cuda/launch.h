// How a kernel is started, and what every kernel asks of a launch. The tests compile the same sources for the CPU,
// against a <cuda_runtime.h> of their own, so nothing here or in a kernel uses <<<>>>.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace fastvq {

// Throws what CUDA says went wrong; the bindings add the operator's name.
inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or CUB would come upon it, and complain, at the next call
  throw std::runtime_error(cudaGetErrorString(status));
}

// Starts kernel(arguments...) on a stream of the current device; an empty grid starts nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// The shared memory that the launch asked for, aligned for every vector access, ldmatrix and cp.async.
#ifdef __CUDACC__
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char fastvq_dynamic_shared[];
  return reinterpret_cast<T*>(fastvq_dynamic_shared);
}
#else
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(shim::dynamic_shared());
}
#endif

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace fastvq
