// The vectors of one instruction set, as GCC and Clang vector types; everything here is private to its file.

#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastvq {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kWide = kLanes / 2;  // doubles in a vector

typedef float FloatVector __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVector __attribute__((vector_size(kLanes * 4)));
typedef float HalfVector __attribute__((vector_size(kWide * 4)));
typedef double DoubleVector __attribute__((vector_size(kLanes * 4)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first `count` values at p, zeros after them.
inline FloatVector load_some(const float* p, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  FloatVector v = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

inline FloatVector broadcast(float v) {
  return v - FloatVector{};
}
inline IntVector broadcast(std::int32_t v) {
  return v - IntVector{};
}
inline DoubleVector broadcast(double v) {
  return v - DoubleVector{};
}
inline DoubleVector load_wide(const float* p) {
#if defined(__AVX512F__)  // gcc 12 converts in halves
  return _mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
  return __builtin_convertvector(load<HalfVector>(p), DoubleVector);
#endif
}
inline HalfVector narrow_half(DoubleVector v) {
#if defined(__AVX512F__)
  return _mm512_cvtpd_ps(v);
#else
  return __builtin_convertvector(v, HalfVector);
#endif
}
inline DoubleVector load_wide(const double* p) {
  return load<DoubleVector>(p);
}

// acc - x * c: fused where the machine can, and then rounded once.
inline FloatVector subtract_product(FloatVector acc, FloatVector x, FloatVector c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(x, c, acc);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(x, c, acc);
#elif defined(__ARM_NEON)
  return vfmsq_f32(acc, x, c);
#else
  return acc - x * c;
#endif
}

// Eight floats: a value for each code of a group.
#if defined(__AVX2__) && !defined(__AVX512F__)
typedef FloatVector GroupVector;
#else
typedef float GroupVector __attribute__((vector_size(32)));
inline GroupVector subtract_product(GroupVector acc, GroupVector x, GroupVector c) {
#if defined(__AVX512F__)
  return _mm256_fnmadd_ps(x, c, acc);
#else
  return acc - x * c;
#endif
}
#endif

inline FloatVector smaller(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline FloatVector larger(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline FloatVector magnitude(FloatVector v) {
  return reinterpret_cast<FloatVector>(reinterpret_cast<IntVector>(v) & 0x7fffffff);
}

// One bit a lane: a <= b.
inline unsigned not_above(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmple_ps(a, b)));
#else
  unsigned mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<unsigned>(a[l] <= b[l]) << l;
  return mask;
#endif
}

// One bit a code of a group: score <= limit.
inline unsigned group_not_above(const float* scores, float limit) {
#if defined(__AVX2__)
  return static_cast<unsigned>(
      _mm256_movemask_ps(_mm256_cmp_ps(load<GroupVector>(scores), _mm256_set1_ps(limit), _CMP_LE_OQ)));
#else
  unsigned mask = 0;
  for (int j = 0; j < 8; ++j) mask |= static_cast<unsigned>(scores[j] <= limit) << j;
  return mask;
#endif
}

inline float smallest(GroupVector v) {
  typedef std::int32_t Index __attribute__((vector_size(32)));
  const GroupVector a = __builtin_shuffle(v, Index{4, 5, 6, 7, 0, 1, 2, 3});
  v = a < v ? a : v;
  const GroupVector b = __builtin_shuffle(v, Index{2, 3, 0, 1, 6, 7, 4, 5});
  v = b < v ? b : v;
  return v[1] < v[0] ? v[1] : v[0];
}

}  // namespace
}  // namespace fastvq
