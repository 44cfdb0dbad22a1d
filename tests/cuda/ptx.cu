// The wrappers of csrc/cuda/ptx.h against whole matrices, spread over the lanes as the PTX manual draws it.

#include <cstdio>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

namespace {

using fastvq::launch;

// Small integers: exact in either type, in every order of summation.
float a_at(int row, int column) {
  return static_cast<float>((row * 7 + column * 3) % 11 - 5);
}
float b_at(int row, int column) {
  return static_cast<float>((row * 5 + column * 2) % 9 - 4);
}

std::uint32_t bits(float v, __half) {
  return __half_as_ushort(__float2half_rn(v));
}
std::uint32_t bits(float v, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

template <class T>
void mma_kernel(float* c) {  // (16, 8)
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](float low, float high) { return bits(low, T{}) | bits(high, T{}) << 16; };
  std::uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i & 1), column = 2 * t + 8 * (i >> 1);
    a[i] = pair(a_at(row, column), a_at(row, column + 1));
  }
  for (int i = 0; i < 2; ++i) b[i] = pair(b_at(2 * t + 8 * i, g), b_at(2 * t + 8 * i + 1, g));
  float d[4] = {1, 2, 3, 4};
  fastvq::ptx::mma(d, a, b, T{});
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = d[i] - static_cast<float>(i + 1);
}

// Row r of matrix i holds 64 i + 8 r + 0 .. 7; the rows lie in shared memory from the last to the first.
void ldmatrix_kernel(std::uint32_t* r) {  // (32, 4)
  auto* shared = fastvq::dynamic_shared<std::uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared[8 * (31 - lane) + i] = static_cast<std::uint16_t>(8 * lane + i);
  __syncwarp();
  std::uint32_t found[4];
  fastvq::ptx::ldmatrix(found, shared + 8 * (31 - lane));
  for (int i = 0; i < 4; ++i) r[4 * lane + i] = found[i];
}

void copy_kernel(const float4* source, float4* target) {  // (64)
  auto* shared = fastvq::dynamic_shared<float4>();
  const int lane = static_cast<int>(threadIdx.x);
  fastvq::ptx::copy_async(shared + lane, source + lane);
  fastvq::ptx::copy_commit();
  fastvq::ptx::copy_async(shared + 32 + lane, source + 32 + lane);
  fastvq::ptx::copy_commit();
  fastvq::ptx::copy_wait<1>();
  target[lane] = shared[lane];
  fastvq::ptx::copy_wait<0>();
  target[32 + lane] = shared[32 + lane];
}

template <class T>
bool mma_is_right() {
  float c[16 * 8];
  launch(mma_kernel<T>, dim3(1), dim3(32), 0, nullptr, c);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a_at(row, k) * b_at(k, column);
      if (c[row * 8 + column] != sum) return false;
    }
  }
  return true;
}

bool ldmatrix_is_right() {
  std::uint32_t r[32 * 4];
  launch(ldmatrix_kernel, dim3(1), dim3(32), 512, nullptr, r);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const unsigned first = 64 * i + 8 * (lane / 4) + 2 * (lane % 4);
      if (r[4 * lane + i] != (first | (first + 1) << 16)) return false;
    }
  }
  return true;
}

bool copy_is_right() {
  alignas(16) float source[256], target[256] = {};
  for (int i = 0; i < 256; ++i) source[i] = static_cast<float>(i);
  launch(copy_kernel, dim3(1), dim3(32), 1024, nullptr, reinterpret_cast<const float4*>(source),
         reinterpret_cast<float4*>(target));
  return std::equal(source, source + 256, target);
}

}  // namespace

int main() {
  const bool right[] = {mma_is_right<__half>(), mma_is_right<__nv_bfloat16>(), ldmatrix_is_right(), copy_is_right()};
  const char* names[] = {"mma, float16", "mma, bfloat16", "ldmatrix", "cp.async"};
  int wrong = 0;
  for (int i = 0; i < 4; ++i) {
    if (!right[i]) std::printf("%s is wrong\n", names[i]), ++wrong;
  }
  return wrong;
}
