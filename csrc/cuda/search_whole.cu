// Every code by the contract, in float64: right for every input, and slow.

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;  // of a block, scored together: each code is read once for all of them

// What is minimised, and whose it is.
struct Best {
  double score;
  std::int64_t code;
};

// The smaller score; of equal ones the smaller code.
__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  return b.score < a.score || (b.score == a.score && b.code < a.code) ? b : a;
}

// Grid (row blocks, H).
template <class X, class C>
__global__ void __launch_bounds__(kThreads)
    search_whole_kernel(Rows x, Rows codes, int D, bool euclidean, std::int64_t* indices, void* distances, Float type) {
  __shared__ double scores[kRows][kThreads / 32];
  __shared__ std::int64_t winners[kRows][kThreads / 32];
  const std::int64_t head = blockIdx.y, first = static_cast<std::int64_t>(blockIdx.x) * kRows;
  const X* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = static_cast<const X*>(x.data) + x.offset(head, min(first + r, x.count - 1));
  }
  Best best[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = {INFINITY, 0};
  for (std::int64_t k = threadIdx.x; k < codes.count; k += kThreads) {
    const C* code = static_cast<const C*>(codes.data) + codes.offset(head, k);
    double score[kRows] = {};
    for (int d = 0; d < D; ++d) {
      const double c = widen(code[d * codes.dim]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const double value = widen(rows[r][d * x.dim]);
        const double difference = __dsub_rn(value, c);
        const double term = euclidean ? __dmul_rn(difference, difference) : __dmul_rn(value, c);
        score[r] = __dadd_rn(score[r], term);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const double least = euclidean ? score[r] : -score[r];
      best[r] = better(best[r], {isnan(least) ? INFINITY : least, k});
    }
  }
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const Best other = {__shfl_down_sync(kAllLanes, best[r].score, distance),
                          __shfl_down_sync(kAllLanes, best[r].code, distance)};
      best[r] = better(best[r], other);
    }
    if (threadIdx.x % 32 == 0) scores[r][warp] = best[r].score, winners[r][warp] = best[r].code;
  }
  __syncthreads();
  const std::int64_t n = first + threadIdx.x;
  if (threadIdx.x >= kRows || n >= x.count) return;
  Best nearest = {INFINITY, 0};
  for (int w = 0; w < kThreads / 32; ++w) nearest = better(nearest, {scores[threadIdx.x][w], winners[threadIdx.x][w]});
  indices[head * x.count + n] = nearest.code;
  if (!distances) return;
  // Once more for the winner: what was kept stands for NaN too.
  const X* row = static_cast<const X*>(x.data) + x.offset(head, n);
  const C* code = static_cast<const C*>(codes.data) + codes.offset(head, nearest.code);
  double distance = 0;
  for (int d = 0; d < D; ++d) {
    const double value = widen(row[d * x.dim]), c = widen(code[d * codes.dim]), difference = __dsub_rn(value, c);
    distance = __dadd_rn(distance, euclidean ? __dmul_rn(difference, difference) : __dmul_rn(value, c));
  }
  store(distances, type, head * x.count + n, distance);
}

}  // namespace

void search_whole(const Rows& x, const Rows& codes, std::int64_t heads, int D, bool euclidean, std::int64_t* indices,
                  void* distances, Float type, std::uintptr_t stream) {
  dispatch(x.type, codes.type, [&](auto x_tag, auto code_tag) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(x.count, kRows)), static_cast<unsigned>(heads));
    launch(search_whole_kernel<X, C>, grid, kThreads, 0, stream_of(stream), x, codes, D, euclidean, indices, distances,
           type);
  });
}

}  // namespace fastvq
