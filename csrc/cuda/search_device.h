// What the kernels of the search share: rows where they lie, powers of two, the contract's arithmetic, the threshold.
// Names are those of docs/certified-search.md.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "device.h"
#include "search.h"

namespace fastvq {

constexpr float kFar = 1e38f;  // the score of what can never win: padding, and codes that are not finite
constexpr int kNobody = INT_MAX;
constexpr int kWhole = -2;     // in place of a code: the row needs every code scored
constexpr int kSample = 4096;  // codes that the frame is taken from: any frame is right, a good one certifies more

// What is known of a codebook, one a head; zeroed before the first kernel. Bits of floats that are not negative, in the
// units of the codes' scale but for `reach`.
struct CodebookFigures {
  unsigned reach;     // the largest distance from the centre along a dimension, of the codes that are sampled
  unsigned norm;      // of the operands
  unsigned residual;  // of the codes less their operands
  unsigned queued;    // rows that wait for the contract
};

__device__ __forceinline__ float inf() {
  return __int_as_float(0x7f800000);
}

// The power of two that takes a positive float32 to [2^8, 2^9), at most 2^100; 1 for zero, inf and NaN. Float16 then
// has a factor of 128 above for what was not sampled, and 22 binary orders below at full precision.
__device__ __forceinline__ float power_of_two(float largest) {
  const int exponent = __float_as_int(largest) >> 23 & 255;
  if (!(largest > 0) || exponent == 255) return 1.0f;
  return __int_as_float(min(262 - exponent, 227) << 23);
}

// 1 over what power_of_two gave, exactly.
__device__ __forceinline__ float reciprocal(float power) {
  return __int_as_float((254 << 23) - __float_as_int(power));
}

__device__ __forceinline__ float to_float(double v) {
  return static_cast<float>(v);
}
__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <class T>
__device__ __forceinline__ T rounded_to(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}
__device__ __forceinline__ std::uint32_t bits_of(__half v) {
  return __half_as_ushort(v);
}
__device__ __forceinline__ std::uint32_t bits_of(__nv_bfloat16 v) {
  return __bfloat16_as_ushort(v);
}

// Calls f with a null pointer to the type of rows that a screen takes.
template <class F>
__device__ __forceinline__ auto with_type(Float type, F f) {
  switch (type) {
    case Float::bfloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case Float::float16:
      return f(static_cast<const __half*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

__device__ __forceinline__ float load_float(const Rows& x, std::int64_t at) {
  return with_type(x.type, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return to_float(static_cast<const T*>(x.data)[at]);
  });
}

template <class T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Four {
  T v[4];
};

// Four values from p on, zero past `left` of them. WHOLE promises that they lie side by side and aligned, four or none
// of them inside; none is then read from `p - past`, where something is. No branch: what a loop loads is under way at
// once.
template <bool WHOLE, class T>
__device__ __forceinline__ float4 load_four(const T* p, std::int64_t stride, int left, std::int64_t past = 0) {
  float v[4];
  if constexpr (WHOLE) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(left > 0 ? p : p - past);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = left > 0 ? to_float(four.v[j]) : 0.0f;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = j < left ? to_float(p[j * stride]) : 0.0f;
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}

// A squared distance or a dot product with one dimension more, by the contract: each operation rounded on its own.
__device__ __forceinline__ double one_term(double sum, double x, double c, bool euclidean) {
  if (euclidean) x = c = __dsub_rn(x, c);
  return __dadd_rn(sum, __dmul_rn(x, c));
}

// The contract's squared distance or dot product of the row that starts at x.data[at].
template <class T>
__device__ __forceinline__ double canonical(const Rows& x, std::int64_t at, const T* code, int D, bool euclidean) {
  double sum = 0;
  for (int i = 0; i < D; ++i) {
    sum = one_term(sum, load(x.data, x.type, at + i * x.dim), widen(code[i]), euclidean);
  }
  return sum;
}

// What is minimised: NaN counts as infinite.
__device__ __forceinline__ double ranked(double score, bool euclidean) {
  if (!euclidean) score = -score;
  return score == score ? score : static_cast<double>(inf());
}

// An upper bound of the norm whose square was summed to `kept` and, with it, of the residual's: a sum of D squares errs
// by D 2^-24 of itself and by D 2^-149 where it underflows, the subtraction of the centre by 2^-24 of the result.
__device__ __forceinline__ float norm_bound(float kept, int D) {
  return sqrtf(kept) * (1 + D * 0x1p-22f) + D * 0x1p-74f;
}
__device__ __forceinline__ float residual_bound(float lost, float norm, int D) {
  return norm_bound(lost, D) + norm * 0x1p-22f;
}

// The screened score above which no code can win, given the smallest; all lengths in units of the codes' scale.
struct Certificate {
  int D;
  Operand operand;
  bool euclidean;
  float packing;  // what a packed score may have lost, of itself
  float slack;

  __device__ __forceinline__ float threshold(float best, float norm, float residual, float code_norm,
                                             float code_residual) const {
    const float both = norm + residual + code_norm + code_residual;
    const float canonical = D * 0x1p-49f * both * both;
    // A split operand has three products a dimension, the bias among them, and drops a fourth.
    const float terms = operand == Operand::split ? 3.0f * D + 3 : D;
    float product = norm * code_norm;
    float eta = D * 0x1p-120f;
    if (euclidean) {
      eta += (D + 4) * 0x1p-25f * code_norm * code_norm;
      if (operand == Operand::split) product += 0.5f * code_norm * code_norm;
    }
    eta += (1.25f * terms + 10) * 0x1p-23f * (operand == Operand::split ? 1.01f : 1.0f) * product;
    if (operand == Operand::split) eta += 0x1p-17f * norm * code_norm;
    const float size = fabsf(best);
    float width;
    if (euclidean) {
      const float delta = residual + code_residual;
      float squared = norm * norm + 2 * (best + eta + packing * size);
      squared += 0x1p-21f * (norm * norm + 2 * size);
      const float reach = sqrtf(squared < 0 ? 0.0f : squared);
      const float by_distance = 2 * delta * (reach + delta);
      const float by_score =
          2 * ((code_norm + norm + residual) * code_residual + residual * code_norm) + code_residual * code_residual;
      width = by_distance < by_score ? by_distance : by_score;
    } else {
      width = 2 * (norm * code_residual + residual * (code_norm + code_residual));
    }
    width = slack * (width + canonical + 2 * eta + 2 * packing * size);
    return best + width * (1 + 0x1p-10f) + 0x1p-21f * size;
  }
};

// The smallest, or the sum, among the four lanes of a quad.
__device__ __forceinline__ float quad_min(float v) {
  v = fminf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fminf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// Which dimension an operand's place (0 .. 15) in a step of 16 holds. A thread's four values of a row's fragment are
// then neighbours in memory; rows and codes agree on the order.
__host__ __device__ constexpr int dimension_at(int place) {
  const int half = place / 8, within = place % 8;
  return 4 * (within / 2) + 2 * half + within % 2;
}

// What a split operand multiplies at each dimension of its width: the high parts of row and code, the row's high with
// the code's low, the row's low with the code's high, and ones with the three parts of the bias.
enum class Part { high_high, high_low, low_high, bias, nothing };
struct SplitPlace {
  Part part;
  int dim;  // or which part of the bias
};
__device__ __forceinline__ SplitPlace split_place(int place, int D) {
  if (place < 3 * D) return {static_cast<Part>(place / D), place % D};
  return place < 3 * D + 3 ? SplitPlace{Part::bias, place - 3 * D} : SplitPlace{Part::nothing, 0};
}

}  // namespace fastvq
