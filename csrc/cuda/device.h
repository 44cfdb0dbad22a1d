// What kernels share: conversions, vectors of 16 bytes, sums over a block in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "tensor.h"

namespace fastvq {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- element types ------------------------------------------------------------------------------------------------

__device__ __forceinline__ double widen(double v) {
  return v;
}
__device__ __forceinline__ double widen(float v) {
  return v;
}
__device__ __forceinline__ double widen(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ double widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

// Float64 as T; the narrow types by way of float32, as torch rounds them.
template <class T>
__device__ __forceinline__ T narrow(double v);
template <>
__device__ __forceinline__ double narrow<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ float narrow<float>(double v) {
  return static_cast<float>(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(double v) {
  return __float2half_rn(static_cast<float>(v));
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(double v) {
  return __float2bfloat16_rn(static_cast<float>(v));
}

__device__ __forceinline__ bool is_finite(float v) {
  return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u;
}
__device__ __forceinline__ bool is_finite(double v) {
  return v - v == 0;
}

// One element of a type known at run time only: for what is read or written seldom.
__device__ __forceinline__ double load(const void* data, Float type, std::int64_t at) {
  switch (type) {
    case Float::float32:
      return static_cast<const float*>(data)[at];
    case Float::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(data)[at]);
    case Float::float16:
      return widen(static_cast<const __half*>(data)[at]);
    default:
      return static_cast<const double*>(data)[at];
  }
}
__device__ __forceinline__ void store(void* data, Float type, std::int64_t at, double value) {
  switch (type) {
    case Float::float32:
      static_cast<float*>(data)[at] = narrow<float>(value);
      break;
    case Float::bfloat16:
      static_cast<__nv_bfloat16*>(data)[at] = narrow<__nv_bfloat16>(value);
      break;
    case Float::float16:
      static_cast<__half*>(data)[at] = narrow<__half>(value);
      break;
    default:
      static_cast<double*>(data)[at] = value;
  }
}

// What distances, losses and sums of X and C are stored in: float64 if either is, else float32.
template <class X, class C>
struct WorkingOf {
  using type = float;
};
template <class X>
struct WorkingOf<X, double> {
  using type = double;
};
template <class C>
struct WorkingOf<double, C> {
  using type = double;
};
template <>
struct WorkingOf<double, double> {
  using type = double;
};
template <class X, class C>
using Working = typename WorkingOf<X, C>::type;

// ---- vectors ------------------------------------------------------------------------------------------------------

// V neighbours, moved 16 bytes at a time where they are as many.
template <class T, int V>
struct alignas(V * sizeof(T) >= 16 ? 16 : V * sizeof(T)) Vector {
  T values[V];
};

template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* at) {
  if constexpr (V == 1) {
    return {{*at}};
  } else {
    return *reinterpret_cast<const Vector<T, V>*>(at);
  }
}

// How many neighbours fill 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Whether rows of D elements can be read V at a time.
template <class T>
bool in_vectors(const Rows& rows, std::int64_t D, int V) {
  const auto whole = [&](std::int64_t stride) { return stride % V == 0; };
  return rows.dim == 1 && whole(D) && whole(rows.head) && whole(rows.outer) && whole(rows.step) &&
         reinterpret_cast<std::uintptr_t>(rows.data) % alignof(Vector<T, kVector<T>>) == 0;
}

// ---- sums ---------------------------------------------------------------------------------------------------------

// The sum over the lanes of a warp, in a fixed order; lane 0 gets it.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  return value;
}

// The sum over the threads of a block of Threads, in an order that depends on nothing else; thread 0 gets it.
// `parts` is shared memory for Threads / 32 numbers.
template <int Threads>
__device__ __forceinline__ double block_sum(double value, double* parts) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < Threads / 32; ++warp) total += parts[warp];
  }
  return total;
}

// How many elements the mean of a loss runs over, at least 1; `kept` is how many rows a mask keeps, or nullptr.
__device__ __forceinline__ double elements(const std::int64_t* kept, std::int64_t all_rows, int D) {
  const std::int64_t count = (kept ? *kept : all_rows) * D;
  return static_cast<double>(count > 1 ? count : 1);
}

// ---- dispatch, on the host ------------------------------------------------------------------------------------------

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void dispatch(Float type, F&& f) {
  switch (type) {
    case Float::float32:
      return f(Tag<float>());
    case Float::bfloat16:
      return f(Tag<__nv_bfloat16>());
    case Float::float16:
      return f(Tag<__half>());
    case Float::float64:
      return f(Tag<double>());
  }
}

// Codes come as x does, in float32 or in float64; what is neither is widened by the caller, which loses nothing.
template <class F>
void dispatch(Float x, Float codes, F&& f) {
  dispatch(x, [&](auto tag) {
    using X = typename decltype(tag)::type;
    if (codes == x) return f(Tag<X>(), Tag<X>());
    if constexpr (sizeof(X) < 4) {
      if (codes == Float::float32) return f(Tag<X>(), Tag<float>());
    }
    if constexpr (sizeof(X) < 8) {
      if (codes == Float::float64) return f(Tag<X>(), Tag<double>());
    }
    throw std::invalid_argument("codes of a type that does not go with x");
  });
}

inline cudaStream_t stream_of(std::uintptr_t stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

}  // namespace fastvq
