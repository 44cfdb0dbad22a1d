// Tensors as kernels see them: element types, where rows lie, and vectors of 16 bytes.
#pragma once

#include <cstdint>

// Bindings are compiled without CUDA's headers, and need the plain structures only.
#if defined(__CUDACC__) || defined(FASTVQ_CUDA_SHIM)
#define FASTVQ_DEVICE_CODE 1
#endif

namespace fastvq {

enum class Float : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A tensor (H, N, D) where it lies: row n of head h starts at h head + (n / inner) outer + (n % inner) step, in
// elements. A codebook (H, K, D) is one too.
struct Rows {
  const void* data;
  Float type;
  std::int64_t count;                   // N
  std::int64_t inner;                   // 1 where one stride will do
  std::int64_t head, outer, step, dim;  // strides

#ifdef FASTVQ_DEVICE_CODE
  __device__ __forceinline__ std::int64_t offset(std::int64_t h, std::int64_t n) const {
    if (inner == 1) return h * head + n * outer;
    if (((n | inner) >> 32) == 0) {  // a division of 64 bits takes a hundred instructions
      const unsigned row = static_cast<unsigned>(n), every = static_cast<unsigned>(inner), quotient = row / every;
      return h * head + quotient * outer + (row - quotient * every) * step;
    }
    return h * head + n / inner * outer + n % inner * step;
  }
#endif
};

}  // namespace fastvq
