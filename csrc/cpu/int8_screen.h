// Screening in int8 (AVX-512 VNNI, AVX-VNNI): part of row_kernel_impl.h. docs/certified-search.md, "Screening in int8".
//
// For a row x~ = s_x p and a code c~ = s_c q, with p and q in int8, the screened score is the integer
// I = p . q - |q|^2 / 2 * s_c / s_x, the larger the nearer; for the dot product p . q. The dot product is exact;
// vpdpbusd wants one unsigned operand, so the row is stored as p + 128 and the accumulator starts at -128 times the sum
// of q. Rows that the scale of the codes serves well take it, s_x = s_c, and the accumulator starts at the whole bias.
// Rows so long that the bias hardly tells codes apart go without it. For others the bias is one int16 dot product more,
// of (a, b) of the code, |q|^2 / 2 = 1024 a + 32 b + error, and (-f, -g) of the row.

namespace fastvq {
namespace {

// acc + the dot products of four uint8 of each lane of x with the four int8 at `code`. In assembly: gcc 12 spills the
// accumulators of the intrinsic.
#if defined(__AVX512VNNI__)
inline void add_dot4(IntVector& acc, IntVector x, const std::int32_t* code) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(x), "m"(*code));
}
inline void add_dot2(IntVector& acc, IntVector pair, const std::int32_t* code) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(pair), "m"(*code));
}
#define FASTVQ_VNNI ""
#define FASTVQ_VNNI_REGISTER "v"
#else
#if defined(FASTVQ_EVEX)  // tests run these where only the encoding of AVX-512 is known
#define FASTVQ_VNNI ""
#else
#define FASTVQ_VNNI "%{vex%} "
#endif
#define FASTVQ_VNNI_REGISTER "x"
inline void add_dot4(IntVector& acc, IntVector x, const std::int32_t* code) {
  asm(FASTVQ_VNNI "vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(broadcast(*code)));
}
inline void add_dot2(IntVector& acc, IntVector pair, const std::int32_t* code) {
  asm(FASTVQ_VNNI "vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(pair), "x"(broadcast(*code)));
}
#endif

inline IntVector larger(IntVector a, IntVector b) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVector>(_mm512_max_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return reinterpret_cast<IntVector>(_mm256_max_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}

// One bit a lane: a >= b.
inline std::uint64_t at_least(IntVector a, IntVector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b), _MM_CMPINT_NLT);
#else
  const __m256i below = _mm256_cmpgt_epi32(reinterpret_cast<__m256i>(b), reinterpret_cast<__m256i>(a));
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) ^ 0xffu;
#endif
}

constexpr int kFour = 4;  // groups whose largest score is kept too: what the scan for candidates goes through
typedef std::int32_t IntFour __attribute__((vector_size(16)));
inline unsigned at_least(IntFour a, IntFour b) {
  const __m128i below = _mm_cmpgt_epi32(reinterpret_cast<__m128i>(b), reinterpret_cast<__m128i>(a));
  return static_cast<unsigned>(_mm_movemask_ps(_mm_castsi128_ps(below))) ^ 0xfu;
}
// The largest of four, four times.
inline IntFour all_largest(IntFour v) {
  const auto maximum = [](IntFour a, IntFour b) {
    return reinterpret_cast<IntFour>(_mm_max_epi32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
  };
  v = maximum(v, __builtin_shuffle(v, IntFour{2, 3, 0, 1}));
  return maximum(v, __builtin_shuffle(v, IntFour{1, 0, 3, 2}));
}

// For each row, the largest score so far and the first four that has it.
struct Best {
  IntVector score;
  IntVector four;
};

// The scores of `groups` groups, from four number `first` on; keeps the largest of each group and of each four, and the
// best of all. Groups past the last, up to a whole four, get kExcluded.
template <bool kRowBias>
void screen_int8(const std::int32_t* codes, const std::int32_t* start, const std::int32_t* bias, std::int64_t groups,
                 std::int64_t quads, const std::int32_t* rows, IntVector row_bias, std::int32_t* maxima,
                 std::int32_t* fours, std::int64_t first, Best* so_far, Errands* errands) {
  Best best = *so_far;
  for (std::int64_t g = 0; g < groups;) {
    IntVector of_four = broadcast(kExcluded);
    const std::int64_t end = g + kFour < groups ? g + kFour : groups;
    for (; g < end; ++g, start += kGroup, bias += kGroup) {
      IntVector s0 = broadcast(start[0]), s1 = broadcast(start[1]), s2 = broadcast(start[2]), s3 = broadcast(start[3]);
      IntVector s4 = broadcast(start[4]), s5 = broadcast(start[5]), s6 = broadcast(start[6]), s7 = broadcast(start[7]);
      if (kRowBias) {
        add_dot2(s0, row_bias, bias + 0);
        add_dot2(s1, row_bias, bias + 1);
        add_dot2(s2, row_bias, bias + 2);
        add_dot2(s3, row_bias, bias + 3);
        add_dot2(s4, row_bias, bias + 4);
        add_dot2(s5, row_bias, bias + 5);
        add_dot2(s6, row_bias, bias + 6);
        add_dot2(s7, row_bias, bias + 7);
      }
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
      of_four = larger(of_four, maximum);
    }
    store(fours, of_four);
    fours += kLanes;
    if (errands->wanted()) errands->step();
    const IntVector better = of_four > best.score;
    best.score = larger(best.score, of_four);
    best.four = better ? broadcast(static_cast<std::int32_t>(first)) : best.four;
    ++first;
  }
  for (std::int64_t g = groups; g % kFour != 0; ++g) store(maxima + g * kLanes, broadcast(kExcluded));
  *so_far = best;
}

// The rows of a block in int8.
struct Int8Rows {
  const std::int32_t* start;  // what the accumulators start at
  bool row_bias;              // whether each row has a bias of its own
  float scale[kLanes];        // s_x
  double residual[kLanes];    // at least |x~ - s_x p|, a transform's length taken back
  double squares[kLanes];     // at most |p|^2
  double bias_error[kLanes];  // at least the error of the bias, in units of I
  std::int32_t bias[kLanes];  // (-f, -g), f and g near 1024 s_c / s_x and 32 s_c / s_x
};

// The scales: that of the codes, where no row of the block is longer than it can hold and few are much shorter.
void choose_scales(const CodebookView& codebook, FloatVector largest, Int8Rows* out) {
  const float shared = codebook.int8_scale;
  // s_c / s_x stays below 31, so that f fits into int16.
  const FloatVector own = larger(largest * (1.0f / 127), broadcast(shared / 31));
  store(out->scale, own);
  for (int l = 0; l < kLanes; ++l) {
    out->bias[l] = 0;
    out->bias_error[l] = codebook.metric == Metric::kDot ? 0 : 0.5;  // the half of an odd |q|^2
  }
  out->row_bias = false;
  out->start = codebook.int8_start;
  if (codebook.metric == Metric::kDot) return;
  float coarser = 0, coarsest = 0;
  bool fits = true;
  for (int l = 0; l < kLanes; ++l) {
    const float ratio = shared / out->scale[l];
    coarser += ratio;
    coarsest = ratio > coarsest ? ratio : coarsest;
    fits &= out->scale[l] <= shared;
  }
  if (coarsest <= codebook.int8_no_bias) {  // I without the bias is never less: no bound suffers
    for (double& error : out->bias_error) error = 0;
    return;
  }
  if (fits && coarser <= kLanes * codebook.int8_coarser) {
    out->start = codebook.int8_whole_start;
    for (float& scale : out->scale) scale = shared;
    return;
  }
  out->row_bias = true;
  for (int l = 0; l < kLanes; ++l) {
    const double ratio = static_cast<double>(shared) / out->scale[l];
    const auto f = static_cast<std::int32_t>(ratio * 1024 + 0.5), g = static_cast<std::int32_t>(ratio * 32 + 0.5);
    const double miss_f = ratio * 1024 - f, miss_g = ratio * 32 - g;
    out->bias_error[l] = ratio * codebook.bias_error + (miss_f < 0 ? -miss_f : miss_f) * codebook.bias_high +
                         (miss_g < 0 ? -miss_g : miss_g) * codebook.bias_low;
    out->bias[l] = (-f & 0xffff) | static_cast<std::int32_t>(static_cast<std::uint32_t>(-g) << 16);
  }
}

inline IntVector nearest_integers(FloatVector v) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVector>(_mm512_cvtps_epi32(v));
#else
  return reinterpret_cast<IntVector>(_mm256_cvtps_epi32(v));
#endif
}
inline void store_bytes(std::int8_t* out, IntVector v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
  typedef std::int8_t Bytes __attribute__((vector_size(kLanes)));
  store(out, __builtin_convertvector(v, Bytes));
#endif
}

// out [D] = the Hadamard transform of `block` dimensions at a time; returns the largest magnitude in each lane.
// There is room for whole vectors.
FloatVector transform_row(const float* row, std::int64_t width, std::int64_t block, float* out) {
  FloatVector most = {};
  for_each_vector(width, [&](std::int64_t d, int count) {
    FloatVector v = load_up_to(row + d, count);
    v = sums_and_differences<2>(sums_and_differences<1>(v));  // blocks are of four and more
    if (block > 4) v = sums_and_differences<4>(v);
    if (kLanes > 8 && block > 8) v = sums_and_differences<8>(v);
    store(out + d, v);
    most = larger(most, magnitude(v));
  });
  if (block <= kLanes) return most;
  for (std::int64_t s = kLanes; s < block; s *= 2) {
    for (std::int64_t d = 0; d < width; d += kLanes) {
      if (d & s) continue;
      const FloatVector a = load<FloatVector>(out + d), b = load<FloatVector>(out + d + s);
      store(out + d, a + b);
      store(out + d + s, a - b);
    }
  }
  most = FloatVector{};
  for (std::int64_t d = 0; d < width; d += kLanes) most = larger(most, magnitude(load<FloatVector>(out + d)));
  return most;
}

// packed [quads][lanes] = p + 128 of the rows, transformed as the codes are. `transformed` and `bytes` are scratch.
void quantise(const CodebookView& codebook, const ScreenedRows& screened, const RowNorms& norms, float* transformed,
              std::int8_t* bytes, std::int32_t* packed, Int8Rows* out) {
  const std::int64_t width = codebook.width, quads = (width + 3) / 4, stride = (width + 63) / 64 * 64;
  ScreenedRows rows = screened;
  if (codebook.int8_block > 1) {
    FloatVector largest[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      float* const out = transformed + l * whole_vectors(width);
      rows.row[l] = out;
      largest[l] = transform_row(screened.row[l], width, codebook.int8_block, out);
    }
    rows.largest = combine_lanes<FloatVector, IntVector, kLanes>(
        largest, [](FloatVector a, FloatVector b) { return larger(a, b); });
  }
  choose_scales(codebook, rows.largest, out);
  FloatVector residual[kLanes], squares[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const FloatVector scale = broadcast(out->scale[l]), inverse = broadcast(1.0f / out->scale[l]);
    FloatVector lost = {}, minus = {};
    for_each_vector(width, [&](std::int64_t d, int count) {
      const FloatVector x = load_up_to(rows.row[l] + d, count);
      const IntVector integer = nearest_integers(x * inverse);
      const FloatVector q = __builtin_convertvector(integer, FloatVector), error = subtract_product(x, q, scale);
      lost = subtract_product(lost, error, error);
      minus = subtract_product(minus, q, q);
      store_bytes(bytes + l * stride + d, integer);
    });
    residual[l] = lost;
    squares[l] = minus;
  }
  for (std::int64_t i = 0; i < quads; i += kLanes) {
    IntVector block[kLanes];
    for (int l = 0; l < kLanes; ++l) block[l] = load<IntVector>(bytes + l * stride + 4 * i);
    transpose<IntVector, IntVector, kLanes>(block);
    for (int j = 0; j < kLanes && i + j < quads; ++j)
      store(packed + (i + j) * kLanes, block[j] ^ broadcast(static_cast<std::int32_t>(0x80808080u)));
  }
  const double ratio_up = 1 + 1e-6 + static_cast<double>(width) * 0x1p-23;
  // Sums of integers below 2^24 are exact; past that they may have rounded up.
  const double squares_down = width <= 1024 ? 1 : 1 - static_cast<double>(width) * 0x1p-23;
  float errors[kLanes], integers[kLanes];
  store(errors, -sum_lanes<FloatVector, IntVector, kLanes>(residual));
  store(integers, -sum_lanes<FloatVector, IntVector, kLanes>(squares));
  const double inverse = 1 / static_cast<double>(codebook.int8_block);
  for (int l = 0; l < kLanes; ++l) {
    const double error = (static_cast<double>(errors[l]) * ratio_up + 0x1p-100) * inverse;
    out->residual[l] = __builtin_sqrt(error) * (1 + 1e-6) + codebook.int8_rounding * norms.norm[l];
    out->squares[l] = static_cast<double>(integers[l]) * squares_down;
  }
}

// For each row: codes whose I is below this cannot win. best: the smallest float32 score of a code of the row.
void int8_thresholds(const CodebookView& codebook, const Bounds& bounds, const Int8Rows& rows, const float* best,
                     std::int32_t* out) {
  const Certificate certificate = bounds.certificate;
  const RowNorms& norms = bounds.norms;
  const double code_residual = FASTVQ_BOUND_FACTOR * codebook.int8_residual;
  const double inverse = 1 / static_cast<double>(codebook.int8_block);  // exact: a power of two
  double lowest[kLanes];  // of s_x s_c I / n of the canonical winner, with the sign turned
  if (bounds.euclidean) {
    for (int l = 0; l < kLanes; ++l) {
      const double row_residual = FASTVQ_BOUND_FACTOR * (rows.residual[l] + norms.residual[l]);
      const double nearest = certificate.distance(best[l], norms.norm[l], norms.residual[l]);
      const double reach = nearest + row_residual + code_residual;
      const double half_norm = rows.squares[l] * rows.scale[l] * rows.scale[l] * inverse / 2;
      const double by_distance = reach * reach / 2 - half_norm;
      const double by_score = certificate.score(best[l], norms.norm[l], norms.residual[l], nearest) +
                              reach * code_residual + row_residual * certificate.farthest();
      lowest[l] = by_distance < by_score ? by_distance : by_score;
    }
  } else {
    for (int l = 0; l < kLanes; ++l) {
      const double row_residual = FASTVQ_BOUND_FACTOR * (rows.residual[l] + norms.residual[l]);
      lowest[l] = certificate.product(best[l], norms.norm[l], norms.residual[l]) +
                  (norms.norm[l] + row_residual) * code_residual + row_residual * certificate.farthest();
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    const double unit = static_cast<double>(rows.scale[l]) * codebook.int8_scale * inverse;
    const double limit = -(lowest[l] / unit + FASTVQ_BOUND_FACTOR * rows.bias_error[l]) - 2;
    const double least = kExcluded + 1;  // 2: the rounding of all this, and of the conversion
    out[l] = static_cast<std::int32_t>(limit > least ? limit : least);
  }
  for (int l = bounds.block.count; l < kLanes; ++l) out[l] = INT32_MAX;
}

typedef std::int32_t IntGroup __attribute__((vector_size(32)));  // a value for each code of a group

// The scores of the codes of one group for one row: the same integers as in screen_int8.
IntGroup group_scores(const CodebookView& codebook, std::int64_t group, const std::int32_t* row, const Int8Rows& rows,
                      int lane) {
  const std::int64_t quads = (codebook.width + 3) / 4;
  const auto* codes = reinterpret_cast<const std::int32_t*>(codebook.int8_codes) + group * quads * kGroup;
  IntGroup even = load<IntGroup>(rows.start + group * kGroup), odd = {}, third = {}, fourth = {};
  const auto add_dot = [&](IntGroup& acc, std::int64_t i) {
    const IntGroup x = row[i * kLanes + lane] - IntGroup{};
    asm(FASTVQ_VNNI "vpdpbusd %2, %1, %0"
        : "+" FASTVQ_VNNI_REGISTER(acc)
        : FASTVQ_VNNI_REGISTER(x), "m"(*reinterpret_cast<const IntGroup*>(codes + i * kGroup)));
  };
  // Without a bias of the row, (f, g) = 0.
  asm(FASTVQ_VNNI "vpdpwssd %2, %1, %0"
      : "+" FASTVQ_VNNI_REGISTER(even)
      : FASTVQ_VNNI_REGISTER(rows.bias[lane] - IntGroup{}),
        "m"(*reinterpret_cast<const IntGroup*>(codebook.int8_bias + group * kGroup)));
  std::int64_t i = 0;
  for (; i + 4 <= quads; i += 4) {
    add_dot(even, i);
    add_dot(odd, i + 1);
    add_dot(third, i + 2);
    add_dot(fourth, i + 3);
  }
  for (; i < quads; ++i) add_dot(even, i);
  return (even + odd) + (third + fourth);
}

inline unsigned codes_at_least(IntGroup scores, std::int32_t limit) {
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), reinterpret_cast<__m256i>(scores));
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) ^ 0xffu;
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
template <Moved kMoved>
float code_score(const CodebookView& codebook, const float* row, std::int64_t code) {
  const float* const c = codebook.rows + code * codebook.row_stride;
  const float* const mean = codebook.mean;
  const std::int64_t width = codebook.width;
  const auto add_product = [&](GroupVector& sum, std::int64_t d) {
    const GroupVector m = kMoved != Moved::kNot && mean ? load<GroupVector>(mean + d) : GroupVector{};
    const GroupVector code = moved<kMoved>(load<GroupVector>(c + d), m, codebook.scale);
    sum = subtract_product(sum, load<GroupVector>(row + d), code);
  };
  GroupVector even = {}, odd = {};
  std::int64_t d = 0;
  for (; d + 2 * kGroup <= width; d += 2 * kGroup) {
    add_product(even, d);
    add_product(odd, d + kGroup);
  }
  if (d + kGroup <= width) {
    add_product(even, d);
    d += kGroup;
  }
  float rest = codebook.bias[code];
  for (; d < width; ++d)
    rest -= row[d] * moved<kMoved>(c[d], kMoved != Moved::kNot && mean ? mean[d] : 0.0f, codebook.scale);
  GroupVector sum = even + odd;
  sum += __builtin_shuffle(sum, IntGroup{4, 5, 6, 7, 0, 1, 2, 3});
  sum += __builtin_shuffle(sum, IntGroup{2, 3, 0, 1, 6, 7, 4, 5});
  return rest + (sum[0] + sum[1]);
}

// The candidates of a block in int8: codes whose score reaches the threshold of the row.
class Int8Candidates {
 public:
  Int8Candidates(const CodebookView& codebook, const Bounds& bounds, const ScreenedRows& rows,
                 const BlockScratch& scratch, Candidates* candidates)
      : codebook_(codebook),
        bounds_(bounds),
        rows_(rows),
        scratch_(scratch),
        candidates_(candidates),
        maxima_(static_cast<std::int32_t*>(scratch.minima)),
        most_pairs_(codebook.groups * bounds.block.count * codebook.width / (512 + 4 * codebook.width)),
        most_fours_(codebook.groups * bounds.block.count / 8),
        far_(codebook.size * codebook.width > kFar) {
    quantise(codebook, rows, bounds.norms, scratch.columns, scratch.bytes, scratch.packed, &quantised_);
    for (std::int32_t& four : best_four_) four = -1;
  }

  // False when there are too many.
  bool find() {
    const std::int64_t quads = (codebook_.width + 3) / 4;
    const auto* codes = reinterpret_cast<const std::int32_t*>(codebook_.int8_codes);
    const bool row_bias = quantised_.row_bias;
    const std::int32_t* start = quantised_.start;
    Best best = {broadcast(kExcluded), broadcast(-1)};
    Errands errands(bounds_.block, (codebook_.groups + kFour - 1) / kFour);
    for (std::int64_t first = 0; first < codebook_.groups; first += kScreenGroups) {
      const std::int64_t left = codebook_.groups - first, groups = left < kScreenGroups ? left : kScreenGroups;
      (row_bias ? screen_int8<true> : screen_int8<false>)(codes + first * quads * kGroup, start + first * kGroup,
                                                          codebook_.int8_bias + first * kGroup, groups, quads,
                                                          scratch_.packed, load<IntVector>(quantised_.bias), maxima_,
                                                          scratch_.fours, first / kFour, &best, &errands);
      if (!candidates_->room_for(kLanes * kGroup) || !take(first, groups, best)) return false;
    }
    return true;
  }

 private:
  // The candidates among the groups screened last, from number `first` on. The best code of each row is scored first,
  // so that the threshold starts from a distance that is known well; the groups that reach it are gone through code by
  // code, and the codes that reach it are scored in float32.
  bool take(std::int64_t first, std::int64_t groups, const Best& best) {
    std::int32_t found[kLanes];
    std::int64_t group[kLanes];
    IntGroup scores[kLanes];
    unsigned others[kLanes];  // of the best group, all codes but the best
    store(found, best.four);
    for (int l = 0; l < bounds_.block.count; ++l) {
      others[l] = 0;
      if (found[l] == best_four_[l]) continue;  // no better one among these
      best_four_[l] = found[l];
      group[l] = take_largest(found[l] - first / kFour, l) + first;
      scores[l] = group_scores(codebook_, group[l], scratch_.packed, quantised_, l);
      const int j = largest_code(scores[l]);
      others[l] = 0xffu & ~(1u << j);
      note(l, group[l], 1u << j);
    }
    score();
    std::int32_t limits[kLanes];
    int8_thresholds(codebook_, bounds_, quantised_, candidates_->best(), limits);
    for (int l = 0; l < bounds_.block.count; ++l)
      if (others[l]) note(l, group[l], others[l] & codes_at_least(scores[l], limits[l]));

    // Many fours at a time, for a branch on each would be mispredicted.
    constexpr int kTogether = 64 / kLanes;
    const IntVector threshold = load<IntVector>(limits);
    const std::int64_t fours = (groups + kFour - 1) / kFour;
    for (std::int64_t f = fours; f % kTogether != 0; ++f) store(scratch_.fours + f * kLanes, broadcast(kExcluded));
    for (std::int64_t f = 0; f < fours; f += kTogether) {
      std::uint64_t hits = 0;
      for (int i = 0; i < kTogether; ++i)
        hits |= at_least(load<IntVector>(scratch_.fours + (f + i) * kLanes), threshold) << (i * kLanes);
      fours_ += hits ? __builtin_popcountll(hits) : 0;
      if (fours_ > most_fours_) return false;
      for (; hits; hits &= hits - 1) {
        const int bit = __builtin_ctzll(hits), lane = bit % kLanes;
        if (!take_four(first, f + bit / kLanes, lane, limits[lane])) return false;
      }
    }
    score();
    return true;
  }

  // The float32 scores of the codes noted since.
  void score() {
    const Moved by = moved_by(codebook_);
    if (by == Moved::kScaled) return score_codes<Moved::kScaled>();
    if (by == Moved::kCentred) return score_codes<Moved::kCentred>();
    score_codes<Moved::kNot>();
  }
  template <Moved kMoved>
  void score_codes() {
    candidates_->score(
        [&](int lane, std::int64_t code) { return code_score<kMoved>(codebook_, rows_.row[lane], code); });
  }

  // The scores of the groups of a four for one row.
  IntFour scores_of(std::int64_t four, int lane) const {
    const std::int32_t* at = maxima_ + four * kFour * kLanes + lane;
    return IntFour{at[0], at[kLanes], at[2 * kLanes], at[3 * kLanes]};
  }

  // The first group of a four with the largest score of a row, which is taken out.
  std::int64_t take_largest(std::int64_t four, int lane) {
    IntFour scores = scores_of(four, lane);
    const int largest = __builtin_ctz(at_least(scores, all_largest(scores)));
    scores = IntFour{0, 1, 2, 3} == largest ? kExcluded - IntFour{} : scores;
    maxima_[(four * kFour + largest) * kLanes + lane] = kExcluded;
    scratch_.fours[four * kLanes + lane] = all_largest(scores)[0];
    return four * kFour + largest;
  }

  bool take_four(std::int64_t first, std::int64_t four, int lane, std::int32_t limit) {
    for (unsigned near = at_least(scores_of(four, lane), limit - IntFour{}); near; near &= near - 1) {
      const std::int64_t group = first + four * kFour + __builtin_ctz(near);
      if (++pairs_ > most_pairs_ || !candidates_->room_for(kGroup)) return false;
      const IntGroup scores = group_scores(codebook_, group, scratch_.packed, quantised_, lane);
      note(lane, group, codes_at_least(scores, limit));
    }
    return true;
  }

  // Notes the codes of a group that are set in `near`, and asks for their memory where that is far away. Most often
  // there is one at most: that one without a branch.
  void note(int lane, std::int64_t group, unsigned near) {
    note_first(lane, group, near);
    for (near &= near - 1; __builtin_expect(near != 0, 0); near &= near - 1) note_first(lane, group, near);
  }
  void note_first(int lane, std::int64_t group, unsigned near) {
    const std::int64_t code = group * kGroup + (near ? __builtin_ctz(near) : 0);
    candidates_->note_if(near != 0, lane, code);
    if (!far_) return;
    const char* start = reinterpret_cast<const char*>(codebook_.rows + code * codebook_.row_stride);
    const std::int64_t bytes = codebook_.width * 4;
    for (std::int64_t b = 0; b < bytes && b < 1024; b += 64) __builtin_prefetch(start + b);
  }

  const CodebookView& codebook_;
  const Bounds& bounds_;
  const ScreenedRows& rows_;
  const BlockScratch& scratch_;
  Candidates* candidates_;
  std::int32_t* maxima_;
  const std::int64_t most_pairs_, most_fours_;
  static constexpr std::int64_t kFar = 1 << 17;  // elements; fewer lie in a second-level cache beside all else
  const bool far_;
  Int8Rows quantised_;
  std::int32_t best_four_[kLanes];
  std::int64_t pairs_ = 0, fours_ = 0;
};

// The candidates of a block. False when there are too many, or the last blocks had: then nothing is in `candidates`.
bool int8_candidates(const CodebookView& codebook, const Bounds& bounds, const ScreenedRows& rows,
                     const BlockScratch& scratch, Candidates* candidates) {
  Int8Trial& trial = *scratch.trial;
  if (trial.skip > 0) {
    --trial.skip;
    return false;
  }
  if (bounds.norms.any_wild) return false;
  if (Int8Candidates(codebook, bounds, rows, scratch, candidates).find()) {
    trial.penalty = 0;
    return true;
  }
  candidates->clear();
  trial.penalty = trial.penalty < 32 ? 2 * trial.penalty + 1 : 63;
  trial.skip = trial.penalty;
  return false;
}

}  // namespace
}  // namespace fastvq
