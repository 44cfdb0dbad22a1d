// What csrc/cuda/ptx.h wraps, in C++: fragments as the PTX manual lays them out, lane by lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastvq::ptx {

struct MmaIn {
  std::uint32_t a[4], b[2];
};
struct MmaOut {
  float d[4];
};

template <class T>
float element(std::uint32_t pair, int high) {
  const auto bits = static_cast<unsigned short>(high ? pair >> 16 : pair & 0xffffu);
  if constexpr (sizeof(T) == sizeof(__half) && std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(bits));
  else
    return __bfloat162float(__ushort_as_bfloat16(bits));
}

// The products are exact in float64, their sum is rounded there and once more to float32: a unit that loses nothing.
template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T) {
  MmaIn in;
  for (int i = 0; i < 4; ++i) in.a[i] = a[i];
  for (int i = 0; i < 2; ++i) in.b[i] = b[i];
  const auto out = shim::collective<MmaOut>("mma.sync", 0xffffffffu, in, [](const MmaIn* const* lanes, int lane) {
    MmaOut result;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        const MmaIn& of_a = *lanes[4 * (row % 8) + k % 8 / 2];
        const MmaIn& of_b = *lanes[4 * column + k % 8 / 2];
        sum += static_cast<double>(element<T>(of_a.a[row / 8 + 2 * (k / 8)], k % 2)) * element<T>(of_b.b[k / 8], k % 2);
      }
      result.d[i] = static_cast<float>(sum);
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) c[i] += out.d[i];
}

struct LdmatrixOut {
  std::uint32_t r[4];
};

inline void ldmatrix(std::uint32_t (&r)[4], const void* row) {
  shim::check_aligned(row, 16, "ldmatrix");
  const auto out =
      shim::collective<LdmatrixOut>("ldmatrix", 0xffffffffu, row, [](const void* const* const* rows, int lane) {
        LdmatrixOut result;
        for (int i = 0; i < 4; ++i) {
          const auto* source = static_cast<const char*>(*rows[8 * i + lane / 4]) + 4 * (lane % 4);
          std::memcpy(&result.r[i], source, 4);
        }
        return result;
      });
  for (int i = 0; i < 4; ++i) r[i] = out.r[i];
}

inline void copy_async(void* target, const void* source) {
  shim::async_copy(target, source, 16, 16);
}
inline void copy_commit() {
  shim::async_commit();
}
template <int Pending>
void copy_wait() {
  shim::async_wait(Pending);
}

inline unsigned thread_again() {
  return threadIdx.x;
}
inline unsigned block_again() {
  return blockIdx.x;
}

}  // namespace fastvq::ptx
