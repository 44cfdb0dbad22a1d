// float16 and its conversions: to nearest, ties to even, subnormals kept, NaN to NaN.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31u, fraction = h.bits & 1023u;
  if (exponent == 0) {
    const float tiny = std::ldexp(static_cast<float>(fraction), -24);
    return __uint_as_float(__float_as_uint(tiny) | sign);
  }
  return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float f) {
  const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned short rest;
  if (magnitude > 0x7f800000u) {
    return {0x7fff};  // a NaN, as NVIDIA's
  } else if (magnitude >= 0x477ff000u) {
    rest = 0x7c00;  // 65520 and beyond
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the unit is 2^-24: adding 0.5 leaves the rounded multiple of it in the low bits.
    rest = static_cast<unsigned short>(__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
  } else {
    rest = static_cast<unsigned short>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
  }
  return {static_cast<unsigned short>(sign | rest)};
}

inline __half __float2half(float f) {
  return __float2half_rn(f);
}
inline unsigned short __half_as_ushort(__half h) {
  return h.bits;
}
inline __half __ushort_as_half(unsigned short bits) {
  return {bits};
}
