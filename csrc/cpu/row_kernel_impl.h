// Screen, certify, re-score: the nearest codes of one block of rows. Included once by the file of each instruction
// set, which defines FASTVQ_ISA. All of it has internal linkage and calls nothing from the standard library that is
// not inlined: code compiled for one instruction set must never be picked by the linker for another.

#include <cstdint>

#include "certificate.h"
#include "row_kernel.h"
#include "simd.h"

namespace fastvq {
namespace {

constexpr int kPieces = kGroup / kWide;      // vectors of doubles that hold one value of each code of a group
constexpr int kPairs = kPieces > 2 ? 2 : 4;  // (row, group) pairs re-scored together, to hide the adds' latency
constexpr float kInfinity = __builtin_inff();

// ---- screen ----

// The float32 scores of `groups` groups for the rows in the lanes; keeps the minimum of each group, returns the best.
FloatVector screen(const float* codes, const float* bias, std::int64_t groups, std::int64_t width, const float* rows,
                   float* minima, FloatVector best) {
  for (std::int64_t g = 0; g < groups; ++g, codes += width * kGroup, bias += kGroup) {
    FloatVector s0 = broadcast(bias[0]), s1 = broadcast(bias[1]), s2 = broadcast(bias[2]), s3 = broadcast(bias[3]);
    FloatVector s4 = broadcast(bias[4]), s5 = broadcast(bias[5]), s6 = broadcast(bias[6]), s7 = broadcast(bias[7]);
    const float* c = codes;
    for (std::int64_t d = 0; d < width; ++d, c += kGroup) {
      const FloatVector x = load<FloatVector>(rows + d * kLanes);
      s0 = subtract_product(s0, x, broadcast(c[0]));
      s1 = subtract_product(s1, x, broadcast(c[1]));
      s2 = subtract_product(s2, x, broadcast(c[2]));
      s3 = subtract_product(s3, x, broadcast(c[3]));
      s4 = subtract_product(s4, x, broadcast(c[4]));
      s5 = subtract_product(s5, x, broadcast(c[5]));
      s6 = subtract_product(s6, x, broadcast(c[6]));
      s7 = subtract_product(s7, x, broadcast(c[7]));
    }
    const FloatVector minimum =
        smaller(smaller(smaller(s0, s1), smaller(s2, s3)), smaller(smaller(s4, s5), smaller(s6, s7)));
    store(minima + g * kLanes, minimum);
    best = smaller(best, minimum);
  }
  return best;
}

// ---- centre ----

struct RowNorms {
  double norm[kLanes];      // at least |x~|
  double residual[kLanes];  // at least |(x - m) S - x~|
  bool wild[kLanes];        // too large for the screen, or not finite: every group is a candidate
};

constexpr double kUp = 1 + 1e-6;   // covers the float64 sums of squares
constexpr float kTame = 0x1p100f;  // squared norms up to here leave no score of the screen infinite

// x~ = float32((x - m) S) in `centred`, or the rows themselves when nothing is to be done.
const float* centre(const CodebookView& codebook, const RowBlock& block, float* centred, RowNorms* norms) {
  const float* rows = static_cast<const float*>(block.rows);
  const std::int64_t width = codebook.width;
  const bool plain = codebook.mean == nullptr && codebook.scale == 1;
  DoubleVector residual[2] = {};
  FloatVector squares = {};
  if (!plain) {
    const DoubleVector scale = broadcast(codebook.scale);
    for (std::int64_t d = 0; d < width; ++d) {
      const DoubleVector mean = broadcast(codebook.mean ? static_cast<double>(codebook.mean[d]) : 0.0);
      for (int half = 0; half < 2; ++half) {
        const DoubleVector wanted = (load_wide(rows + d * kLanes + half * kWide) - mean) * scale;
        const HalfVector rounded = __builtin_convertvector(wanted, HalfVector);
        store(centred + d * kLanes + half * kWide, rounded);
        const DoubleVector error = wanted - __builtin_convertvector(rounded, DoubleVector);
        residual[half] += error * error;
      }
    }
  }
  const float* screened = plain ? rows : centred;
  for (std::int64_t d = 0; d < width; ++d) {
    const FloatVector x = load<FloatVector>(screened + d * kLanes);
    squares += x * x;
  }
  // float32 squares may underflow: the small term covers that for each of D terms.
  const double up = kUp + static_cast<double>(width) * 0x1p-23, under = static_cast<double>(width) * 0x1p-149;
  bool any_wild = false;
  for (int l = 0; l < kLanes; ++l) {
    norms->wild[l] = !(squares[l] <= kTame);
    any_wild |= norms->wild[l];
    norms->norm[l] = __builtin_sqrt(static_cast<double>(squares[l]) * up + under);
    // The last term is the rounding of x - m in float64.
    norms->residual[l] =
        (__builtin_sqrt(residual[l / kWide][l % kWide]) + (codebook.mean ? 0x1p-51 * norms->norm[l] : 0)) * kUp;
  }
  if (any_wild) {
    for (std::int64_t d = 0; d < width; ++d)
      for (int l = 0; l < kLanes; ++l) centred[d * kLanes + l] = norms->wild[l] ? 0 : screened[d * kLanes + l];
    screened = centred;
  }
  return screened;
}

// ---- re-score ----

// A few (row, group) pairs, gathered so that their sums run side by side.
template <bool kDot, class X, class C>
class Rescore {
 public:
  Rescore(const CodebookView& codebook, const RowBlock& block, Nearest* nearest)
      : codebook_(codebook), rows_(static_cast<const X*>(block.rows)), nearest_(nearest) {
    for (int l = 0; l < block.count; ++l) {
      nearest->index[l] = -1;
      best_[l] = __builtin_inf();
    }
  }

  void add(int lane, std::int64_t group) {
    lane_[pending_] = lane;
    group_[pending_] = group;
    if (++pending_ == kPairs) flush();
  }

  void flush() {
    if (pending_ == 0) return;
    for (int p = pending_; p < kPairs; ++p) {
      lane_[p] = lane_[0];
      group_[p] = group_[0];
    }
    double values[kPairs][kGroup];
    sums(values);
    for (int p = 0; p < pending_; ++p) keep_smallest(lane_[p], group_[p], values[p]);
    pending_ = 0;
  }

  // Rows without any finite distance take code 0, whatever its distance.
  void finish(int count) {
    flush();
    for (int l = 0; l < count; ++l) {
      if (nearest_->index[l] >= 0) continue;
      lane_[0] = l;
      group_[0] = 0;
      for (int p = 1; p < kPairs; ++p) {
        lane_[p] = l;
        group_[p] = 0;
      }
      double values[kPairs][kGroup];
      sums(values);
      nearest_->index[l] = 0;
      nearest_->value[l] = values[0][0];
    }
  }

 private:
  // The contract: float64, terms in order, each operation rounded on its own.
  void sums(double values[kPairs][kGroup]) const {
    const std::int64_t width = codebook_.width;
    const X* x[kPairs];
    const C* c[kPairs];
    for (int p = 0; p < kPairs; ++p) {
      x[p] = rows_ + lane_[p];
      c[p] = static_cast<const C*>(codebook_.exact) + group_[p] * width * kGroup;
    }
    DoubleVector total[kPairs][kPieces] = {};
    for (std::int64_t d = 0; d < width; ++d) {
      for (int p = 0; p < kPairs; ++p) {
        const DoubleVector value = broadcast(static_cast<double>(x[p][d * kLanes]));
        for (int i = 0; i < kPieces; ++i) {
          const DoubleVector code = load_wide(c[p] + d * kGroup + i * kWide);
          if (kDot) {
            total[p][i] += value * code;
          } else {
            const DoubleVector t = value - code;
            total[p][i] += t * t;
          }
        }
      }
    }
    for (int p = 0; p < kPairs; ++p)
      for (int i = 0; i < kPieces; ++i) store(values[p] + i * kWide, total[p][i]);
  }

  // Groups come in ascending order for each row, so "less" keeps the first of equals; NaN is never less.
  void keep_smallest(int lane, std::int64_t group, const double values[kGroup]) {
    const std::int64_t first = group * kGroup;
    const int count = codebook_.size - first < kGroup ? static_cast<int>(codebook_.size - first) : kGroup;
    for (int j = 0; j < count; ++j) {
      const double value = kDot ? -values[j] : values[j];
      if (value < best_[lane]) {
        best_[lane] = value;
        nearest_->index[lane] = first + j;
        nearest_->value[lane] = values[j];
      }
    }
  }

  const CodebookView& codebook_;
  const X* rows_;
  Nearest* nearest_;
  double best_[kLanes];
  int pending_ = 0;
  int lane_[kPairs];
  std::int64_t group_[kPairs];
};

template <bool kDot, class X, class C>
void rescore_all(const CodebookView& codebook, const RowBlock& block, Nearest* nearest) {
  Rescore<kDot, X, C> rescore(codebook, block, nearest);
  for (std::int64_t g = 0; g < codebook.groups; ++g)
    for (int l = 0; l < block.count; ++l) rescore.add(l, g);
  rescore.finish(block.count);
}

// ---- the search of a block ----

template <bool kDot>
void screened_nearest(const CodebookView& codebook, const RowBlock& block, const BlockScratch& scratch,
                      const Certificate& certificate, Nearest* nearest) {
  RowNorms norms;
  const float* rows = centre(codebook, block, scratch.centred, &norms);
  Rescore<kDot, float, float> rescore(codebook, block, nearest);
  FloatVector best = broadcast(kInfinity);
  for (std::int64_t first = 0; first < codebook.groups; first += kScreenGroups) {
    const std::int64_t left = codebook.groups - first, groups = left < kScreenGroups ? left : kScreenGroups;
    best = screen(codebook.screen + first * codebook.width * kGroup, codebook.bias + first * kGroup, groups,
                  codebook.width, rows, scratch.minima, best);
    FloatVector threshold = broadcast(-kInfinity);
    for (int l = 0; l < block.count; ++l) {
      const double bound = certificate.threshold(best[l], norms.norm[l], norms.residual[l], !kDot);
      // One step up covers the rounding to float32.
      const float above = __builtin_nextafterf(static_cast<float>(bound), kInfinity);
      threshold[l] = norms.wild[l] ? kInfinity : block.certify ? above : best[l];
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      unsigned lanes = not_above(load<FloatVector>(scratch.minima + g * kLanes), threshold);
      for (; lanes; lanes &= lanes - 1) rescore.add(__builtin_ctz(lanes), first + g);
    }
  }
  rescore.finish(block.count);
}

template <bool kDot>
void nearest_with(const CodebookView& codebook, const RowBlock& block, const BlockScratch& scratch, Nearest* nearest) {
  if (block.is_double) {
    return codebook.is_double ? rescore_all<kDot, double, double>(codebook, block, nearest)
                              : rescore_all<kDot, double, float>(codebook, block, nearest);
  }
  if (codebook.is_double) return rescore_all<kDot, float, double>(codebook, block, nearest);
  const Certificate certificate(codebook.width, codebook.screen_norm, codebook.residual, !kDot);
  if (!codebook.screen || !certificate.usable) return rescore_all<kDot, float, float>(codebook, block, nearest);
  screened_nearest<kDot>(codebook, block, scratch, certificate, nearest);
}

void nearest(const CodebookView& codebook, const RowBlock& block, const BlockScratch& scratch, Nearest* found) {
  if (codebook.metric == Metric::kDot) return nearest_with<true>(codebook, block, scratch, found);
  nearest_with<false>(codebook, block, scratch, found);
}

}  // namespace

#define FASTVQ_KERNEL_NAME(isa) row_kernel_##isa
#define FASTVQ_KERNEL(isa) FASTVQ_KERNEL_NAME(isa)
#define FASTVQ_TEXT(isa) #isa
#define FASTVQ_STRING(isa) FASTVQ_TEXT(isa)
extern const RowKernel FASTVQ_KERNEL(FASTVQ_ISA);
const RowKernel FASTVQ_KERNEL(FASTVQ_ISA) = {FASTVQ_STRING(FASTVQ_ISA), kLanes, nearest};

}  // namespace fastvq
