// Rows sorted by code, in row order: one radix sort, CUB's, for all problems (a head, or a head and stage).
//
// The problem's number stands above the bits of its codes. 1024 codes and what is left out take 11 bits; CUB sorts 8 in
// a pass, so 32 problems fit what two passes leave over, where a sort for each would be eight launches for each. Keys
// have 32 bits: before sm_90 CUB takes three kernels a pass for narrower ones.

#include <cub/device/device_radix_sort.cuh>

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

using Number = std::uint32_t;
using Buffers = cub::DoubleBuffer<Number>;

constexpr int kThreads = 256;

// Grid (row blocks, H * Q).
__global__ void __launch_bounds__(kThreads)
    key_kernel(const std::int64_t* indices, const std::uint8_t* mask, std::int64_t N, std::int64_t K, std::int64_t Q,
               int bits, bool checked, Number* keys, Number* order) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= N) return;
  const std::int64_t problem = blockIdx.y, head = problem / Q;
  const std::int64_t index = indices[(head * N + row) * Q + problem % Q];
  if (checked && index >= K) __trap();
  const bool keep = index >= 0 && index < K && (!mask || mask[head * N + row]);
  keys[problem * N + row] = static_cast<Number>(problem << bits | (keep ? index : K));
  order[problem * N + row] = static_cast<Number>(row);
}

// The first place of each code, by bisection. Grid (code blocks, H * Q).
__global__ void __launch_bounds__(kThreads)
    starts_kernel(const Number* keys, std::int64_t N, std::int64_t K, int bits, std::int64_t* starts) {
  const std::int64_t code = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x, problem = blockIdx.y;
  if (code > K) return;
  const Number key = static_cast<Number>(problem << bits | code);
  std::int64_t low = 0, high = N;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (keys[problem * N + middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  starts[problem * (K + 1) + code] = low;
}

// Without scratch, how much of it is needed.
void radix_sort(void* scratch, std::size_t& scratch_bytes, Buffers& keys, Buffers& order, std::int64_t problems,
                std::int64_t N, std::int64_t K, std::uintptr_t stream) {
  const int bits = code_bits(K) + (problems > 1 ? code_bits(problems - 1) : 0);
  check(cub::DeviceRadixSort::SortPairs(scratch, scratch_bytes, keys, order, static_cast<Number>(problems * N), 0, bits,
                                        stream_of(stream)));
}

}  // namespace

std::size_t sort_scratch(std::int64_t problems, std::int64_t N, std::int64_t K, std::uintptr_t stream) {
  std::size_t bytes = 0;
  Buffers keys, order;
  radix_sort(nullptr, bytes, keys, order, problems, N, K, stream);
  return bytes;
}

int sort_rows(const std::int64_t* indices, const std::uint8_t* mask, std::int64_t heads, std::int64_t N, std::int64_t Q,
              std::int64_t K, bool checked, std::uint32_t* keys, std::uint32_t* order, std::int64_t* starts,
              void* scratch, std::size_t scratch_bytes, std::uintptr_t stream) {
  const std::int64_t problems = heads * Q, all = problems * N;
  const int bits = code_bits(K);
  const auto grid = [&](std::int64_t threads) {
    return dim3(static_cast<unsigned>(ceil_div<std::int64_t>(threads, kThreads)), static_cast<unsigned>(problems));
  };
  Buffers key_buffers(keys, keys + all), order_buffers(order, order + all);
  launch(key_kernel, grid(N), kThreads, 0, stream_of(stream), indices, mask, N, K, Q, bits, checked, keys, order);
  radix_sort(scratch, scratch_bytes, key_buffers, order_buffers, problems, N, K, stream);
  launch(starts_kernel, grid(K + 1), kThreads, 0, stream_of(stream), key_buffers.Current(), N, K, bits, starts);
  return key_buffers.selector;
}

}  // namespace fastvq
