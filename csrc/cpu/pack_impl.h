// Packing rows and codes for the kernels: part of row_kernel_impl.h.

namespace fastvq {
namespace {

// What shuffles two rows into those with their blocks of s lanes exchanged.
template <class Index, int kCount>
inline void exchange(int s, Index* upper, Index* lower) {
  for (int l = 0; l < kCount; ++l) {
    (*upper)[l] = l & s ? kCount + l - s : l;
    (*lower)[l] = l & s ? kCount + l : l + s;
  }
}

// Transposes kCount vectors of kCount lanes in place: in step s, blocks of s lanes are exchanged between rows s apart.
template <class Vector, class Index, int kCount>
inline void transpose(Vector (&rows)[kCount]) {
#pragma GCC unroll 4
  for (int s = 1; s < kCount; s *= 2) {
    Index upper{}, lower{};
    exchange<Index, kCount>(s, &upper, &lower);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (i & s) continue;
      const Vector a = rows[i], b = rows[i + s];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + s] = __builtin_shuffle(a, b, lower);
    }
  }
}

// The lanes of each of kCount vectors put together by `combine`: a transpose that does so on its way.
template <class Vector, class Index, int kCount, class Combine>
inline Vector combine_lanes(Vector (&rows)[kCount], const Combine& combine) {
#pragma GCC unroll 4
  for (int s = 1; s < kCount; s *= 2) {
    Index upper{}, lower{};
    exchange<Index, kCount>(s, &upper, &lower);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i += 2 * s)
      rows[i] = combine(__builtin_shuffle(rows[i], rows[i + s], upper), __builtin_shuffle(rows[i], rows[i + s], lower));
  }
  return rows[0];
}
template <class Vector, class Index, int kCount>
inline Vector sum_lanes(Vector (&rows)[kCount]) {
  return combine_lanes<Vector, Index, kCount>(rows, [](Vector a, Vector b) { return a + b; });
}

// out [width][kCount] = the transpose of kCount rows.
template <class Vector, class Index, int kCount>
void transpose_rows(const float* const* rows, std::int64_t width, float* out) {
  std::int64_t d = 0;
  for (; d + kCount <= width; d += kCount) {
    Vector block[kCount];
    for (int i = 0; i < kCount; ++i) block[i] = load<Vector>(rows[i] + d);
    transpose<Vector, Index, kCount>(block);
    for (int i = 0; i < kCount; ++i) store(out + (d + i) * kCount, block[i]);
  }
  for (; d < width; ++d)
    for (int i = 0; i < kCount; ++i) out[d * kCount + i] = rows[i][d];
}

typedef std::int32_t GroupIndex __attribute__((vector_size(32)));

// out [kCount][width] = the transpose of `width` columns of kCount floats that lie `stride` apart.
template <class Vector, class Index, int kCount>
void transpose_columns(const float* columns, std::int64_t stride, std::int64_t width, float* out) {
  std::int64_t d = 0;
  for (; d + kCount <= width; d += kCount) {
    Vector block[kCount];
    for (int i = 0; i < kCount; ++i) block[i] = load<Vector>(columns + (d + i) * stride);
    transpose<Vector, Index, kCount>(block);
    for (int i = 0; i < kCount; ++i) store(out + i * width + d, block[i]);
  }
  for (; d < width; ++d)
    for (int i = 0; i < kCount; ++i) out[i * width + d] = columns[d * stride + i];
}

void untranspose(const float* columns, std::int64_t stride, std::int64_t width, float* out) {
  transpose_columns<FloatVector, IntVector, kLanes>(columns, stride, width, out);
}
void load_codes(const float* const* rows, std::int64_t width, float* codes) {
  transpose_rows<GroupVector, GroupIndex, kGroup>(rows, width, codes);
}

typedef std::uint32_t GroupHash __attribute__((vector_size(32)));

#if !defined(__AVX2__) || defined(__AVX512F__)  // else a group is as wide as the lanes
inline GroupVector magnitude(GroupVector v) {
  return reinterpret_cast<GroupVector>(reinterpret_cast<GroupIndex>(v) & 0x7fffffff);
}
inline GroupVector larger(GroupVector a, GroupVector b) {
#if defined(__AVX512F__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
#endif

// difference = a - b, and what rounding it lost, exactly (Knuth's two-sum).
template <class Vector>
inline Vector subtract(Vector a, Vector b, Vector* difference) {
  const Vector rounded = a - b, virtual_b = a - rounded;
  *difference = rounded;
  return (a - (rounded + virtual_b)) - (b - virtual_b);
}

// What a sum of `count` squares in float32 is at most. They may underflow: the small term covers that for each.
inline double at_most(float sum, std::int64_t count) {
  const auto terms = static_cast<double>(count);
  return static_cast<double>(sum) * (kUp + terms * 0x1p-23) + terms * 0x1p-149;
}

// Calls f(d, chain) for every dimension: sums in several chains do not wait for each other.
constexpr int kChains = 2;
template <class F>
inline void for_each_dimension(std::int64_t width, const F& f) {
  std::int64_t d = 0;
  for (; d + kChains <= width; d += kChains) {
    f(d, 0);
    f(d + 1, 1);
  }
  if (d < width) f(d, 0);
}

void measure(const float* codes, std::int64_t width, int count, float* bias, std::uint32_t* hashes,
             CodeStatistics* statistics) {
  GroupVector poison[kChains] = {};  // becomes NaN where an element is not finite
  GroupHash hash[kChains] = {};
  for_each_dimension(width, [&](std::int64_t d, int chain) {
    const GroupVector c = load<GroupVector>(codes + d * kGroup);
    poison[chain] += c - c;
    hash[chain] = (hash[chain] ^ reinterpret_cast<GroupHash>(c)) * 0x9e3779b1u;
  });
  const GroupHash both = (hash[0] * 0x9e3779b1u) ^ hash[1];
  store(hashes, both ^ (both >> 15));
  const GroupVector bad = poison[0] + poison[1];
  GroupIndex keep;  // ones for the codes that count
  for (int j = 0; j < kGroup; ++j) {
    const bool usable = j < count && bad[j] == 0;
    bias[j] = usable ? 0.0f : kInfinity;
    keep[j] = usable ? -1 : 0;
    statistics->finite += usable;
  }
  GroupVector largest[kChains] = {}, squares[kChains] = {};
  for_each_dimension(width, [&](std::int64_t d, int chain) {
    const GroupVector c =
        reinterpret_cast<GroupVector>(reinterpret_cast<GroupIndex>(load<GroupVector>(codes + d * kGroup)) & keep);
    float* total = statistics->sums + d * kGroup;
    store(total, load<GroupVector>(total) + c);
    squares[chain] += c * c;
    largest[chain] = larger(largest[chain], magnitude(c));
  });
  const GroupVector square = squares[0] + squares[1], most = larger(largest[0], largest[1]);
  for (int j = 0; j < kGroup; ++j) {
    statistics->squares += square[j];
    statistics->largest = most[j] > statistics->largest ? most[j] : statistics->largest;
  }
}

enum class Moved { kNot, kCentred, kScaled };  // kScaled: centred too, where there is a mean
inline Moved moved_by(const CodebookView& codebook) {
  if (codebook.scale != 1) return Moved::kScaled;
  return codebook.mean ? Moved::kCentred : Moved::kNot;
}
template <Moved kMoved>
inline float moved(float c, float mean, double scale) {
  if (kMoved == Moved::kScaled) return static_cast<float>((static_cast<double>(c) - static_cast<double>(mean)) * scale);
  return kMoved == Moved::kCentred ? c - mean : c;
}
template <Moved kMoved>
inline GroupVector moved(GroupVector c, GroupVector mean, double scale) {
  if (kMoved == Moved::kScaled) {
    for (int j = 0; j < kGroup; ++j) c[j] = moved<kMoved>(c[j], mean[j], scale);
    return c;
  }
  return kMoved == Moved::kCentred ? c - mean : c;
}

template <Moved kMoved>
void move_group(const float* codes, const CodebookView& codebook, const float* bias, float* screened) {
  GroupIndex keep;
  for (int j = 0; j < kGroup; ++j) keep[j] = bias[j] == kInfinity ? 0 : -1;
  for (std::int64_t d = 0; d < codebook.width; ++d) {
    const GroupVector mean = (codebook.mean ? codebook.mean[d] : 0.0f) - GroupVector{};
    const GroupVector c = moved<kMoved>(load<GroupVector>(codes + d * kGroup), mean, codebook.scale);
    store(screened + d * kGroup, reinterpret_cast<GroupIndex>(c) & keep);
  }
}
void move_codes(const float* codes, const CodebookView& codebook, const float* bias, float* screened) {
  const Moved by = moved_by(codebook);
  if (by == Moved::kScaled) return move_group<Moved::kScaled>(codes, codebook, bias, screened);
  if (by == Moved::kCentred) return move_group<Moved::kCentred>(codes, codebook, bias, screened);
  move_group<Moved::kNot>(codes, codebook, bias, screened);
}

template <Moved kMoved>
void screen_group(const float* codes, const CodebookView& codebook, float* bias, float* screened,
                  CodeExtremes* extremes) {
  const DoubleVector scale = broadcast(codebook.scale);
  GroupIndex keep;
  for (int j = 0; j < kGroup; ++j) keep[j] = bias[j] == 0 ? -1 : 0;
  DoubleVector norm[kChains][kPieces] = {}, residual[kChains][kPieces] = {};
  GroupVector largest[kChains] = {}, minus[kChains] = {};  // minus: the residual where codes are only centred
  for_each_dimension(codebook.width, [&](std::int64_t d, int chain) {
    const float* code = codes + d * kGroup;
    GroupVector c = load<GroupVector>(code);
    float kept[kGroup];
    DoubleVector wanted[kPieces];
    if (kMoved == Moved::kCentred) {
      const GroupVector lost = subtract(c, codebook.mean[d] - GroupVector{}, &c);
      minus[chain] = subtract_product(minus[chain], lost, lost);
    } else if (kMoved == Moved::kScaled) {
      const DoubleVector mean = broadcast(codebook.mean ? static_cast<double>(codebook.mean[d]) : 0.0);
      for (int i = 0; i < kPieces; ++i) {
        wanted[i] = (load_wide(code + i * kWide) - mean) * scale;
        store(kept + i * kWide, narrow_half(wanted[i]));
      }
      c = load<GroupVector>(kept);
    }
    if (kMoved != Moved::kNot) {
      c = reinterpret_cast<GroupVector>(reinterpret_cast<GroupIndex>(c) & keep);
      store(screened + d * kGroup, c);
    }
    store(kept, c);
    for (int i = 0; i < kPieces; ++i) {
      const DoubleVector wide = load_wide(kept + i * kWide);
      norm[chain][i] += wide * wide;
      if (kMoved == Moved::kScaled) residual[chain][i] += (wanted[i] - wide) * (wanted[i] - wide);
    }
    largest[chain] = larger(largest[chain], magnitude(c));
  });
  const GroupVector most = larger(largest[0], largest[1]), centring = -(minus[0] + minus[1]);
  for (int j = 0; j < kGroup; ++j) {
    if (bias[j] != 0) continue;
    const int i = j / kWide, l = j % kWide;
    const double squared = norm[0][i][l] + norm[1][i][l];
    const double error =
        kMoved == Moved::kCentred ? at_most(centring[j], codebook.width) : residual[0][i][l] + residual[1][i][l];
    if (codebook.metric == Metric::kEuclidean) bias[j] = static_cast<float>(squared / 2);
    extremes->norm = squared > extremes->norm ? squared : extremes->norm;
    extremes->residual = error > extremes->residual ? error : extremes->residual;
    extremes->largest = most[j] > extremes->largest ? most[j] : extremes->largest;
  }
}

void screen_codes(const float* codes, const CodebookView& codebook, float* bias, float* screened,
                  CodeExtremes* extremes) {
  if (!screened) return screen_group<Moved::kNot>(codes, codebook, bias, screened, extremes);
  if (moved_by(codebook) == Moved::kCentred)
    return screen_group<Moved::kCentred>(codes, codebook, bias, screened, extremes);
  screen_group<Moved::kScaled>(codes, codebook, bias, screened, extremes);
}

#if defined(FASTVQ_INT8)
// One step of the transform: each pair of lanes kStep apart becomes its sum and its difference.
template <int kStep>
inline FloatVector sums_and_differences(FloatVector v) {
  IntVector other{}, sign{};
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    other[l] = (l ^ kStep) % kLanes;
    sign[l] = l & kStep ? INT32_MIN : 0;
  }
  return __builtin_shuffle(v, other) + reinterpret_cast<FloatVector>(reinterpret_cast<IntVector>(v) ^ sign);
}

// log2(kRadix) steps in one pass, on kRadix vectors at a time that lie `stride` apart, after the step within each
// vector if it is the first pass; returns the largest magnitude in each lane.
template <int kRadix, bool kFirst>
FloatVector transform_steps(const float* in, std::int64_t vectors, std::int64_t stride, float* out) {
  FloatVector most = {};
  for (std::int64_t first = 0; first < vectors; first += kRadix * stride) {
    for (std::int64_t i = first; i < first + stride; ++i) {
      FloatVector v[kRadix];
#pragma GCC unroll 8
      for (int j = 0; j < kRadix; ++j) {
        v[j] = load<FloatVector>(in + (i + j * stride) * kLanes);
        if (kFirst && kLanes > kGroup) v[j] = sums_and_differences<kGroup>(v[j]);
      }
#pragma GCC unroll 3
      for (int s = 1; s < kRadix; s *= 2) {
#pragma GCC unroll 8
        for (int j = 0; j < kRadix; ++j) {
          if (j & s) continue;
          const FloatVector a = v[j], b = v[j + s];
          v[j] = a + b;
          v[j + s] = a - b;
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kRadix; ++j) {
        store(out + (i + j * stride) * kLanes, v[j]);
        most = larger(most, magnitude(v[j]));
      }
    }
  }
  return most;
}
template <bool kFirst>
FloatVector transform_pass(const float* in, std::int64_t vectors, std::int64_t stride, std::int64_t radix, float* out) {
  if (radix == 8) return transform_steps<8, kFirst>(in, vectors, stride, out);
  if (radix == 4) return transform_steps<4, kFirst>(in, vectors, stride, out);
  return transform_steps<2, kFirst>(in, vectors, stride, out);
}

float transform_codes(const float* screened, std::int64_t width, std::int64_t block, float* out) {
  constexpr std::int64_t kDimensions = kLanes / kGroup;  // of a vector
  constexpr std::int64_t kMost = 8;                      // vectors that a pass can hold in registers
  const std::int64_t vectors = width / kDimensions, length = block / kDimensions;
  std::int64_t stride = length < kMost ? length : kMost;
  FloatVector most = transform_pass<true>(screened, vectors, 1, stride, out);
  while (stride < length) {
    const std::int64_t radix = length / stride < kMost ? length / stride : kMost;
    most = transform_pass<false>(out, vectors, stride, radix, out);
    stride *= radix;
  }
  float largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  return largest;
}

void quantise_codes(const float* screened, const float* bias, std::int64_t width, float scale, std::int8_t* out,
                    std::int32_t* start, std::int32_t* whole_start, std::int32_t* bias_pairs, CodeExtremes* extremes) {
  const GroupVector inverse = 1.0f / (scale - GroupVector{});
  GroupVector residual = {};
  GroupIndex sum = {}, squares = {}, keep;
  for (int j = 0; j < kGroup; ++j) keep[j] = bias[j] == kInfinity ? 0 : -1;
  for (std::int64_t d = 0; d < width; d += 4) {
    GroupIndex quad = {};
    for (int j = 0; j < 4 && d + j < width; ++j) {
      const GroupVector c = load<GroupVector>(screened + (d + j) * kGroup);
      const GroupVector q =
          _mm256_round_ps(_mm256_min_ps(_mm256_max_ps(c * inverse, _mm256_set1_ps(-127)), _mm256_set1_ps(127)),
                          _MM_FROUND_TO_NEAREST_INT);
      const GroupVector error = subtract_product(c, q, scale - GroupVector{});
      residual += error * error;
      const GroupIndex integer = __builtin_convertvector(q, GroupIndex) & keep;
      sum += integer;
      squares += integer * integer;
      quad |= (integer & 0xff) << (8 * j);
    }
    store(out + d * kGroup, quad);
  }
  for (int j = 0; j < kGroup; ++j) {
    bias_pairs[j] = 0;
    start[j] = whole_start[j] = kExcluded;
    if (bias[j] == kInfinity) continue;
    start[j] = -128 * sum[j];
    whole_start[j] = start[j] - squares[j] / 2;
    // Half the squared norm, a multiple of 1/2, as 1024 a + 32 b, both rounded to nearest.
    const std::int32_t high = (squares[j] / 2 + 512) >> 10, low = (squares[j] / 2 - 1024 * high + 16) >> 5;
    bias_pairs[j] = (high & 0xffff) | static_cast<std::int32_t>(static_cast<std::uint32_t>(low) << 16);
    const double miss = squares[j] / 2.0 - 1024.0 * high - 32.0 * low;
    const double error = miss < 0 ? -miss : miss, low_size = low < 0 ? -low : low;
    extremes->int8_residual = residual[j] > extremes->int8_residual ? residual[j] : extremes->int8_residual;
    extremes->bias_error = error > extremes->bias_error ? error : extremes->bias_error;
    extremes->bias_high = high > extremes->bias_high ? high : extremes->bias_high;
    extremes->bias_low = low_size > extremes->bias_low ? low_size : extremes->bias_low;
  }
}
#endif

}  // namespace
}  // namespace fastvq
