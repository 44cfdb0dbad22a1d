#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "row_kernel.h"

namespace fastvq {
namespace {

constexpr std::int64_t kGroupsPerTask = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t tasks_of(std::int64_t groups) {
  return (groups + kGroupsPerTask - 1) / kGroupsPerTask;
}

// How much coarser a scale than its own a row may take to be spared the bias of its own, which costs 8 of each
// 8 + 2 D dot instructions: past D = 64 it is not worth a candidate more.
float coarser(std::int64_t width) {
  if (width <= 16) return 8.0f;
  if (width <= 32) return 4.0f;
  return width <= 64 ? 3.4f : 0.0f;
}

bool lies_as_floats(const Rows& codes) {
  return codes.dtype == DType::kFloat32 && codes.step == 1;
}

// Calls f(g, task, scratch) for every group, with a thread's scratch of so many floats.
template <class F>
void for_each_group(std::int64_t groups, int threads, std::int64_t floats, const F& f) {
  parallel(tasks_of(groups), threads, [&](Tasks& tasks) {
    const Buffer<float> scratch(floats);
    for (std::int64_t task; tasks.next(&task);) {
      const std::int64_t end = std::min(groups, (task + 1) * kGroupsPerTask);
      for (std::int64_t g = task * kGroupsPerTask; g < end; ++g) f(g, task, scratch.get());
    }
  });
}
template <class F>
void for_each_group(std::int64_t groups, int threads, const F& f) {
  for_each_group(groups, threads, 0, [&](std::int64_t g, std::int64_t task, float*) { f(g, task); });
}

}  // namespace

PackedCodebook::PackedCodebook(const Rows& codes, Metric metric, bool screened, bool int8, int threads) {
  view_.size = codes.count;
  view_.width = codes.width;
  view_.groups = (codes.count + kGroup - 1) / kGroup;
  view_.metric = metric;
  view_.is_double = codes.dtype == DType::kFloat64;
  const std::int64_t elements = view_.groups * view_.width * kGroup;
  if (view_.is_double) {
    exact_double_ = Buffer<double>(elements);
    view_.exact = exact_double_.get();
    copy_exact(codes, exact_double_.get(), threads);
  } else {
    exact_float_ = Buffer<float>(elements);
    view_.exact = exact_float_.get();
    copy_exact(codes, exact_float_.get(), threads);
    if (screened) prepare_screen(threads);
    if (int8 && view_.screen) prepare_int8(lies_as_floats(codes), threads);
  }
}

std::int64_t PackedCodebook::bytes() const {
  const std::int64_t elements = view_.groups * view_.width * kGroup;
  return elements * ((exact_float_ ? 4 : 8) + (screen_ ? 4 : 0) + (rows_ ? 4 : 0) + (int8_codes_ ? 1 : 0)) +
         view_.groups * kGroup * (int8_codes_ ? 16 : 4);
}

CodebookView PackedCodebook::view(const Rows& codes) const {
  CodebookView view = view_;
  if (!view.int8_codes || view.rows) return view;
  view.rows = codes.row<float>(0);
  view.row_stride = codes.dims ? codes.strides[0] : 0;
  return view;
}

template <class T>
void PackedCodebook::copy_exact(const Rows& codes, T* exact, int threads) const {
  const std::int64_t width = view_.width;
  const RowKernel& kernel = row_kernel();
  for_each_group(view_.groups, threads, [&](std::int64_t g, std::int64_t) {
    T* out = exact + g * width * kGroup;
    const int count = static_cast<int>(std::min<std::int64_t>(kGroup, view_.size - g * kGroup));
    if constexpr (std::is_same_v<T, float>) {
      if (codes.dtype == DType::kFloat32 && codes.step == 1 && count == kGroup) {
        const float* rows[kGroup];
        for (int lane = 0; lane < kGroup; ++lane) rows[lane] = codes.row<float>(g * kGroup + lane);
        return kernel.load_codes(rows, width, out);
      }
    }
    dispatch(codes.dtype, [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      for (int lane = 0; lane < kGroup; ++lane) {
        const Stored* row = lane < count ? codes.row<Stored>(g * kGroup + lane) : nullptr;
        for (std::int64_t d = 0; d < width; ++d)
          out[d * kGroup + lane] = row ? static_cast<T>(widen(row[d * codes.step])) : T{0};
      }
    });
  });
}

void PackedCodebook::prepare_screen(int threads) {
  const std::int64_t width = view_.width, groups = view_.groups, tasks = tasks_of(groups);
  const RowKernel& kernel = row_kernel();
  const float* exact = exact_float_.get();
  bias_ = Buffer<float>(groups * kGroup);

  // Pass 1: which codes are finite (the others get an infinite bias: they cannot win), and the statistics.
  std::vector<float> sums(tasks * width * kGroup, 0.0f);
  std::vector<CodeStatistics> partial;
  for (std::int64_t task = 0; task < tasks; ++task) partial.push_back({&sums[task * width * kGroup], 0, 0, 0});
  std::vector<std::uint32_t> hashes(groups * kGroup);
  for_each_group(groups, threads, [&](std::int64_t g, std::int64_t task) {
    const int count = static_cast<int>(std::min<std::int64_t>(kGroup, view_.size - g * kGroup));
    kernel.measure(exact + g * width * kGroup, width, count, bias_.get() + g * kGroup, &hashes[g * kGroup],
                   &partial[task]);
  });
  std::vector<double> mean(width, 0.0);
  double squares = 0, largest = 0;
  std::int64_t finite = 0;
  for (const CodeStatistics& s : partial) {
    for (std::int64_t i = 0; i < width * kGroup; ++i) mean[i / kGroup] += s.sums[i];
    squares += s.squares;
    largest = std::max<double>(largest, s.largest);
    finite += s.finite;
  }
  // A dot product with an infinity can be the largest of all: such a codebook is not screened.
  if (finite == 0 || (view_.metric == Metric::kDot && finite != view_.size)) return;

  exclude_copies(hashes.data());

  // Centring pays when the mean is not small beside the spread; when it is, the codes as they are have no rounding.
  double mean_norm = 0, mean_largest = 0;
  for (double& m : mean) {
    m /= static_cast<double>(finite);
    mean_norm += m * m;
    mean_largest = std::max(mean_largest, std::fabs(m));
  }
  const double square = squares / static_cast<double>(finite), spread = std::max(0.0, square - mean_norm);
  const bool centred = view_.metric == Metric::kEuclidean && mean_norm > 0.25 * spread && mean_largest < kInfinity;
  if (centred) {
    mean_ = Buffer<float>(width);
    for (std::int64_t d = 0; d < width; ++d) mean_[d] = static_cast<float>(mean[d]);
    view_.mean = mean_.get();
    largest += mean_largest;
  }
  // A scale that keeps squares far from overflow and underflow; 1 for all but extreme data.
  if (largest > 0 && (largest < 0x1p-20 || largest > 0x1p20)) view_.scale = std::ldexp(1.0, -std::ilogb(largest));
  typical_ = view_.scale * std::sqrt((centred ? spread : square) / static_cast<double>(width));

  // Pass 2: the screened codes, their norms and the residuals of rounding them.
  all_finite_ = finite == view_.size;
  const bool copied = centred || view_.scale != 1 || !all_finite_;
  if (copied) screen_ = Buffer<float>(groups * width * kGroup);
  std::vector<CodeExtremes> extremes(tasks);
  for_each_group(groups, threads, [&](std::int64_t g, std::int64_t task) {
    const std::int64_t at = g * width * kGroup;
    kernel.screen(exact + at, view_, bias_.get() + g * kGroup, copied ? screen_.get() + at : nullptr, &extremes[task]);
  });
  double norm = 0, residual = 0;
  for (const CodeExtremes& e : extremes) {
    norm = std::max(norm, e.norm);
    residual = std::max(residual, e.residual);
    screen_largest_ = std::max(screen_largest_, e.largest);
  }
  // The factor covers sums in float64, and the last term the rounding of c - m to float64.
  constexpr double kUp = 1 + 1e-6;
  view_.screen_norm = std::sqrt(norm) * kUp;
  view_.residual = (std::sqrt(residual) + (centred ? 0x1p-51 * view_.screen_norm : 0)) * kUp;
  view_.screen = copied ? screen_.get() : exact;
  view_.bias = bias_.get();
}

// A later copy of a code never wins: of equal distances the smallest index does. Left in, the copies of a collapsed
// codebook would all have to be scored exactly.
void PackedCodebook::exclude_copies(const std::uint32_t* hashes) {
  std::size_t slots = 16;
  while (slots < 2 * static_cast<std::size_t>(view_.size)) slots *= 2;
  std::vector<std::int32_t> table(slots, -1);
  const auto equal = [&](std::int64_t a, std::int64_t b) {
    const float* at = exact_float_.get();
    const auto element = [&](std::int64_t k, std::int64_t d) {
      return bit_cast<std::uint32_t>(at[(k / kGroup * view_.width + d) * kGroup + k % kGroup]);
    };
    for (std::int64_t d = 0; d < view_.width; ++d)
      if (element(a, d) != element(b, d)) return false;
    return true;
  };
  for (std::int64_t k = 0; k < view_.size; ++k) {
    if (bias_[k] != 0) continue;
    std::size_t slot = hashes[k] & (slots - 1);
    while (table[slot] >= 0 && (hashes[table[slot]] != hashes[k] || !equal(table[slot], k)))
      slot = (slot + 1) & (slots - 1);
    if (table[slot] >= 0) {
      bias_[k] = kInfinity;
    } else {
      table[slot] = static_cast<std::int32_t>(k);
    }
  }
}

// Where a few dimensions are far longer than the others, one scale for all leaves those few levels. A Hadamard
// transform evens them out and keeps all distances, but for a factor. Sets n, 1 where that does not pay; returns the
// largest magnitude of what is to be rounded.
float PackedCodebook::choose_block(int threads) {
  constexpr double kUneven = 6.5;  // the largest of some million Gaussian values is six times as long as a typical one
  constexpr double kGain = 1.25;   // finer levels that pay for the transform of each row
  const std::int64_t width = view_.width, block = width & -width;
  if (block < 4 || screen_largest_ < kUneven * typical_) return screen_largest_;
  const RowKernel& kernel = row_kernel();
  std::vector<float> largest(tasks_of(view_.groups), 0.0f);
  for_each_group(view_.groups, threads, width * kGroup, [&](std::int64_t g, std::int64_t task, float* transformed) {
    const float of_group = kernel.transform(view_.screen + g * width * kGroup, width, block, transformed);
    largest[task] = std::max(largest[task], of_group);
  });
  const float most = *std::max_element(largest.begin(), largest.end());
  if (most * kGain > screen_largest_ * std::sqrt(static_cast<double>(block))) return screen_largest_;
  view_.int8_block = block;
  // Each of its log2(n) steps rounds every value once.
  for (std::int64_t n = block; n > 1; n /= 2) view_.int8_rounding += 0x1p-24 * (1 + 1e-5);
  return most;
}

void PackedCodebook::prepare_int8(bool floats, int threads) {
  constexpr std::int64_t kWidest = 4096;  // above, the bias does not fit into int16
  const std::int64_t width = view_.width, groups = view_.groups, quads = (width + 3) / 4;
  if (width < 4 || width > kWidest) return;
  if (!(screen_largest_ / 127 > 0x1p-60f)) return;
  const float scale = choose_block(threads) / 127;

  if (floats && view_.scale == 1 && all_finite_) {  // view() finds them
    view_.row_mean = view_.mean;
  } else {
    rows_ = Buffer<float>(groups * kGroup * width);
    view_.rows = rows_.get();
    view_.row_stride = width;
  }
  int8_codes_ = Buffer<std::int8_t>(groups * quads * 4 * kGroup);
  int8_start_ = Buffer<std::int32_t>(groups * kGroup);
  int8_whole_start_ = Buffer<std::int32_t>(groups * kGroup);
  int8_bias_ = Buffer<std::int32_t>(groups * kGroup);
  const RowKernel& kernel = row_kernel();
  std::vector<CodeExtremes> extremes(tasks_of(groups));
  const bool transformed = view_.int8_block > 1;
  const std::int64_t room = transformed ? width * kGroup : 0;
  for_each_group(groups, threads, room, [&](std::int64_t g, std::int64_t task, float* scratch) {
    const float* group = view_.screen + g * width * kGroup;
    if (transformed) kernel.transform(group, width, view_.int8_block, scratch);
    kernel.quantise(transformed ? scratch : group, view_.bias + g * kGroup, width, scale,
                    int8_codes_.get() + g * quads * 4 * kGroup, int8_start_.get() + g * kGroup,
                    int8_whole_start_.get() + g * kGroup, int8_bias_.get() + g * kGroup, &extremes[task]);
    if (rows_) kernel.store_codes(group, width, rows_.get() + g * kGroup * width);
  });
  double residual = 0;
  for (const CodeExtremes& e : extremes) {
    residual = std::max(residual, e.int8_residual);
    view_.bias_error = std::max(view_.bias_error, e.bias_error);
    view_.bias_high = std::max(view_.bias_high, e.bias_high);
    view_.bias_low = std::max(view_.bias_low, e.bias_low);
  }
  // From the screened float32 codes; their own residual E is added. The factor covers sums of D squares in float32.
  // Of a transform the length is taken back, and what its additions round is added.
  const double length = std::sqrt(static_cast<double>(view_.int8_block));
  view_.int8_residual = std::sqrt(residual * (1 + 1e-6 + static_cast<double>(width) * 0x1p-23)) / length * (1 + 1e-6) +
                        view_.int8_rounding * view_.screen_norm + view_.residual;
  // Up to there the bias, s_c / s_x |q|^2 / 2 at most, is small beside what rounding a row does to a product, some
  // sqrt(D / 12) |q|.
  const double half_norm = 1024 * view_.bias_high + 32 * view_.bias_low + view_.bias_error;
  view_.int8_no_bias = static_cast<float>(std::sqrt(static_cast<double>(width) / (24 * half_norm)));
  view_.int8_scale = scale;
  view_.int8_coarser = coarser(width);
  view_.int8_codes = int8_codes_.get();
  view_.int8_start = int8_start_.get();
  view_.int8_whole_start = int8_whole_start_.get();
  view_.int8_bias = int8_bias_.get();
}

}  // namespace fastvq
