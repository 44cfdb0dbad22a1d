// A codebook packed for the kernels: groups of eight codes side by side, as they are and as they are screened.

#pragma once

#include <cstdint>
#include <memory>

#include "tensor.h"

namespace fastvq {

constexpr int kGroup = 8;  // codes in a group: the unit of screening and of the exact re-score

enum class Metric : int { kEuclidean = 0, kDot = 1 };  // the codes of a cosine search are normalised: it is a dot

// What the kernels read; plain data, owned by PackedCodebook. docs/certified-search.md names the quantities.
struct CodebookView {
  std::int64_t size = 0;    // K
  std::int64_t width = 0;   // D
  std::int64_t groups = 0;  // ceil(K / 8)
  Metric metric = Metric::kEuclidean;

  bool is_double = false;         // what `exact` points to: double or float
  const void* exact = nullptr;    // [groups][D][8], the codes as stored
  const float* screen = nullptr;  // [groups][D][8], c~: centred and scaled; null where screening is impossible
  const float* bias = nullptr;    // [groups][8], |c~|^2 / 2 or 0; +inf where no code can win
  const float* mean = nullptr;    // [D], m, or null when the codes are not centred

  double scale = 1;        // S, a power of two
  double screen_norm = 0;  // C, at least max |c~|
  double residual = 0;     // E, at least max |(c - m) S - c~|
};

class PackedCodebook {
 public:
  // codes: (K, D). Without `screened` only the exact copy is made, for rows that are float64.
  PackedCodebook(const Rows& codes, Metric metric, bool screened, int threads);

  const CodebookView& view() const { return view_; }

 private:
  template <class T>
  void copy_exact(const Rows& codes, T* exact, int threads) const;
  void prepare_screen(int threads);

  CodebookView view_;
  std::unique_ptr<float[]> exact_float_;
  std::unique_ptr<double[]> exact_double_;
  std::unique_ptr<float[]> screen_;
  std::unique_ptr<float[]> bias_;
  std::unique_ptr<float[]> mean_;
};

}  // namespace fastvq
