// A codebook packed for the kernels: groups of eight codes side by side, as they are screened, or as they are where
// they are not.

#pragma once

#include <atomic>
#include <cstdint>

#include "memory.h"
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
  const void* exact = nullptr;    // [groups][D][8], the codes as stored; only where they are not screened
  const float* bias = nullptr;    // [groups][8], |c~|^2 / 2 or 0; +inf where no code can win; null without screening
  const float* screen = nullptr;  // [groups][D][8], c~: centred and scaled; with int8_codes null until somebody asks
  const float* rows = nullptr;    // the codes that are screened as stored, code k at rows + k * row_stride
  std::int64_t row_stride = 0;
  const float* mean = nullptr;  // [D], m, or null when the codes are not centred

  // The codes once more in int8, or null. docs/certified-search.md, "Screening in int8".
  const std::int8_t* int8_codes = nullptr;   // [groups][ceil(D / 4)][8][4]
  const std::int32_t* int8_start = nullptr;  // [groups][8], -128 times the sum of a code; very negative to exclude it
  const std::int32_t* int8_whole_start = nullptr;  // the same less |q|^2 / 2
  const std::int32_t* int8_bias = nullptr;         // [groups][8], a pair of int16 (low half a, high half b)
  std::int64_t int8_block = 1;                     // n: so many dimensions at a time go through a Hadamard transform
  float int8_scale = 0;                            // s_c
  float int8_coarser = 0;                          // how much coarser than their own, on average, s_c may be for rows
  float int8_no_bias = 0;                          // up to which s_c / s_x the bias hardly tells codes apart
  double int8_rounding = 0;                        // what the transform rounds, as a share of a vector's length
  double int8_residual = 0;                        // E_8, at least max |e - s_c q|
  double bias_error = 0;                           // max ||q|^2 / 2 - 1024 a - 32 b|
  double bias_high = 0, bias_low = 0;              // max a, max |b|

  double scale = 1;        // S, a power of two
  double screen_norm = 0;  // C, at least max |c~|
  double residual = 0;     // E, at least max |(c - m) S - c~|
};

constexpr std::int32_t kExcluded = -2000000000;  // a start value below every score that can be reached

class PackedCodebook {
 public:
  // codes: (K, D). Without `screened` they are packed as they are, for rows that are float64; with `int8` for int8
  // screening, where their values and D allow it. `copy`, if not null, gets the bytes of the codes row after row.
  PackedCodebook(const Rows& codes, Metric metric, bool screened, bool int8, char* copy, int threads);

  const CodebookView& view() const { return view_; }
  // The view for one call; float32 codes are read from where they lie.
  CodebookView view(const Rows& codes) const;
  // That view with `screen`, which is made by the first thread that asks for it.
  CodebookView with_screen(const CodebookView& view) const;
  std::int64_t bytes() const;

 private:
  template <class T>
  void copy_exact(const Rows& codes, T* exact, char* copy, int threads) const;
  void lay_rows(const Rows& codes, char* copy, int threads);
  void load(const CodebookView& view, std::int64_t group, float* out) const;
  void load_moved(const CodebookView& view, std::int64_t group, float* out) const;
  void prepare_screen(const Rows& codes, bool int8, char* copy, int threads);
  void exclude_copies(const std::uint32_t* hashes);
  void prepare_int8(int threads);
  float choose_block(int threads);
  void make_screen(const CodebookView& view, int threads) const;

  CodebookView view_;
  float screen_largest_ = 0;  // max |c~_i|
  double typical_ = 0;        // the root of the mean of c~_i^2
  bool moved_ = false;        // whether c~ is not c, or 0 where c is not finite
  Buffer<float> exact_float_;
  Buffer<double> exact_double_;
  Buffer<float> rows_;  // where the codes do not lie as float32
  Buffer<float> bias_;
  Buffer<float> mean_;
  Buffer<std::int8_t> int8_codes_;
  Buffer<std::int32_t> int8_start_;
  Buffer<std::int32_t> int8_whole_start_;
  Buffer<std::int32_t> int8_bias_;
  mutable Buffer<float> screen_;
  mutable std::atomic<const float*> screen_made_{nullptr};
  mutable std::atomic<std::int64_t> screen_maker_{0};  // the process whose thread makes it
};

}  // namespace fastvq
