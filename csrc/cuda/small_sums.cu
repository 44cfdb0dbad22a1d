// Sums by code where all of them fit shared memory, of rows or of what is left of them without their codes: one pass
// over the rows, nothing sorted.
//
// A block takes kBlockRows rows, tile by tile. Each warp owns the codes that leave its number over when divided by 32,
// finds their rows in a tile by ballot and adds them in row order, so no two warps touch a sum and no order depends on
// the device. The sums of several blocks are added in their order by a second kernel.

#include <algorithm>

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

constexpr int kWarps = 32, kThreads = 32 * kWarps;  // one block a multiprocessor: for two ptxas would spill
constexpr std::int64_t kBlockRows = 8192;
constexpr std::size_t kShared = 99 * 1024;  // what every architecture gives a block

// Rows of a tile: as many as 8192 elements are, between a warp's and half a block's.
int tile_of(int D) {
  return std::clamp(8192 / D / 32 * 32, 32, kThreads / 2);
}

std::size_t shared_bytes(std::int64_t K, int D, std::size_t element) {
  return static_cast<std::size_t>(K) * (D * sizeof(double) + sizeof(int)) + tile_of(D) * (D * element + sizeof(int));
}

// What is added to a sum: an element of the row,
template <class X>
struct Element {
  __device__ void begin(std::int64_t) {}
  __device__ __forceinline__ double of(X value, std::int64_t, int, int) const { return widen(value); }
};

// or its difference from the code's, scaled; that is written down too where `rest` (H, N, D) is not null.
template <class X, class C>
struct Difference {
  Rows codes;
  const std::int64_t* kept;
  const void* grad_loss;
  Float loss_type;
  std::int64_t all_rows;
  int D;
  Working<X, C>* rest;
  double scale;
  const C* book;  // of this head

  __device__ void begin(std::int64_t head) {
    scale = 2 * load(grad_loss, loss_type, 0) / elements(kept, all_rows, D);
    book = static_cast<const C*>(codes.data) + head * codes.head;
  }
  __device__ __forceinline__ double of(X value, std::int64_t row, int code, int column) const {
    using W = Working<X, C>;
    const C own = book[code * codes.outer + column * codes.dim];
    if (rest) rest[row * D + column] = narrow<W>(widen(value)) - narrow<W>(widen(own));
    return (widen(value) - widen(own)) * scale;
  }
};

// Where sums go: (H, K, D) times `factor`, heads `stride` apart; counts (H, K) unless nullptr; sums of several blocks
// to `parts` (H, blocks, K, D + 1).
struct Target {
  void *counts, *sums;
  std::int64_t stride;
  Float type;
  double factor;
  double* parts;

  // Sum i of a head's K D, or the count that follows them.
  __device__ __forceinline__ void put(std::int64_t head, int i, int K, int D, double total) const {
    if (i < K * D) {
      store(sums, type, head * stride + i, factor * total);
    } else if (counts) {
      store(counts, type, head * K + i - K * D, total);
    }
  }
};

// Indices (H, N, Q), of which one a row is taken. Grid (blocks, H); with one block a head its sums are final.
template <class X, class TERM>
__global__ void __launch_bounds__(kThreads, 1)
    small_sums_kernel(Rows x, const std::int64_t* indices, std::int64_t Q, const std::uint8_t* mask, int K, int D,
                      int tile, bool checked, TERM term, Target target) {
  double* total = dynamic_shared<double>();
  X* values = reinterpret_cast<X*>(total + K * D);  // a multiple of 32 of them
  int* codes = reinterpret_cast<int*>(values + tile * D);
  int* count = codes + tile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t head = blockIdx.y, N = x.count;
  const std::int64_t first = blockIdx.x * kBlockRows, last = min(first + kBlockRows, N);
  term.begin(head);
  for (int i = threadIdx.x; i < K * D; i += kThreads) total[i] = 0;
  for (int i = threadIdx.x; i < K; i += kThreads) count[i] = 0;
  for (std::int64_t start = first; start < last; start += tile) {
    const int here = static_cast<int>(min(static_cast<std::int64_t>(tile), last - start));
    __syncthreads();  // until the last tile is used up
    if (static_cast<int>(threadIdx.x) < tile) {
      int code = -1;
      if (static_cast<int>(threadIdx.x) < here) {
        const std::int64_t row = head * N + start + threadIdx.x, index = indices[row * Q];
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
          const X value = values[(base + from) * D + column];
          total[owner * D + column] += term.of(value, head * N + start + base + from, owner, column);
        }
        if (lane == 0) ++count[owner];
      }
    }
  }
  __syncthreads();
  double* part = target.parts + (head * gridDim.x + blockIdx.x) * static_cast<std::int64_t>(K) * (D + 1);
  for (int i = threadIdx.x; i < K * (D + 1); i += kThreads) {
    const double found = i < K * D ? total[i] : count[i - K * D];
    if (gridDim.x == 1) {
      target.put(head, i, K, D, found);
    } else {
      part[i] = found;
    }
  }
}

// Grid (blocks of kThreads sums and counts, H).
__global__ void __launch_bounds__(kThreads, 1) add_parts_kernel(int blocks, int K, int D, Target target) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x), all = K * (D + 1);
  if (i >= all) return;
  const std::int64_t head = blockIdx.y;
  double total = 0;
  for (int block = 0; block < blocks; ++block) {
    total += target.parts[(head * blocks + block) * static_cast<std::int64_t>(all) + i];
  }
  target.put(head, i, K, D, total);
}

template <class X, class TERM>
void start(const Rows& x, const std::int64_t* indices, std::int64_t Q, const std::uint8_t* mask, std::int64_t heads,
           std::int64_t K, int D, bool checked, const TERM& term, const Target& target, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(small_sums_parts(x.count, K, D, sizeof(X)));
  const int codes = static_cast<int>(K);
  launch(small_sums_kernel<X, TERM>, dim3(blocks, static_cast<unsigned>(heads)), kThreads,
         shared_bytes(K, D, sizeof(X)), stream, x, indices, Q, mask, codes, D, tile_of(D), checked, term, target);
  if (blocks == 1) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(codes * (D + 1), kThreads)), static_cast<unsigned>(heads));
  launch(add_parts_kernel, grid, kThreads, 0, stream, static_cast<int>(blocks), codes, D, target);
}

}  // namespace

std::int64_t small_sums_parts(std::int64_t N, std::int64_t K, int D, int element_bytes) {
  if (K > static_cast<std::int64_t>(kShared) || D > 8192 || shared_bytes(K, D, element_bytes) > kShared) return 0;
  return std::max<std::int64_t>(1, ceil_div(N, kBlockRows));
}

void small_sums(const Rows& x, const std::int64_t* indices, const std::uint8_t* mask, std::int64_t heads,
                std::int64_t K, int D, bool checked, void* counts, void* sums, Float type, double* parts,
                std::uintptr_t stream) {
  dispatch(x.type, [&](auto tag) {
    using X = typename decltype(tag)::type;
    const Target target = {counts, sums, K * D, type, 1.0, parts};
    start<X>(x, indices, 1, mask, heads, K, D, checked, Element<X>(), target, stream_of(stream));
  });
}

void small_differences(const Rows& x, const Rows& codes, const std::int64_t* indices, std::int64_t Q,
                       const std::uint8_t* mask, const std::int64_t* kept, const void* grad_loss, Float loss_type,
                       std::int64_t heads, std::int64_t K, int D, double factor, void* sums, std::int64_t stride_sums,
                       Float type, double* parts, void* rest, std::uintptr_t stream) {
  dispatch(x.type, codes.type, [&](auto x_tag, auto code_tag) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    const Difference<X, C> term = {
        codes, kept, grad_loss, loss_type, heads * x.count, D, static_cast<Working<X, C>*>(rest), 0, nullptr};
    const Target target = {nullptr, sums, stride_sums, type, factor, parts};
    start<X>(x, indices, Q, mask, heads, K, D, false, term, target, stream_of(stream));
  });
}

}  // namespace fastvq
