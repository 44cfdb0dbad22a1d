// Runs the CPU operators under sanitizers on ragged, strided, extreme data, and compares what they give with plain
// loops in float64. `driver random SEED COUNT` draws cases; `driver bound` runs rows that only the full bound gets
// right. Exits with 1 and a line a failure.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/code_counts.h"
#include "../../csrc/cpu/operators.h"
#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cpu/row_kernel.h"

using namespace fastvq;

namespace {

int failures = 0;

void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// Rows with room between them, so that a stray read or write is seen.
struct Matrix {
  std::int64_t rows, width, step, stride;
  std::vector<float> values;

  Matrix(std::int64_t n, std::int64_t d, std::int64_t step_, std::int64_t gap)
      : rows(n),
        width(d),
        step(step_),
        stride(d * step_ + gap),
        values(n > 0 ? (n - 1) * stride + (d - 1) * step_ + 1 : 0) {}

  float& at(std::int64_t n, std::int64_t d) { return values[n * stride + d * step]; }
  float at(std::int64_t n, std::int64_t d) const { return values[n * stride + d * step]; }

  Tensor tensor() {
    Tensor t;
    t.data = values.data();
    t.dims = 2;
    t.sizes[0] = rows;
    t.sizes[1] = width;
    t.strides[0] = stride;
    t.strides[1] = step;
    return t;
  }
};

Tensor flat(void* data, std::vector<std::int64_t> sizes, DType dtype = DType::kFloat32) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.dims = static_cast<int>(sizes.size());
  std::int64_t stride = 1;
  for (int d = t.dims - 1; d >= 0; --d) {
    t.sizes[d] = sizes[d];
    t.strides[d] = stride;
    stride *= sizes[d];
  }
  return t;
}

double distance(const Matrix& x, std::int64_t n, const Matrix& c, std::int64_t k, Metric metric) {
  double total = 0;
  for (std::int64_t d = 0; d < x.width; ++d) {
    if (metric == Metric::kDot) {
      const double product = static_cast<double>(x.at(n, d)) * c.at(k, d);
      total -= product;
    } else {
      const double t = static_cast<double>(x.at(n, d)) - c.at(k, d);
      const double square = t * t;
      total += square;
    }
  }
  return std::isnan(total) ? std::numeric_limits<double>::infinity() : total;
}

std::int64_t canonical(const Matrix& x, std::int64_t n, const Matrix& c, Metric metric) {
  std::int64_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (std::int64_t k = 0; k < c.rows; ++k) {
    const double d = distance(x, n, c, k, metric);
    if (d < least) {
      least = d;
      best = k;
    }
  }
  return best;
}

std::vector<std::int64_t> found(Matrix& x, Matrix& c, Metric metric, int threads, bool few) {
  std::vector<std::int64_t> indices(x.rows, -1);
  std::vector<float> distances(x.rows);
  if (few) {
    search_by(Way::kFew, x.tensor(), c.tensor(), indices.data(), threads);
    return indices;
  }
  search(x.tensor(), c.tensor(), false, metric, true, indices.data(), flat(distances.data(), {x.rows}), threads);
  return indices;
}

// few: by the way of a few rows, however many there are.
void compare(Matrix& x, Matrix& c, Metric metric, int threads, const std::string& what, bool few = false) {
  const std::vector<std::int64_t> indices = found(x, c, metric, threads, few);
  for (std::int64_t n = 0; n < x.rows; ++n) {
    const std::int64_t want = canonical(x, n, c, metric);
    if (indices[n] != want)
      return fail(what + ", row " + std::to_string(n) + ": index " + std::to_string(indices[n]) + ", want " +
                  std::to_string(want));
  }
}

// The other operators: run for the sanitizers, with the identities that any result must satisfy.
void run_layer(Matrix& x, Matrix& c, int threads, const std::string& what) {
  const std::int64_t n = x.rows, k = c.rows, d = x.width;
  std::vector<float> quantized(n * d), grad_x(n * d), grad_codebook(k * d), counts(k), sums(k * d), ones(n * d, 1.0f);
  std::vector<std::int64_t> indices(n), stage_indices(n * 2), taken(k, -1);
  std::vector<std::uint8_t> mask(n);
  for (std::int64_t i = 0; i < n; ++i) mask[i] = i % 3 != 0;
  float loss = 0, losses[2] = {};
  vector_quantize(x.tensor(), c.tensor(), false, Metric::kEuclidean, 1.25, mask.data(), quantized.data(),
                  indices.data(), flat(&loss, {}), taken.data(), threads);
  vector_quantize_backward(flat(ones.data(), {n, d}), 1.0, x.tensor(), c.tensor(), false, indices.data(), mask.data(),
                           1.0, 0.25, grad_x.data(), grad_codebook.data(), threads);
  code_sums(x.tensor(), false, indices.data(), mask.data(), false, flat(counts.data(), {k}), sums.data(), threads);
  std::vector<float> codebook(k * d, 0.5f), sizes(k, 1.0f), averages(k * d, 0.5f);
  ema_update(flat(codebook.data(), {1, k, d}), flat(sizes.data(), {1, k}), flat(averages.data(), {1, k, d}),
             flat(counts.data(), {1, k}), flat(sums.data(), {1, k, d}), 0.9, 1e-5, threads);
  std::vector<float> again(k * d, 0.5f), again_sizes(k, 1.0f), again_averages(k * d, 0.5f), again_counts(k);
  ema_step(flat(again.data(), {k, d}), flat(again_sizes.data(), {k}), flat(again_averages.data(), {k, d}),
           flat(again_counts.data(), {k}), x.tensor(), indices.data(), mask.data(), 0.9, 1e-5, threads);
  double counted = 0, kept = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    kept += mask[i];
    if (indices[i] != canonical(x, i, c, Metric::kEuclidean)) return fail(what + ": index of vector_quantize");
    for (std::int64_t j = 0; j < d; ++j)
      if (std::memcmp(&quantized[i * d + j], &c.at(indices[i], j), sizeof(float)) != 0)
        return fail(what + ": quantized is not the code");
  }
  for (std::int64_t i = 0; i < k; ++i)
    if (taken[i] != static_cast<std::int64_t>(counts[i])) return fail(what + ": counts of vector_quantize");
  if (again_counts != counts || again != codebook || again_averages != averages || again_sizes != sizes)
    return fail(what + ": ema_step is not code_sums and ema_update");
  for (float count : counts) counted += count;
  if (counted != kept) fail(what + ": counts");
  std::vector<float> both(2 * k * d);
  for (std::int64_t i = 0; i < k * d; ++i) both[i] = both[k * d + i] = c.at(i / d, i % d);
  residual_quantize(x.tensor(), flat(both.data(), {2, k, d}), false, Metric::kEuclidean, quantized.data(),
                    stage_indices.data(), flat(losses, {2}), threads);
  const double grad_losses[2] = {1.0, 0.5};
  std::vector<float> grad_codebooks(2 * k * d);
  residual_quantize_backward(flat(ones.data(), {n, d}), grad_losses, x.tensor(), flat(both.data(), {2, k, d}), false,
                             stage_indices.data(), grad_x.data(), grad_codebooks.data(), threads);
  rotate_back(flat(ones.data(), {n, d}), x.tensor(), flat(both.data(), {2, k, d}), stage_indices.data(), grad_x.data(),
              threads);
  rotate_back(flat(ones.data(), {n, d}), x.tensor(), flat(quantized.data(), {n, d}), nullptr, grad_x.data(), threads);
  std::vector<float> stage_counts(2 * k), stage_sums(2 * k * d);
  residual_code_sums(x.tensor(), flat(both.data(), {2, k, d}), stage_indices.data(), flat(stage_counts.data(), {2, k}),
                     stage_sums.data(), threads);
  for (float count : stage_counts)
    if (count < 0 || count > static_cast<float>(n)) return fail(what + ": counts of the stages");
  for (std::int64_t i = 0; i < n; ++i)
    if (stage_indices[2 * i] != indices[i]) return fail(what + ": first stage");
}

void random_case(std::mt19937_64& random) {
  const auto draw = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const std::int64_t widths[] = {1, 2, 3, 7, 8, 16, 31, 64, 129}, sizes[] = {1, 2, 7, 8, 9, 64, 100, 257};
  const std::int64_t n = draw(0, 150), d = widths[draw(0, 8)], k = sizes[draw(0, 7)];
  const int family = static_cast<int>(draw(0, 9)), threads = static_cast<int>(draw(1, 4));
  Matrix x(n, d, draw(1, 2), draw(0, 3)), c(k, d, draw(1, 2), draw(0, 3));
  std::normal_distribution<float> normal;
  const float scales[] = {1, 1, 1e30f, 1e-40f, 1, 3, 1, 1, 1, 1};
  const auto value = [&] {
    float v = normal(random) * scales[family];
    if (family == 1) v += 10;
    if (family == 5) v = std::round(v);
    return v;
  };
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < d; ++j) x.at(i, j) = value();
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = 0; j < d; ++j) c.at(i, j) = family == 4 && i > 0 ? c.at(0, j) : value();
  if (family == 6 && n > 0) x.at(draw(0, n - 1), draw(0, d - 1)) = std::numeric_limits<float>::quiet_NaN();
  if (family == 6) c.at(draw(0, k - 1), draw(0, d - 1)) = std::numeric_limits<float>::infinity();
  if (family == 7)
    for (std::int64_t i = 1; i < k; ++i)
      for (std::int64_t j = 0; j < d; ++j) c.at(i, j) = c.at(0, j) * (1 + 1e-7f * normal(random));
  if (family == 8) {  // a dimension far longer than the others
    for (std::int64_t i = 0; i < n; ++i) x.at(i, d / 2) *= 50;
    for (std::int64_t i = 0; i < k; ++i) c.at(i, d / 2) *= 50;
  }
  if (family == 9)  // codes far shorter than the rows
    for (std::int64_t i = 0; i < k; ++i)
      for (std::int64_t j = 0; j < d; ++j) c.at(i, j) *= 1e-3f;
  const std::string what = "family " + std::to_string(family) + ", N " + std::to_string(n) + ", K " +
                           std::to_string(k) + ", D " + std::to_string(d) + ", threads " + std::to_string(threads);
  compare(x, c, Metric::kEuclidean, threads, what);
  compare(x, c, Metric::kDot, threads, what + ", dot");
  if (family != 6) run_layer(x, c, threads, what);
}

// More codes than are screened at once, in an order that makes each chunk better than the last, with near ties at the
// seams.
void chunked_case(std::mt19937_64& random, float spread) {
  std::normal_distribution<float> normal;
  Matrix x(19, 5, 1, 1), c(50021, 5, 1, 0);
  for (std::int64_t i = 0; i < x.rows; ++i)
    for (std::int64_t j = 0; j < x.width; ++j) x.at(i, j) = normal(random) * 0.1f;
  for (std::int64_t k = 0; k < c.rows; ++k) {
    const float size = 1 + spread * static_cast<float>(c.rows - k) / static_cast<float>(c.rows);
    for (std::int64_t j = 0; j < c.width; ++j) c.at(k, j) = normal(random) * size;
  }
  for (std::int64_t k : {16383, 16384, 32767, 32768, 49151, 49152, 50020})
    for (std::int64_t j = 0; j < c.width; ++j) c.at(k, j) = x.at(k % x.rows, j) + 1e-4f * normal(random);
  compare(x, c, Metric::kEuclidean, 2, "several chunks");
  compare(x, c, Metric::kDot, 2, "several chunks, dot");
}

// Threads that count each by itself, and together.
void counts_case() {
  for (std::int64_t codes : {std::int64_t{7}, std::int64_t{1} << 19}) {
    std::vector<std::int64_t> counts(codes, -1);
    CodeCounts all(counts.data(), codes, 3);
    parallel(700, 3, [&](Tasks& tasks) {
      CodeCounts::Share share(all);
      for (std::int64_t task; tasks.next(&task);) share.add(task % 7);
    });
    for (std::int64_t k = 0; k < codes; ++k)
      if (counts[k] != (k < 7 ? 100 : 0)) return fail("counts of " + std::to_string(codes) + " codes");
  }
}

constexpr std::int64_t kRows = 9;  // enough that they do not count as few

// A row near the origin whose D products with the code w are each just under half a unit in the last place of the
// bias, so that the screen loses every one of them: its score errs by nearly eta. Code j, in another group, screens
// lower by 0.7 eta though it is the farther one. Negated copies keep the mean at zero, so that nothing is centred.
void bound_case(std::int64_t d) {
  Matrix x(kRows, d, 1, 0), c(32, d, 1, 0);
  const float near_two = 2.0f * (1 + 0x1p-10f);  // the bias: its unit in the last place is 2^-22
  const float a = std::sqrt(2 * near_two / static_cast<float>(d));
  const double eta = static_cast<double>(d + 2) * 0x1p-24 * near_two;
  const float b = static_cast<float>(std::sqrt((2.0 * near_two - 2 * 0.7 * eta) / static_cast<double>(d)));
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t n = 0; n < kRows; ++n) x.at(n, i) = 0.49f * 0x1p-22f / a;
    for (std::int64_t k = 0; k < 8; ++k) {
      const float sign = i % 2 ? 1.0f : -1.0f;
      c.at(k, i) = sign * b;
      c.at(8 + k, i) = -sign * b;
      c.at(16 + k, i) = a;
      c.at(24 + k, i) = -a;
    }
  }
  if (canonical(x, 0, c, Metric::kEuclidean) != 16) return fail("the constructed row does not do what it should");
  compare(x, c, Metric::kEuclidean, 1, "bound, D " + std::to_string(d));
}

// The same for int8. Rounding moves the row 0.45 units one way in 64 dimensions and the code w 0.45 units the other, so
// that w, the nearest, looks farther by nearly all the slack; code j is stored exactly and looks nearer than it is. One
// dimension of 127 fixes the units at 1, and far codes of both signs keep the mean near zero.
void int8_bound_case() {
  constexpr std::int64_t d = 65, k = 256;
  Matrix x(kRows, d, 1, 0), c(k, d, 1, 0);
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t n = 0; n < kRows; ++n) x.at(n, i) = i ? 10.45f : 127.0f;
    for (std::int64_t n = 0; n < k; ++n) {
      const float far = n % 2 ? 127.0f : -127.0f;
      const float near = n < 8 ? 9.0f : 11.55f;
      const bool is_near = n < 8 || (n >= 16 && n < 24);
      c.at(n, i) = !is_near ? far : i ? near : 127.0f;
    }
  }
  for (std::int64_t n = 0; n < k; ++n)
    if (n >= 24 || (n >= 8 && n < 16)) c.at(n, 1 + n % 64) = 100.0f;  // no two of them alike
  if (canonical(x, 0, c, Metric::kEuclidean) != 16) return fail("the constructed row does not do what it should");
  compare(x, c, Metric::kEuclidean, 1, "int8 bound");
}

// Rows far longer than the codes, where the bound by the scores counts, and the dot product: rounding takes 0.45 units
// from each of 64 dimensions of the code w, all along the row, so that w, the nearest, looks worse by nearly all that
// the length of the row makes of it; code j is stored exactly. A dimension of 127 units makes that the unit of the
// rows, of which they lose 0.45 as well; one of -127 makes that of the codes 1, and far codes of both signs cancel.
void long_row_bound_case(Metric metric, float unit, const std::string& what) {
  constexpr std::int64_t d = 65, k = 256;
  Matrix x(kRows, d, 1, 0), c(k, d, 1, 0);
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t n = 0; n < kRows; ++n) x.at(n, i) = (i ? 125.45f : 127.0f) * unit;
    for (std::int64_t n = 0; n < k; ++n) {
      const float j = i % 8 < 3 ? 11.0f : 10.0f, far = (i + n) % 2 ? 20.0f : -20.0f;
      const bool is_near = n < 8 || (n >= 16 && n < 24);
      c.at(n, i) = is_near ? (i == 0 ? 0 : n < 8 ? j : 10.45f) : i ? far : n % 2 ? -127.0f : 0;
    }
  }
  for (std::int64_t n = 0; n < k; ++n)
    if (n >= 24 || (n >= 8 && n < 16)) c.at(n, 1 + n % 64) = -static_cast<float>(21 + n / 64);  // no two of them alike
  if (canonical(x, 0, c, metric) != 16) return fail("the constructed row does not do what it should");
  compare(x, c, metric, 1, what);
}

// In place: the Hadamard transform of 64 values.
void transform(float* v) {
  for (int s = 1; s < 64; s *= 2) {
    for (int i = 0; i < 64; ++i) {
      if (i & s) continue;
      const float a = v[i], b = v[i + s];
      v[i] = a + b;
      v[i + s] = a - b;
    }
  }
}

// The same as int8_bound_case for codes that are transformed before they are rounded: it is the transforms of rows and
// codes that are 0.4375 units off. The far codes have equal values there, and so one dimension far longer than the
// others here.
void transformed_bound_case() {
  constexpr std::int64_t d = 64, k = 256;
  Matrix x(kRows, d, 1, 0), c(k, d, 1, 0);
  const auto set = [](Matrix& rows, std::int64_t n, std::vector<float> row) {
    transform(row.data());
    for (std::int64_t i = 0; i < d; ++i) rows.at(n, i) = row[i] / 64;
  };
  for (std::int64_t n = 0; n < kRows; ++n) {
    std::vector<float> row(d, 10.4375f);
    row[0] = 127;
    set(x, n, row);
  }
  for (std::int64_t n = 0; n < k; ++n) {
    const bool is_near = n < 8 || (n >= 16 && n < 24);
    std::vector<float> code(d, is_near ? (n < 8 ? 9.0f : 11.5625f) : n % 2 ? 127.0f : -127.0f);
    if (is_near) code[0] = 127;
    if (!is_near) code[1 + n % 63] = static_cast<float>(100 - n / 63);  // no two of them alike
    set(c, n, code);
  }
  if (canonical(x, 0, c, Metric::kEuclidean) != 16) return fail("the constructed row does not do what it should");
  compare(x, c, Metric::kEuclidean, 1, "int8 bound, transformed");
}

// A few rows: the differences of code j are 1 in its first eight dimensions, one a partial sum, and just too small in
// the others to change that sum; those of code w add up to less, but exactly.
void few_rows_bound_case(std::int64_t d) {
  Matrix x(1, d, 1, 0), c(32, d, 1, 0);
  const std::int64_t lost = d / 8 - 1;
  const float small = std::sqrt(0.98f * 0x1p-24f);
  const float large = 1 + static_cast<float>(lost * 97 / 400) * 0x1p-23f;
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t k = 0; k < c.rows; ++k)
      c.at(k, i) = k == 3 ? (i < 8 ? 1.0f : small) : k == 16 && i < 8 ? large : 0;
    for (std::int64_t k = 0; k < c.rows; ++k)
      if (k != 3 && k != 16) c.at(k, i) = 2;
  }
  if (canonical(x, 0, c, Metric::kEuclidean) != 16) return fail("the constructed row does not do what it should");
  compare(x, c, Metric::kEuclidean, 1, "few rows, D " + std::to_string(d), true);
}

// A few rows and many codes, which several threads share; near ties at the seams.
void few_rows_case(std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  for (std::int64_t n : {1, 2, 5, 8}) {
    for (std::int64_t d : {1, 7, 8, 13, 64}) {
      Matrix x(n, d, n == 2 ? 2 : 1, 3), c(70001 - n, d, 1, d == 13 ? 5 : 0);
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < d; ++j) x.at(i, j) = normal(random);
      for (std::int64_t k = 0; k < c.rows; ++k)
        for (std::int64_t j = 0; j < d; ++j) c.at(k, j) = normal(random);
      for (std::int64_t k : {std::int64_t{255}, std::int64_t{256}, std::int64_t{16384}, c.rows - 1})
        for (std::int64_t j = 0; j < d; ++j) c.at(k, j) = x.at(k % n, j) * (1 + 1e-7f * normal(random));
      compare(x, c, Metric::kEuclidean, 3, "few rows, N " + std::to_string(n) + ", D " + std::to_string(d), true);
    }
  }
}

bool near(double a, double b, double tolerance) {
  return std::fabs(a - b) <= tolerance * std::fabs(b) + 1e-30;
}

// The packing of a group of eight codes, step by step, against plain loops. Code 3 equals code 1, code 6 is not finite,
// and code 7 is none.
void packing_case(std::mt19937_64& random, std::int64_t d) {
  const RowKernel& kernel = row_kernel();
  const std::string what = "packing, D " + std::to_string(d) + ": ";
  std::normal_distribution<float> normal;
  std::vector<float> rows(8 * d), codes(8 * d);
  for (float& value : rows) value = 10 + normal(random);
  std::copy_n(&rows[d], d, &rows[3 * d]);
  rows[6 * d + d / 2] = std::numeric_limits<float>::infinity();
  const float* row[8];
  for (int j = 0; j < 8; ++j) row[j] = &rows[j * d];
  kernel.load_codes(row, d, codes.data());
  for (std::int64_t i = 0; i < 8 * d; ++i)
    if (codes[i] != row[i % 8][i / 8]) return fail(what + "load_codes");

  std::vector<float> sums(8 * d, 1.0f), bias(8), screened(8 * d);
  std::vector<std::uint32_t> hashes(8);
  CodeStatistics statistics{sums.data(), 0, 0, 0};
  kernel.measure(codes.data(), d, 7, bias.data(), hashes.data(), &statistics);
  double squares = 0;
  float largest = 0;
  for (std::int64_t i = 0; i < 8 * d; ++i) {
    const bool counts = i % 8 < 6;
    if ((bias[i % 8] == 0) != counts || sums[i] != (counts ? 1 + codes[i] : 1)) return fail(what + "measure");
    squares += counts ? static_cast<double>(codes[i]) * codes[i] : 0;
    largest = counts ? std::max(largest, codes[i]) : largest;
  }
  if (!near(statistics.squares, squares, 1e-5) || statistics.largest != largest || statistics.finite != 6)
    return fail(what + "measure, statistics");
  for (int j = 0; j < 6; ++j)
    if ((hashes[j] == hashes[1]) != (j == 1 || j == 3)) return fail(what + "measure, hashes");

  std::vector<float> mean(d);
  for (float& value : mean) value = 1 + 0.1f * normal(random);  // finer than the codes, so that differences are rounded
  for (const double scale : {0.0, 1.0, 0.25}) {                 // 0: the codes are screened as they are
    const bool moved = scale != 0;
    CodebookView view;
    view.size = view.width = d;
    view.mean = moved ? mean.data() : nullptr;
    view.scale = moved ? scale : 1;
    for (int j = 0; j < 8; ++j) bias[j] = j < 6 ? 0 : std::numeric_limits<float>::infinity();
    CodeExtremes extremes{};
    kernel.screen(codes.data(), view, bias.data(), moved ? screened.data() : nullptr, &extremes);
    double norm = 0, residual = 0;
    float most = 0;
    for (int j = 0; j < 8; ++j) {
      double squared = 0, lost = 0;
      for (std::int64_t i = 0; i < d; ++i) {
        const double wanted = moved ? (static_cast<double>(rows[j * d + i]) - mean[i]) * scale : rows[j * d + i];
        const float c = j < 6 ? static_cast<float>(wanted) : 0;
        if (moved && screened[i * 8 + j] != c) return fail(what + "screen");
        squared += static_cast<double>(c) * c;
        lost += (wanted - c) * (wanted - c);
        most = std::max(most, std::fabs(c));
      }
      if (j >= 6) continue;
      if (!near(bias[j], squared / 2, 1e-7)) return fail(what + "screen, bias");
      norm = std::max(norm, squared);
      residual = std::max(residual, lost);
    }
    const bool rounded = scale == 1;  // the residual, a float32 sum of what float32 subtractions lost: no less
    std::vector<float> again = codes;
    kernel.move(again.data(), view, bias.data(), again.data());  // in place
    if (moved && again != screened) return fail(what + "move");
    if (!near(extremes.norm, norm, 1e-12) || extremes.largest != most ||
        !near(extremes.residual, residual, rounded ? 1e-3 : 1e-12) || (rounded && extremes.residual < residual))
      return fail(what + "screen, extremes");
  }
  if (!kernel.int8) return;

  const std::int64_t block = d & -d, quads = (d + 3) / 4;
  if (block >= 4) {
    std::vector<float> wanted = screened, back(8 * d);
    for (std::int64_t s = 1; s < block; s *= 2) {
      for (std::int64_t i = 0; i < 8 * d; ++i) {
        if (i / 8 & s) continue;
        const float a = wanted[i], b = wanted[i + 8 * s];
        wanted[i] = a + b;
        wanted[i + 8 * s] = a - b;
      }
    }
    float most = 0;
    for (float value : wanted) most = std::max(most, std::fabs(value));
    if (kernel.transform(screened.data(), d, block, back.data()) != most || back != wanted)
      return fail(what + "transform");
  }

  std::vector<std::int8_t> bytes(32 * quads, 99);
  std::vector<std::int32_t> start(8), whole_start(8), pairs(8);
  CodeExtremes extremes{};
  constexpr float kScale = 0.01f;
  kernel.quantise(screened.data(), bias.data(), d, kScale, bytes.data(), start.data(), whole_start.data(), pairs.data(),
                  &extremes);
  double residual = 0;
  for (int j = 0; j < 8; ++j) {
    std::int32_t sum = 0, squared = 0;
    double lost = 0;
    for (std::int64_t i = 0; i < 4 * quads; ++i) {
      const float c = i < d ? screened[i * 8 + j] : 0;
      const float q = std::min(127.0f, std::max(-127.0f, std::nearbyint(c * (1.0f / kScale))));
      if (bytes[i / 4 * 32 + 4 * j + i % 4] != q) return fail(what + "quantise");
      sum += static_cast<std::int32_t>(q);
      squared += static_cast<std::int32_t>(q * q);
      lost += (c - static_cast<double>(q) * kScale) * (c - static_cast<double>(q) * kScale);
    }
    if (j >= 6 ? start[j] != kExcluded : start[j] != -128 * sum || whole_start[j] != start[j] - squared / 2)
      return fail(what + "quantise, start");
    if (j < 6) residual = std::max(residual, lost);
  }
  if (!near(extremes.int8_residual, residual, 1e-4)) return fail(what + "quantise, residual");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4 && !std::strcmp(argv[1], "random")) {
    std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
    for (int i = 0; i < std::atoi(argv[3]); ++i) random_case(random);
    chunked_case(random, 0);
    chunked_case(random, 1);
    chunked_case(random, 30);
    few_rows_case(random);
    for (std::int64_t d : {1, 2, 3, 4, 7, 8, 12, 16, 31, 32, 48, 64, 100, 128, 192, 256, 512, 1024})
      packing_case(random, d);
    counts_case();
  } else if (argc == 2 && !std::strcmp(argv[1], "bound")) {
    for (std::int64_t d : {16, 64, 256}) bound_case(d);
    int8_bound_case();
    transformed_bound_case();
    long_row_bound_case(Metric::kEuclidean, 8, "int8 bound, long rows");
    long_row_bound_case(Metric::kEuclidean, 1024, "int8 bound, no bias");
    long_row_bound_case(Metric::kDot, 8, "int8 bound, dot");
    few_rows_bound_case(512);
  } else {
    std::printf("usage: driver random SEED COUNT | driver bound\n");
    return 2;
  }
  std::printf("%s: %d failures\n", row_kernel().name, failures);
  return failures ? 1 : 0;
}
