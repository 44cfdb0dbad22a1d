// The screen: every code against a block of rows on tensor cores, what survives scored again in the same kernel.
//
// A warp holds 16 M rows as fragments in registers; the codes pass by in tiles, packed so that one ldmatrix gives 16
// codes x 16 dimensions. A thread sees codes 2t and 2t+1 of every eight, of rows g and g+8. Packing gives it GROUP
// codes that follow each other in the codebook: their smallest score is all that is kept, and of those the three
// smallest of the row and thread, each with the number of its segment (4 groups, one a thread of the quad) in the last
// bits. No lane asks another anything before the last code has passed.
#pragma once

#include "ptx.h"
#include "search_device.h"

namespace fastvq {

constexpr int kFragment = 16 * 16 * 2;  // bytes of 16 rows or codes x 16 dimensions

struct ScreenArguments {
  Rows x;
  std::int64_t K;
  int D;
  bool euclidean, row_vectors, code_vectors;  // vectors: four values of a row or code may be loaded as one
  float slack;
  int bits;                      // of a packed score that hold the segment
  std::int64_t tiles, share;     // of a codebook; of one split
  std::int64_t row_blocks;       // of a head
  const void* codebook;          // (H, K, D)
  const float* frame;            // (H, width) the centre; not read where operands are stored values
  CodebookFigures* figures;      // (H)
  const unsigned char* packed;   // (H, tiles, tile bytes)
  const unsigned char* rounded;  // (H, row blocks, chunks, rows, chunk) operands of rows; where they are chunked
  const float* row_figures;      // (H, row blocks * rows, 3): norm, residual and factor; where rows are chunked
  std::int64_t* queue;           // out (H, N) rows to be scored whole
  std::int64_t* indices;         // out (H, N)
  void* distances;               // out (H, N) float32, or nullptr
  double* part_scores;           // out (splits, H, N), nullptr where the codes are not split
  int* part_indices;             // out (splits, H, N): the winner of the split, or kWhole
};

template <Operand OPERAND, class ELEMENT, class CODE, int WIDTH, Source SOURCE>
struct ScreenPolicy {
  static constexpr Operand kOperand = OPERAND;
  static constexpr Source kSource = SOURCE;
  using Element = ELEMENT;  // that is multiplied
  using Code = CODE;        // that the codebook holds
  static constexpr int kWidth = WIDTH;
  static constexpr Tiles kTiles = tiles_for(OPERAND, SOURCE, WIDTH);
  static constexpr int kGroup = kTiles.group, kTile = kTiles.tile, kStages = kTiles.stages, kM = kTiles.m;
  static constexpr int kThreads = 32 * kTiles.warps;
  static constexpr int kRows = 16 * kM * kTiles.warps;
  static constexpr bool kBiased = OPERAND != Operand::split;  // a split operand has its bias folded in
  static constexpr int kSteps = WIDTH / 16;
  static constexpr int kSegments = kTile / (4 * kGroup);
  static constexpr int kTileBytes = kTile * (2 * WIDTH + 4);
  static_assert(kTile % (4 * kGroup) == 0 && kGroup % 4 == 0 && WIDTH % 16 == 0 && kTileBytes % 16 == 0);
};

// ---- what survives the screen ---------------------------------------------------------------------------------------

// What is known of a row's winner: its score is at most `reached`; the two smallest lower ends of intervals, and whose
// the smallest is.
struct Standing {
  float reached, lowest, runner_up;
  int nearest;

  __device__ __forceinline__ void meet(float low, float high, int code) {
    reached = fminf(reached, high);
    runner_up = fminf(runner_up, fmaxf(lowest, low));
    if (low < lowest) nearest = code;
    lowest = fminf(lowest, low);
  }
  __device__ __forceinline__ void meet_lane(int bit) {
    const float low = __shfl_xor_sync(kAllLanes, lowest, bit), next = __shfl_xor_sync(kAllLanes, runner_up, bit);
    const float high = __shfl_xor_sync(kAllLanes, reached, bit);
    const int code = __shfl_xor_sync(kAllLanes, nearest, bit);
    meet(low, high, code);
    runner_up = fminf(runner_up, next);
  }
};

// One row a quad: the groups that its lanes have found, in turn. All lanes of the warp go round together.
struct Turns {
  int count, taken = 0;
  int lane;
  bool active;  // whether this quad has a group this time
  int group;

  __device__ Turns(int count, int lane) : count(count), lane(lane) {}
  __device__ __forceinline__ bool next(int first, int second) {
    const unsigned waiting = __ballot_sync(kAllLanes, taken < count);
    if (waiting == 0) return false;
    const int quad = lane & 28;
    const unsigned mine = waiting >> quad & 15;
    active = mine != 0;
    const int source = quad + (active ? __ffs(mine) - 1 : 0);
    group = __shfl_sync(kAllLanes, taken == 0 ? first : second, source);
    if (active && lane == source) ++taken;
    return true;
  }
};

// Dimensions d .. d + 3, d + step .. of the row that starts at x.data[at].
template <class P, int N>
__device__ __forceinline__ void load_row(const ScreenArguments& a, std::int64_t at, int d, int step, float4 (&out)[N]) {
  const auto load = [&](const auto* data, auto whole) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at_d = d + i * step;
      out[i] = load_four<whole.value>(data + at + at_d * a.x.dim, a.x.dim, a.D - at_d, at_d * a.x.dim);
    }
  };
  const auto load_type = [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(a.x.data);
    if (a.row_vectors) {
      load(data, std::true_type());
    } else {
      load(data, std::false_type());
    }
  };
  if constexpr (P::kOperand == Operand::stored) {
    load_type(static_cast<const typename P::Element*>(nullptr));
  } else {
    with_type(a.x.type, load_type);
  }
}

// Adds what this lane and the one across `bit` have of N sums each: of the first N, or of the next for the upper lane.
template <int N, int G>
__device__ __forceinline__ void add_halves(float (&sum)[G], bool upper, int bit) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float other = __shfl_xor_sync(kAllLanes, upper ? sum[k] : sum[k + N], bit);
    sum[k] = (upper ? sum[k + N] : sum[k]) + other;
  }
}

// Scores the codes of one group a quad, each lane a quarter of the dimensions, and then a quarter of the codes, of
// which meet(low, high, code) gets the ends of an interval. `size` bounds the sum of the magnitudes of a dot product's
// terms.
template <class P, class F>
__device__ __forceinline__ void score_group(const ScreenArguments& a, const typename P::Code* codebook, std::int64_t at,
                                            const Turns& turn, float size, F meet) {
  constexpr int G = P::kGroup;
  const int t = turn.lane & 3;
  const std::int64_t first = static_cast<std::int64_t>(turn.group) * G;
  float sum[G];
#pragma unroll
  for (int k = 0; k < G; ++k) sum[k] = 0.0f;
  const auto* group = codebook + first * a.D;
  const int last = static_cast<int>(a.K - first < G ? a.K - first : G) - 1;
  const auto add = [&](auto whole) {
    constexpr int kPart = sizeof(typename P::Code) == 2 ? 1 : P::kSource == Source::staged ? 4 : 2;
    constexpr int kBatch = whole.value ? G / kPart : 2;  // codes under way: as many as there are registers for
#pragma unroll 1
    for (int d = 4 * t; d < a.D; d += 16) {
      float4 codes[kBatch], x[1];
#pragma unroll
      for (int k = 0; k < G; ++k) {
        if (k % kBatch == 0) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            codes[i] = load_four<whole.value>(group + min(k + i, last) * a.D + d, 1, a.D - d);
          }
          if (k == 0) load_row<P>(a, at, d, 0, x);
        }
        float4 c = codes[k % kBatch];
        if (a.euclidean) {
          c = make_float4(x[0].x - c.x, x[0].y - c.y, x[0].z - c.z, x[0].w - c.w);
          sum[k] = fmaf(c.x, c.x, fmaf(c.y, c.y, fmaf(c.z, c.z, fmaf(c.w, c.w, sum[k]))));
        } else {
          sum[k] = fmaf(-x[0].x, c.x, fmaf(-x[0].y, c.y, fmaf(-x[0].z, c.z, fmaf(-x[0].w, c.w, sum[k]))));
        }
      }
    }
  };
  if (turn.active) {
    if (a.code_vectors) {
      add(std::true_type());
    } else {
      add(std::false_type());
    }
  }
  add_halves<G / 2>(sum, t & 2, 2);
  add_halves<G / 4>(sum, t & 1, 1);
#pragma unroll
  for (int k = 0; k < G / 4; ++k) {
    const std::int64_t code = first + t * (G / 4) + k;
    const float error = (a.euclidean ? sum[k] : size) * ((a.D + 8) * 0x1p-24f) + a.D * 0x1p-120f;
    const bool certain = is_finite(sum[k] + error);
    if (turn.active && code < a.K) {
      meet(certain ? sum[k] - error : -inf(), certain ? sum[k] + error : inf(), static_cast<int>(code));
    }
  }
}

// The best of the codes that were scored by the contract: kNobody where every score is infinite or NaN.
struct Canonical {
  double score = inf();
  int code = kNobody;

  __device__ __forceinline__ void meet(double other, int other_code) {
    if (other < score || (other == score && other_code < code && other < inf())) {
      score = other;
      code = other_code;
    }
  }
  __device__ __forceinline__ void meet_lane(int bit) {
    const double other = __shfl_xor_sync(kAllLanes, score, bit);
    meet(other, __shfl_xor_sync(kAllLanes, code, bit));
  }
};

// The canonical best among the codes of the groups that a quad has listed.
template <class P>
__device__ __forceinline__ int settle_by_contract(const ScreenArguments& a, const typename P::Code* codebook,
                                                  std::int64_t at, Turns turn, int first, int second) {
  Canonical best;
  while (turn.next(first, second)) {
    if (!turn.active) continue;
#pragma unroll 1
    for (int k = turn.lane & 3; k < P::kGroup; k += 4) {
      const std::int64_t code = static_cast<std::int64_t>(turn.group) * P::kGroup + k;
      if (code >= a.K) break;
      const double score = canonical(a.x, at, codebook + code * a.D, a.D, a.euclidean);
      best.meet(ranked(score, a.euclidean), static_cast<int>(code));
    }
  }
  best.meet_lane(1);
  best.meet_lane(2);
  return best.code;
}

// The three smallest packed group minima that a thread has seen of one row.
struct Smallest {
  float best = kFar, second = kFar, third = kFar;

  __device__ __forceinline__ void insert(float value) {
    const float after = fmaxf(best, value);
    best = fminf(best, value);
    const float later = fmaxf(second, after);
    second = fminf(second, after);
    third = fminf(third, later);
  }
};

// What a warp needs to settle its rows.
struct Lengths {
  float norm, residual;  // of the row's operand, in units of the codes' scale
};

// A bound of the sum of the magnitudes of the terms of the row's dot product with any code.
template <class P>
__device__ __forceinline__ float magnitude(const CodebookFigures& book, const Lengths& row) {
  float scale = 1.0f;
  if constexpr (P::kOperand != Operand::stored) scale = power_of_two(__uint_as_float(book.reach));
  const float codes = __uint_as_float(book.norm) + __uint_as_float(book.residual);
  return (row.norm + row.residual) / scale * (codes / scale);
}

// Settles one row a quad by certificate, re-score, and the contract where that leaves two: its code, kNobody where
// every distance is infinite or NaN, or kWhole. `head` is that of the codebook, `at` where the row starts.
template <class P>
__device__ __forceinline__ int settle(const ScreenArguments& a, std::int64_t head, std::int64_t at, bool alive,
                                      const Smallest& seen, const Lengths& row, std::int64_t first_segment, int lane) {
  const CodebookFigures& book = a.figures[head];
  const float code_norm = __uint_as_float(book.norm), code_residual = __uint_as_float(book.residual);
  const Certificate certificate{a.D, P::kOperand, a.euclidean, __int_as_float((127 + a.bits - 23) << 23), a.slack};
  const float bound = certificate.threshold(quad_min(seen.best), row.norm, row.residual, code_norm, code_residual);
  // Not `<= bound`: a bound that is NaN must let everything in.
  const int within = static_cast<int>(!(seen.best > bound)) + static_cast<int>(!(seen.second > bound));
  const unsigned hidden = __ballot_sync(kAllLanes, !(seen.third > bound));
  const bool whole = (hidden >> (lane & 28) & 15) != 0;
  const auto group = [&](float packed) {
    const std::int64_t segment = first_segment + (__float_as_int(packed) & ((1 << a.bits) - 1));
    return static_cast<int>(segment * 4 + (lane & 3));
  };
  const int first = group(seen.best), second = group(seen.second);

  const auto* codebook = static_cast<const typename P::Code*>(a.codebook) + head * a.K * a.D;
  Standing standing{inf(), inf(), inf(), kNobody};
  const float size = magnitude<P>(book, row);
  const Turns turns(alive && !whole ? within : 0, lane);
  for (Turns turn = turns; turn.next(first, second);) {
    score_group<P>(a, codebook, at, turn, size,
                   [&](float low, float high, int code) { standing.meet(low, high, code); });
  }
  standing.meet_lane(1);
  standing.meet_lane(2);
  int nearest = standing.nearest;
  const bool tied = standing.lowest < inf() && !(standing.runner_up > standing.reached);
  if (__any_sync(kAllLanes, tied)) {
    const int winner = settle_by_contract<P>(a, codebook, at, Turns(tied ? turns.count : 0, lane), first, second);
    if (tied) nearest = winner;
  }
  return whole ? kWhole : nearest;
}

// One row a warp that settle could not: every code in an interval, and by the contract those whose intervals reach the
// lowest, as long as there are few. Its code, kNobody, or kWhole where a lane has more.
template <class P>
__device__ __forceinline__ int settle_whole(const ScreenArguments& a, std::int64_t head, std::int64_t at,
                                            const Lengths& row, int lane) {
  constexpr int kFew = 16;
  const auto* codebook = static_cast<const typename P::Code*>(a.codebook) + head * a.K * a.D;
  const int groups = static_cast<int>(ceil_div<std::int64_t>(a.K, P::kGroup));
  const float size = magnitude<P>(a.figures[head], row);
  Standing standing{inf(), inf(), inf(), kNobody};
  Canonical best;
  int reaching = 0;
#pragma unroll 1
  for (int look = 0; look < 2; ++look) {
    Turns turn(1, lane);
#pragma unroll 1
    for (int first = 0; first < groups; first += 8) {
      turn.group = first + lane / 4;
      turn.active = turn.group < groups;
      score_group<P>(a, codebook, at, turn, size, [&](float low, float high, int code) {
        if (look == 0) return standing.meet(low, high, code);
        if (low > standing.reached || ++reaching > kFew) return;
        const auto* of_code = codebook + static_cast<std::int64_t>(code) * a.D;
        best.meet(ranked(canonical(a.x, at, of_code, a.D, a.euclidean), a.euclidean), code);
      });
    }
    if (look == 1) break;
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) standing.meet_lane(bit);
    if (standing.runner_up > standing.reached) return standing.nearest;
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) best.meet_lane(bit);
  return __any_sync(kAllLanes, reaching > kFew) ? kWhole : best.code;
}

// Settles the rows of a warp, from `first_row` of the head on; take(row of the warp, row of the head, code) gets each
// from one lane.
template <class P, class F>
__device__ __forceinline__ void settle_rows(const ScreenArguments& a, std::int64_t head, std::int64_t first_row,
                                            const Smallest (&seen)[2 * P::kM], const Lengths* lengths,
                                            std::int64_t first_segment, int lane, F take) {
#pragma unroll 1
  for (int r = 0; r < 2 * P::kM; ++r) {
    Smallest chosen = seen[0];
#pragma unroll
    for (int i = 1; i < 2 * P::kM; ++i) {
      if (i == r) chosen = seen[i];
    }
    const int row = r * 8 + lane / 4;
    const std::int64_t n = first_row + row;
    const bool alive = n < a.x.count;
    const std::int64_t at = alive ? a.x.offset(head, n) : 0;
    const int code = settle<P>(a, head, at, alive, chosen, lengths[row], first_segment, lane);
    if (alive && (lane & 3) == 0) take(row, n, code);
  }
}

// Where the code of a row goes that is searched in one codebook: to its place, to the queue, or among the splits'
// winners.
template <class P>
__device__ __forceinline__ void store_code(const ScreenArguments& a, std::int64_t head, std::int64_t n, int code) {
  const auto* codebook = static_cast<const typename P::Code*>(a.codebook) + head * a.K * a.D;
  const auto score = [&](int k) {
    return canonical(a.x, a.x.offset(head, n), codebook + static_cast<std::int64_t>(k) * a.D, a.D, a.euclidean);
  };
  const std::int64_t place = head * a.x.count + n;
  if (a.part_scores != nullptr) {
    const std::int64_t part = blockIdx.y * (gridDim.x / a.row_blocks) * a.x.count + place;
    const bool found = code != kWhole && code != kNobody;
    a.part_scores[part] = found ? ranked(score(code), a.euclidean) : static_cast<double>(inf());
    a.part_indices[part] = code;
  } else if (code == kWhole) {
    a.queue[head * a.x.count + atomicAdd(&a.figures[head].queued, 1u)] = n;
  } else {
    if (code == kNobody) code = 0;  // every distance is infinite or NaN
    a.indices[place] = code;
    if (a.distances != nullptr) static_cast<float*>(a.distances)[place] = __double2float_rn(score(code));
  }
}

// ---- rows as fragments ----------------------------------------------------------------------------------------------

template <class Element>
__device__ __forceinline__ std::uint32_t pair_bits(Element low, Element high) {
  return bits_of(low) | bits_of(high) << 16;
}

// Loads and rounds the rows of a warp; leaves their lengths, times `ratio`, and minus the factor that takes a product
// to the codes' scale.
template <class P>
__device__ __forceinline__ void load_rows(const ScreenArguments& a, std::int64_t head, std::int64_t first_row, int lane,
                                          std::uint32_t (&operand)[P::kM][P::kSteps][4], float (&factor)[2 * P::kM],
                                          Lengths* lengths) {
  using Element = typename P::Element;
  const int t = lane & 3;
  const float* centre = a.frame + head * P::kWidth;
  float code_scale = 1.0f;
  if constexpr (P::kOperand != Operand::stored) code_scale = power_of_two(__uint_as_float(a.figures[head].reach));
  // Only where no type has to be told apart do the loads of several rows overlap, and where there are but two;
  // elsewhere that is code eight times over.
#pragma unroll(P::kOperand == Operand::stored || P::kM == 1 ? 2 * P::kM : 1)
  for (int r = 0; r < 2 * P::kM; ++r) {
    const std::int64_t n = first_row + r * 8 + lane / 4;
    const bool alive = n < a.x.count;
    const std::int64_t at = alive ? a.x.offset(head, n) : 0;
    float kept = 0, lost = 0, row_scale = 1.0f;
    std::uint32_t words[P::kSteps][2];
    if constexpr (P::kOperand == Operand::split) {
      float values[P::kSteps][4];
      with_type(a.x.type, [&](auto* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
#pragma unroll
        for (int j = 0; j < 4 * P::kSteps; ++j) {
          const SplitPlace place = split_place(16 * (j / 4) + 4 * t + j % 4, a.D);
          const bool read = place.part < Part::bias && alive;
          values[j / 4][j % 4] = read ? to_float(static_cast<const T*>(a.x.data)[at + place.dim * a.x.dim]) : 0.0f;
        }
      });
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s) {
        Element part[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const SplitPlace place = split_place(16 * s + 4 * t + j, a.D);
          float value = 0.0f;
          if (place.part < Part::bias && alive) value = (values[s][j] - centre[place.dim]) * code_scale;
          const Element high = rounded_to<Element>(value);
          const Element low = rounded_to<Element>(value - to_float(high));
          if (place.part == Part::high_high) {
            const float operand_value = to_float(high) + to_float(low);
            kept = fmaf(operand_value, operand_value, kept);
            lost = fmaf(value - operand_value, value - operand_value, lost);
          }
          part[j] = place.part == Part::low_high ? low : high;
          part[j] = rounded_to<Element>(place.part == Part::bias ? 1.0f : -to_float(part[j]));
        }
        words[s][0] = pair_bits(part[0], part[1]);
        words[s][1] = pair_bits(part[2], part[3]);
      }
    } else {
      constexpr int kBatch = P::kSteps < 4 ? P::kSteps : 4;  // loads under way
      const auto load = [&](int s, float4(&v)[kBatch]) {
        load_row<P>(a, at, 16 * s + 4 * t, 16, v);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if constexpr (P::kOperand == Operand::rounded) {
            const float4 m = *reinterpret_cast<const float4*>(centre + 16 * (s + i) + 4 * t);
            v[i] = make_float4(v[i].x - m.x, v[i].y - m.y, v[i].z - m.z, v[i].w - m.w);
          }
          if (!alive) v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
      };
      float4 v[kBatch];
      if constexpr (P::kOperand == Operand::rounded) {
        float largest = 0;
#pragma unroll 1
        for (int s = 0; s < P::kSteps; s += kBatch) {
          load(s, v);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v[i].x), fabsf(v[i].y)), fmaxf(fabsf(v[i].z), fabsf(v[i].w))));
          }
        }
        row_scale = power_of_two(quad_max(largest));
      }
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s) {
        if (s % kBatch == 0 && (P::kOperand == Operand::stored || P::kSteps > kBatch)) load(s, v);
        const float4 four = v[s % kBatch];
        const float scaled[4] = {four.x * row_scale, four.y * row_scale, four.z * row_scale, four.w * row_scale};
        Element e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          e[j] = rounded_to<Element>(scaled[j]);
          const float value = to_float(e[j]);
          kept = fmaf(value, value, kept);
          lost = fmaf(scaled[j] - value, scaled[j] - value, lost);
        }
        words[s][0] = pair_bits(e[0], e[1]);
        words[s][1] = pair_bits(e[2], e[3]);
      }
    }
    const float ratio = code_scale * reciprocal(P::kOperand == Operand::rounded ? row_scale : code_scale);
    const float norm = norm_bound(quad_sum(kept), a.D);
    float residual = 0.0f;
    if constexpr (P::kOperand != Operand::stored) residual = residual_bound(quad_sum(lost), norm, a.D);
    // Registers have no address: the row that this is gets its own.
#pragma unroll
    for (int i = 0; i < 2 * P::kM; ++i) {
      if (i != r) continue;
      factor[i] = -ratio;
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s) {
        operand[i / 2][s][i % 2] = words[s][0];
        operand[i / 2][s][i % 2 + 2] = words[s][1];
      }
    }
    if (t == 0) lengths[r * 8 + lane / 4] = {norm * ratio, residual * ratio};
  }
  __syncwarp();
}

// ---- the loop -------------------------------------------------------------------------------------------------------

// One tile of codes in shared memory against the rows of a warp.
template <class P>
__device__ __forceinline__ void screen_tile(const unsigned char* tile, int segment, int keep, int lane,
                                            const std::uint32_t (&operand)[P::kM][P::kSteps][4],
                                            const float (&factor)[2 * P::kM], Smallest (&seen)[2 * P::kM]) {
  constexpr int M = P::kM;
  constexpr int kSums = M == 1 ? 2 : 1;  // of a score: four chains of products under way hide each other's latency
  const float* bias = reinterpret_cast<const float*>(tile + P::kTile * P::kWidth * 2) + 2 * (lane & 3);
  tile += 16 * lane;
#pragma unroll 1
  for (int i = 0; i < P::kSegments; ++i) {
    float smallest[2 * M];
#pragma unroll
    for (int pair = 0; pair < P::kGroup / 4; ++pair) {
      float sums[kSums][2][M][4];
#pragma unroll
      for (int j = 0; j < kSums * 2 * M * 4; ++j) sums[j / (8 * M)][j / (4 * M) % 2][j / 4 % M][j % 4] = 0.0f;
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s) {
        std::uint32_t b[4];
        ptx::ldmatrix(b, tile + (pair * P::kSteps + s) * kFragment);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const std::uint32_t of_eight[2] = {b[2 * j], b[2 * j + 1]};
#pragma unroll
          for (int m = 0; m < M; ++m) ptx::mma(sums[s % kSums][j][m], operand[m][s], of_eight, typename P::Element{});
        }
      }
      auto& c = sums[0];
      if constexpr (kSums == 2) {
#pragma unroll
        for (int j = 0; j < 2 * M * 4; ++j) c[j / (4 * M)][j / 4 % M][j % 4] += sums[1][j / (4 * M)][j / 4 % M][j % 4];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float2 b = make_float2(0.0f, 0.0f);
        if constexpr (P::kBiased) b = *reinterpret_cast<const float2*>(bias + (2 * pair + j) * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float one = c[j][m][2 * half], other = c[j][m][2 * half + 1];
            if constexpr (P::kBiased) {
              one = fmaf(factor[2 * m + half], one, b.x);
              other = fmaf(factor[2 * m + half], other, b.y);
            }
            float& least = smallest[2 * m + half];
            least = pair == 0 && j == 0 ? fminf(one, other) : fminf(fminf(least, one), other);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      seen[r].insert(__int_as_float((__float_as_int(smallest[r]) & keep) | (segment + i)));
    }
    tile += P::kGroup / 4 * P::kSteps * kFragment;
    bias += 4 * P::kGroup;
  }
}

// Copies BYTES, a multiple of 16, to shared memory, by all threads of the block.
template <class P, int BYTES>
__device__ __forceinline__ void copy_block(unsigned char* target, const unsigned char* source) {
  constexpr int kStep = 16 * P::kThreads;
  target += 16 * threadIdx.x;
  source += 16 * threadIdx.x;
#pragma unroll
  for (int at = 0; at < BYTES; at += kStep) {
    if (at + kStep <= BYTES || at + 16 * static_cast<int>(threadIdx.x) < BYTES)
      ptx::copy_async(target + at, source + at);
  }
}

// A warp's rows among those of its block; computed before the loop over the codes and again after it.
template <class P>
struct WarpPlace {
  int lane, first_row;  // of the block's

  __device__ __forceinline__ WarpPlace() {
    const unsigned thread = ptx::thread_again();
    lane = static_cast<int>(thread % 32);
    first_row = static_cast<int>(thread / 32) * 16 * P::kM;
  }
  __device__ __forceinline__ std::int64_t row(unsigned block) const {
    return static_cast<std::int64_t>(block) * P::kRows + first_row;
  }
};

// All codes stay in shared memory; each warp takes rows on its own. Grid (blocks, heads).
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) resident_kernel(const ScreenArguments a) {
  auto* shared = dynamic_shared<unsigned char>();
  const auto lengths_of = [&](const WarpPlace<P>& place) {
    return reinterpret_cast<Lengths*>(shared + a.tiles * P::kTileBytes) + place.first_row;
  };
  const unsigned head = blockIdx.y;
  const int tiles = static_cast<int>(a.tiles);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int at = tile * P::kTileBytes;
    copy_block<P, P::kTileBytes>(shared + at, a.packed + head * a.tiles * P::kTileBytes + at);
  }
  ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncthreads();
  for (unsigned block = blockIdx.x; block < a.row_blocks; block += gridDim.x) {
    const WarpPlace<P> before;
    std::uint32_t operand[P::kM][P::kSteps][4];
    float factor[2 * P::kM];
    load_rows<P>(a, head, before.row(block), before.lane, operand, factor, lengths_of(before));
    Smallest seen[2 * P::kM];
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      screen_tile<P>(shared + tile * P::kTileBytes, tile * P::kSegments, -(1 << a.bits), before.lane, operand, factor,
                     seen);
    }
    const WarpPlace<P> after;
    settle_rows<P>(a, head, after.row(block), seen, lengths_of(after), 0, after.lane,
                   [&](int, std::int64_t n, int code) { store_code<P>(a, head, n, code); });
    __syncwarp();
  }
}

// Passes `tiles` tiles of codes through a pipeline in shared memory, for all warps of the block; `prepare` loads the
// rows while the first tiles are on their way.
template <class P, class F>
__device__ __forceinline__ void screen_tiles(unsigned char* shared, const unsigned char* source, int tiles, int keep,
                                             int lane, std::uint32_t (&operand)[P::kM][P::kSteps][4],
                                             float (&factor)[2 * P::kM], Smallest (&seen)[2 * P::kM], F prepare) {
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const auto at = static_cast<std::int64_t>(tile) * P::kTileBytes;
      copy_block<P, P::kTileBytes>(shared + tile % P::kStages * P::kTileBytes, source + at);
    }
    ptx::copy_commit();
  };
#pragma unroll 1
  for (int tile = 0; tile < P::kStages - 1; ++tile) fetch(tile);
  prepare();
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::copy_wait<P::kStages - 2>();
    __syncthreads();  // the tile is there for all, and all are done with the one whose place is filled next
    fetch(tile + P::kStages - 1);
    screen_tile<P>(shared + tile % P::kStages * P::kTileBytes, tile * P::kSegments, keep, lane, operand, factor, seen);
  }
  ptx::copy_wait<0>();
}

// Codes pass through a pipeline in shared memory, shared by the warps of a block. Grid (row blocks x heads, splits).
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) streamed_kernel(const ScreenArguments a) {
  auto* shared = dynamic_shared<unsigned char>();
  const auto lengths_of = [&](const WarpPlace<P>& place) {
    return reinterpret_cast<Lengths*>(shared + P::kStages * P::kTileBytes) + place.first_row;
  };
  const auto row_blocks = static_cast<unsigned>(a.row_blocks);
  const WarpPlace<P> before;
  const unsigned head = blockIdx.x / row_blocks, block = blockIdx.x % row_blocks;
  const std::int64_t first_tile = blockIdx.y * a.share;
  const int tiles = static_cast<int>(a.tiles - first_tile < a.share ? a.tiles - first_tile : a.share);
  const unsigned char* source = a.packed + (head * a.tiles + first_tile) * P::kTileBytes;
  std::uint32_t operand[P::kM][P::kSteps][4];
  float factor[2 * P::kM];
  Smallest seen[2 * P::kM];
  screen_tiles<P>(shared, source, tiles, -(1 << a.bits), before.lane, operand, factor, seen,
                  [&] { load_rows<P>(a, head, before.row(block), before.lane, operand, factor, lengths_of(before)); });
  const WarpPlace<P> after;
  const unsigned block_after = ptx::block_again(), head_after = block_after / row_blocks;
  settle_rows<P>(a, head_after, after.row(block_after % row_blocks), seen, lengths_of(after),
                 blockIdx.y * a.share * P::kSegments, after.lane,
                 [&](int, std::int64_t n, int code) { store_code<P>(a, head_after, n, code); });
}

// All stages of a residual quantiser for a block of rows, the residual in shared memory; codebooks are (H, Q, K, D). A
// row with many codes as near as each other at some stage is queued for all. Grid (row blocks x heads).
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) staged_kernel(const ScreenArguments a, int stages) {
  constexpr int kRowsOfWarp = 16 * P::kM;
  static_assert(kRowsOfWarp <= 32);  // a lane has a row
  auto* shared = dynamic_shared<unsigned char>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* lengths = reinterpret_cast<Lengths*>(shared + P::kStages * P::kTileBytes) + warp * kRowsOfWarp;
  auto* codes = reinterpret_cast<int*>(shared + P::kStages * P::kTileBytes + P::kRows * sizeof(Lengths));
  auto* residual = reinterpret_cast<float*>(codes + P::kRows) + warp * kRowsOfWarp * P::kWidth;
  codes += warp * kRowsOfWarp;
  const std::int64_t head = blockIdx.x / a.row_blocks;
  const std::int64_t first = (blockIdx.x % a.row_blocks) * P::kRows + warp * kRowsOfWarp;
  const std::int64_t left = a.x.count - first;
  const int rows = left < 0 ? 0 : left < kRowsOfWarp ? static_cast<int>(left) : kRowsOfWarp;
  for (int i = lane; i < rows * P::kWidth; i += 32) {
    const int d = i % P::kWidth;
    if (d < a.D) residual[i] = load_float(a.x, a.x.offset(head, first + i / P::kWidth) + d * a.x.dim);
  }
  __syncwarp();
  ScreenArguments here = a;
  here.x = {residual, Float::float32, rows, 1, 0, P::kWidth, 0, 1};
  here.row_vectors = a.D % 4 == 0;
  bool queued = false;  // this lane's row
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const std::int64_t book = head * stages + stage;
    std::uint32_t operand[P::kM][P::kSteps][4];
    float factor[2 * P::kM];
    Smallest seen[2 * P::kM];
    screen_tiles<P>(shared, a.packed + book * a.tiles * P::kTileBytes, static_cast<int>(a.tiles), -(1 << a.bits), lane,
                    operand, factor, seen, [&] { load_rows<P>(here, book, 0, lane, operand, factor, lengths); });
    settle_rows<P>(here, book, 0, seen, lengths, 0, lane, [&](int row, std::int64_t, int code) { codes[row] = code; });
    __syncwarp();
    int code = lane < rows ? codes[lane] : 0;
    if constexpr (P::kM == 1) {  // a warp of 32 rows has no registers left for it
      for (unsigned waiting = __ballot_sync(kAllLanes, code == kWhole && !queued); waiting != 0;
           waiting &= waiting - 1) {
        const int row = __ffs(waiting) - 1;
        const int nearest = settle_whole<P>(here, book, row * P::kWidth, lengths[row], lane);
        if (lane == row) code = nearest;
      }
    }
    queued = queued || code == kWhole;
    if (code == kWhole || code == kNobody) code = 0;
    if (lane < rows) {
      codes[lane] = code;
      a.indices[(head * a.x.count + first + lane) * stages + stage] = code;
    }
    __syncthreads();  // the codes are there for the warp, and no warp still reads what the next stage fetches over
    const auto* codebook = static_cast<const typename P::Code*>(a.codebook) + book * a.K * a.D;
    for (int i = lane; i < rows * P::kWidth; i += 32) {
      const int d = i % P::kWidth;
      if (d >= a.D) continue;
      const auto at = static_cast<std::int64_t>(codes[i / P::kWidth]) * a.D + d;
      residual[i] = __fsub_rn(residual[i], to_float(codebook[at]));
    }
    __syncwarp();
  }
  if (queued) a.queue[head * a.x.count + atomicAdd(&a.figures[head * stages].queued, 1u)] = first + lane;
}

// Rows and codes pass through the pipeline, kWidth dimensions of each at a time; a tile is one segment.
// Grid (row blocks x heads, splits).
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) chunked_kernel(const ScreenArguments a, int chunks) {
  constexpr int M = P::kM, kPairs = P::kTile / 16, kSteps = P::kWidth / 16;
  constexpr int kRowBytes = P::kRows * P::kWidth * 2, kCodeBytes = P::kTile * P::kWidth * 2;
  constexpr int kStageBytes = kRowBytes + kCodeBytes;
  static_assert(P::kSegments == 1);
  auto* shared = dynamic_shared<unsigned char>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* lengths = reinterpret_cast<Lengths*>(shared + P::kStages * kStageBytes) + warp * 16 * M;
  const std::int64_t head = blockIdx.x / a.row_blocks;
  const std::int64_t first = (blockIdx.x % a.row_blocks) * P::kRows + warp * 16 * M;
  const std::int64_t first_tile = blockIdx.y * a.share;
  const int tiles = static_cast<int>(a.tiles - first_tile < a.share ? a.tiles - first_tile : a.share);
  const std::int64_t tile_bytes = static_cast<std::int64_t>(chunks) * kCodeBytes + P::kTile * 4;
  const unsigned char* codes = a.packed + (head * a.tiles + first_tile) * tile_bytes;
  const unsigned char* rows = a.rounded + static_cast<std::int64_t>(blockIdx.x) * chunks * kRowBytes;
  // What is fetched next: a chunk of a tile, into a place.
  int next_tile = 0, next_chunk = 0, next_place = 0;
  const auto fetch = [&] {
    if (next_tile < tiles) {
      unsigned char* target = shared + next_place * kStageBytes;
      copy_block<P, kRowBytes>(target, rows + static_cast<std::int64_t>(next_chunk) * kRowBytes);
      copy_block<P, kCodeBytes>(target + kRowBytes, codes + next_tile * tile_bytes + next_chunk * kCodeBytes);
      if (++next_chunk == chunks) next_chunk = 0, ++next_tile;
      next_place = next_place + 1 == P::kStages ? 0 : next_place + 1;
    }
    ptx::copy_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < P::kStages - 1; ++stage) fetch();
  float factor[2 * M];
  const float* row_figures = a.row_figures + (head * a.row_blocks * P::kRows + first) * 3;
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int row = r * 8 + lane / 4;
    factor[r] = row_figures[3 * row + 2];
    if ((lane & 3) == 0) lengths[row] = {row_figures[3 * row], row_figures[3 * row + 1]};
  }
  __syncwarp();
  Smallest seen[2 * M];
  int place = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float c[2 * kPairs][M][4];
#pragma unroll
    for (int j = 0; j < 2 * kPairs * M * 4; ++j) c[j / (4 * M)][j / 4 % M][j % 4] = 0.0f;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::copy_wait<P::kStages - 2>();
      __syncthreads();
      fetch();
      const unsigned char* of_rows = shared + place * kStageBytes + warp * M * kSteps * kFragment + 16 * lane;
      const unsigned char* of_codes = shared + place * kStageBytes + kRowBytes + 16 * lane;
      place = place + 1 == P::kStages ? 0 : place + 1;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        std::uint32_t row[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ptx::ldmatrix(row[m], of_rows + (m * kSteps + s) * kFragment);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          std::uint32_t b[4];
          ptx::ldmatrix(b, of_codes + (pair * kSteps + s) * kFragment);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const std::uint32_t of_eight[2] = {b[2 * j], b[2 * j + 1]};
#pragma unroll
            for (int m = 0; m < M; ++m) ptx::mma(c[2 * pair + j][m], row[m], of_eight, typename P::Element{});
          }
        }
      }
    }
    const auto* bias = reinterpret_cast<const float*>(codes + tile * tile_bytes + chunks * kCodeBytes) + 2 * (lane & 3);
    float smallest[2 * M];
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
      const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j);
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const float one = fmaf(factor[r], c[j][r / 2][r % 2 * 2], b.x);
        const float other = fmaf(factor[r], c[j][r / 2][r % 2 * 2 + 1], b.y);
        smallest[r] = j == 0 ? fminf(one, other) : fminf(fminf(smallest[r], one), other);
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      seen[r].insert(__int_as_float((__float_as_int(smallest[r]) & -(1 << a.bits)) | tile));
    }
  }
  ptx::copy_wait<0>();
  settle_rows<P>(a, head, first, seen, lengths, first_tile, lane,
                 [&](int, std::int64_t n, int code) { store_code<P>(a, head, n, code); });
}

// Starts the kernel of a policy.
template <class P>
void start_screen(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, unsigned multiprocessors,
                  cudaStream_t stream) {
  const dim3 block(P::kThreads);
  const auto blocks = static_cast<unsigned>(plan.row_blocks * heads), splits = static_cast<unsigned>(plan.splits);
  const auto shared = static_cast<std::size_t>(plan.shared_memory);
  if constexpr (P::kSource == Source::resident) {
    const unsigned most = ceil_div(multiprocessors, heads);
    const auto each = static_cast<unsigned>(plan.row_blocks < most ? plan.row_blocks : most);
    launch(resident_kernel<P>, dim3(each, heads), block, shared, stream, a);
  } else if constexpr (P::kSource == Source::streamed) {
    launch(streamed_kernel<P>, dim3(blocks, splits), block, shared, stream, a);
  } else {
    launch(chunked_kernel<P>, dim3(blocks, splits), block, shared, stream, a, plan.width / P::kWidth);
  }
}

template <Operand OPERAND, class ELEMENT, class CODE>
void start_screen_of(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, unsigned multiprocessors,
                     cudaStream_t stream) {
  const auto start = [&](auto policy) { start_screen<decltype(policy)>(plan, a, heads, multiprocessors, stream); };
  if (plan.source == Source::chunked) return start(ScreenPolicy<OPERAND, ELEMENT, CODE, 64, Source::chunked>());
  const bool resident = plan.source == Source::resident;
  switch (plan.width) {
    case 32:
      return resident ? start(ScreenPolicy<OPERAND, ELEMENT, CODE, 32, Source::resident>())
                      : start(ScreenPolicy<OPERAND, ELEMENT, CODE, 32, Source::streamed>());
    case 64:
      return resident ? start(ScreenPolicy<OPERAND, ELEMENT, CODE, 64, Source::resident>())
                      : start(ScreenPolicy<OPERAND, ELEMENT, CODE, 64, Source::streamed>());
    case 128:
      return start(ScreenPolicy<OPERAND, ELEMENT, CODE, 128, Source::streamed>());
    default:
      return start(ScreenPolicy<OPERAND, ELEMENT, CODE, 256, Source::streamed>());
  }
}

// All stages of residual quantisers.
void start_stages(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, int stages, cudaStream_t stream);

using ScreenStarter = void(const SearchPlan&, const ScreenArguments&, unsigned heads, unsigned multiprocessors,
                           cudaStream_t);
ScreenStarter start_rounded_screen, start_half_screen, start_bfloat_screen, start_split_screen;

}  // namespace fastvq
