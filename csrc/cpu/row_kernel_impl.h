// Screen, certify, re-score: the nearest codes of one block of rows. Included once by the file of each instruction
// set, which defines FASTVQ_ISA. All of it has internal linkage and calls nothing from the standard library that is
// not inlined: code compiled for one instruction set must never be picked by the linker for another.

#include <cstdint>

#include "certificate.h"
#include "row_kernel.h"
#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define FASTVQ_INT8  // this instruction set screens in int8
#endif

namespace fastvq {
namespace {

constexpr int kPieces = kGroup / kWide;      // vectors of doubles that hold one value of each code of a group
constexpr int kPairs = kPieces > 2 ? 2 : 4;  // (row, group) pairs re-scored together, to hide the adds' latency
constexpr float kInfinity = __builtin_inff();
constexpr double kUp = 1 + 1e-6;  // covers the float64 sums of squares

}  // namespace
}  // namespace fastvq

#include "layer_impl.h"
#include "pack_impl.h"

namespace fastvq {
namespace {

// ---- screen ----

// What is done by the way while codes are screened, a share in each of `steps` steps: memory that is wanted afterwards
// is brought into the cache, for asked for at once it would be waited for, and twins are compared.
class Errands {
 public:
  Errands(const RowBlock& block, std::int64_t steps)
      : next_(block.next),
        output_(block.output),
        twins_(block.twins),
        left_((next_.end - next_.begin) + (output_.end - output_.begin)),
        share_(left_ > kFewBytes ? left_ / steps + kLine : left_),
        twins_share_(twins_ ? (twins_->bytes / steps / kPair + 1) * kPair : 0) {
    if (left_ <= kFewBytes) fetch();
  }

  bool wanted() const { return left_ > 0 || twins_share_ > 0; }

  __attribute__((noinline)) void step() {
    if (left_ > 0) fetch();
    if (twins_share_ > 0) compare();
  }

 private:
  void fetch() {
    left_ -= share_;
    std::int64_t bytes = share_;
    for (; bytes > 0 && output_.begin < output_.end; bytes -= kLine, output_.begin += kLine)
      __builtin_prefetch(output_.begin, 1, 2);
    for (; bytes > 0 && next_.begin < next_.end; bytes -= kLine, next_.begin += kLine)
      __builtin_prefetch(next_.begin, 0, 2);
  }

  void compare() {
    if (twins_->bytes < twins_share_) twins_share_ = twins_->bytes / kPair * kPair;
    IntVector differ = {};
    for (std::int64_t b = 0; b < twins_share_; b += kVector)
      differ |= load<IntVector>(twins_->one + b) ^ load<IntVector>(twins_->other + b);
    std::int32_t each[kLanes], any = 0;
    store(each, differ);
    for (std::int32_t e : each) any |= e;
    twins_->same &= any == 0;
    twins_->one += twins_share_;
    twins_->other += twins_share_;
    twins_->bytes -= twins_share_;
  }

  static constexpr std::int64_t kLine = 64, kFewBytes = 16 * kLine, kVector = sizeof(IntVector), kPair = 2 * kVector;
  Span next_, output_;
  Twins* const twins_;
  std::int64_t left_;
  const std::int64_t share_;
  std::int64_t twins_share_;
};

// The float32 scores of `groups` groups for the rows in the lanes; keeps the minimum of each group, returns the best.
FloatVector screen(const float* codes, const float* bias, std::int64_t groups, std::int64_t width, const float* rows,
                   float* minima, FloatVector best, Errands* errands) {
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
    if (errands->wanted()) errands->step();
  }
  return best;
}

// ---- centre ----

struct RowNorms {
  double norm[kLanes];      // at least |x~|
  double residual[kLanes];  // at least |(x - m) S - x~|
  bool wild[kLanes];        // too large for the screen, or not finite: every group is a candidate
  bool any_wild;
};

constexpr float kTame = 0x1p100f;  // squared norms up to here leave no score of the screen infinite

// x~ of the rows of a block, D floats each: float32((x - m) S), or the rows themselves when nothing is to be done.
struct ScreenedRows {
  const float* row[kLanes];
  FloatVector largest;  // max |x~_i|
};

// Calls f(d, count) for the dimensions of a row, a vector of `count` at a time.
template <class F>
inline void for_each_vector(std::int64_t width, const F& f) {
  std::int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) f(d, kLanes);
  if (d < width) f(d, static_cast<int>(width - d));
}
inline FloatVector load_up_to(const float* p, int count) {
  return count == kLanes ? load<FloatVector>(p) : load_some(p, count);
}
// D and the rest of the last vector. What is stored whole is there at once for a load; after a masked store that waits.
inline std::int64_t whole_vectors(std::int64_t width) {
  return (width + kLanes - 1) / kLanes * kLanes;
}

// out = float32((x - m) S); returns |(x - m) S - out|^2, but for the rounding of x - m to float64.
double move(const CodebookView& codebook, const float* x, float* out) {
  double total = 0;
  for (std::int64_t d = 0; d < codebook.width; ++d) {
    const double mean = codebook.mean ? static_cast<double>(codebook.mean[d]) : 0.0;
    const double wanted = (static_cast<double>(x[d]) - mean) * codebook.scale;
    out[d] = static_cast<float>(wanted);
    const double error = wanted - static_cast<double>(out[d]);
    total += error * error;
  }
  return total;
}

void centre(const CodebookView& codebook, const RowBlock& block, float* centred, ScreenedRows* rows, RowNorms* norms) {
  const auto* const* source = reinterpret_cast<const float* const*>(block.row);
  const std::int64_t width = codebook.width;
  const bool plain = codebook.mean == nullptr && codebook.scale == 1, moved = codebook.mean && codebook.scale == 1;
  FloatVector squares[kLanes], largest[kLanes], errors[kLanes];
  double error[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    float* out = centred + l * whole_vectors(width);
    const float* x = source[l];
    const float* const row = rows->row[l] = plain ? x : out;
    FloatVector minus = {}, most = {};
    const auto add = [&](FloatVector value) {
      minus = subtract_product(minus, value, value);
      most = larger(most, magnitude(value));
    };
    if (moved) {
      FloatVector minus_errors = {};
      for_each_vector(width, [&](std::int64_t d, int count) {
        const FloatVector value = load_up_to(x + d, count), mean = load_up_to(codebook.mean + d, count);
        FloatVector difference;
        const FloatVector lost = subtract(value, mean, &difference);
        store(out + d, difference);
        add(difference);
        minus_errors = subtract_product(minus_errors, lost, lost);
      });
      errors[l] = minus_errors;
    } else {
      if (!plain) error[l] = move(codebook, x, out);
      for_each_vector(width, [&](std::int64_t d, int count) { add(load_up_to(row + d, count)); });
    }
    squares[l] = minus;
    largest[l] = most;
  }
  rows->largest =
      combine_lanes<FloatVector, IntVector, kLanes>(largest, [](FloatVector a, FloatVector b) { return larger(a, b); });
  float squared[kLanes];
  store(squared, -sum_lanes<FloatVector, IntVector, kLanes>(squares));
  if (moved) {
    float two_sum_error[kLanes];
    store(two_sum_error, -sum_lanes<FloatVector, IntVector, kLanes>(errors));
    for (int l = 0; l < kLanes; ++l) error[l] = at_most(two_sum_error[l], width);
  }
  const double centring = codebook.mean ? 0x1p-51 : 0;  // the rounding of x - m in float64
  bool any_wild = false;
  for (int l = 0; l < kLanes; ++l) {
    norms->wild[l] = !(squared[l] <= kTame);
    any_wild |= norms->wild[l];
  }
  for (int l = 0; l < kLanes; ++l) {
    norms->norm[l] = __builtin_sqrt(at_most(squared[l], width));
    norms->residual[l] = (__builtin_sqrt(error[l]) + centring * norms->norm[l]) * kUp;
  }
  norms->any_wild = any_wild;
  if (!any_wild) return;
  for (int l = 0; l < kLanes; ++l) {  // never to be screened: zeros
    if (!norms->wild[l]) continue;
    float* const zeros = centred + l * whole_vectors(width);
    for (std::int64_t d = 0; d < width; ++d) zeros[d] = 0;
    rows->row[l] = zeros;
  }
}

// ---- re-score ----

template <bool kDot>
inline DoubleVector exact_term(DoubleVector x, DoubleVector c) {
  const DoubleVector t = x - c;
  return kDot ? x * c : t * t;
}

// The sums of a few (row, group) pairs, which run side by side.
template <bool kDot, class X, class C>
struct GroupSums {
  static constexpr int kTogether = kPairs, kCodes = kGroup;

  static void of(const CodebookView& codebook, const X* const (&x)[kTogether], const std::int64_t (&group)[kTogether],
                 double (&values)[kTogether][kCodes]) {
    const C* c[kTogether];
    for (int p = 0; p < kTogether; ++p)
      c[p] = static_cast<const C*>(codebook.exact) + group[p] * codebook.width * kGroup;
    DoubleVector total[kTogether][kPieces] = {};
    for (std::int64_t d = 0; d < codebook.width; ++d) {
      for (int p = 0; p < kTogether; ++p) {
        const DoubleVector value = broadcast(static_cast<double>(x[p][d]));
        for (int i = 0; i < kPieces; ++i)
          total[p][i] += exact_term<kDot>(value, load_wide(c[p] + d * kGroup + i * kWide));
      }
    }
    for (int p = 0; p < kTogether; ++p)
      for (int i = 0; i < kPieces; ++i) store(values[p] + i * kWide, total[p][i]);
  }
};

// The same of (row, code) pairs, for codes that are screened and lie as rows.
template <bool kDot>
struct CodeSums {
  static constexpr int kTogether = kGroup, kCodes = 1;

  static void of(const CodebookView& codebook, const float* const (&x)[kTogether],
                 const std::int64_t (&code)[kTogether], double (&values)[kTogether][kCodes]) {
    constexpr std::int64_t kChunk = 64;  // dimensions that are turned at a time
    DoubleVector total[kPieces] = {};
    for (std::int64_t d = 0; d < codebook.width; d += kChunk) {
      const std::int64_t left = codebook.width - d, count = left < kChunk ? left : kChunk;
      const float *row[kTogether], *c[kTogether];
      for (int p = 0; p < kTogether; ++p) {
        row[p] = x[p] + d;
        c[p] = codebook.rows + code[p] * codebook.row_stride + d;
      }
      float rows[kChunk * kGroup], codes[kChunk * kGroup];
      load_codes(row, count, rows);
      load_codes(c, count, codes);
      for (std::int64_t i = 0; i < count * kGroup; i += kWide)
        total[i % kGroup / kWide] += exact_term<kDot>(load_wide(rows + i), load_wide(codes + i));
    }
    for (int i = 0; i < kPieces; ++i) store(&values[0][0] + i * kWide, total[i]);
  }
};

// The exact winner of each row, of the groups or codes that are added to it, in whatever order they come.
template <bool kDot, class X, class Sums>
class Rescore {
 public:
  Rescore(const CodebookView& codebook, const RowBlock& block)
      : codebook_(codebook), rows_(reinterpret_cast<const X* const*>(block.row)) {
    for (int l = 0; l < kLanes; ++l) {
      index_[l] = -1;
      best_[l] = __builtin_inf();
    }
  }

  // item: the number of a group or a code.
  void add(int lane, std::int64_t item) {
    lane_[pending_] = lane;
    item_[pending_] = item;
    if (++pending_ == Sums::kTogether) flush();
  }

  // The nearest code of a row, all that it has added; code 0, whatever its distance, when none is finite.
  void finish(int lane, Nearest* nearest) {
    flush();
    if (index_[lane] < 0) {
      double values[Sums::kTogether][Sums::kCodes];
      sums(lane, 0, values);
      index_[lane] = 0;
      value_[lane] = values[0][0];
    }
    nearest->index[lane] = index_[lane];
    nearest->value[lane] = value_[lane];
  }

 private:
  void flush() {
    if (pending_ == 0) return;
    double values[Sums::kTogether][Sums::kCodes];
    const int count = pending_;
    sums(lane_[0], item_[0], values);
    for (int p = 0; p < count; ++p) {
      const std::int64_t first = item_[p] * Sums::kCodes, left = codebook_.size - first;
      for (int j = 0; j < Sums::kCodes && j < left; ++j) keep_smallest(lane_[p], first + j, values[p][j]);
    }
  }

  // The contract: float64, terms in order, each operation rounded on its own. Of what is pending, then of one more item
  // as often as there is room.
  void sums(int lane, std::int64_t item, double (&values)[Sums::kTogether][Sums::kCodes]) {
    for (int p = pending_; p < Sums::kTogether; ++p) {
      lane_[p] = lane;
      item_[p] = item;
    }
    const X* x[Sums::kTogether];
    for (int p = 0; p < Sums::kTogether; ++p) x[p] = rows_[lane_[p]];
    Sums::of(codebook_, x, item_, values);
    pending_ = 0;
  }

  // The first of equals; NaN is never less, nor equal.
  void keep_smallest(int lane, std::int64_t code, double value) {
    const double minimised = kDot ? -value : value;
    if (minimised < best_[lane] || (minimised == best_[lane] && code < index_[lane])) {
      best_[lane] = minimised;
      index_[lane] = code;
      value_[lane] = value;
    }
  }

  const CodebookView& codebook_;
  const X* const* rows_;
  double best_[kLanes];   // what is minimised: the distance, or minus the dot product
  double value_[kLanes];  // the distance or the dot product
  std::int64_t index_[kLanes];
  int pending_ = 0;
  int lane_[Sums::kTogether];
  std::int64_t item_[Sums::kTogether];
};

template <bool kDot, class X, class C>
void rescore_all(const CodebookView& codebook, const RowBlock& block, Nearest* nearest) {
  Rescore<kDot, X, GroupSums<kDot, X, C>> exact(codebook, block);
  for (std::int64_t g = 0; g < codebook.groups; ++g)
    for (int l = 0; l < block.count; ++l) exact.add(l, g);
  for (int l = 0; l < block.count; ++l) exact.finish(l, nearest);
}

// ---- candidates: codes that the screen could not rule out ----

// Codes of the rows of a block with their float32 scores: most rows are decided by these alone.
class Candidates {
 public:
  explicit Candidates(const BlockScratch& scratch) : scratch_(scratch) {
    for (float& best : best_) best = kInfinity;
  }

  int count() const { return count_; }
  bool room_for(int more) const { return count_ + more <= kMaxCandidates; }
  // A code to be scored later: by then its memory may have arrived. There must be room, wanted or not.
  void note_if(bool wanted, int lane, std::int64_t code) {
    scratch_.lane[count_] = lane;
    scratch_.code[count_] = code;
    count_ += wanted;
  }
  void add(int lane, std::int64_t code, float score) {
    note_if(true, lane, code);
    keep(score);
  }
  // Scores the codes that were noted, by score_of(lane, code).
  template <class Score>
  void score(const Score& score_of) {
    while (scored_ < count_) keep(score_of(scratch_.lane[scored_], scratch_.code[scored_]));
  }
  void clear() {
    count_ = scored_ = 0;
    for (float& best : best_) best = kInfinity;
  }

  // How many codes a row has.
  int count_of(int lane) const {
    int count = 0;
    for (int i = 0; i < count_; ++i) count += scratch_.lane[i] == lane;
    return count;
  }

  // For each row, the smallest score of its codes.
  const float* best() const { return best_; }

  // Hands every code to the exact re-score.
  template <class Exact>
  void all_exact(Exact* exact) {
    for (int i = 0; i < count_; ++i) exact->add(scratch_.lane[i], scratch_.code[i]);
    count_ = scored_ = 0;
  }

  // Decides the rows by their only code up to `threshold`, and hands the codes of the others to the exact re-score,
  // those of all rows when the value of the distance is wanted. decided[lane] tells which.
  template <class Exact>
  void decide(const float* threshold, bool want_value, Exact* exact, Nearest* nearest, bool* decided) const {
    int codes[kLanes] = {};
    for (int i = 0; i < count_; ++i) {
      const int lane = scratch_.lane[i];
      const bool near = scratch_.score[i] <= threshold[lane];
      codes[lane] += near;
      nearest->index[lane] = near ? scratch_.code[i] : nearest->index[lane];
    }
    bool all = true;
    for (int l = 0; l < kLanes; ++l) {
      decided[l] = codes[l] == 1 && !want_value;
      all &= decided[l];
    }
    if (all) return;
    for (int i = 0; i < count_; ++i) {
      const int lane = scratch_.lane[i];
      if (!decided[lane] && scratch_.score[i] <= threshold[lane]) exact->add(lane, scratch_.code[i]);
    }
  }

 private:
  void keep(float score) {
    float& best = best_[scratch_.lane[scored_]];
    scratch_.score[scored_++] = score;
    best = score < best ? score : best;
  }

  const BlockScratch& scratch_;
  float best_[kLanes];
  int count_ = 0;
  int scored_ = 0;
};

// ---- the search of a block ----

// What the certificate knows of the rows of a block.
struct Bounds {
  const Certificate& certificate;
  const RowNorms& norms;
  const RowBlock& block;
  bool euclidean;

  // For each row: no code can win whose float32 score lies above this. best: its smallest float32 score so far.
  void thresholds(const float* best, float* out) const {
    if (!block.certify) {
      for (int l = 0; l < kLanes; ++l) out[l] = best[l];
    } else {
      const Certificate known = certificate;  // a copy of its own: the loops below are vectorised
      double bound[kLanes];
      if (euclidean) {
        for (int l = 0; l < kLanes; ++l) bound[l] = known.threshold(best[l], norms.norm[l], norms.residual[l], true);
      } else {
        for (int l = 0; l < kLanes; ++l) bound[l] = known.threshold(best[l], norms.norm[l], norms.residual[l], false);
      }
      for (int l = 0; l < kLanes; ++l) {
        const auto rounded = static_cast<float>(bound[l]);
        const float size = rounded < 0 ? -rounded : rounded;
        out[l] = rounded + size * 0x1p-22f + 0x1p-140f;  // a step up and more: covers the rounding to float32
      }
    }
    if (norms.any_wild)
      for (int l = 0; l < kLanes; ++l) out[l] = norms.wild[l] ? kInfinity : out[l];
    for (int l = block.count; l < kLanes; ++l) out[l] = -kInfinity;
  }
};

}  // namespace
}  // namespace fastvq

#if defined(FASTVQ_INT8)
#include "int8_screen.h"
#endif

namespace fastvq {
namespace {

// The float32 scores of (row, group) pairs, a few at a time to hide the latency of the FMAs: the same sums as in
// screen(). Codes up to the limit of their row become candidates.
template <class Exact>
class GroupScores {
 public:
  GroupScores(const CodebookView& codebook, const float* const* rows, Candidates* candidates, Exact* exact)
      : codebook_(codebook), rows_(rows), candidates_(candidates), exact_(exact) {}

  void add(int lane, std::int64_t group, float limit) {
    lane_[pending_] = lane;
    group_[pending_] = group;
    limit_[pending_] = limit;
    if (++pending_ == kTogether) flush();
  }

  // Whether candidates past what is kept had to go to the exact re-score: then all must.
  bool finish() {
    flush();
    return spilled_;
  }

 private:
  static constexpr int kTogether = 4;

  void flush() {
    if (pending_ == 0) return;
    const float* x[kTogether];
    const float* c[kTogether];
    GroupVector s[kTogether];
    for (int p = 0; p < kTogether; ++p) {
      const int i = p < pending_ ? p : 0;
      x[p] = rows_[lane_[i]];
      c[p] = codebook_.screen + group_[i] * codebook_.width * kGroup;
      s[p] = load<GroupVector>(codebook_.bias + group_[i] * kGroup);
    }
    for (std::int64_t d = 0; d < codebook_.width; ++d)
      for (int p = 0; p < kTogether; ++p)
        s[p] = subtract_product(s[p], x[p][d] - GroupVector{}, load<GroupVector>(c[p] + d * kGroup));
    if (!candidates_->room_for(kTogether * kGroup)) {
      candidates_->all_exact(exact_);
      spilled_ = true;
    }
    for (int p = 0; p < pending_; ++p) {
      float scores[kGroup];
      store(scores, s[p]);
      const std::int64_t first = group_[p] * kGroup;
      for (unsigned near = group_not_above(scores, limit_[p]); near; near &= near - 1) {
        const int j = __builtin_ctz(near);
        if (first + j < codebook_.size) candidates_->add(lane_[p], first + j, scores[j]);
      }
    }
    pending_ = 0;
  }

  const CodebookView& codebook_;
  const float* const* rows_;
  Candidates* candidates_;
  Exact* exact_;
  int pending_ = 0;
  bool spilled_ = false;
  int lane_[kTogether];
  std::int64_t group_[kTogether];
  float limit_[kTogether];
};

// Screens all codes in float32. Returns whether candidates had to go to the exact re-score for want of room.
template <class Exact>
bool float_candidates(const CodebookView& codebook, const Bounds& bounds, const float* const* rows,
                      const BlockScratch& scratch, Candidates* candidates, Exact* exact) {
  transpose_rows<FloatVector, IntVector, kLanes>(rows, codebook.width, scratch.columns);
  FloatVector best = broadcast(kInfinity);
  GroupScores<Exact> scores(codebook, rows, candidates, exact);
  float* minima = static_cast<float*>(scratch.minima);
  Errands errands(bounds.block, codebook.groups);
  for (std::int64_t first = 0; first < codebook.groups; first += kScreenGroups) {
    const std::int64_t left = codebook.groups - first, groups = left < kScreenGroups ? left : kScreenGroups;
    best = screen(codebook.screen + first * codebook.width * kGroup, codebook.bias + first * kGroup, groups,
                  codebook.width, scratch.columns, minima, best, &errands);
    float so_far[kLanes], limits[kLanes];
    store(so_far, best);
    bounds.thresholds(so_far, limits);
    const FloatVector threshold = load<FloatVector>(limits);
    for (std::int64_t g = 0; g < groups; ++g) {
      unsigned lanes = not_above(load<FloatVector>(minima + g * kLanes), threshold);
      for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        scores.add(lane, first + g, limits[lane]);
      }
    }
  }
  return scores.finish();
}

template <bool kDot>
bool screened_nearest(const CodebookView& codebook, const RowBlock& block, const BlockScratch& scratch,
                      Nearest* nearest) {
  const Certificate certificate(codebook.width, codebook.screen_norm, codebook.residual, !kDot);
  if (!codebook.screen && scratch.trial->skip > 0) return false;  // before any work: int8 is not tried
  RowNorms norms;
  ScreenedRows rows;
  centre(codebook, block, scratch.centred, &rows, &norms);
  const Bounds bounds{certificate, norms, block, !kDot};
  Rescore<kDot, float, CodeSums<kDot>> exact(codebook, block);
  Candidates candidates(scratch);
  bool decided[kLanes] = {};
  bool spilled = false, screened = false;
#if defined(FASTVQ_INT8)
  screened = codebook.int8_codes && int8_candidates(codebook, bounds, rows, scratch, &candidates);
#endif
  if (!screened) {
    if (!codebook.screen) return false;
    spilled = float_candidates(codebook, bounds, rows.row, scratch, &candidates, &exact);
  }
  if (spilled) {
    candidates.all_exact(&exact);
  } else {
    float threshold[kLanes];
    bounds.thresholds(candidates.best(), threshold);
    candidates.decide(threshold, block.want_value, &exact, nearest, decided);
    if (scratch.counts) {
      for (int l = 0; l < block.count; ++l) {
        scratch.counts->open -= candidates.count_of(l) == 1;
        scratch.counts->exact -= decided[l];
      }
    }
  }
  for (int l = 0; l < block.count; ++l)
    if (!decided[l]) exact.finish(l, nearest);
  return true;
}

template <bool kDot>
bool nearest_with(const CodebookView& codebook, const RowBlock& block, const BlockScratch& scratch, Nearest* nearest) {
  if (codebook.bias && !block.is_double) return screened_nearest<kDot>(codebook, block, scratch, nearest);
  if (block.is_double) {
    (codebook.is_double ? rescore_all<kDot, double, double> : rescore_all<kDot, double, float>)(codebook, block,
                                                                                                nearest);
  } else {
    (codebook.is_double ? rescore_all<kDot, float, double> : rescore_all<kDot, float, float>)(codebook, block, nearest);
  }
  return true;
}

// ---- a few rows ----

// A term is the square of a rounded difference (two roundings) and passes at most ceil(D / 8) + 2 more along its lane
// and three across the lanes.
float scan(const float* codes, std::int64_t stride, std::int64_t count, std::int64_t width, const float* row,
           float* distances) {
  GroupVector least = kInfinity - GroupVector{};
  const std::int64_t whole = width / kGroup * kGroup, rest = width - whole;
  GroupIndex mask;  // of the last eight dimensions, those that were not among the whole groups
  for (int i = 0; i < kGroup; ++i) mask[i] = i >= kGroup - rest ? -1 : 0;
  for (std::int64_t k = 0; k < count; k += kGroup) {
    const float* c[kGroup];
    for (int j = 0; j < kGroup; ++j) c[j] = codes + (k + j < count ? k + j : count - 1) * stride;
    GroupVector minus[kGroup] = {};
    for (std::int64_t d = 0; d < whole; d += kGroup) {
      const GroupVector x = load<GroupVector>(row + d);
      for (int j = 0; j < kGroup; ++j) {
        const GroupVector t = x - load<GroupVector>(c[j] + d);
        minus[j] = subtract_product(minus[j], t, t);
      }
    }
    if (rest && whole) {
      const GroupVector x = load<GroupVector>(row + width - kGroup);
      for (int j = 0; j < kGroup; ++j) {
        const GroupVector difference = x - load<GroupVector>(c[j] + width - kGroup);
        const GroupVector t = reinterpret_cast<GroupVector>(reinterpret_cast<GroupIndex>(difference) & mask);
        minus[j] = subtract_product(minus[j], t, t);
      }
    } else if (rest) {
      for (std::int64_t d = 0; d < rest; ++d) {
        for (int j = 0; j < kGroup; ++j) {
          const float t = row[d] - c[j][d];
          minus[j][d] = -(t * t);
        }
      }
    }
    const GroupVector sum = -sum_lanes<GroupVector, GroupIndex, kGroup>(minus);
    least = sum < least ? sum : least;
    if (k + kGroup <= count) {
      store(distances + k, sum);
    } else {
      for (int j = 0; k + j < count; ++j) distances[k + j] = sum[j];
    }
  }
  return smallest(least);
}

bool nearest(const CodebookView& codebook, const RowBlock& block, const BlockScratch& scratch, Nearest* found) {
  const bool done = codebook.metric == Metric::kDot ? nearest_with<true>(codebook, block, scratch, found)
                                                    : nearest_with<false>(codebook, block, scratch, found);
  if (done && scratch.counts) {  // those that the screen has not taken away are looked at again in float64
    scratch.counts->rows += block.count;
    scratch.counts->open += block.count;
    scratch.counts->exact += block.count;
  }
  return done;
}

}  // namespace

#define FASTVQ_KERNEL_NAME(isa) row_kernel_##isa
#define FASTVQ_KERNEL(isa) FASTVQ_KERNEL_NAME(isa)
#define FASTVQ_TEXT(isa) #isa
#define FASTVQ_STRING(isa) FASTVQ_TEXT(isa)
extern const RowKernel FASTVQ_KERNEL(FASTVQ_ISA);
#if defined(FASTVQ_INT8)
constexpr bool kInt8 = true;
constexpr auto kTransformCodes = transform_codes;
constexpr auto kQuantiseCodes = quantise_codes;
#else
constexpr bool kInt8 = false;
constexpr decltype(RowKernel::transform) kTransformCodes = nullptr;
constexpr decltype(RowKernel::quantise) kQuantiseCodes = nullptr;
#endif
const RowKernel FASTVQ_KERNEL(FASTVQ_ISA) = {FASTVQ_STRING(FASTVQ_ISA),
                                             kLanes,
                                             kInt8,
                                             nearest,
                                             untranspose,
                                             load_codes,
                                             measure,
                                             screen_codes,
                                             move_codes,
                                             kTransformCodes,
                                             kQuantiseCodes,
                                             scan,
                                             squared_distance,
                                             copy_code,
                                             pull_rows,
                                             add_row,
                                             {pull_stage<float>, turn_stage<float>},
                                             {pull_stage<double>, turn_stage<double>}};

}  // namespace fastvq
