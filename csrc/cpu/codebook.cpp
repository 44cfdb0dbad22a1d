#include "codebook.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "certificate.h"
#include "parallel.h"
#include "row_kernel.h"

namespace fastvq {
namespace {

constexpr std::int64_t kGroupsPerTask = 64;
constexpr std::int64_t kNarrowest = 4, kWidest = 4096;  // D for int8: the bias of wider codes does not fit into int16
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

PackedCodebook::PackedCodebook(const Rows& codes, Metric metric, bool screened, bool int8, char* copy, int threads) {
  view_.size = codes.count;
  view_.width = codes.width;
  view_.groups = (codes.count + kGroup - 1) / kGroup;
  view_.metric = metric;
  view_.is_double = codes.dtype == DType::kFloat64;
  const std::int64_t elements = view_.groups * view_.width * kGroup;
  if (view_.is_double) {
    exact_double_ = Buffer<double>(elements);
    view_.exact = exact_double_.get();
    copy_exact(codes, exact_double_.get(), copy, threads);
    return;
  }
  if (screened && Certificate(view_.width, 0, 0, true).usable) {
    lay_rows(codes, lies_as_floats(codes) ? nullptr : copy, threads);
    prepare_screen(codes, int8, lies_as_floats(codes) ? copy : nullptr, threads);
    if (!rows_ || !view_.bias) view_.rows = nullptr;  // each call has its own
    if (view_.bias) return;
    rows_ = Buffer<float>();
    screen_ = Buffer<float>();
  }
  exact_float_ = Buffer<float>(elements);
  view_.exact = exact_float_.get();
  copy_exact(codes, exact_float_.get(), copy, threads);
}

std::int64_t PackedCodebook::bytes() const {
  const std::int64_t elements = view_.groups * view_.width * kGroup;
  return elements * ((exact_float_ ? 4 : 0) + (exact_double_ ? 8 : 0) + (rows_ ? 4 : 0) + (int8_codes_ ? 1 : 0) +
                     (screen_made_.load(std::memory_order_acquire) ? 4 : 0)) +
         view_.groups * kGroup * (int8_codes_ ? 16 : 4);
}

CodebookView PackedCodebook::view(const Rows& codes) const {
  CodebookView view = view_;
  if (!view.bias) return view;
  view.screen = screen_made_.load(std::memory_order_acquire);
  if (view.rows) return view;
  view.rows = codes.row<float>(0);
  view.row_stride = codes.dims ? codes.strides[0] : 0;
  return view;
}

CodebookView PackedCodebook::with_screen(const CodebookView& view) const {
  CodebookView with = view;
  // A thread of another process never finishes: this one was forked meanwhile.
  const std::int64_t process = getpid();
  while (!(with.screen = screen_made_.load(std::memory_order_acquire))) {
    std::int64_t maker = screen_maker_.load();
    if (maker != process && screen_maker_.compare_exchange_strong(maker, process)) {
      try {
        make_screen(view, 1);
      } catch (...) {
        screen_maker_ = 0;
        throw;
      }
    } else {
      std::this_thread::yield();
    }
  }
  return with;
}

// exact [groups][D][8], zeros after the last code.
template <class T>
void PackedCodebook::copy_exact(const Rows& codes, T* exact, char* copy, int threads) const {
  const std::int64_t width = view_.width;
  for_each_group(view_.groups, threads, [&](std::int64_t g, std::int64_t) {
    T* out = exact + g * width * kGroup;
    const int count = static_cast<int>(std::min<std::int64_t>(kGroup, view_.size - g * kGroup));
    if (copy) codes.copy_bytes(g * kGroup, count, copy);
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

// Codes of D floats each, side by side or not: those of the caller where they are.
void PackedCodebook::lay_rows(const Rows& codes, char* copy, int threads) {
  if (lies_as_floats(codes)) {
    view_.rows = codes.row<float>(0);
    view_.row_stride = codes.dims ? codes.strides[0] : 0;
    return;
  }
  const std::int64_t width = view_.width;
  rows_ = Buffer<float>(view_.size * width);
  view_.rows = rows_.get();
  view_.row_stride = width;
  for_each_group(view_.groups, threads, [&](std::int64_t g, std::int64_t) {
    const std::int64_t end = std::min(view_.size, (g + 1) * kGroup);
    if (copy) codes.copy_bytes(g * kGroup, end - g * kGroup, copy);
    dispatch(codes.dtype, [&](auto* type) {
      using Stored = std::remove_pointer_t<decltype(type)>;
      for (std::int64_t k = g * kGroup; k < end; ++k)
        for (std::int64_t d = 0; d < width; ++d)
          rows_[k * width + d] = static_cast<float>(widen(codes.row<Stored>(k)[d * codes.step]));
    });
  });
}

// out [D][8]: the codes of a group, copies of the last one after it.
void PackedCodebook::load(const CodebookView& view, std::int64_t group, float* out) const {
  const float* rows[kGroup];
  for (int lane = 0; lane < kGroup; ++lane)
    rows[lane] = view.rows + std::min(group * kGroup + lane, view.size - 1) * view.row_stride;
  row_kernel().load_codes(rows, view.width, out);
}

// The same as they are screened.
void PackedCodebook::load_moved(const CodebookView& view, std::int64_t group, float* out) const {
  load(view, group, out);
  if (moved_) row_kernel().move(out, view, view.bias + group * kGroup, out);
}

void PackedCodebook::prepare_screen(const Rows& codes, bool int8, char* copy, int threads) {
  const std::int64_t width = view_.width, groups = view_.groups, tasks = tasks_of(groups);
  const RowKernel& kernel = row_kernel();
  bias_ = Buffer<float>(groups * kGroup);
  int8 = int8 && width >= kNarrowest && width <= kWidest;
  if (!int8) screen_ = Buffer<float>(groups * width * kGroup);  // else each group is needed for a moment only
  const auto place = [&](std::int64_t g, float* scratch) { return int8 ? scratch : &screen_[g * width * kGroup]; };
  constexpr double kLargest = 0x1p20, kSmallest = 0x1p-20;  // of codes that keep squares far from over- and underflow

  // Pass 1: which codes are finite (the others get an infinite bias: they cannot win), and the statistics. Most often
  // the codes are screened as they are, so what that needs is found at once.
  std::vector<float> sums(tasks * width * kGroup, 0.0f);
  std::vector<CodeStatistics> partial;
  for (std::int64_t task = 0; task < tasks; ++task) partial.push_back({&sums[task * width * kGroup], 0, 0, 0});
  std::vector<std::uint32_t> hashes(groups * kGroup);
  std::vector<CodeExtremes> extremes(tasks);
  for_each_group(groups, threads, width * kGroup, [&](std::int64_t g, std::int64_t task, float* scratch) {
    const int count = static_cast<int>(std::min<std::int64_t>(kGroup, view_.size - g * kGroup));
    float *const group = place(g, scratch), *const bias = bias_.get() + g * kGroup;
    load(view_, g, group);
    if (copy) codes.copy_bytes(g * kGroup, count, copy);
    kernel.measure(group, width, count, bias, &hashes[g * kGroup], &partial[task]);
    if (partial[task].largest <= kLargest) kernel.screen(group, view_, bias, nullptr, &extremes[task]);
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
  if (largest > 0 && (largest < kSmallest || largest > kLargest)) view_.scale = std::ldexp(1.0, -std::ilogb(largest));
  typical_ = view_.scale * std::sqrt((centred ? spread : square) / static_cast<double>(width));

  // Pass 2, where they are not screened as they are: the screened codes, their norms and what rounding them loses.
  moved_ = centred || view_.scale != 1 || finite != view_.size;
  if (moved_) {
    extremes.assign(tasks, {});
    for_each_group(groups, threads, width * kGroup, [&](std::int64_t g, std::int64_t task, float* scratch) {
      float *const group = place(g, scratch), *const bias = bias_.get() + g * kGroup;
      load(view_, g, group);
      for (int j = 0; j < kGroup; ++j) bias[j] = bias[j] == kInfinity ? kInfinity : 0;
      kernel.screen(group, view_, bias, group, &extremes[task]);
    });
  }
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
  view_.bias = bias_.get();
  if (int8) prepare_int8(threads);
  if (screen_) {
    screen_made_ = screen_.get();
  } else if (!int8_codes_) {
    make_screen(view_, threads);
  }
}

void PackedCodebook::make_screen(const CodebookView& view, int threads) const {
  Buffer<float> screen(view.groups * view.width * kGroup);
  for_each_group(view.groups, threads,
                 [&](std::int64_t g, std::int64_t) { load_moved(view, g, screen.get() + g * view.width * kGroup); });
  screen_ = std::move(screen);
  screen_made_.store(screen_.get(), std::memory_order_release);
}

// A later copy of a code never wins: of equal distances the smallest index does. Left in, the copies of a collapsed
// codebook would all have to be scored exactly.
void PackedCodebook::exclude_copies(const std::uint32_t* hashes) {
  std::size_t slots = 16;
  while (slots < 2 * static_cast<std::size_t>(view_.size)) slots *= 2;
  std::vector<std::int32_t> table(slots, -1);
  const auto equal = [&](std::int64_t a, std::int64_t b) {
    return std::memcmp(view_.rows + a * view_.row_stride, view_.rows + b * view_.row_stride, view_.width * 4) == 0;
  };
  for (std::int64_t k = 0; k < view_.size; ++k) {
    if (bias_[k] == kInfinity) continue;
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
  for_each_group(view_.groups, threads, 2 * width * kGroup, [&](std::int64_t g, std::int64_t task, float* group) {
    load_moved(view_, g, group);
    const float of_group = kernel.transform(group, width, block, group + width * kGroup);
    largest[task] = std::max(largest[task], of_group);
  });
  const float most = *std::max_element(largest.begin(), largest.end());
  if (most * kGain > screen_largest_ * std::sqrt(static_cast<double>(block))) return screen_largest_;
  view_.int8_block = block;
  // Each of its log2(n) steps rounds every value once.
  for (std::int64_t n = block; n > 1; n /= 2) view_.int8_rounding += 0x1p-24 * (1 + 1e-5);
  return most;
}

void PackedCodebook::prepare_int8(int threads) {
  const std::int64_t width = view_.width, groups = view_.groups, quads = (width + 3) / 4;
  if (!(screen_largest_ / 127 > 0x1p-60f)) return;
  const float scale = choose_block(threads) / 127;

  int8_codes_ = Buffer<std::int8_t>(groups * quads * 4 * kGroup);
  int8_start_ = Buffer<std::int32_t>(groups * kGroup);
  int8_whole_start_ = Buffer<std::int32_t>(groups * kGroup);
  int8_bias_ = Buffer<std::int32_t>(groups * kGroup);
  const RowKernel& kernel = row_kernel();
  std::vector<CodeExtremes> extremes(tasks_of(groups));
  const bool transformed = view_.int8_block > 1;
  for_each_group(groups, threads, 2 * width * kGroup, [&](std::int64_t g, std::int64_t task, float* group) {
    load_moved(view_, g, group);
    float* const rounded = transformed ? group + width * kGroup : group;
    if (transformed) kernel.transform(group, width, view_.int8_block, rounded);
    kernel.quantise(rounded, view_.bias + g * kGroup, width, scale, int8_codes_.get() + g * quads * 4 * kGroup,
                    int8_start_.get() + g * kGroup, int8_whole_start_.get() + g * kGroup, int8_bias_.get() + g * kGroup,
                    &extremes[task]);
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
