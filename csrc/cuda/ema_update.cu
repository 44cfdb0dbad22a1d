// The codebook follows its moving averages, in place.
//
// Two kernels: the smoothing needs the total of a head before its first code can be written, and the sizes that the
// total is made of are overwritten, so no block may take it from them while another writes.

#include <algorithm>

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockCodes = 1024;     // whose sizes a block adds: fixed, and with it the order of the total
constexpr int kBlockElements = 2048;  // that a block updates

__device__ __forceinline__ double moved(double decay, double old, double fresh) {
  return decay * old + (1 - decay) * fresh;
}

// Grid (blocks, H).
__global__ void __launch_bounds__(kThreads)
    total_kernel(Matrix size, Matrix counts, double decay, std::int64_t K, double* totals) {
  __shared__ double parts[kThreads / 32];
  const std::int64_t head = blockIdx.y, first = static_cast<std::int64_t>(blockIdx.x) * kBlockCodes;
  const std::int64_t last = min(first + kBlockCodes, K);
  double total = 0;
  for (std::int64_t k = first + threadIdx.x; k < last; k += kThreads) {
    total += moved(decay, load(size.data, size.type, head * size.head + k * size.row),
                   load(counts.data, counts.type, head * counts.head + k * counts.row));
  }
  total = block_sum<kThreads>(total, parts);
  if (threadIdx.x == 0) totals[head * gridDim.x + blockIdx.x] = total;
}

// Grid (blocks of `codes` codes, H).
__global__ void __launch_bounds__(kThreads)
    update_kernel(Matrix codebook, Matrix size, Matrix average, Matrix counts, Matrix sums, double decay, double eps,
                  std::int64_t K, int D, int codes, const double* totals, int blocks) {
  __shared__ double parts[kThreads / 32];
  __shared__ double shared_total;
  __shared__ double smoothed[kBlockElements];
  const std::int64_t head = blockIdx.y, first = static_cast<std::int64_t>(blockIdx.x) * codes;
  double total = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) total += totals[head * blocks + i];
  total = block_sum<kThreads>(total, parts);
  if (threadIdx.x == 0) shared_total = total;
  __syncthreads();
  total = shared_total;

  const int here = static_cast<int>(min(static_cast<std::int64_t>(codes), K - first));
  for (int i = threadIdx.x; i < here; i += kThreads) {
    const std::int64_t at = head * size.head + (first + i) * size.row;
    const double fresh = load(counts.data, counts.type, head * counts.head + (first + i) * counts.row);
    const double now = moved(decay, load(size.data, size.type, at), fresh);
    store(size.data, size.type, at, now);
    smoothed[i] = (now + eps) / (total + K * eps) * total;
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < static_cast<std::int64_t>(here) * D; i += kThreads) {
    const int code = static_cast<int>(i / D), column = static_cast<int>(i - static_cast<std::int64_t>(code) * D);
    const auto place = [&](const Matrix& m) { return head * m.head + (first + code) * m.row + column * m.column; };
    const double now =
        moved(decay, load(average.data, average.type, place(average)), load(sums.data, sums.type, place(sums)));
    store(average.data, average.type, place(average), now);
    store(codebook.data, codebook.type, place(codebook), now / smoothed[code]);
  }
}

}  // namespace

std::int64_t ema_parts(std::int64_t K) {
  return ceil_div<std::int64_t>(K, kBlockCodes);
}

void ema_update(const Matrix& codebook, const Matrix& cluster_size, const Matrix& embed_avg, const Matrix& counts,
                const Matrix& sums, double decay, double eps, std::int64_t heads, std::int64_t K, int D, double* parts,
                std::uintptr_t stream) {
  const unsigned blocks = static_cast<unsigned>(ema_parts(K)), by_head = static_cast<unsigned>(heads);
  launch(total_kernel, dim3(blocks, by_head), kThreads, 0, stream_of(stream), cluster_size, counts, decay, K, parts);
  const int codes = std::max(1, kBlockElements / D);
  launch(update_kernel, dim3(static_cast<unsigned>(ceil_div<std::int64_t>(K, codes)), by_head), kThreads, 0,
         stream_of(stream), codebook, cluster_size, embed_avg, counts, sums, decay, eps, K, D, codes, parts,
         static_cast<int>(blocks));
}

}  // namespace fastvq
