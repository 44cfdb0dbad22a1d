// Counts and sums of the rows of each code where all of them fit shared memory: one pass over the rows, nothing sorted.
//
// A block takes kBlockRows rows, tile by tile. Each warp owns the codes that leave its number over when divided by 32,
// finds their rows in a tile by ballot and adds them in row order, so no two warps touch a sum and no order depends on
// the device. The sums of several blocks are added in their order by a second kernel.

#include <algorithm>

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

constexpr int kWarps = 32, kThreads = 32 * kWarps;
constexpr std::int64_t kBlockRows = 8192;
constexpr std::size_t kShared = 99 * 1024;  // what every architecture gives a block

// Rows of a tile: as many as 8192 elements are, between a warp's and half a block's.
int tile_of(int D) {
  return std::clamp(8192 / D / 32 * 32, 32, kThreads / 2);
}

std::size_t shared_bytes(std::int64_t K, int D, std::size_t element) {
  return static_cast<std::size_t>(K) * (D * sizeof(double) + sizeof(int)) + tile_of(D) * (D * element + sizeof(int));
}

// Grid (blocks, H). With one block a head counts and sums are final, else `parts` takes (H, blocks, K, D + 1) float64.
template <class X>
__global__ void __launch_bounds__(kThreads)
    small_sums_kernel(Rows x, const std::int64_t* indices, const std::uint8_t* mask, int K, int D, int tile,
                      bool checked, void* counts, void* sums, Float type, double* parts) {
  double* total = dynamic_shared<double>();
  X* values = reinterpret_cast<X*>(total + K * D);  // a multiple of 32 of them
  int* codes = reinterpret_cast<int*>(values + tile * D);
  int* count = codes + tile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t head = blockIdx.y, N = x.count;
  const std::int64_t first = blockIdx.x * kBlockRows, last = min(first + kBlockRows, N);
  for (int i = threadIdx.x; i < K * D; i += kThreads) total[i] = 0;
  for (int i = threadIdx.x; i < K; i += kThreads) count[i] = 0;
  for (std::int64_t start = first; start < last; start += tile) {
    const int here = static_cast<int>(min(static_cast<std::int64_t>(tile), last - start));
    __syncthreads();  // until the last tile is used up
    if (static_cast<int>(threadIdx.x) < tile) {
      int code = -1;
      if (static_cast<int>(threadIdx.x) < here) {
        const std::int64_t row = head * N + start + threadIdx.x, index = indices[row];
        if (checked && index >= K) __trap();
        if (index >= 0 && index < K && (!mask || mask[row])) code = static_cast<int>(index);
      }
      codes[threadIdx.x] = code;
    }
    for (int i = threadIdx.x; i < here * D; i += kThreads) {
      const int row = i / D, column = i - row * D;
      values[i] = static_cast<const X*>(x.data)[x.offset(head, start + row) + column * x.dim];
    }
    __syncthreads();
    for (int base = 0; base < tile; base += 32) {
      const int code = codes[base + lane];
      unsigned mine = __ballot_sync(kAllLanes, code >= 0 && code % kWarps == warp);
      for (; mine; mine &= mine - 1) {
        const int from = __ffs(mine) - 1, owner = __shfl_sync(kAllLanes, code, from);
        for (int column = lane; column < D; column += 32) {
          total[owner * D + column] += widen(values[(base + from) * D + column]);
        }
        if (lane == 0) ++count[owner];
      }
    }
  }
  __syncthreads();
  if (gridDim.x == 1) {
    for (int i = threadIdx.x; i < K * D; i += kThreads) store(sums, type, head * K * D + i, total[i]);
    for (int i = threadIdx.x; i < K; i += kThreads) store(counts, type, head * K + i, count[i]);
  } else {
    double* part = parts + (head * gridDim.x + blockIdx.x) * static_cast<std::int64_t>(K) * (D + 1);
    for (int i = threadIdx.x; i < K * D; i += kThreads) part[i] = total[i];
    for (int i = threadIdx.x; i < K; i += kThreads) part[K * D + i] = count[i];
  }
}

// Grid (blocks of kThreads sums and counts, H).
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const double* parts, int blocks, int K, int D, void* counts, void* sums, Float type) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x), all = K * (D + 1);
  if (i >= all) return;
  const std::int64_t head = blockIdx.y;
  double total = 0;
  for (int block = 0; block < blocks; ++block) {
    total += parts[(head * blocks + block) * static_cast<std::int64_t>(all) + i];
  }
  if (i < K * D) {
    store(sums, type, head * K * D + i, total);
  } else {
    store(counts, type, head * K + i - K * D, total);
  }
}

}  // namespace

std::int64_t small_sums_parts(std::int64_t N, std::int64_t K, int D, int element_bytes) {
  if (K > static_cast<std::int64_t>(kShared) || D > 8192 || shared_bytes(K, D, element_bytes) > kShared) return 0;
  return std::max<std::int64_t>(1, ceil_div(N, kBlockRows));
}

void small_sums(const Rows& x, const std::int64_t* indices, const std::uint8_t* mask, std::int64_t heads,
                std::int64_t K, int D, bool checked, void* counts, void* sums, Float type, double* parts,
                std::uintptr_t stream) {
  const int element_bytes = x.type == Float::float64 ? 8 : x.type == Float::float32 ? 4 : 2;
  const unsigned blocks = static_cast<unsigned>(small_sums_parts(x.count, K, D, element_bytes));
  const int codes = static_cast<int>(K);
  dispatch(x.type, [&](auto tag) {
    using X = typename decltype(tag)::type;
    launch(small_sums_kernel<X>, dim3(blocks, static_cast<unsigned>(heads)), kThreads, shared_bytes(K, D, sizeof(X)),
           stream_of(stream), x, indices, mask, codes, D, tile_of(D), checked, counts, sums, type, parts);
  });
  if (blocks == 1) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(codes * (D + 1), kThreads)), static_cast<unsigned>(heads));
  launch(add_parts_kernel, grid, kThreads, 0, stream_of(stream), parts, static_cast<int>(blocks), codes, D, counts,
         sums, type);
}

}  // namespace fastvq
