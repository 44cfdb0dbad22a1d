// The loops of the layer round the search, over float32 rows of D floats each: part of row_kernel_impl.h. All work in
// float64, each operation rounded on its own, in an order that no instruction set changes.

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

// out = gradient + pull * (row - code)
void pull_rows(const float* gradient, const float* row, const float* code, double pull, std::int64_t width,
               float* out) {
  for (std::int64_t d = 0; d < width; ++d) {
    const double difference = static_cast<double>(row[d]) - static_cast<double>(code[d]);
    out[d] = static_cast<float>(static_cast<double>(gradient[d]) + pull * difference);
  }
}

// total += row
void add_row(const float* row, std::int64_t width, double* total) {
  for (std::int64_t d = 0; d < width; ++d) total[d] += static_cast<double>(row[d]);
}

}  // namespace
}  // namespace fastvq
