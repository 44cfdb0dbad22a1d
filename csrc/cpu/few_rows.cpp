#include "few_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "certificate.h"
#include "parallel.h"
#include "search_way.h"

namespace fastvq {
namespace {

constexpr std::int64_t kChunkFloats = 16384;  // elements of codes that stay in cache while the rows pass over them
constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One row and the codes, by the contract: float64, terms in order, each operation rounded on its own. A few codes at a
// time, to hide the latency of the additions.
class Exact {
 public:
  Exact(const Rows& codes, const float* row) : codes_(codes), row_(row) {}

  double distance(std::int64_t code) {
    flush();
    double values[kTogether];
    code_[pending_++] = code;
    sums(values);
    pending_ = 0;
    return values[0];
  }
  void add(std::int64_t code) {
    code_[pending_++] = code;
    if (pending_ == kTogether) flush();
  }
  // The first of the nearest codes that were added, in their order; -1 where every distance is infinite or NaN.
  std::int64_t nearest() {
    flush();
    return nearest_;
  }

 private:
  static constexpr int kTogether = 8;

  void sums(double values[kTogether]) const {
    const float* c[kTogether];
    for (int p = 0; p < kTogether; ++p) c[p] = codes_.row<float>(code_[p < pending_ ? p : 0]);
    std::fill_n(values, kTogether, 0.0);
    for (std::int64_t d = 0; d < codes_.width; ++d) {
      for (int p = 0; p < kTogether; ++p) {
        const double t = static_cast<double>(row_[d]) - static_cast<double>(c[p][d]);
        values[p] += t * t;
      }
    }
  }
  void flush() {
    double values[kTogether];
    if (pending_ > 0) sums(values);
    for (int p = 0; p < pending_; ++p) {
      if (!(values[p] < least_)) continue;
      least_ = values[p];
      nearest_ = code_[p];
    }
    pending_ = 0;
  }

  const Rows& codes_;
  const float* row_;
  std::int64_t code_[kTogether];
  int pending_ = 0;
  std::int64_t nearest_ = -1;
  double least_ = kInfinity;
};

// No code can be the canonical nearest whose float32 distance lies above this; infinite where that proves nothing.
float threshold(float best, std::int64_t width, bool certify) {
  if (!certify) return best;
  if (!(best < 0x1p125f)) return kFloatInfinity;
  const double passed = static_cast<double>((width + kGroup - 1) / kGroup) + 8;  // roundings that a term passes
  const double gamma = passed * 0x1p-24 / (1 - passed * 0x1p-24);
  const double under = (static_cast<double>(width) + 12) * 0x1p-147;
  const double exact_sum = (static_cast<double>(width) + 6) * 0x1p-52;
  const double bound = (best + under) / (1 - gamma) * (1 + exact_sum) * (1 + gamma) + under;
  return static_cast<float>((best + FASTVQ_BOUND_FACTOR * (bound - best)) * (1 + 0x1p-22)) + 0x1p-140f;
}

// The canonical nearest of some codes.
struct Winner {
  std::int64_t code = -1;           // none: every distance is infinite or NaN
  float screened = kFloatInfinity;  // its float32 distance
  float least = kFloatInfinity;     // the smallest of these distances
};

// Among codes first .. first + count - 1, whose float32 distances are given, and the smallest of them.
Winner winner_of(const float* distances, float least, std::int64_t first, std::int64_t count, const Rows& codes,
                 const float* row, bool certify) {
  Winner winner;
  winner.least = least;
  const float limit = threshold(least, codes.width, certify);
  int near = 0;
  for (std::int64_t k = 0; k < count; ++k) near += distances[k] <= limit;
  if (near == 0) return winner;
  std::int64_t k = 0;
  if (!certify || (near == 1 && limit < kFloatInfinity)) {
    while (!(distances[k] <= limit)) ++k;
  } else {
    Exact exact(codes, row);
    for (; k < count; ++k)
      if (distances[k] <= limit) exact.add(first + k);
    k = exact.nearest() - first;
    if (k < 0) return winner;
  }
  winner.code = first + k;
  winner.screened = distances[k];
  return winner;
}

}  // namespace

bool few_rows(std::int64_t rows, const Rows& codes, Metric metric) {
  return metric == Metric::kEuclidean && codes.dtype == DType::kFloat32 && codes.step == 1 && codes.width < (1 << 20) &&
         rows <= search_way(codes.count, codes.width).few_rows;
}

void nearest_of_few(const float* const* rows, int count, const Rows& codes, bool certify, bool want_value, int threads,
                    Nearest* found) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t chunk = std::max<std::int64_t>(kGroup, kChunkFloats / codes.width / kGroup * kGroup);
  const std::int64_t chunks = (codes.count + chunk - 1) / chunk;
  std::vector<Winner> winners(chunks * count);
  parallel(chunks, worth_threads(codes.count * codes.width * count, threads), [&](Tasks& tasks) {
    std::vector<float> distances(chunk);
    for (std::int64_t task; tasks.next(&task);) {
      const std::int64_t first = task * chunk, size = std::min(chunk, codes.count - first);
      for (int r = 0; r < count; ++r) {
        const float least = kernel.scan(codes.row<float>(first), codes.dims ? codes.strides[0] : 0, size, codes.width,
                                        rows[r], distances.data());
        winners[task * count + r] = winner_of(distances.data(), least, first, size, codes, rows[r], certify);
      }
    }
  });
  for (int r = 0; r < count; ++r) {
    float least = kFloatInfinity;
    for (std::int64_t i = 0; i < chunks; ++i) least = std::min(least, winners[i * count + r].least);
    const float limit = threshold(least, codes.width, certify);
    Exact exact(codes, rows[r]);
    std::int64_t near = 0, nearest = -1;
    for (std::int64_t i = 0; i < chunks; ++i) {
      const Winner& winner = winners[i * count + r];
      if (winner.code < 0 || !(winner.screened <= limit)) continue;
      if (near++ == 0) nearest = winner.code;
      if (certify) exact.add(winner.code);
    }
    if (certify && (near > 1 || limit == kFloatInfinity)) nearest = exact.nearest();
    found->index[r] = std::max<std::int64_t>(0, nearest);
    if (want_value) found->value[r] = exact.distance(found->index[r]);
  }
}

}  // namespace fastvq
