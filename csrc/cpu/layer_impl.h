// The loops of the layer round the search, over rows of D floats each: part of row_kernel_impl.h. All work in float64,
// each operation rounded on its own, in an order that no instruction set changes.

namespace fastvq {
namespace {

// |row - code|^2 as eight partial sums, dimension d going to the sum d % 8, added up in order.
double squared_distance(const float* row, const float* code, std::int64_t width) {
  DoubleVector sums[kPieces] = {};
  std::int64_t d = 0;
  for (; d + kGroup <= width; d += kGroup) {
    for (int i = 0; i < kPieces; ++i) {
      const DoubleVector t = load_wide(row + d + i * kWide) - load_wide(code + d + i * kWide);
      sums[i] += t * t;
    }
  }
  double parts[kGroup];
  for (int i = 0; i < kPieces; ++i) store(parts + i * kWide, sums[i]);
  for (int i = 0; d < width; ++d, ++i) {
    const double t = static_cast<double>(row[d]) - static_cast<double>(code[d]);
    parts[i] += t * t;
  }
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

// out = code; returns |row - code|^2, as above.
double copy_code(const float* row, const float* code, std::int64_t width, float* out) {
  std::int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load<FloatVector>(code + d));
  for (; d < width; ++d) out[d] = code[d];
  return squared_distance(row, code, width);
}

// out = gradient + pull * (row - code)
void pull_rows(const float* gradient, const float* row, const float* code, double pull, std::int64_t width,
               float* out) {
  const DoubleVector factor = broadcast(pull);
  std::int64_t d = 0;
  for (; d + kWide <= width; d += kWide)
    store(out + d, narrow_half(load_wide(gradient + d) + factor * (load_wide(row + d) - load_wide(code + d))));
  for (; d < width; ++d) {
    const double difference = static_cast<double>(row[d]) - static_cast<double>(code[d]);
    out[d] = static_cast<float>(static_cast<double>(gradient[d]) + pull * difference);
  }
}

// total += row
void add_row(const float* row, std::int64_t width, double* total) {
  std::int64_t d = 0;
  for (; d + kWide <= width; d += kWide) store(total + d, load<DoubleVector>(total + d) + load_wide(row + d));
  for (; d < width; ++d) total[d] += static_cast<double>(row[d]);
}

// out[j] = the sum over the dimensions of terms(gradient, row, code)[j], in eight parts each as in squared_distance.
template <int kSums, class T, class Terms>
void sums_of_terms(const T* gradient, const T* row, const T* code, std::int64_t width, const Terms& terms,
                   double* out) {
  DoubleVector parts[kSums][kPieces] = {};
  std::int64_t d = 0;
  for (; d + kGroup <= width; d += kGroup) {
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = d + i * kWide;
      DoubleVector t[kSums];
      terms(load_wide(gradient + at), load_wide(row + at), load_wide(code + at), t);
      for (int j = 0; j < kSums; ++j) parts[j][i] += t[j];
    }
  }
  double all[kSums][kGroup];
  for (int j = 0; j < kSums; ++j)
    for (int i = 0; i < kPieces; ++i) store(all[j] + i * kWide, parts[j][i]);
  for (int i = 0; d < width; ++d, ++i) {
    double t[kSums];
    terms(static_cast<double>(gradient[d]), static_cast<double>(row[d]), static_cast<double>(code[d]), t);
    for (int j = 0; j < kSums; ++j) all[j][i] += t[j];
  }
  for (int j = 0; j < kSums; ++j) {
    out[j] = 0;
    for (double part : all[j]) out[j] += part;
  }
}

// total += scale * (residual - code), and residual -= code
template <class T>
void pull_stage(T* residual, const T* code, double scale, std::int64_t width, double* total) {
  for (std::int64_t d = 0; d < width; ++d) {
    total[d] += scale * (static_cast<double>(residual[d]) - static_cast<double>(code[d]));
    residual[d] -= code[d];
  }
}

// total += the gradient at the code of a residual, turned and scaled back to it (fastvq/nn/rotation.py), and
// residual -= code. With u = residual / |residual|, p = code / |code| and h = u + p the gradient is
// |code| / |residual| (g - 2 h (h.g) / |h|^2 + 2 u (p.g)). Norms below 1e-6 count as 1e-6.
template <class T>
void turn_stage(const T* gradient, T* residual, const T* code, std::int64_t width, double* total) {
  constexpr double kLeast = 1e-6, kCancels = 1e-4;
  const auto at_least = [](double value, double least) { return value < least ? least : value; };
  double products[5], along[2];
  const auto products_of = [](auto g, auto r, auto c, auto* t) {
    t[0] = r * r;
    t[1] = c * c;
    t[2] = r * c;
    t[3] = r * g;
    t[4] = c * g;
  };
  sums_of_terms<5>(gradient, residual, code, width, products_of, products);
  const double row_norm = at_least(__builtin_sqrt(products[0]), kLeast), code_norm = __builtin_sqrt(products[1]);
  const double scale = code_norm / row_norm, to_u = 1 / row_norm, to_p = 1 / at_least(code_norm, kLeast);
  along[0] = products[0] * to_u * to_u + 2 * products[2] * to_u * to_p + products[1] * to_p * to_p;
  along[1] = products[3] * to_u + products[4] * to_p;
  if (along[0] < kCancels) {  // u is nearly -p
    const auto along_h = [=](auto g, auto r, auto c, auto* t) {
      const auto h = r * to_u + c * to_p;
      t[0] = h * h;
      t[1] = h * g;
    };
    sums_of_terms<2>(gradient, residual, code, width, along_h, along);
  }
  const double of_h = -2 * scale * along[1] / at_least(along[0], kLeast * kLeast);
  const double of_u = 2 * scale * products[4] * to_p;
  for (std::int64_t d = 0; d < width; ++d) {
    const double u = static_cast<double>(residual[d]) * to_u, p = static_cast<double>(code[d]) * to_p;
    total[d] += static_cast<double>(gradient[d]) * scale + of_h * (u + p) + of_u * u;
    residual[d] -= code[d];
  }
}

}  // namespace
}  // namespace fastvq
