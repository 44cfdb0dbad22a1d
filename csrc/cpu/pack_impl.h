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

// out [kLanes][width] = the transpose of `width` columns of kLanes floats that lie `stride` apart.
void untranspose(const float* columns, std::int64_t stride, std::int64_t width, float* out) {
  std::int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    FloatVector block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = load<FloatVector>(columns + (d + i) * stride);
    transpose<FloatVector, IntVector, kLanes>(block);
    for (int i = 0; i < kLanes; ++i) store(out + i * width + d, block[i]);
  }
  for (; d < width; ++d)
    for (int i = 0; i < kLanes; ++i) out[i * width + d] = columns[d * stride + i];
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
  return a > b ? a : b;
}
#endif

void measure(const float* codes, std::int64_t width, int count, float* bias, std::uint32_t* hashes,
             CodeStatistics* statistics) {
  GroupVector poison = {};  // becomes NaN where an element is not finite
  GroupHash hash = {};
  for (std::int64_t d = 0; d < width; ++d) {
    const GroupVector c = load<GroupVector>(codes + d * kGroup);
    poison += c - c;
    hash = (hash ^ reinterpret_cast<GroupHash>(c)) * 0x9e3779b1u;
  }
  store(hashes, hash ^ (hash >> 15));
  GroupIndex keep;  // ones for the codes that count
  for (int j = 0; j < kGroup; ++j) {
    const bool usable = j < count && poison[j] == 0;
    bias[j] = usable ? 0.0f : kInfinity;
    keep[j] = usable ? -1 : 0;
    statistics->finite += usable;
  }
  GroupVector largest = {}, squares = {};
  for (std::int64_t d = 0; d < width; ++d) {
    const GroupVector c =
        reinterpret_cast<GroupVector>(reinterpret_cast<GroupIndex>(load<GroupVector>(codes + d * kGroup)) & keep);
    float* sum = statistics->sums + d * kGroup;
    store(sum, load<GroupVector>(sum) + c);
    squares += c * c;
    largest = larger(largest, magnitude(c));
  }
  for (int j = 0; j < kGroup; ++j) {
    statistics->squares += squares[j];
    statistics->largest = largest[j] > statistics->largest ? largest[j] : statistics->largest;
  }
}

void screen_codes(const float* codes, const CodebookView& codebook, float* bias, float* screened,
                  CodeExtremes* extremes) {
  const DoubleVector scale = broadcast(codebook.scale);
  DoubleVector norm[kPieces] = {}, residual[kPieces] = {};
  GroupVector largest = {};
  for (std::int64_t d = 0; d < codebook.width; ++d) {
    if (screened) {
      const DoubleVector mean = broadcast(codebook.mean ? static_cast<double>(codebook.mean[d]) : 0.0);
      for (int i = 0; i < kPieces; ++i) {
        const DoubleVector wanted = (load_wide(codes + d * kGroup + i * kWide) - mean) * scale;
        store(screened + d * kGroup + i * kWide, narrow_half(wanted));
      }
      for (int j = 0; j < kGroup; ++j)
        if (bias[j] != 0) screened[d * kGroup + j] = 0;
      for (int i = 0; i < kPieces; ++i) {
        const DoubleVector wanted = (load_wide(codes + d * kGroup + i * kWide) - mean) * scale;
        const DoubleVector error = wanted - load_wide(screened + d * kGroup + i * kWide);
        residual[i] += error * error;
      }
    }
    const float* kept = (screened ? screened : codes) + d * kGroup;
    for (int i = 0; i < kPieces; ++i) {
      const DoubleVector c = load_wide(kept + i * kWide);
      norm[i] += c * c;
    }
    largest = larger(largest, magnitude(load<GroupVector>(kept)));
  }
  for (int j = 0; j < kGroup; ++j) {
    if (bias[j] != 0) continue;
    const double squared = norm[j / kWide][j % kWide], error = residual[j / kWide][j % kWide];
    if (codebook.metric == Metric::kEuclidean) bias[j] = static_cast<float>(squared / 2);
    extremes->norm = squared > extremes->norm ? squared : extremes->norm;
    extremes->residual = error > extremes->residual ? error : extremes->residual;
    extremes->largest = largest[j] > extremes->largest ? largest[j] : extremes->largest;
  }
}

#if defined(FASTVQ_INT8)
float transform_codes(const float* screened, std::int64_t width, std::int64_t block, float* out) {
  for (std::int64_t i = 0; i < width * kGroup; ++i) out[i] = screened[i];
  for (std::int64_t s = 1; s < block; s *= 2) {
    for (std::int64_t d = 0; d < width; ++d) {
      if (d & s) continue;
      const GroupVector a = load<GroupVector>(out + d * kGroup), b = load<GroupVector>(out + (d + s) * kGroup);
      store(out + d * kGroup, a + b);
      store(out + (d + s) * kGroup, a - b);
    }
  }
  GroupVector most = {};
  for (std::int64_t d = 0; d < width; ++d) most = larger(most, magnitude(load<GroupVector>(out + d * kGroup)));
  float largest = 0;
  for (int j = 0; j < kGroup; ++j) largest = most[j] > largest ? most[j] : largest;
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
