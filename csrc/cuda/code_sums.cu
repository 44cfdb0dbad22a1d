// How many rows chose each code, and their sum: rows sorted by code (sort.cu), then summed run by run, in a fixed
// order.
//
// A chunk is a run of at most `size` rows of one code, counted from the code's first. One team of threads adds a chunk
// row after row; the sums of such chunks are added in the same way, and so on until the code is whole. So a sum depends
// on nothing but the rows of its code, whatever the grid and the device, and a code that owns all rows still occupies
// the device. Up to `size` rows the float64 sum is that of the reference, bit for bit.
//
// Who finds the chunks? The first K teams take the first chunk of each code. Any other chunk starts `size` rows after
// the last one of its code, so a window of `size` sorted rows holds at most one start of such a chunk, and its code
// must be the one at the window's beginning: one more team for each window, and nothing to count or to scan.

#include "device.h"
#include "operators.h"

namespace fastvq {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // a multiprocessor, at least: left to itself ptxas aims higher, and spills
// Rows on their way at a time: a sum in row order lives by the loads in flight. 64 bytes a thread; more would spill.
template <int V>
constexpr int kRowsAhead = V == 1 ? 8 : 4;

// ---- chunks -------------------------------------------------------------------------------------------------------

// A team's chunk: places first .. last of the sorted rows, none where there is no such chunk.
struct Chunk {
  std::int64_t code, number, start, end;  // the code, the chunk's number in it, and the code's places
  bool exists;
};

// The code at a place of the sorted rows, K for a row left out.
__device__ __forceinline__ std::int64_t code_at(const ByCode& by_code, std::int64_t head, std::int64_t place) {
  return by_code.keys[head * by_code.stride_rows + place] & ((std::int64_t{1} << by_code.code_bits) - 1);
}

__device__ __forceinline__ Chunk chunk_of(const ByCode& by_code, std::int64_t head, std::int64_t team,
                                          std::int64_t size) {
  Chunk c = {by_code.K, 0, 0, 0, false};
  const std::int64_t window = (team - by_code.K) * size;
  if (team < by_code.K) {
    c.code = team;
  } else if (window < by_code.N) {
    c.code = code_at(by_code, head, window);
  }
  if (c.code >= by_code.K) return c;
  const std::int64_t* starts = by_code.starts + head * by_code.stride_starts + c.code;
  c.start = starts[0];
  c.end = starts[1];
  if (team < by_code.K) {
    c.exists = true;
  } else {
    c.number = (window - c.start + size - 1) / size;
    c.exists = c.number > 0 && c.start + c.number * size < c.end;
  }
  return c;
}

// Where the sum of a chunk is kept: two places for each window, as a window may hold a first chunk and another.
__device__ __forceinline__ std::int64_t slot_of(std::int64_t start, std::int64_t number, std::int64_t size) {
  return 2 * (start / size + number) + (number == 0 ? 1 : 0);
}

// Writes the sum of a chunk: times `factor` and rounded where it is the whole code, else for the next level.
template <int V>
__device__ __forceinline__ void keep_sum(const double (&total)[V], const Chunk& c, std::int64_t size, double factor,
                                         void* sums, std::int64_t head_sums, Float type, double* chunks, int D,
                                         int column) {
  if (!c.exists) return;
  if (c.end - c.start <= size) {
#pragma unroll
    for (int v = 0; v < V; ++v) store(sums, type, head_sums + c.code * D + column + v, factor * total[v]);
  } else {
    double* at = chunks + slot_of(c.start, c.number, size) * D + column;
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] = total[v];
  }
}

// What a thread is: its team among those of the grid, its first column of V.
template <int V>
struct Place {
  std::int64_t team;
  int column;
  __device__ __forceinline__ Place()
      : team(static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y),
        column(static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * V) {}
};

// Grid (teams, column blocks, H), block (columns, teams).
template <class X, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_rows_kernel(Rows x, ByCode by_code, int D, std::int64_t size, std::int64_t slots, void* counts, void* sums,
                    Float type, double* chunks) {
  constexpr int kUnroll = kRowsAhead<V>;
  const Place<V> place;
  const std::int64_t head = blockIdx.z;
  if (place.column >= D) return;
  const Chunk c = chunk_of(by_code, head, place.team, size);
  const std::int64_t first = c.start + c.number * size, last = c.exists ? min(first + size, c.end) : first;
  const std::uint32_t* order = by_code.order + head * by_code.stride_rows;
  const X* rows = static_cast<const X*>(x.data) + place.column;
  double total[V] = {};
  for (std::int64_t at = first; at < last; at += kUnroll) {
    Vector<X, V> values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u < last) values[u] = load_vector<X, V>(rows + x.offset(head, order[at + u]));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u < last) {
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += widen(values[u].values[v]);
      }
    }
  }
  if (place.column == 0 && place.team < by_code.K) {
    store(counts, type, head * by_code.K + c.code, static_cast<double>(c.end - c.start));
  }
  keep_sum(total, c, size, 1.0, sums, head * by_code.K * D, type, chunks + head * slots * D, D, place.column);
}

// The same of (row - code) * scale; row - code goes to `rest`, if there is one.
template <class X, class C, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_differences_kernel(Rows x, Rows codes, ByCode by_code, const std::int64_t* kept, std::int64_t all_rows,
                           const void* grad_loss, Float loss_type, int D, std::int64_t size, std::int64_t slots,
                           double factor, void* sums, std::int64_t stride_sums, Float type, double* chunks,
                           Working<X, C>* rest) {
  using W = Working<X, C>;
  constexpr int kUnroll = kRowsAhead<V>;
  const Place<V> place;
  const std::int64_t head = blockIdx.z;
  if (place.column >= D) return;
  const Chunk c = chunk_of(by_code, head, place.team, size);
  if (!c.exists) return;
  const std::int64_t first = c.start + c.number * size, last = min(first + size, c.end);
  const double scale = 2 * load(grad_loss, loss_type, 0) / elements(kept, all_rows, D);
  const std::uint32_t* order = by_code.order + head * by_code.stride_rows;
  const X* rows = static_cast<const X*>(x.data) + place.column;
  const C* at_code = static_cast<const C*>(codes.data) + codes.offset(head, c.code) + place.column * codes.dim;
  const Vector<C, V> code = load_vector<C, V>(at_code);
  double total[V] = {};
  for (std::int64_t at = first; at < last; at += kUnroll) {
    Vector<X, V> values[kUnroll];
    std::int64_t numbers[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u < last) {
        numbers[u] = order[at + u];
        values[u] = load_vector<X, V>(rows + x.offset(head, numbers[u]));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u < last) {
        Vector<W, V> left;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          total[v] += (widen(values[u].values[v]) - widen(code.values[v])) * scale;
          left.values[v] = narrow<W>(widen(values[u].values[v])) - narrow<W>(widen(code.values[v]));
        }
        if (rest) {
          *reinterpret_cast<Vector<W, V>*>(rest + (head * x.count + numbers[u]) * D + place.column) = left;
        }
      }
    }
  }
  keep_sum(total, c, size, factor, sums, head * stride_sums, type, chunks + head * slots * D, D, place.column);
}

// The sums of a level from those of the level below, for codes of more than `part` rows.
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_chunks_kernel(ByCode by_code, const double* parts, int D, std::int64_t part, std::int64_t size,
                      std::int64_t part_slots, std::int64_t slots, double factor, void* sums, std::int64_t stride_sums,
                      Float type, double* chunks) {
  constexpr int kUnroll = kRowsAhead<1>;
  const Place<1> place;
  const std::int64_t head = blockIdx.z;
  if (place.column >= D) return;
  const Chunk c = chunk_of(by_code, head, place.team, size);
  if (!c.exists || c.end - c.start <= part) return;
  const std::int64_t each = size / part, count = (c.end - c.start + part - 1) / part;
  const std::int64_t first = c.number * each, last = min(first + each, count);
  double total[1] = {};
  for (std::int64_t at = first; at < last; at += kUnroll) {
    double values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u < last) {
        values[u] = parts[(head * part_slots + slot_of(c.start, at + u, part)) * D + place.column];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u < last) total[0] += values[u];
    }
  }
  keep_sum(total, c, size, factor, sums, head * stride_sums, type, chunks + head * slots * D, D, place.column);
}

// ---- launches -----------------------------------------------------------------------------------------------------

struct Shape {
  dim3 grid, block;
};

// A team is as many threads as a row has pieces of V columns, to a power of two.
Shape shape_of(const ByCode& by_code, std::int64_t heads, int D, int V, std::int64_t size) {
  const int pieces = ceil_div(D, V);
  unsigned columns = 1;
  while (columns < static_cast<unsigned>(pieces) && columns < kThreads) columns *= 2;
  const unsigned teams = kThreads / columns;
  const std::int64_t all = by_code.K + ceil_div(by_code.N, size);
  return {dim3(static_cast<unsigned>(ceil_div<std::int64_t>(all, teams)), ceil_div<unsigned>(pieces, columns),
               static_cast<unsigned>(heads)),
          dim3(columns, teams)};
}

std::int64_t slots_of(std::int64_t N, std::int64_t size) {
  return 2 * ceil_div(N, size);
}

}  // namespace

void sum_rows(const Rows& x, const ByCode& by_code, std::int64_t heads, int D, std::int64_t size, void* counts,
              void* sums, Float type, double* chunks, std::uintptr_t stream) {
  dispatch(x.type, [&](auto tag) {
    using X = typename decltype(tag)::type;
    const auto start = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const Shape shape = shape_of(by_code, heads, D, V, size);
      launch(sum_rows_kernel<X, V>, shape.grid, shape.block, 0, stream_of(stream), x, by_code, D, size,
             slots_of(by_code.N, size), counts, sums, type, chunks);
    };
    if (in_vectors<X>(x, D, kVector<X>)) return start(std::integral_constant<int, kVector<X>>());
    start(std::integral_constant<int, 1>());
  });
}

void sum_differences(const Rows& x, const Rows& codes, const ByCode& by_code, const std::int64_t* kept,
                     const void* grad_loss, Float loss_type, std::int64_t heads, int D, std::int64_t size,
                     double factor, void* sums, std::int64_t stride_sums, Float type, double* chunks, void* rest,
                     std::uintptr_t stream) {
  dispatch(x.type, codes.type, [&](auto x_tag, auto code_tag) {
    using X = typename decltype(x_tag)::type;
    using C = typename decltype(code_tag)::type;
    const auto start = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const Shape shape = shape_of(by_code, heads, D, V, size);
      launch(sum_differences_kernel<X, C, V>, shape.grid, shape.block, 0, stream_of(stream), x, codes, by_code, kept,
             heads * x.count, grad_loss, loss_type, D, size, slots_of(by_code.N, size), factor, sums, stride_sums, type,
             chunks, static_cast<Working<X, C>*>(rest));
    };
    constexpr int V = kVector<X>;
    if constexpr (sizeof(C) < 8 || sizeof(X) == 8) {
      if (in_vectors<X>(x, D, V) && in_vectors<C>(codes, D, V) && reinterpret_cast<std::uintptr_t>(rest) % 16 == 0) {
        return start(std::integral_constant<int, V>());
      }
    }
    start(std::integral_constant<int, 1>());
  });
}

void sum_chunks(const ByCode& by_code, const double* parts, std::int64_t heads, int D, std::int64_t part,
                std::int64_t size, double factor, void* sums, std::int64_t stride_sums, Float type, double* chunks,
                std::uintptr_t stream) {
  const Shape shape = shape_of(by_code, heads, D, 1, size);
  launch(sum_chunks_kernel, shape.grid, shape.block, 0, stream_of(stream), by_code, parts, D, part, size,
         slots_of(by_code.N, part), slots_of(by_code.N, size), factor, sums, stride_sums, type, chunks);
}

}  // namespace fastvq
