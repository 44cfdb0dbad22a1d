// Rows replaced by their codes, with the loss in two stages; and the gradient to the rows, in one pass.

#include <algorithm>

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;               // a multiprocessor, at least: left to itself ptxas aims higher, and spills
constexpr int kBlockElements = 8192;     // a block's share of the rows: 32 elements a thread
constexpr std::int64_t kParts = 65'536;  // partial sums of a head, at most

// Rows of a block; a function of the shape alone, and so is the order of the sum.
std::int64_t rows_of_block(std::int64_t N, int D) {
  const std::int64_t rows = std::max(1, kBlockElements / D);
  return std::max(rows, ceil_div(N, kParts));
}

// Walks a block's (row, piece) pairs, V neighbours a piece, a thread after the other; no division a step.
template <int V>
struct Walk {
  std::int64_t row, last;
  int piece, pieces, row_step, piece_step;

  __device__ __forceinline__ Walk(std::int64_t rows, std::int64_t N, int D) {
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * rows;
    last = min(first + rows, N);
    pieces = D / V;
    row_step = kThreads / pieces;
    piece_step = kThreads - row_step * pieces;
    const int skipped = static_cast<int>(threadIdx.x) / pieces;
    row = first + skipped;
    piece = static_cast<int>(threadIdx.x) - skipped * pieces;
  }
  __device__ __forceinline__ bool more() const { return row < last; }
  __device__ __forceinline__ void next() {
    row += row_step;
    piece += piece_step;
    if (piece >= pieces) piece -= pieces, ++row;
  }
};

template <class T>
__device__ __forceinline__ const T* address(const Rows& rows, std::int64_t head, std::int64_t row,
                                            std::int64_t column) {
  return static_cast<const T*>(rows.data) + rows.offset(head, row) + column * rows.dim;
}

// Which of a block's rows are not finite, a bit each in shared memory: a row is shared among threads.
struct NotFinite {
  std::uint32_t* bits;
  std::int64_t first;

  __host__ __device__ static std::int64_t words(std::int64_t rows) { return (rows + 31) / 32; }

  __device__ __forceinline__ void clear(std::int64_t rows) {
    for (std::int64_t word = threadIdx.x; word < words(rows); word += kThreads) bits[word] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(std::int64_t row) { atomicOr(&bits[(row - first) / 32], bit_of(row)); }
  __device__ __forceinline__ bool has(std::int64_t row) const { return bits[(row - first) / 32] & bit_of(row); }
  __device__ __forceinline__ std::uint32_t bit_of(std::int64_t row) const { return 1u << ((row - first) % 32); }
};

// Grid (blocks, H); to count, shared memory for NotFinite, and counts (H, K).
template <class X, class C, int V, bool Count>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(Rows x, Rows codes, const std::int64_t* indices, const std::uint8_t* mask, X* quantized, double* sums,
                  unsigned long long* counts, std::int64_t rows, std::int64_t K, int D) {
  __shared__ double parts[kThreads / 32];
  const std::int64_t head = blockIdx.y, N = x.count, first = static_cast<std::int64_t>(blockIdx.x) * rows;
  NotFinite not_finite = {dynamic_shared<std::uint32_t>(), first};
  if constexpr (Count) not_finite.clear(rows);
  double squares = 0;
  for (Walk<V> at(rows, N, D); at.more(); at.next()) {
    const std::int64_t row = head * N + at.row, column = at.piece * V;
    const auto code = load_vector<C, V>(address<C>(codes, head, indices[row], column));
    const auto value = load_vector<X, V>(address<X>(x, head, at.row, column));
    Vector<X, V> out;
    double sum = 0;
    bool finite = true;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double difference = widen(value.values[v]) - widen(code.values[v]);
      sum += difference * difference;
      out.values[v] = narrow<X>(widen(code.values[v]));
      if constexpr (Count) finite = finite && is_finite(widen(value.values[v]));
    }
    if (!mask || mask[row]) squares += sum;
    if (Count && !finite) not_finite.add(at.row);
    *reinterpret_cast<Vector<X, V>*>(quantized + row * D + column) = out;
  }
  if constexpr (Count) {
    // Integers add up alike in any order, so that atomics leave the result what it is.
    __syncthreads();
    for (std::int64_t n = first + threadIdx.x; n < min(first + rows, N); n += kThreads) {
      const std::int64_t row = head * N + n;
      if ((!mask || mask[row]) && !not_finite.has(n)) atomicAdd(&counts[head * K + indices[row]], 1ull);
    }
  }
  const double total = block_sum<kThreads>(squares, parts);
  if (threadIdx.x == 0) sums[head * gridDim.x + blockIdx.x] = total;
}

// The second stage: the mean of the squared differences, times its weight. Grid (losses).
__global__ void __launch_bounds__(kThreads, kBlocks)
    loss_kernel(const double* sums, std::int64_t count, const std::int64_t* kept, std::int64_t all_rows, double weight,
                int D, void* losses, Float type) {
  __shared__ double parts[kThreads / 32];
  double total = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) total += sums[blockIdx.x * count + i];
  total = block_sum<kThreads>(total, parts);
  if (threadIdx.x == 0) store(losses, type, blockIdx.x, weight * (total / elements(kept, all_rows, D)));
}

// Grid (blocks, H).
template <class X, class C, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pull_kernel(Rows gradient, Rows x, Rows codes, const std::int64_t* indices, const std::uint8_t* mask,
                const std::int64_t* kept, const void* grad_loss, Float loss_type, double weight, X* grad_x,
                std::int64_t rows, std::int64_t all_rows, int D) {
  const std::int64_t head = blockIdx.y, N = x.count;
  const double scale = 2 * load(grad_loss, loss_type, 0) / elements(kept, all_rows, D);
  for (Walk<V> at(rows, N, D); at.more(); at.next()) {
    const std::int64_t row = head * N + at.row, column = at.piece * V;
    const auto code = load_vector<C, V>(address<C>(codes, head, indices[row], column));
    const auto value = load_vector<X, V>(address<X>(x, head, at.row, column));
    const auto came = load_vector<X, V>(address<X>(gradient, head, at.row, column));
    const bool counted = !mask || mask[row];
    Vector<X, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double difference = counted ? widen(value.values[v]) - widen(code.values[v]) : 0.0;
      out.values[v] = narrow<X>(widen(came.values[v]) + weight * (difference * scale));
    }
    *reinterpret_cast<Vector<X, V>*>(grad_x + row * D + column) = out;
  }
}

// ---- residual quantisation ------------------------------------------------------------------------------------------

// Grid (blocks, H); shared memory for Q float64 a warp.
template <class X, class C, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_stages_kernel(Rows x, Rows codes, const std::int64_t* indices, X* quantized, double* sums, std::int64_t rows,
                         int Q, int D) {
  using W = Working<X, C>;
  double* squares = dynamic_shared<double>() + threadIdx.x / 32 * Q;
  const int lane = threadIdx.x % 32;
  const std::int64_t head = blockIdx.y, N = x.count;
  for (int q = lane; q < Q; q += 32) squares[q] = 0;
  __syncwarp();
  Walk<V> at(rows, N, D);
  while (__any_sync(kAllLanes, at.more())) {
    const bool more = at.more();
    const std::int64_t row = head * N + at.row, column = at.piece * V;
    W residual[V] = {}, sum[V] = {};
    if (more) {
      const auto value = load_vector<X, V>(address<X>(x, head, at.row, column));
#pragma unroll
      for (int v = 0; v < V; ++v) residual[v] = narrow<W>(widen(value.values[v]));
    }
    for (int q = 0; q < Q; ++q) {
      double square = 0;
      if (more) {
        const auto code = load_vector<C, V>(address<C>(codes, head * Q + q, indices[row * Q + q], column));
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const double difference = widen(residual[v]) - widen(code.values[v]);
          square += difference * difference;
          const W taken = narrow<W>(widen(code.values[v]));
          residual[v] = residual[v] - taken;
          // The first code is taken, not added to zero, which would lose the sign of a zero.
          sum[v] = q == 0 ? taken : sum[v] + taken;
        }
      }
      square = warp_sum(square);
      if (lane == 0) squares[q] += square;
    }
    if (more) {
      Vector<X, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) out.values[v] = narrow<X>(widen(sum[v]));
      *reinterpret_cast<Vector<X, V>*>(quantized + row * D + column) = out;
      at.next();
    }
  }
  __syncthreads();
  const double* all = dynamic_shared<double>();
  for (int q = threadIdx.x; q < Q; q += kThreads) {
    double total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += all[warp * Q + q];
    sums[(static_cast<std::int64_t>(q) * gridDim.y + head) * gridDim.x + blockIdx.x] = total;
  }
}

// Grid (blocks, H).
template <class X, class C, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pull_stages_kernel(Rows gradient, Rows x, Rows codes, const std::int64_t* indices, const void* grad_losses,
                       Float loss_type, X* grad_x, std::int64_t rows, std::int64_t all_rows, int Q, int D) {
  using W = Working<X, C>;
  const std::int64_t head = blockIdx.y, N = x.count;
  const double count = elements(nullptr, all_rows, D);
  for (Walk<V> at(rows, N, D); at.more(); at.next()) {
    const std::int64_t row = head * N + at.row, column = at.piece * V;
    const auto value = load_vector<X, V>(address<X>(x, head, at.row, column));
    const auto came = load_vector<X, V>(address<X>(gradient, head, at.row, column));
    W residual[V];
    double total[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      residual[v] = narrow<W>(widen(value.values[v]));
      total[v] = widen(came.values[v]);
    }
#pragma unroll 1
    for (int q = 0; q < Q; ++q) {
      const double scale = 2 * load(grad_losses, loss_type, q) / count;
      const auto code = load_vector<C, V>(address<C>(codes, head * Q + q, indices[row * Q + q], column));
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[v] += (widen(residual[v]) - widen(code.values[v])) * scale;
        residual[v] = residual[v] - narrow<W>(widen(code.values[v]));
      }
    }
    Vector<X, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.values[v] = narrow<X>(total[v]);
    *reinterpret_cast<Vector<X, V>*>(grad_x + row * D + column) = out;
  }
}

// Grid (blocks, H).
template <class X, class C, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    take_codes_kernel(Rows x, Rows codes, const std::int64_t* indices, Working<X, C>* residual, std::int64_t rows,
                      std::int64_t Q, std::int64_t q, int D) {
  using W = Working<X, C>;
  const std::int64_t head = blockIdx.y, N = x.count;
  for (Walk<V> at(rows, N, D); at.more(); at.next()) {
    const std::int64_t row = head * N + at.row, column = at.piece * V;
    const auto code = load_vector<C, V>(address<C>(codes, head * Q + q, indices[row * Q + q], column));
    const auto value = load_vector<X, V>(address<X>(x, head, at.row, column));
    Vector<W, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.values[v] = narrow<W>(widen(value.values[v])) - narrow<W>(widen(code.values[v]));
    }
    *reinterpret_cast<Vector<W, V>*>(residual + row * D + column) = out;
  }
}

// Calls f(X, C, V) with as many neighbours at a time as fill 16 bytes of x, or with one.
template <class F>
void by_types(const Rows& x, const Rows& codes, int D, const Rows* other, const void* out, F&& f) {
  dispatch(x.type, codes.type, [&](auto x_tag, auto code_tag) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    constexpr int V = kVector<X>;
    const bool whole = in_vectors<X>(x, D, V) && in_vectors<C>(codes, D, V) &&
                       (!other || in_vectors<X>(*other, D, V)) && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
    // Float64 codes for narrower rows are rare, and not worth kernels of their own.
    if constexpr (sizeof(C) < 8 || sizeof(X) == 8) {
      if (whole) return f(x_tag, code_tag, std::integral_constant<int, V>());
    }
    f(x_tag, code_tag, std::integral_constant<int, 1>());
  });
}

dim3 grid_of(std::int64_t N, int D, std::int64_t heads) {
  return dim3(static_cast<unsigned>(loss_parts(N, D)), static_cast<unsigned>(heads));
}

}  // namespace

std::int64_t loss_parts(std::int64_t N, int D) {
  return ceil_div(N, rows_of_block(N, D));
}

void gather(const Rows& x, const Rows& codes, const std::int64_t* indices, const std::uint8_t* mask,
            const std::int64_t* kept, double weight, std::int64_t heads, std::int64_t K, int D, void* quantized,
            double* parts, void* loss, Float loss_type, std::int64_t* counts, std::uintptr_t stream) {
  const std::int64_t rows = rows_of_block(x.count, D);
  const std::size_t shared = counts ? NotFinite::words(rows) * sizeof(std::uint32_t) : 0;
  by_types(x, codes, D, nullptr, quantized, [&](auto x_tag, auto code_tag, auto v) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    const auto kernel =
        counts ? gather_kernel<X, C, decltype(v)::value, true> : gather_kernel<X, C, decltype(v)::value, false>;
    launch(kernel, grid_of(x.count, D, heads), kThreads, shared, stream_of(stream), x, codes, indices, mask,
           static_cast<X*>(quantized), parts, reinterpret_cast<unsigned long long*>(counts), rows, K, D);
  });
  launch(loss_kernel, 1, kThreads, 0, stream_of(stream), parts, heads * loss_parts(x.count, D), kept, heads * x.count,
         weight, D, loss, loss_type);
}

void pull(const Rows& gradient, const Rows& x, const Rows& codes, const std::int64_t* indices, const std::uint8_t* mask,
          const std::int64_t* kept, const void* grad_loss, Float loss_type, double weight, std::int64_t heads, int D,
          void* grad_x, std::uintptr_t stream) {
  by_types(x, codes, D, &gradient, grad_x, [&](auto x_tag, auto code_tag, auto v) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    launch(pull_kernel<X, C, decltype(v)::value>, grid_of(x.count, D, heads), kThreads, 0, stream_of(stream), gradient,
           x, codes, indices, mask, kept, grad_loss, loss_type, weight, static_cast<X*>(grad_x),
           rows_of_block(x.count, D), heads * x.count, D);
  });
}

void take_codes(const Rows& x, const Rows& codes, const std::int64_t* indices, std::int64_t heads, std::int64_t Q,
                std::int64_t q, int D, void* residual, std::uintptr_t stream) {
  by_types(x, codes, D, nullptr, residual, [&](auto x_tag, auto code_tag, auto v) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    launch(take_codes_kernel<X, C, decltype(v)::value>, grid_of(x.count, D, heads), kThreads, 0, stream_of(stream), x,
           codes, indices, static_cast<Working<X, C>*>(residual), rows_of_block(x.count, D), Q, q, D);
  });
}

void gather_stages(const Rows& x, const Rows& codes, const std::int64_t* indices, std::int64_t heads, std::int64_t Q,
                   int D, void* quantized, double* parts, void* losses, Float loss_type, std::uintptr_t stream) {
  const std::size_t shared = kThreads / 32 * static_cast<std::size_t>(Q) * sizeof(double);
  by_types(x, codes, D, nullptr, quantized, [&](auto x_tag, auto code_tag, auto v) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    launch(gather_stages_kernel<X, C, decltype(v)::value>, grid_of(x.count, D, heads), kThreads, shared,
           stream_of(stream), x, codes, indices, static_cast<X*>(quantized), parts, rows_of_block(x.count, D),
           static_cast<int>(Q), D);
  });
  launch(loss_kernel, static_cast<unsigned>(Q), kThreads, 0, stream_of(stream), parts, heads * loss_parts(x.count, D),
         nullptr, heads * x.count, 1.0, D, losses, loss_type);
}

void pull_stages(const Rows& gradient, const Rows& x, const Rows& codes, const std::int64_t* indices,
                 const void* grad_losses, Float loss_type, std::int64_t heads, std::int64_t Q, int D, void* grad_x,
                 std::uintptr_t stream) {
  by_types(x, codes, D, &gradient, grad_x, [&](auto x_tag, auto code_tag, auto v) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    launch(pull_stages_kernel<X, C, decltype(v)::value>, grid_of(x.count, D, heads), kThreads, 0, stream_of(stream),
           gradient, x, codes, indices, grad_losses, loss_type, static_cast<X*>(grad_x), rows_of_block(x.count, D),
           heads * x.count, static_cast<int>(Q), D);
  });
}

}  // namespace fastvq
