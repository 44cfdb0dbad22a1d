// What the screen leaves over: rows against every code by the contract, and the winners of splits.

#include "search_kernels.h"

namespace fastvq {
namespace {

constexpr int kThreads = kWholeThreads, kRowsTogether = kWholeRows;
static_assert(kThreads == 32 * kRowsTogether);  // a warp loads a row

struct Winner {
  double score = HUGE_VAL;
  int code = kNobody;

  // The smaller score; of equal ones the smaller code.
  __device__ __forceinline__ void meet(double other, int other_code) {
    if (other < score || (other == score && other_code < code)) {
      score = other;
      code = other_code;
    }
  }
};

// What a code leaves of a value, rounded once: in float64 where codes are, else in float32.
template <class Code>
__device__ __forceinline__ double left_by(Code code, double value) {
  if constexpr (std::is_same_v<Code, double>) {
    return __dsub_rn(value, code);
  } else {
    return __fsub_rn(static_cast<float>(value), to_float(code));
  }
}

// Rows of a queue, or all, kRowsTogether at a time, through all stages, `held` dimensions at a time. The residual stays
// in shared memory where that holds all of them, else in `residuals`. Grid (blocks, heads).
template <class Code>
__global__ void __launch_bounds__(kThreads, 2)
    whole_kernel(const Rows x, const Code* codebooks, const CodebookFigures* figures, const std::int64_t* queue,
                 double* residuals, std::int64_t* indices, void* distances, int stages, std::int64_t K, int D, int held,
                 bool euclidean, Float type) {
  auto* values = dynamic_shared<double>();       // (kRowsTogether, held) of the rows
  auto* scores = values + kRowsTogether * held;  // (kRowsTogether, warps)
  auto* codes = reinterpret_cast<int*>(scores + kRowsTogether * (kThreads / 32));
  const std::int64_t head = blockIdx.y;
  const std::int64_t rows = queue == nullptr ? x.count : figures[head * stages].queued;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A few rows are shared out among the blocks: each takes as long as those that one of them has.
  const int together = rows > gridDim.x ? kRowsTogether : 1;
  for (std::int64_t block = blockIdx.x; block * together < rows; block += gridDim.x) {
    const auto row = [&](int r) {
      const std::int64_t entry = block * together + r;
      if (r >= together || entry >= rows) return std::int64_t{-1};
      return queue == nullptr ? entry : queue[head * x.count + entry];
    };
    const std::int64_t own = row(warp);  // what this warp loads
    const std::int64_t own_place = head * x.count + (own < 0 ? 0 : own);
    double* residual = held < D ? residuals + own_place * D : values + warp * held;  // each value is one thread's
    for (int stage = 0; stage < stages; ++stage) {
      const Code* codebook = codebooks + (head * stages + stage) * K * D;
      const Code* taken = nullptr;  // the code of the stage before
      if (own >= 0 && stage > 0) taken = codebook + (indices[own_place * stages + stage - 1] - K) * D;
      const auto value_at = [&](int d, bool first) {
        if (own < 0) return 0.0;
        double value = stage == 0 ? load(x.data, x.type, x.offset(head, own) + d * x.dim) : residual[d];
        if (first && stage > 0) value = left_by(taken[d], value);
        if (first && stages > 1) residual[d] = value;
        return value;
      };
      Winner winners[kRowsTogether];
      for (std::int64_t start = 0; start < K; start += kThreads) {
        const std::int64_t k = start + threadIdx.x;
        double sums[kRowsTogether] = {};
        for (int d = 0; d < D; d += held) {
          const int dims = min(held, D - d);
          if (start == 0 || D > held) {
            __syncthreads();
            for (int i = lane; i < dims; i += 32) values[warp * held + i] = value_at(d + i, start == 0);
            __syncthreads();
          }
          if (k >= K) continue;
          const auto add = [&](auto count) {
#pragma unroll(count.value == 1 ? 8 : 1)
            for (int i = 0; i < dims; ++i) {
              const double code = widen(codebook[k * D + d + i]);
#pragma unroll
              for (int r = 0; r < count.value; ++r) {
                sums[r] = one_term(sums[r], values[r * held + i], code, euclidean);
              }
            }
          };
          if (together == 1) {
            add(std::integral_constant<int, 1>());
          } else {
            add(std::integral_constant<int, kRowsTogether>());
          }
        }
        if (k >= K) continue;
#pragma unroll
        for (int r = 0; r < kRowsTogether; ++r) {
          const double score = ranked(sums[r], euclidean);
          if (score < winners[r].score) winners[r] = {score, static_cast<int>(k)};
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsTogether; ++r) {
#pragma unroll
        for (int bit = 16; bit > 0; bit /= 2) {
          const double score = __shfl_xor_sync(kAllLanes, winners[r].score, bit);
          winners[r].meet(score, __shfl_xor_sync(kAllLanes, winners[r].code, bit));
        }
        if (lane == 0) {
          scores[r * (kThreads / 32) + warp] = winners[r].score;
          codes[r * (kThreads / 32) + warp] = winners[r].code;
        }
      }
      __syncthreads();
      if (threadIdx.x < kRowsTogether && row(threadIdx.x) >= 0) {
        Winner winner;
        for (int w = 0; w < kThreads / 32; ++w) {
          const int at = threadIdx.x * (kThreads / 32) + w;
          winner.meet(scores[at], codes[at]);
        }
        const std::int64_t n = row(threadIdx.x), place = head * x.count + n;
        const int nearest = winner.code == kNobody ? 0 : winner.code;  // every distance is infinite or NaN
        indices[place * stages + stage] = nearest;
        if (distances != nullptr) {
          const Code* code = codebook + static_cast<std::int64_t>(nearest) * D;
          store(distances, type, place, canonical(x, x.offset(head, n), code, D, euclidean));
        }
      }
      __syncthreads();
    }
  }
}

// Grid (rows, heads).
template <class Code>
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(const Rows x, const Code* codebooks, CodebookFigures* figures, const double* part_scores,
                 const int* part_indices, std::int64_t* queue, std::int64_t* indices, void* distances, int splits,
                 std::int64_t K, int D, bool euclidean) {
  const std::int64_t head = blockIdx.y, heads = gridDim.y;
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= x.count) return;
  const std::int64_t place = head * x.count + n;
  Winner winner;
  bool whole = false;
  for (int split = 0; split < splits; ++split) {
    const std::int64_t part = split * heads * x.count + place;
    const int code = part_indices[part];
    whole = whole || code == kWhole;
    if (code >= 0) winner.meet(part_scores[part], code);
  }
  if (whole) {
    queue[head * x.count + atomicAdd(&figures[head].queued, 1u)] = n;
    return;
  }
  const bool none = winner.code == kNobody || !(winner.score < inf());  // every distance is infinite or NaN
  const int nearest = none ? 0 : winner.code;
  indices[place] = nearest;
  if (distances != nullptr) {
    const Code* code = codebooks + (head * K + nearest) * D;
    store(distances, Float::float32, place, canonical(x, x.offset(head, n), code, D, euclidean));
  }
}

}  // namespace

void merge_splits(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, std::int64_t* indices,
                  void* distances, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(p.x.count, kThreads)), static_cast<unsigned>(p.heads));
  dispatch(p.code_type, [&](auto tag) {
    using Code = typename decltype(tag)::type;
    const auto* codebook = static_cast<const Code*>(p.codebook);
    if constexpr (!std::is_same_v<Code, double>) {
      launch(merge_kernel<Code>, grid, dim3(kThreads), 0, stream, p.x, codebook, scratch.figures, scratch.part_scores,
             scratch.part_indices, scratch.queue, indices, distances, plan.splits, p.K, p.D, p.euclidean);
    }
  });
}

void score_rest(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, int stages,
                int multiprocessors, std::int64_t* indices, void* distances, cudaStream_t stream) {
  std::int64_t blocks = ceil_div<std::int64_t>(p.x.count, kRowsTogether);
  if (blocks > 8 * multiprocessors) blocks = 8 * multiprocessors;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.heads));
  const auto shared = static_cast<std::size_t>(whole_bytes(plan.held));
  const std::int64_t* queue = plan.source == Source::none ? nullptr : scratch.queue;
  const Float type = p.code_type == Float::float64 ? Float::float64 : Float::float32;
  dispatch(p.code_type, [&](auto tag) {
    using Code = typename decltype(tag)::type;
    const auto* codebook = static_cast<const Code*>(p.codebook);
    launch(whole_kernel<Code>, grid, dim3(kThreads), shared, stream, p.x, codebook, scratch.figures, queue,
           scratch.residuals, indices, distances, stages, p.K, p.D, plan.held, p.euclidean, type);
  });
}

}  // namespace fastvq
