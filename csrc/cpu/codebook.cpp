#include "codebook.h"

#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace fastvq {
namespace {

constexpr std::int64_t kGroupsPerTask = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t tasks_of(std::int64_t groups) {
  return (groups + kGroupsPerTask - 1) / kGroupsPerTask;
}

template <class F>
void for_each_group(std::int64_t groups, int threads, const F& f) {
  parallel(tasks_of(groups), threads, [&](Tasks& tasks) {
    for (std::int64_t task; tasks.next(&task);) {
      const std::int64_t end = std::min(groups, (task + 1) * kGroupsPerTask);
      for (std::int64_t g = task * kGroupsPerTask; g < end; ++g) f(g, task);
    }
  });
}

// What centring and scaling are decided by, of the codes that are finite.
struct Statistics {
  std::vector<double> sums;  // of each element
  double squares = 0;        // sum of |c|^2
  double largest = 0;        // max |c_i|
  std::int64_t finite = 0;

  void add(const Statistics& other) {
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
    squares += other.squares;
    largest = std::max(largest, other.largest);
    finite += other.finite;
  }
};

}  // namespace

PackedCodebook::PackedCodebook(const Rows& codes, Metric metric, bool screened, int threads) {
  view_.size = codes.count;
  view_.width = codes.width;
  view_.groups = (codes.count + kGroup - 1) / kGroup;
  view_.metric = metric;
  view_.is_double = codes.dtype == DType::kFloat64;
  const std::int64_t elements = view_.groups * view_.width * kGroup;
  if (view_.is_double) {
    exact_double_.reset(new double[elements]);
    view_.exact = exact_double_.get();
    copy_exact(codes, exact_double_.get(), threads);
  } else {
    exact_float_.reset(new float[elements]);
    view_.exact = exact_float_.get();
    copy_exact(codes, exact_float_.get(), threads);
    if (screened) prepare_screen(threads);
  }
}

template <class T>
void PackedCodebook::copy_exact(const Rows& codes, T* exact, int threads) const {
  const std::int64_t width = view_.width;
  for_each_group(view_.groups, threads, [&](std::int64_t g, std::int64_t) {
    T* out = exact + g * width * kGroup;
    for (int lane = 0; lane < kGroup; ++lane) {
      const std::int64_t k = g * kGroup + lane;
      if (k >= view_.size) {
        for (std::int64_t d = 0; d < width; ++d) out[d * kGroup + lane] = 0;
        continue;
      }
      dispatch(codes.dtype, [&](auto* type) {
        using Stored = std::remove_pointer_t<decltype(type)>;
        const Stored* row = codes.row<Stored>(k);
        for (std::int64_t d = 0; d < width; ++d) out[d * kGroup + lane] = static_cast<T>(widen(row[d * codes.step]));
      });
    }
  });
}

void PackedCodebook::prepare_screen(int threads) {
  const std::int64_t width = view_.width, groups = view_.groups;
  const float* exact = exact_float_.get();
  bias_.reset(new float[groups * kGroup]);

  // Pass 1: which codes are finite (the others get an infinite bias: they cannot win), and the statistics.
  std::vector<Statistics> partial(tasks_of(groups));
  for (Statistics& s : partial) s.sums.assign(width, 0.0);
  for_each_group(groups, threads, [&](std::int64_t g, std::int64_t task) {
    const float* codes = exact + g * width * kGroup;
    float* bias = bias_.get() + g * kGroup;
    double norm[kGroup] = {};
    for (std::int64_t d = 0; d < width; ++d)
      for (int l = 0; l < kGroup; ++l) norm[l] += static_cast<double>(codes[d * kGroup + l]) * codes[d * kGroup + l];
    bool all = true;
    for (int l = 0; l < kGroup; ++l) {
      const bool usable = g * kGroup + l < view_.size && norm[l] <= std::numeric_limits<double>::max();
      bias[l] = usable ? 0.0f : kInfinity;
      all = all && usable;
    }
    Statistics& s = partial[task];
    for (int l = 0; l < kGroup; ++l) {
      if (bias[l] != 0) continue;
      s.squares += norm[l];
      ++s.finite;
    }
    float largest[kGroup] = {};
    for (std::int64_t d = 0; d < width; ++d) {
      double sum = 0;
      for (int l = 0; l < kGroup; ++l) {
        const float c = all || bias[l] == 0 ? codes[d * kGroup + l] : 0.0f;
        sum += c;
        largest[l] = std::max(largest[l], std::fabs(c));
      }
      s.sums[d] += sum;
    }
    for (float v : largest) s.largest = std::max<double>(s.largest, v);
  });
  Statistics all{std::vector<double>(width, 0.0)};
  for (const Statistics& s : partial) all.add(s);
  // A dot product with an infinity can be the largest of all: such a codebook is not screened.
  if (all.finite == 0 || (view_.metric == Metric::kDot && all.finite != view_.size)) return;

  // Centring pays when the mean is not small beside the spread; when it is, the codes as they are have no rounding.
  double mean_norm = 0;
  for (double& sum : all.sums) {
    sum /= static_cast<double>(all.finite);
    mean_norm += sum * sum;
  }
  const double spread = std::max(0.0, all.squares / static_cast<double>(all.finite) - mean_norm);
  if (view_.metric == Metric::kEuclidean && mean_norm > 0.25 * spread) {
    mean_.reset(new float[width]);
    for (std::int64_t d = 0; d < width; ++d) mean_[d] = static_cast<float>(all.sums[d]);
    view_.mean = mean_.get();
  }

  // A scale that keeps squares far from overflow and underflow; 1 for all but extreme data.
  double largest = all.largest;
  if (view_.mean) {
    largest = 0;
    for (std::int64_t g = 0; g < groups; ++g)
      for (std::int64_t d = 0; d < width; ++d)
        for (int l = 0; l < kGroup; ++l)
          if (bias_[g * kGroup + l] == 0)
            largest = std::max(largest, std::fabs(static_cast<double>(exact[(g * width + d) * kGroup + l]) - mean_[d]));
  }
  if (largest > 0 && (largest < 0x1p-20 || largest > 0x1p20)) view_.scale = std::ldexp(1.0, -std::ilogb(largest));

  // Pass 2: the screened codes, their norms and the residuals of rounding them.
  const bool copied = view_.mean || view_.scale != 1 || all.finite != view_.size;
  if (copied) screen_.reset(new float[groups * width * kGroup]);
  std::vector<double> norms(tasks_of(groups), 0.0), residuals(tasks_of(groups), 0.0);
  for_each_group(groups, threads, [&](std::int64_t g, std::int64_t task) {
    const float* codes = exact + g * width * kGroup;
    float* bias = bias_.get() + g * kGroup;
    double norm[kGroup] = {}, residual[kGroup] = {};
    for (std::int64_t d = 0; d < width; ++d) {
      for (int l = 0; l < kGroup; ++l) {
        const double code = bias[l] == 0 ? codes[d * kGroup + l] : 0.0;
        const double centre = view_.mean && bias[l] == 0 ? mean_[d] : 0.0;
        const double wanted = (code - centre) * view_.scale;
        const float rounded = static_cast<float>(wanted);
        if (copied) screen_[(g * width + d) * kGroup + l] = rounded;
        norm[l] += static_cast<double>(rounded) * rounded;
        residual[l] += (wanted - rounded) * (wanted - rounded);
      }
    }
    for (int l = 0; l < kGroup; ++l) {
      if (view_.metric == Metric::kEuclidean && bias[l] == 0) bias[l] = static_cast<float>(norm[l] / 2);
      norms[task] = std::max(norms[task], norm[l]);
      residuals[task] = std::max(residuals[task], residual[l]);
    }
  });
  double norm = 0, residual = 0;
  for (std::size_t i = 0; i < norms.size(); ++i) {
    norm = std::max(norm, norms[i]);
    residual = std::max(residual, residuals[i]);
  }
  // Both were summed in float64: the factor covers that, and the last term the rounding of c - m itself.
  constexpr double kUp = 1 + 1e-6;
  view_.screen_norm = std::sqrt(norm) * kUp;
  view_.residual = (std::sqrt(residual) + (view_.mean ? 0x1p-51 * view_.screen_norm : 0)) * kUp;
  view_.screen = copied ? screen_.get() : exact;
  view_.bias = bias_.get();
}

}  // namespace fastvq
