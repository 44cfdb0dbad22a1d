// Operands for tensor cores: centred, scaled by a power of two, rounded, with the rounding measured.

#include "search_kernels.h"

namespace fastvq {
namespace {

__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) v += __shfl_xor_sync(kAllLanes, v, bit);
  return v;
}

__device__ __forceinline__ float max_lanes(float v) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, bit));
  return v;
}

// The larger of two floats that are not negative, by their bits; what is not finite counts as infinite.
__device__ __forceinline__ void raise(unsigned* largest, float v) {
  atomicMax(largest, __float_as_uint(is_finite(v) ? v : inf()));
}

__global__ void clear_kernel(CodebookFigures* figures, int heads) {
  const int head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head < heads) figures[head] = {};
}

constexpr int kColumns = 32, kLines = 32;

// Where the codes lie: the mean and the reach of at most kSample of them, evenly spaced. Grid (columns, heads), a block
// of kColumns x kLines threads.
__global__ void __launch_bounds__(kColumns* kLines)
    frame_kernel(const float* codebook, float* frame, CodebookFigures* figures, std::int64_t K, int D, int width,
                 bool centred) {
  auto* sums = dynamic_shared<float>();  // (3, kLines, kColumns)
  float* lows = sums + kLines * kColumns;
  float* highs = lows + kLines * kColumns;
  const int line = threadIdx.x / kColumns, within = threadIdx.x % kColumns;
  const int column = blockIdx.x * kColumns + within;
  const std::int64_t head = blockIdx.y;
  const std::int64_t stride = ceil_div<std::int64_t>(K, kSample);
  const int sampled = static_cast<int>(ceil_div(K, stride));
  const float* codes = codebook + head * K * D + column;
  float sum = 0, low = inf(), high = -inf();
  if (column < D) {
    for (int k = line; k < sampled; k += kLines) {
      const float value = codes[k * stride * D];
      if (!is_finite(value)) continue;
      sum += value;
      low = fminf(low, value);
      high = fmaxf(high, value);
    }
  }
  sums[threadIdx.x] = sum;
  lows[threadIdx.x] = low;
  highs[threadIdx.x] = high;
  __syncthreads();
  if (line != 0 || column >= width) return;
  for (int i = 1; i < kLines; ++i) {
    sum += sums[i * kColumns + within];
    low = fminf(low, lows[i * kColumns + within]);
    high = fmaxf(high, highs[i * kColumns + within]);
  }
  float centre = centred && column < D ? sum / static_cast<float>(sampled) : 0.0f;
  if (!is_finite(centre)) centre = 0.0f;
  frame[head * width + column] = centre;
  const float reach = fmaxf(high - centre, centre - low);
  if (reach > 0) raise(&figures[head].reach, reach);
}

constexpr int kPackWarps = 8;

// The largest length of a block's codes; what is not finite counts as infinite.
__device__ __forceinline__ float largest_of(const float (&lengths)[kPackWarps]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPackWarps; ++i) largest = fmaxf(largest, is_finite(lengths[i]) ? lengths[i] : inf());
  return largest;
}

// Codes in the order of the screen's tiles: a tile is, for each chunk of the width, 16 codes after the other, of which
// 16 dimensions are four 8 x 8 matrices; then the biases. A warp takes a code. Grid (places / kPackWarps, heads).
template <Operand OPERAND, class Element, class Code>
__global__ void __launch_bounds__(32 * kPackWarps)
    pack_kernel(const Code* codebook, const float* frame, CodebookFigures* figures, unsigned char* packed,
                const SearchPlan plan, std::int64_t K, int D, bool euclidean) {
  __shared__ float norms[kPackWarps], residuals[kPackWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = plan.tiles.group, size = plan.tiles.tile;
  const std::int64_t head = blockIdx.y;
  const std::int64_t place = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
  const int within = static_cast<int>(place % size), of_segment = within % (4 * group), column = within % 8;
  const std::int64_t segment = place / (4 * group);
  const std::int64_t k = (segment * 4 + column / 2) * group + of_segment / 8 * 2 + column % 2;
  const Code* code = codebook + (head * K + k) * D;
  const float* centre = frame + head * plan.width;
  float scale = 1.0f;
  if constexpr (OPERAND != Operand::stored) scale = power_of_two(__uint_as_float(figures[head].reach));
  bool finite = true;
  if (k < K) {
    for (int d = lane; d < D; d += 32) finite = finite && is_finite(to_float(code[d]));
  }
  // A code that is not finite is nearest only where none is near; but its dot product may be the largest.
  const bool alive = k < K && (!euclidean || __all_sync(kAllLanes, finite));
  const auto load = [&](int d) {
    float value = alive && d < D ? to_float(code[d]) : 0.0f;
    if constexpr (OPERAND != Operand::stored) value = alive && d < D ? (value - centre[d]) * scale : 0.0f;
    return value;
  };
  float kept = 0, lost = 0;
  for (int d = lane; d < D; d += 32) {
    const float value = load(d);
    float operand = to_float(rounded_to<Element>(value));
    if constexpr (OPERAND == Operand::split) operand += to_float(rounded_to<Element>(value - operand));
    kept = fmaf(operand, operand, kept);
    lost = fmaf(value - operand, value - operand, lost);
  }
  kept = sum_lanes(kept);
  lost = sum_lanes(lost);
  const float bias = !alive ? kFar : euclidean ? 0.5f * kept : 0.0f;

  unsigned char* tile = packed + (head * plan.tile_count + place / size) * plan.tile_bytes;
  for (int w = lane; w < plan.width; w += 32) {
    const int d = w / 16 * 16 + dimension_at(w % 16);
    Element element;
    if constexpr (OPERAND == Operand::split) {
      const SplitPlace split = split_place(d, D);
      float value = split.part == Part::bias ? bias : split.part == Part::nothing ? 0.0f : load(split.dim);
      element = rounded_to<Element>(value);
      const int parts = split.part == Part::bias ? split.dim : split.part == Part::high_low ? 1 : 0;
      for (int i = 0; i < parts; ++i) {
        value -= to_float(element);
        element = rounded_to<Element>(value);
      }
    } else {
      element = rounded_to<Element>(load(d));
    }
    const int step = w % plan.chunk / 16, of_step = w % 16;
    unsigned char* target = tile + w / plan.chunk * (size * plan.chunk * 2);
    target += (within / 16 * (plan.chunk / 16) + step) * 512 + within / 8 % 2 * 256 + of_step / 8 * 128;
    *reinterpret_cast<Element*>(target + column * 16 + of_step % 8 * 2) = element;
  }
  if (lane == 0) {
    *reinterpret_cast<float*>(tile + static_cast<std::size_t>(size) * plan.width * 2 + within * 4) = bias;
    norms[warp] = norm_bound(kept, D);
    residuals[warp] = OPERAND == Operand::stored ? 0.0f : residual_bound(lost, norms[warp], D);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  // One for the block: all blocks' meet at one address.
  raise(&figures[head].norm, largest_of(norms));
  if constexpr (OPERAND != Operand::stored) raise(&figures[head].residual, largest_of(residuals));
}

// Rows as operands, where they are chunked: fragments of 16 rows x 16 dimensions, chunk by chunk; and their lengths and
// factors. A warp takes a row. Grid (rows / kPackWarps, heads).
template <Operand OPERAND, class Element>
__global__ void __launch_bounds__(32 * kPackWarps)
    round_rows_kernel(const Rows x, const float* frame, const CodebookFigures* figures, unsigned char* rounded,
                      float* row_figures, const SearchPlan plan, int D) {
  const int lane = threadIdx.x % 32;
  const std::int64_t head = blockIdx.y;
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + threadIdx.x / 32;
  if (n >= plan.row_blocks * plan.rows) return;
  const bool alive = n < x.count;
  const std::int64_t at = alive ? x.offset(head, n) : 0;
  const float* centre = frame + head * plan.width;
  const auto load = [&](int d) {
    if (!alive || d >= D) return 0.0f;
    const float value = load_float(x, at + d * x.dim);
    return OPERAND == Operand::stored ? value : value - centre[d];
  };
  float code_scale = 1.0f, row_scale = 1.0f;
  if constexpr (OPERAND != Operand::stored) {
    code_scale = power_of_two(__uint_as_float(figures[head].reach));
    float largest = 0;
    for (int d = lane; d < D; d += 32) largest = fmaxf(largest, fabsf(load(d)));
    row_scale = power_of_two(max_lanes(largest));
  }
  const std::int64_t block = head * plan.row_blocks + n / plan.rows;
  const int within = static_cast<int>(n % plan.rows), chunks = plan.width / plan.chunk, steps = plan.chunk / 16;
  unsigned char* target = rounded + block * chunks * (plan.rows * plan.chunk * 2);
  float kept = 0, lost = 0;
  for (int w = lane; w < plan.width; w += 32) {
    const float value = load(w / 16 * 16 + dimension_at(w % 16)) * row_scale;
    const Element element = rounded_to<Element>(value);
    const float operand = to_float(element);
    kept = fmaf(operand, operand, kept);
    lost = fmaf(value - operand, value - operand, lost);
    const int of_step = w % 16;
    unsigned char* place = target + static_cast<std::int64_t>(w / plan.chunk) * (plan.rows * plan.chunk * 2);
    place += (within / 16 * steps + w % plan.chunk / 16) * 512 + of_step / 8 * 256 + within / 8 % 2 * 128;
    *reinterpret_cast<Element*>(place + within % 8 * 16 + of_step % 8 * 2) = element;
  }
  kept = sum_lanes(kept);
  lost = sum_lanes(lost);
  if (lane == 0) {
    const float norm = norm_bound(kept, D), ratio = code_scale * reciprocal(row_scale);
    float* of_row = row_figures + (head * plan.row_blocks * plan.rows + n) * 3;
    of_row[0] = norm * ratio;
    of_row[1] = OPERAND == Operand::stored ? 0.0f : residual_bound(lost, norm, D) * ratio;
    of_row[2] = -ratio;
  }
}

template <Operand OPERAND, class Element, class Code>
void pack_as(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(p.heads);
  const auto* codebook = static_cast<const Code*>(p.codebook);
  if constexpr (OPERAND != Operand::stored) {
    const dim3 grid(ceil_div(plan.width, kColumns), heads);
    launch(frame_kernel, grid, dim3(kColumns * kLines), 3 * kColumns * kLines * sizeof(float), stream, codebook,
           scratch.frame, scratch.figures, p.K, p.D, plan.width, p.euclidean);
  }
  const dim3 warps(32 * kPackWarps);
  const auto codes = static_cast<unsigned>(plan.tile_count * plan.tiles.tile / kPackWarps);
  launch(pack_kernel<OPERAND, Element, Code>, dim3(codes, heads), warps, 0, stream, codebook, scratch.frame,
         scratch.figures, scratch.packed, plan, p.K, p.D, p.euclidean);
  if constexpr (OPERAND != Operand::split) {
    if (plan.source != Source::chunked) return;
    const auto rows = static_cast<unsigned>(plan.row_blocks * plan.rows / kPackWarps);
    launch(round_rows_kernel<OPERAND, Element>, dim3(rows, heads), warps, 0, stream, p.x, scratch.frame,
           scratch.figures, scratch.rounded, scratch.row_figures, plan, p.D);
  }
}

}  // namespace

void pack_codes(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, cudaStream_t stream) {
  const auto heads = static_cast<int>(p.heads);
  launch(clear_kernel, dim3(ceil_div(heads, 128)), dim3(128), 0, stream, scratch.figures, heads);
  if (plan.source == Source::none) return;
  if (plan.operand == Operand::split) {
    pack_as<Operand::split, __nv_bfloat16, float>(p, plan, scratch, stream);
  } else if (plan.operand == Operand::rounded) {
    pack_as<Operand::rounded, __half, float>(p, plan, scratch, stream);
  } else if (p.code_type == Float::float16) {
    pack_as<Operand::stored, __half, __half>(p, plan, scratch, stream);
  } else {
    pack_as<Operand::stored, __nv_bfloat16, __nv_bfloat16>(p, plan, scratch, stream);
  }
}

}  // namespace fastvq
