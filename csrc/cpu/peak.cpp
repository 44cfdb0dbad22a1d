#include "peak.h"

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastvq {
namespace {

// Sums that do not wait for one another: more than the latency of a multiply-add times the units that do them, and few
// enough for sixteen registers.
constexpr int kSums = 12;

struct Loop {
  int operations;  // a round
  float (*run)(std::int64_t rounds, float value);
};

#if defined(__x86_64__)

__attribute__((target("avx512f"))) float multiply_add_avx512(std::int64_t rounds, float value) {
  const __m512 x = _mm512_set1_ps(value);
  __m512 s[kSums];
  for (int i = 0; i < kSums; ++i) s[i] = x;
  for (; rounds > 0; --rounds)
    for (int i = 0; i < kSums; ++i) s[i] = _mm512_fmadd_ps(s[i], x, x);
  for (int i = 1; i < kSums; ++i) s[0] = _mm512_add_ps(s[0], s[i]);
  return _mm512_cvtss_f32(s[0]);
}

__attribute__((target("avx2,fma"))) float multiply_add_avx2(std::int64_t rounds, float value) {
  const __m256 x = _mm256_set1_ps(value);
  __m256 s[kSums];
  for (int i = 0; i < kSums; ++i) s[i] = x;
  for (; rounds > 0; --rounds)
    for (int i = 0; i < kSums; ++i) s[i] = _mm256_fmadd_ps(s[i], x, x);
  for (int i = 1; i < kSums; ++i) s[0] = _mm256_add_ps(s[0], s[i]);
  return _mm256_cvtss_f32(s[0]);
}

#if defined(FASTVQ_HAS_AVX512VNNI)
// In assembly: gcc 12 spills the sums of the intrinsic. Whatever the registers hold will do.
float int8_dot_avx512(std::int64_t rounds, float value) {
  for (; rounds > 0; --rounds)
    asm volatile(".irp sum, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n\tvpdpbusd %%zmm0, %%zmm0, %%zmm\\sum\n\t.endr" ::
                     : "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
                       "xmm15");
  asm volatile("vzeroupper" ::: "xmm0");
  return value;
}
#endif

#elif defined(__ARM_NEON)

float multiply_add_neon(std::int64_t rounds, float value) {
  const float32x4_t x = vdupq_n_f32(value);
  float32x4_t s[kSums];
  for (int i = 0; i < kSums; ++i) s[i] = x;
  for (; rounds > 0; --rounds)
    for (int i = 0; i < kSums; ++i) s[i] = vfmaq_f32(x, s[i], x);
  for (int i = 1; i < kSums; ++i) s[0] = vaddq_f32(s[0], s[i]);
  return vgetq_lane_f32(s[0], 0);
}

#endif

// A product and a sum: what a machine without fused multiply-adds has.
float multiply_add_portable(std::int64_t rounds, float value) {
  typedef float Vector __attribute__((vector_size(16)));
  const Vector x = value - Vector{};
  Vector s[kSums];
  for (int i = 0; i < kSums; ++i) s[i] = x;
  for (; rounds > 0; --rounds)
    for (int i = 0; i < kSums; ++i) s[i] = s[i] * x + x;
  for (int i = 1; i < kSums; ++i) s[0] += s[i];
  return s[0][0];
}

Loop multiply_add_loop() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {kSums * 16 * 2, multiply_add_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {kSums * 8 * 2, multiply_add_avx2};
#elif defined(__ARM_NEON)
  return {kSums * 4 * 2, multiply_add_neon};
#endif
  return {kSums * 4 * 2, multiply_add_portable};
}

Loop int8_dot_loop() {
#if defined(FASTVQ_HAS_AVX512VNNI)
  if (__builtin_cpu_supports("avx512vnni")) return {kSums * 64 * 2, int8_dot_avx512};
#endif
  return {0, nullptr};
}

double operations(const Loop& loop, std::int64_t rounds, int threads) {
  if (!loop.run) return 0;
  parallel(threads, threads, [&](Tasks& tasks) {
    // The compiler must not know the value, nor that nobody wants the sum. Below 1, so that no sum grows.
    volatile float value = 0.5f;
    for (std::int64_t task; tasks.next(&task);) value = loop.run(rounds, value) < 0 ? 0.25f : 0.5f;
  });
  return static_cast<double>(loop.operations) * static_cast<double>(rounds) * threads;
}

}  // namespace

double float32_operations(std::int64_t rounds, int threads) {
  return operations(multiply_add_loop(), rounds, threads);
}

double int8_operations(std::int64_t rounds, int threads) {
  return operations(int8_dot_loop(), rounds, threads);
}

}  // namespace fastvq
