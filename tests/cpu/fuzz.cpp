// Runs every operator on one case a line of standard input, under sanitizers: shapes, strides, dtypes and values are
// the caller's. Answers "ok" or "FAILED: what" for each, by comparison with plain loops in float64. Each tensor's
// memory is exactly as large as it must be, and what lies between its elements is NaN, so that no stray read goes
// unseen.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cpu/operators.h"

using namespace fastvq;

namespace {

using Sizes = std::vector<std::int64_t>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

std::int64_t product(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{1}, std::multiplies<>());
}

// Where the elements of a tensor lie: dimensions in this order, the first the densest, with gaps; one of them may be
// repeated with stride 0.
struct Layout {
  std::vector<int> order;
  Sizes gaps;
  std::int64_t start = 0;
  int expanded = -1;
};

class Strided {
 public:
  Strided(DType dtype, const Sizes& sizes, const Layout& layout) : start_(layout.start), count_(product(sizes)) {
    tensor_.dtype = dtype;
    tensor_.dims = static_cast<int>(sizes.size());
    std::int64_t stride = 1, last = layout.start;
    for (int d : layout.order) {
      stride += layout.gaps[d];
      tensor_.sizes[d] = sizes[d];
      tensor_.strides[d] = d == layout.expanded ? 0 : stride;
      if (d == layout.expanded) continue;
      last += stride * (std::max<std::int64_t>(sizes[d], 1) - 1);
      stride *= std::max<std::int64_t>(sizes[d], 1);
    }
    const std::int64_t elements = count_ ? last + 1 : 0;
    memory_.reset(new char[elements * element_bytes(dtype)]);
    std::memset(memory_.get(), 0xff, elements * element_bytes(dtype));
    tensor_.data = memory_.get() + (count_ ? start_ * element_bytes(dtype) : 0);
  }

  // Contiguous, as outputs are.
  Strided(DType dtype, const Sizes& sizes) : Strided(dtype, sizes, dense(sizes.size())) {}

  const Tensor& tensor() const { return tensor_; }
  std::int64_t count() const { return count_; }
  void* data() const { return tensor_.data; }

  // Element i in row-major order, widened.
  double at(std::int64_t i) const {
    double value = 0;
    dispatch(tensor_.dtype, [&](auto* type) {
      value = widen(static_cast<std::remove_pointer_t<decltype(type)>*>(tensor_.data)[offset(i)]);
    });
    return value;
  }
  void set(std::int64_t i, double value) {
    dispatch(tensor_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      static_cast<T*>(tensor_.data)[offset(i)] = narrow<T>(value);
    });
  }

 private:
  static Layout dense(std::size_t dims) {
    Layout layout;
    for (std::size_t d = dims; d > 0; --d) layout.order.push_back(static_cast<int>(d - 1));
    layout.gaps.assign(dims, 0);
    return layout;
  }
  std::int64_t offset(std::int64_t i) const {
    std::int64_t total = 0;
    for (int d = tensor_.dims - 1; d >= 0; --d) {
      total += i % tensor_.sizes[d] * tensor_.strides[d];
      i /= tensor_.sizes[d];
    }
    return total;
  }

  Tensor tensor_;
  std::int64_t start_, count_;
  std::unique_ptr<char[]> memory_;
};

struct Case {
  std::uint64_t seed;
  int threads;
  bool dot, certify, masked, noise;
  std::int64_t heads;  // 0: one codebook, without the dimension H
  std::int64_t stages, codes, width;
  DType row_dtype, code_dtype;
  Sizes lead;  // the leading sizes of x, without H
  Layout row_layout, code_layout;
  std::vector<double> pool;

  DType working() const {
    return row_dtype == DType::kFloat64 || code_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  Sizes with_heads(Sizes sizes) const {
    if (heads) sizes.insert(sizes.begin(), heads);
    return sizes;
  }
  Sizes row_sizes() const {
    Sizes sizes = with_heads(lead);
    sizes.push_back(width);
    return sizes;
  }
};

template <class T>
T next(std::istream& in) {
  T value;
  require(static_cast<bool>(in >> value), "the case ends early");
  return value;
}
template <class T>
std::vector<T> several(std::istream& in) {
  std::vector<T> values(next<std::size_t>(in));
  for (T& value : values) value = next<T>(in);
  return values;
}
Layout layout(std::istream& in) {
  Layout l;
  l.order = several<int>(in);
  l.gaps = several<std::int64_t>(in);
  l.start = next<std::int64_t>(in);
  l.expanded = next<int>(in);
  return l;
}

Case parse(const std::string& line) {
  std::istringstream in(line);
  Case c;
  c.seed = next<std::uint64_t>(in);
  c.threads = next<int>(in);
  c.dot = next<bool>(in);
  c.certify = next<bool>(in);
  c.masked = next<bool>(in);
  c.noise = next<bool>(in);
  c.heads = next<std::int64_t>(in);
  c.stages = next<std::int64_t>(in);
  c.codes = next<std::int64_t>(in);
  c.width = next<std::int64_t>(in);
  c.row_dtype = static_cast<DType>(next<int>(in));
  c.code_dtype = static_cast<DType>(next<int>(in));
  c.lead = several<std::int64_t>(in);
  c.row_layout = layout(in);
  c.code_layout = layout(in);
  for (const std::string& text : several<std::string>(in)) c.pool.push_back(std::strtod(text.c_str(), nullptr));
  return c;
}

// ---- what must come out -----------------------------------------------------------------------------------------

// Values of rows and codes: [count][width].
struct Values {
  std::int64_t width;
  std::vector<double> values;

  Values(std::int64_t d, std::int64_t first, std::int64_t count, const Strided& t) : width(d), values(count * d) {
    for (std::int64_t i = 0; i < count * d; ++i) values[i] = t.at(first * d + i);
  }
  const double* row(std::int64_t n) const { return values.data() + n * width; }
  double* row(std::int64_t n) { return values.data() + n * width; }
};

double score(const double* x, const double* code, std::int64_t width, bool dot) {
  double total = 0;
  for (std::int64_t d = 0; d < width; ++d) {
    const double t = dot ? x[d] : x[d] - code[d];
    const double term = t * (dot ? code[d] : t);
    total += term;
  }
  return total;
}

std::int64_t canonical(const double* x, const Values& codes, std::int64_t count, bool dot) {
  std::int64_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (std::int64_t k = 0; k < count; ++k) {
    const double s = score(x, codes.row(k), codes.width, dot);
    if ((dot ? -s : s) < least) {
      least = dot ? -s : s;
      best = k;
    }
  }
  return best;
}

// The same value once both are stored as `dtype`; any NaN is as good as any other.
bool same(double found, double wanted, DType dtype) {
  Strided cell(dtype, {1});
  cell.set(0, wanted);
  wanted = cell.at(0);
  return found == wanted || (std::isnan(found) && std::isnan(wanted));
}

// Within a few roundings of `dtype`, and what `terms` of together `size` lose when they are summed in float64; nothing
// is asked of results that are not finite.
bool near(double found, double wanted, double size, DType dtype, std::int64_t terms = 1) {
  const double unit = dtype == DType::kFloat64   ? 0x1p-52
                      : dtype == DType::kFloat32 ? 0x1p-23
                      : dtype == DType::kFloat16 ? 0x1p-10
                                                 : 0x1p-7;
  const double smallest = dtype == DType::kFloat16 ? 0x1p-24 : dtype == DType::kFloat64 ? 0x1p-1000 : 0x1p-130;
  const double largest = dtype == DType::kFloat16 ? 6e4 : dtype == DType::kFloat64 ? 1e300 : 3e38;
  if (!(std::abs(wanted) < largest) || !(size < largest)) return true;
  return std::abs(found - wanted) <= (4 * unit + static_cast<double>(terms) * 0x1p-52) * size + smallest;
}

// ---- the operators ----------------------------------------------------------------------------------------------

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        heads_(std::max<std::int64_t>(c.heads, 1)),
        rows_(product(c.lead)),
        x_(c.row_dtype, c.row_sizes(), c.row_layout),
        codebooks_(c.code_dtype, c.with_heads({c.stages, c.codes, c.width}), c.code_layout),
        mask_(new std::uint8_t[heads_ * rows_]) {
    std::mt19937_64 random(c.seed);
    fill(&x_, random);
    fill(&codebooks_, random);
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) mask_[n] = random() % 4 != 0;
    kept_ = 0;
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) kept_ += kept(n);
    for (std::int64_t h = 0; h < heads_; ++h) {
      x_values_.emplace_back(c.width, h * rows_, rows_, x_);
      code_values_.emplace_back(c.width, h * c.stages * c.codes, c.codes, codebooks_);
    }
    wanted_.resize(heads_ * rows_);
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) wanted_[n] = canonical(row(n), codes(n), c.codes, c.dot);
  }

  void all() {
    check_search();
    check_vector_quantize();
    check_code_sums();
    check_ema_update();
    check_residual_quantize();
  }

 private:
  // Picks from the pool, so that ties abound, and perhaps noise on top.
  void fill(Strided* t, std::mt19937_64& random) const {
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < t->count(); ++i) {
      const double value = c_.pool[random() % c_.pool.size()];
      t->set(i, c_.noise ? value + normal(random) : value);
    }
  }

  const std::uint8_t* mask() const { return c_.masked ? mask_.get() : nullptr; }
  bool kept(std::int64_t n) const { return !c_.masked || mask_[n]; }
  const double* row(std::int64_t n) const { return x_values_[n / rows_].row(n % rows_); }
  const Values& codes(std::int64_t n) const { return code_values_[n / rows_]; }
  Metric metric() const { return c_.dot ? Metric::kDot : Metric::kEuclidean; }
  Tensor first_stage() const { return codebooks_.tensor().select(c_.heads ? 1 : 0, 0); }
  // At least one element, so that its address is one.
  std::vector<std::int64_t> indices(std::int64_t count, std::int64_t value = -1) const {
    return std::vector<std::int64_t>(count + 1, value);
  }

  void check_search() const {
    auto found = indices(heads_ * rows_);
    const Strided distances(c_.working(), c_.with_heads({rows_}));
    search(x_.tensor(), first_stage(), c_.heads > 0, metric(), true, found.data(), distances.tensor(), c_.threads);
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) {
      require(found[n] == wanted_[n], "search, row " + std::to_string(n) + ": index " + std::to_string(found[n]) +
                                          ", want " + std::to_string(wanted_[n]));
      const double value = score(row(n), codes(n).row(wanted_[n]), c_.width, c_.dot);
      require(same(distances.at(n), value, c_.working()), "search: distance");
    }
    auto again = indices(heads_ * rows_);
    Tensor none = distances.tensor();
    none.data = nullptr;
    search(x_.tensor(), first_stage(), c_.heads > 0, metric(), c_.certify, again.data(), none, c_.threads);
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) {
      require(again[n] >= 0 && again[n] < c_.codes, "search: index out of range");
      require(!c_.certify || again[n] == wanted_[n], "search without distances: index");
    }
  }

  void check_vector_quantize() const {
    auto found = indices(heads_ * rows_);
    const Strided quantized(c_.row_dtype, c_.row_sizes()), loss(c_.working(), {});
    vector_quantize(x_.tensor(), first_stage(), c_.heads > 0, metric(), 1.25, mask(), quantized.data(), found.data(),
                    loss.tensor(), c_.threads);
    double total = 0;
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) {
      require(found[n] == wanted_[n], "vector_quantize: index");
      const double* code = codes(n).row(wanted_[n]);
      for (std::int64_t d = 0; d < c_.width; ++d)
        require(same(quantized.at(n * c_.width + d), code[d], c_.row_dtype), "vector_quantize: quantized");
      if (kept(n)) total += score(row(n), code, c_.width, false);
    }
    const double elements = static_cast<double>(kept_ * c_.width), mean = kept_ ? 1.25 * total / elements : 0;
    require(near(loss.at(0), mean, mean, c_.working(), kept_ * c_.width),
            "vector_quantize: loss " + std::to_string(loss.at(0)) + ", want " + std::to_string(mean));
    // Backward, the gradient of `quantized` laid out as x is.
    Strided gradient(c_.row_dtype, c_.row_sizes(), c_.row_layout);
    for (std::int64_t i = 0; i < gradient.count(); ++i) gradient.set(i, 0.5);
    const Strided grad_x(c_.row_dtype, c_.row_sizes()), grad_codes(c_.code_dtype, c_.with_heads({c_.codes, c_.width}));
    vector_quantize_backward(gradient.tensor(), 2.0, x_.tensor(), first_stage(), c_.heads > 0, found.data(), mask(),
                             1.0, 0.25, grad_x.data(), grad_codes.data(), c_.threads);
    std::vector<double> wanted(grad_codes.count()), size(grad_codes.count());
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) {
      for (std::int64_t d = 0; d < c_.width; ++d) {
        const double x = row(n)[d], q = codes(n).row(wanted_[n])[d];
        const double pull = kept(n) ? 4 * (x - q) / elements : 0;
        require(near(grad_x.at(n * c_.width + d), 0.5 + pull, 0.5 + std::abs(pull), c_.row_dtype),
                "vector_quantize_backward: gradient of x");
        const std::int64_t at = (n / rows_ * c_.codes + wanted_[n]) * c_.width + d;
        wanted[at] -= 0.25 * pull;
        size[at] += std::abs(pull);
      }
    }
    for (std::int64_t i = 0; i < grad_codes.count(); ++i)
      require(near(grad_codes.at(i), wanted[i], size[i], c_.code_dtype, kept_),
              "vector_quantize_backward: gradient of the codebook");
  }

  void check_code_sums() const {
    std::vector<std::int64_t> given = wanted_;
    given.push_back(0);
    for (std::int64_t n = 0; n < heads_ * rows_; n += 5) given[n] = -1;
    const DType dtype = c_.row_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const Strided counts(dtype, c_.with_heads({c_.codes})), sums(dtype, c_.with_heads({c_.codes, c_.width}));
    code_sums(x_.tensor(), c_.heads > 0, given.data(), mask(), counts.tensor(), sums.data(), c_.threads);
    std::vector<double> count(counts.count()), sum(sums.count()), size(sums.count());
    for (std::int64_t n = 0; n < heads_ * rows_; ++n) {
      if (!kept(n) || given[n] < 0) continue;
      const std::int64_t k = n / rows_ * c_.codes + given[n];
      count[k] += 1;
      for (std::int64_t d = 0; d < c_.width; ++d) {
        sum[k * c_.width + d] += row(n)[d];
        size[k * c_.width + d] += std::abs(row(n)[d]);
      }
    }
    for (std::size_t k = 0; k < count.size(); ++k) require(counts.at(k) == count[k], "code_sums: counts");
    for (std::size_t i = 0; i < sum.size(); ++i)
      require(near(sums.at(i), sum[i], size[i], dtype, kept_), "code_sums: sums");
  }

  // The tensors of the update in the layouts of the codes, H being there always.
  void check_ema_update() const {
    const Sizes many = {heads_, c_.codes, c_.width}, few = {heads_, c_.codes};
    Layout wide, narrow;
    for (int d : c_.code_layout.order)
      if (d < 3) wide.order.push_back(d);
    for (int d : c_.code_layout.order)
      if (d < 2) narrow.order.push_back(d);
    for (int d = static_cast<int>(wide.order.size()); d < 3; ++d) wide.order.push_back(d);
    wide.gaps.assign(3, c_.code_layout.gaps[0]);
    narrow.gaps.assign(2, c_.code_layout.gaps[0]);
    Strided codebook(c_.code_dtype, many, wide), sizes(DType::kFloat32, few, narrow);
    Strided averages(DType::kFloat32, many, wide), counts(DType::kFloat32, few), sums(DType::kFloat32, many, wide);
    std::mt19937_64 random(c_.seed);
    for (std::int64_t i = 0; i < sizes.count(); ++i) {
      sizes.set(i, static_cast<double>(random() % 5));
      counts.set(i, static_cast<double>(random() % 3));
    }
    fill(&averages, random);
    fill(&sums, random);
    const double decay = 0.75, eps = 1e-5;
    std::vector<double> wanted(codebook.count()), average(codebook.count()), size(sizes.count());
    for (std::int64_t h = 0; h < heads_; ++h) {
      double total = 0;
      for (std::int64_t k = h * c_.codes; k < (h + 1) * c_.codes; ++k) {
        size[k] = decay * sizes.at(k) + (1 - decay) * counts.at(k);
        total += size[k];
      }
      for (std::int64_t k = h * c_.codes; k < (h + 1) * c_.codes; ++k) {
        const double smoothed = (size[k] + eps) / (total + static_cast<double>(c_.codes) * eps) * total;
        for (std::int64_t i = k * c_.width; i < (k + 1) * c_.width; ++i) {
          average[i] = decay * averages.at(i) + (1 - decay) * sums.at(i);
          wanted[i] = average[i] / smoothed;
        }
      }
    }
    ema_update(codebook.tensor(), sizes.tensor(), averages.tensor(), counts.tensor(), sums.tensor(), decay, eps,
               c_.threads);
    for (std::int64_t k = 0; k < sizes.count(); ++k)
      require(near(sizes.at(k), size[k], size[k], DType::kFloat32), "ema_update: cluster sizes");
    for (std::int64_t i = 0; i < codebook.count(); ++i) {
      require(near(averages.at(i), average[i], std::abs(average[i]), DType::kFloat32), "ema_update: averages");
      require(near(codebook.at(i), wanted[i], std::abs(wanted[i]), c_.code_dtype), "ema_update: codes");
    }
  }

  // The residual after a stage is r - c, and quantized the sum of the codes: float32, or float64 for float64 input.
  void check_residual_quantize() const {
    const std::int64_t total = heads_ * rows_;
    auto found = indices(total * c_.stages);
    const Strided quantized(c_.row_dtype, c_.row_sizes()), losses(c_.working(), {c_.stages});
    residual_quantize(x_.tensor(), codebooks_.tensor(), c_.heads > 0, metric(), quantized.data(), found.data(),
                      losses.tensor(), c_.threads);
    const auto rounded = [&](double v) {
      return c_.working() == DType::kFloat64 ? v : static_cast<double>(static_cast<float>(v));
    };
    std::vector<double> loss(c_.stages);
    for (std::int64_t h = 0; h < heads_; ++h) {
      for (std::int64_t n = 0; n < rows_; ++n) {
        std::vector<double> residual(x_values_[h].row(n), x_values_[h].row(n) + c_.width), sum(c_.width);
        for (std::int64_t q = 0; q < c_.stages; ++q) {
          const Values stage(c_.width, (h * c_.stages + q) * c_.codes, c_.codes, codebooks_);
          const std::int64_t k = canonical(residual.data(), stage, c_.codes, c_.dot);
          require(found[((h * rows_) + n) * c_.stages + q] == k,
                  "residual_quantize: index of stage " + std::to_string(q));
          for (std::int64_t d = 0; d < c_.width; ++d) {
            residual[d] = rounded(residual[d] - stage.row(k)[d]);
            sum[d] = q ? rounded(sum[d] + stage.row(k)[d]) : stage.row(k)[d];
            loss[q] += residual[d] * residual[d];
          }
        }
        for (std::int64_t d = 0; d < c_.width; ++d)
          require(same(quantized.at((h * rows_ + n) * c_.width + d), sum[d], c_.row_dtype),
                  "residual_quantize: quantized");
      }
    }
    for (std::int64_t q = 0; q < c_.stages && total > 0; ++q) {
      const double mean = loss[q] / static_cast<double>(total * c_.width);
      require(near(losses.at(q), mean, mean, c_.working(), total * c_.width), "residual_quantize: loss of a stage");
    }
    Strided gradient(c_.row_dtype, c_.row_sizes(), c_.row_layout);
    for (std::int64_t i = 0; i < gradient.count(); ++i) gradient.set(i, 0.5);
    const std::vector<double> grad_losses(c_.stages, 0.0);
    const Strided grad_x(c_.row_dtype, c_.row_sizes());
    const Strided grad_codes(c_.code_dtype, c_.with_heads({c_.stages, c_.codes, c_.width}));
    residual_quantize_backward(gradient.tensor(), grad_losses.data(), x_.tensor(), codebooks_.tensor(), c_.heads > 0,
                               found.data(), grad_x.data(), grad_codes.data(), c_.threads);
    for (std::int64_t i = 0; i < grad_x.count(); ++i)
      require(grad_x.at(i) == 0.5 || std::isnan(grad_x.at(i)), "residual_quantize_backward: straight through");
  }

  const Case& c_;
  const std::int64_t heads_, rows_;  // rows a head
  Strided x_, codebooks_;
  std::unique_ptr<std::uint8_t[]> mask_;
  std::int64_t kept_;
  std::vector<Values> x_values_, code_values_;  // a head each; the codes of the first stage
  std::vector<std::int64_t> wanted_;
};

}  // namespace

int main() {
  bool failed = false;
  for (std::string line; std::getline(std::cin, line);) {
    std::string answer = "ok";
    try {
      const Case c = parse(line);
      Run(c).all();
    } catch (const std::exception& error) {
      answer = std::string("FAILED: ") + error.what();
      failed = true;
    }
    std::cout << answer << std::endl;
  }
  return failed ? 1 : 0;
}
