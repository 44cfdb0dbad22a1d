// Screening in int8 (AVX-512 VNNI): part of row_kernel_impl.h. docs/certified-search.md, "Screening in int8".
//
// For a row x~ = s_x p and a code c~ = s_c q, with p and q in int8, the screened score is the integer
// I = p . q - |q|^2 / 2 * s_c / s_x, the larger the nearer. The dot product is exact; vpdpbusd wants one unsigned
// operand, so the row is stored as p + 128 and the accumulator starts at -128 times the sum of q. The bias is one int16
// dot product of (a, b) of the code, |q|^2 / 2 = 1024 a + 32 b + error, and (-f, -g) of the row.

namespace fastvq {
namespace {

typedef std::int32_t IntVector __attribute__((vector_size(64)));

// acc + the dot products of four uint8 of each lane of x with the four int8 at `code`. In assembly: gcc 12 spills the
// accumulators of the intrinsic.
inline void add_dot4(IntVector& acc, IntVector x, const std::int32_t* code) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(x), "m"(*code));
}
inline void add_dot2(IntVector& acc, IntVector pair, const std::int32_t* code) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(pair), "m"(*code));
}
inline IntVector larger(IntVector a, IntVector b) {
  return reinterpret_cast<IntVector>(_mm512_max_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline IntVector broadcast(std::int32_t v) {
  return v - IntVector{};
}

// For each row, the largest score so far and the first group that has it.
struct Best {
  IntVector score;
  IntVector group;
};

// The scores of `groups` groups from number `first` on; keeps the largest of each group, and the best of all.
void screen_int8(const std::int32_t* codes, const std::int32_t* start, const std::int32_t* bias, std::int64_t groups,
                 std::int64_t quads, const std::int32_t* rows, IntVector row_bias, std::int32_t* maxima,
                 std::int64_t first, Best* so_far) {
  Best best = *so_far;
  for (std::int64_t g = 0; g < groups; ++g, start += kGroup, bias += kGroup) {
    IntVector s0 = broadcast(start[0]), s1 = broadcast(start[1]), s2 = broadcast(start[2]), s3 = broadcast(start[3]);
    IntVector s4 = broadcast(start[4]), s5 = broadcast(start[5]), s6 = broadcast(start[6]), s7 = broadcast(start[7]);
    add_dot2(s0, row_bias, bias + 0);
    add_dot2(s1, row_bias, bias + 1);
    add_dot2(s2, row_bias, bias + 2);
    add_dot2(s3, row_bias, bias + 3);
    add_dot2(s4, row_bias, bias + 4);
    add_dot2(s5, row_bias, bias + 5);
    add_dot2(s6, row_bias, bias + 6);
    add_dot2(s7, row_bias, bias + 7);
    for (std::int64_t i = 0; i < quads; ++i, codes += kGroup) {
      const IntVector x = load<IntVector>(rows + i * kLanes);
      add_dot4(s0, x, codes + 0);
      add_dot4(s1, x, codes + 1);
      add_dot4(s2, x, codes + 2);
      add_dot4(s3, x, codes + 3);
      add_dot4(s4, x, codes + 4);
      add_dot4(s5, x, codes + 5);
      add_dot4(s6, x, codes + 6);
      add_dot4(s7, x, codes + 7);
    }
    const IntVector maximum = larger(larger(larger(s0, s1), larger(s2, s3)), larger(larger(s4, s5), larger(s6, s7)));
    store(maxima + g * kLanes, maximum);
    const IntVector better = maximum > best.score;
    best.score = larger(best.score, maximum);
    best.group = better ? broadcast(static_cast<std::int32_t>(first + g)) : best.group;
  }
  *so_far = best;
}

// The rows of a block in int8.
struct Int8Rows {
  float scale[kLanes];        // s_x
  double residual[kLanes];    // at least |x~ - s_x p|
  double squares[kLanes];     // at most |p|^2
  double bias_error[kLanes];  // at least the error of the bias, in units of I
  std::int32_t bias[kLanes];  // (-f, -g), f and g near 1024 s_c / s_x and 32 s_c / s_x
};

void quantise(const CodebookView& codebook, const float* rows, std::int32_t* packed, Int8Rows* out) {
  const std::int64_t width = codebook.width;
  FloatVector largest = {};
  for (std::int64_t d = 0; d < width; ++d) {
    const FloatVector x = load<FloatVector>(rows + d * kLanes);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
  }
  // s_c / s_x stays below 31, so that f fits into int16.
  const FloatVector scale = _mm512_max_ps(largest * (1.0f / 127), broadcast(codebook.int8_scale / 31));
  const FloatVector inverse = 1.0f / scale;
  FloatVector residual = {}, squares = {};
  for (std::int64_t d = 0; d < width; d += 4) {
    IntVector quad = {};
    for (int j = 0; j < 4 && d + j < width; ++j) {
      const FloatVector x = load<FloatVector>(rows + (d + j) * kLanes);
      const FloatVector q =
          _mm512_roundscale_ps(_mm512_min_ps(_mm512_max_ps(x * inverse, broadcast(-127.0f)), broadcast(127.0f)), 0);
      const FloatVector error = subtract_product(x, q, scale);
      residual += error * error;
      squares += q * q;
      const IntVector offset = __builtin_convertvector(q + 128.0f, IntVector);
      quad |= offset << (8 * j);
    }
    store(packed + d / 4 * kLanes, quad);
  }
  const double ratio_up = 1 + 1e-6 + static_cast<double>(width) * 0x1p-23;
  // Sums of integers below 2^24 are exact; past that they may have rounded up.
  const double squares_down = width <= 1024 ? 1 : 1 - static_cast<double>(width) * 0x1p-23;
  float errors[kLanes], norms[kLanes];
  store(out->scale, scale);
  store(errors, residual);
  store(norms, squares);
  for (int l = 0; l < kLanes; ++l) {
    out->residual[l] = __builtin_sqrt(static_cast<double>(errors[l]) * ratio_up + 0x1p-100) * (1 + 1e-6);
    out->squares[l] = static_cast<double>(norms[l]) * squares_down;
    const double ratio = static_cast<double>(codebook.int8_scale) / out->scale[l];
    const auto f = static_cast<std::int32_t>(ratio * 1024 + 0.5), g = static_cast<std::int32_t>(ratio * 32 + 0.5);
    const double miss_f = ratio * 1024 - f, miss_g = ratio * 32 - g;
    out->bias_error[l] = ratio * codebook.bias_error + (miss_f < 0 ? -miss_f : miss_f) * codebook.bias_high +
                         (miss_g < 0 ? -miss_g : miss_g) * codebook.bias_low;
    out->bias[l] = (-f & 0xffff) | static_cast<std::int32_t>(static_cast<std::uint32_t>(-g) << 16);
  }
}

// For each row: codes whose I is below this cannot win. best: the smallest float32 score of a code of the row.
void int8_thresholds(const CodebookView& codebook, const Bounds& bounds, const Int8Rows& rows, const float* best,
                     std::int32_t* out) {
  const Certificate& certificate = bounds.certificate;
  for (int l = 0; l < kLanes; ++l) {
    const double unit = static_cast<double>(rows.scale[l]) * codebook.int8_scale;
    const double nearest = certificate.distance(best[l], bounds.norms.norm[l], bounds.norms.residual[l]);
    const double row_residual = FASTVQ_BOUND_FACTOR * (rows.residual[l] + bounds.norms.residual[l]);
    const double code_residual = FASTVQ_BOUND_FACTOR * codebook.int8_residual;
    const double reach = nearest + row_residual + code_residual;
    const double half_norm = rows.squares[l] * rows.scale[l] * rows.scale[l] / 2;
    const double by_distance = reach * reach / 2 - half_norm;
    const double by_score = certificate.score(best[l], bounds.norms.norm[l], bounds.norms.residual[l], nearest) +
                            reach * code_residual + row_residual * certificate.farthest();
    const double highest =
        (by_distance < by_score ? by_distance : by_score) / unit + FASTVQ_BOUND_FACTOR * rows.bias_error[l];
    const double limit = -highest - 2;  // 2: the rounding of all this, and of the conversion
    const double lowest = kExcluded + 1;
    out[l] = static_cast<std::int32_t>(limit > lowest ? limit : lowest);
  }
  for (int l = bounds.block.count; l < kLanes; ++l) out[l] = INT32_MAX;
}

typedef std::int32_t IntGroup __attribute__((vector_size(32)));  // a value for each code of a group

// The scores of the codes of one group for one row: the same integers as in screen_int8.
IntGroup group_scores(const CodebookView& codebook, std::int64_t group, const std::int32_t* row, std::int32_t bias) {
  const std::int64_t quads = (codebook.width + 3) / 4;
  const auto* codes = reinterpret_cast<const std::int32_t*>(codebook.int8_codes) + group * quads * kGroup;
  IntGroup even = load<IntGroup>(codebook.int8_start + group * kGroup), odd = {};
  const auto add_dot = [&](IntGroup& acc, std::int64_t i) {
    const IntGroup x = row[i * kLanes] - IntGroup{};
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "m"(*reinterpret_cast<const IntGroup*>(codes + i * kGroup)));
  };
  asm("vpdpwssd %2, %1, %0"
      : "+v"(even)
      : "v"(bias - IntGroup{}), "m"(*reinterpret_cast<const IntGroup*>(codebook.int8_bias + group * kGroup)));
  std::int64_t i = 0;
  for (; i + 2 <= quads; i += 2) {
    add_dot(even, i);
    add_dot(odd, i + 1);
  }
  if (i < quads) add_dot(even, i);
  return even + odd;
}

inline unsigned codes_at_least(IntGroup scores, std::int32_t limit) {
  return _mm256_cmp_epi32_mask(reinterpret_cast<__m256i>(scores), _mm256_set1_epi32(limit), _MM_CMPINT_NLT);
}

// The first of the codes with the largest score.
inline int largest_code(IntGroup scores) {
  const auto maximum = [](IntGroup a, IntGroup b) { return a > b ? a : b; };
  IntGroup all = maximum(scores, __builtin_shuffle(scores, IntGroup{4, 5, 6, 7, 0, 1, 2, 3}));
  all = maximum(all, __builtin_shuffle(all, IntGroup{2, 3, 0, 1, 6, 7, 4, 5}));
  all = maximum(all, __builtin_shuffle(all, IntGroup{1, 0, 3, 2, 5, 4, 7, 6}));
  return __builtin_ctz(codes_at_least(scores, all[0]));
}

// The float32 score of one code, along the dimensions. A term passes ceil(D / 8) + 4 roundings or, of the last D % 8,
// that many and 2: never more than the D + 2 of the bound, for D of 4 and more.
float code_score(const CodebookView& codebook, const float* row, std::int64_t code) {
  const float* c = codebook.rows + code * codebook.row_stride;
  const std::int64_t width = codebook.width;
  GroupVector even = {}, odd = {};
  std::int64_t d = 0;
  for (; d + 2 * kGroup <= width; d += 2 * kGroup) {
    even = subtract_product(even, load<GroupVector>(row + d), load<GroupVector>(c + d));
    odd = subtract_product(odd, load<GroupVector>(row + d + kGroup), load<GroupVector>(c + d + kGroup));
  }
  if (d + kGroup <= width) {
    even = subtract_product(even, load<GroupVector>(row + d), load<GroupVector>(c + d));
    d += kGroup;
  }
  float rest = codebook.bias[code];
  for (; d < width; ++d) rest -= row[d] * c[d];
  GroupVector sum = even + odd;
  sum += __builtin_shuffle(sum, IntGroup{4, 5, 6, 7, 0, 1, 2, 3});
  sum += __builtin_shuffle(sum, IntGroup{2, 3, 0, 1, 6, 7, 4, 5});
  return rest + (sum[0] + sum[1]);
}

// Finds the (group, row) pairs whose largest score reaches the threshold of the row, four groups at a time: bit
// 16 i + l of masks[n] is row l of group 4 fours[n] + i. Without a branch, for it would be mispredicted. `maxima` has
// room for a multiple of four groups. Returns the number of fours that have any.
int find_hits(std::int32_t* maxima, std::int64_t groups, IntVector threshold, std::int32_t* fours,
              std::uint64_t* masks) {
  for (std::int64_t g = groups; g % 4 != 0; ++g) store(maxima + g * kLanes, broadcast(kExcluded));
  const auto reached = [&](std::int64_t g) {
    return _mm512_cmp_epi32_mask(reinterpret_cast<__m512i>(load<IntVector>(maxima + g * kLanes)),
                                 reinterpret_cast<__m512i>(threshold), _MM_CMPINT_NLT);
  };
  int hits = 0;
  for (std::int64_t g = 0; g < groups; g += 4) {
    const __mmask32 low = _mm512_kunpackw(reached(g + 1), reached(g)),
                    high = _mm512_kunpackw(reached(g + 3), reached(g + 2));
    const std::uint64_t mask = _cvtmask64_u64(_mm512_kunpackd(high, low));
    fours[hits] = static_cast<std::int32_t>(g / 4);
    masks[hits] = mask;
    hits += mask != 0;
  }
  return hits;
}

// The candidates of a block. The best code of each row is scored first, so that the threshold starts from a distance
// that is known well; the groups that reach it are gone through code by code in int8, and the codes that reach it are
// scored in float32. False when there are too many, or the last blocks had: then nothing is in `candidates`.
bool int8_candidates(const CodebookView& codebook, const Bounds& bounds, const float* rows, const BlockScratch& scratch,
                     Candidates* candidates) {
  Int8Trial& trial = *scratch.trial;
  if (trial.skip > 0) {
    --trial.skip;
    return false;
  }
  if (bounds.norms.any_wild) return false;
  const auto give_up = [&] {
    candidates->clear();
    trial.penalty = trial.penalty < 32 ? 2 * trial.penalty + 1 : 63;
    trial.skip = trial.penalty;
    return false;
  };
  const std::int64_t most = codebook.groups * bounds.block.count / 5;
  const std::int64_t quads = (codebook.width + 3) / 4;
  const auto* codes = reinterpret_cast<const std::int32_t*>(codebook.int8_codes);
  auto* maxima = static_cast<std::int32_t*>(scratch.minima);
  Int8Rows quantised;
  quantise(codebook, rows, scratch.packed, &quantised);
  const float* row[kLanes];
  if (rows == bounds.block.rows && bounds.block.row) {
    for (int l = 0; l < bounds.block.count; ++l) row[l] = bounds.block.row[l];
  } else {
    untranspose(rows, kLanes, codebook.width, scratch.row_major);
    for (int l = 0; l < kLanes; ++l) row[l] = scratch.row_major + l * codebook.width;
  }
  const auto note = [&](int lane, std::int64_t code) {
    candidates->note(lane, code);
    const char* start = reinterpret_cast<const char*>(codebook.rows + code * codebook.row_stride);
    const std::int64_t bytes = codebook.width * 4;
    for (std::int64_t b = 0; b < bytes && b < 1024; b += 64) __builtin_prefetch(start + b);
  };
  const auto score = [&](int lane, std::int64_t code) { return code_score(codebook, row[lane], code); };

  const IntVector row_bias = load<IntVector>(quantised.bias);
  Best best = {broadcast(kExcluded), broadcast(-1)};
  std::int32_t best_group[kLanes];
  for (std::int32_t& group : best_group) group = -1;
  std::int64_t pairs = 0;
  for (std::int64_t first = 0; first < codebook.groups; first += kScreenGroups) {
    const std::int64_t left = codebook.groups - first, groups = left < kScreenGroups ? left : kScreenGroups;
    screen_int8(codes + first * quads * kGroup, codebook.int8_start + first * kGroup,
                codebook.int8_bias + first * kGroup, groups, quads, scratch.packed, row_bias, maxima, first, &best);
    if (!candidates->room_for(kLanes * kGroup)) return give_up();

    std::int32_t found[kLanes];
    IntGroup found_scores[kLanes];
    unsigned others[kLanes];  // of the best group, all codes but the best
    store(found, best.group);
    for (int l = 0; l < bounds.block.count; ++l) {
      others[l] = 0;
      if (found[l] == best_group[l]) continue;  // no better one in this chunk
      best_group[l] = found[l];
      found_scores[l] = group_scores(codebook, found[l], scratch.packed + l, quantised.bias[l]);
      const int j = largest_code(found_scores[l]);
      others[l] = 0xffu & ~(1u << j);
      note(l, std::int64_t{kGroup} * found[l] + j);
      maxima[(found[l] - first) * kLanes + l] = kExcluded;  // dealt with here
    }
    candidates->score(score);
    std::int32_t limits[kLanes];
    int8_thresholds(codebook, bounds, quantised, candidates->best(), limits);
    for (int l = 0; l < bounds.block.count; ++l) {
      if (!others[l]) continue;
      for (unsigned near = others[l] & codes_at_least(found_scores[l], limits[l]); near; near &= near - 1)
        note(l, std::int64_t{kGroup} * found[l] + __builtin_ctz(near));
    }

    const int hits = find_hits(maxima, groups, load<IntVector>(limits), scratch.fours, scratch.masks);
    for (int i = 0; i < hits; ++i) pairs += __builtin_popcountll(scratch.masks[i]);
    if (pairs > most) return give_up();
    for (int i = 0; i < hits; ++i) {
      for (std::uint64_t mask = scratch.masks[i]; mask; mask &= mask - 1) {
        const int bit = __builtin_ctzll(mask), lane = bit % kLanes;
        const std::int64_t group = first + 4 * std::int64_t{scratch.fours[i]} + bit / kLanes;
        const IntGroup scores = group_scores(codebook, group, scratch.packed + lane, quantised.bias[lane]);
        if (!candidates->room_for(kGroup)) return give_up();
        for (unsigned near = codes_at_least(scores, limits[lane]); near; near &= near - 1)
          note(lane, group * kGroup + __builtin_ctz(near));
      }
    }
    candidates->score(score);
  }
  trial.penalty = 0;
  return true;
}

}  // namespace
}  // namespace fastvq
