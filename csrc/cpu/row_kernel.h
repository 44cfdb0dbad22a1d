// The search of one block of rows, compiled once for each instruction set and chosen at run time.

#pragma once

#include <cstdint>

#include "codebook.h"

namespace fastvq {

constexpr int kMaxLanes = 16;                 // the widest block of rows of any instruction set
constexpr std::int64_t kScreenGroups = 2048;  // groups screened before candidates are taken: bounds the scratch
constexpr int kMaxCandidates = 1024;          // (row, code) pairs of a block that are kept with their float32 scores

constexpr int kMaxKernels = 5;

// Memory in one piece.
struct Span {
  const char* begin = nullptr;
  const char* end = nullptr;
};

// Two pieces of memory, and whether they are the same as far as they have been compared. They are while codes are
// screened, whose arithmetic leaves room for reading.
struct Twins {
  const char* one = nullptr;
  const char* other = nullptr;
  std::int64_t bytes = 0;  // left to be compared
  bool same = true;
};

struct RowBlock {
  bool is_double = false;            // what `row` points to: double or float
  const void* const* row = nullptr;  // [lanes], each D values; those past `count` are copies of the first
  int count = 0;                     // rows that are there
  bool certify = true;               // false: the best screened code is taken as it is (precision="fast")
  bool want_value = false;           // fill Nearest::value
  Span next;                         // what is read when this block is done, or nothing
  Span output;                       // what is written then
  Twins* twins = nullptr;            // what is compared by the way, all of it or some
};

// When int8 screening leaves too many candidates, the next blocks are spared the attempt, and more after each failure.
struct Int8Trial {
  int skip = 0;     // blocks still to be screened in float32
  int penalty = 0;  // how many blocks the next failure skips
};

// What became of rows that were searched.
struct SearchCounts {
  std::int64_t rows = 0;
  std::int64_t open = 0;   // for which the screen left more than one code
  std::int64_t exact = 0;  // decided in float64
};

// One a thread; pointers are aligned to 64 bytes.
struct BlockScratch {
  float* centred = nullptr;        // [lanes][D up to a multiple of lanes], x~ where it is not x
  float* columns = nullptr;        // [D][lanes], x~ for the screen in float32; as `centred`, x~ transformed for int8
  void* minima = nullptr;          // [min(groups, kScreenGroups), up to a multiple of 4][lanes], of float or int32
  std::int32_t* fours = nullptr;   // [as many fours of groups, up to a multiple of 16][lanes]; null without int8
  std::int8_t* bytes = nullptr;    // [lanes][D up to a multiple of 64]; null without int8 screening
  std::int32_t* packed = nullptr;  // [ceil(D / 4)][lanes], four int8 each; null without int8 screening
  int* lane = nullptr;             // [kMaxCandidates]
  std::int64_t* code = nullptr;    // [kMaxCandidates]
  float* score = nullptr;          // [kMaxCandidates]
  Int8Trial* trial = nullptr;
  SearchCounts* counts = nullptr;  // null unless somebody asks
};

struct Nearest {
  std::int64_t index[kMaxLanes];
  double value[kMaxLanes];  // squared distance, or dot product
};

// What centring and scaling are decided by, gathered group after group; `sums` is [D][8], of the codes that are finite.
// A cache line each, for threads write to neighbours.
struct alignas(64) CodeStatistics {
  float* sums;
  double squares;
  float largest;
  std::int64_t finite;
};

// What the bounds need to know of the codes as they are screened: maxima over the codes. A cache line each.
struct alignas(64) CodeExtremes {
  double norm;           // |c~|^2
  double residual;       // |(c - m) S - c~|^2
  float largest;         // |c~_i|
  double int8_residual;  // |c~ - s_c q|^2
  double bias_error, bias_high, bias_low;
};

// Loops over a residual of D numbers and its code, which leave the next residual behind.
template <class T>
struct StageLoops {
  void (*pull)(T* residual, const T* code, double scale, std::int64_t width, double* total);
  void (*turn)(const T* gradient, T* residual, const T* code, std::int64_t width, double* total);
};

struct RowKernel {
  const char* name;
  int lanes;  // rows in a block
  bool int8;  // screens int8 codebooks
  // False, and nothing found, where it takes CodebookView::screen, which is null.
  bool (*nearest)(const CodebookView&, const RowBlock&, const BlockScratch&, Nearest*);

  // out [lanes][D] = the transpose of D columns of `lanes` floats that lie `stride` apart.
  void (*untranspose)(const float* columns, std::int64_t stride, std::int64_t width, float* out);

  // The packing of one group: `codes` is [D][8], and 8 rows of D contiguous floats for load_codes.
  void (*load_codes)(const float* const* rows, std::int64_t width, float* codes);
  // bias [8] becomes 0 for the codes that are finite, among the first `count`, and infinite for the others; hashes [8]
  // are equal for equal codes.
  void (*measure)(const float* codes, std::int64_t width, int count, float* bias, std::uint32_t* hashes,
                  CodeStatistics* statistics);
  // screened (or null, where it would equal `codes`; or `codes`) = float32((codes - mean) scale), and bias = |c~|^2
  // / 2.
  void (*screen)(const float* codes, const CodebookView&, float* bias, float* screened, CodeExtremes* extremes);
  // screened once more, zeros where the bias is infinite.
  void (*move)(const float* codes, const CodebookView&, const float* bias, float* screened);
  // out [D][8] = the Hadamard transform of `block` dimensions at a time; returns the largest magnitude.
  float (*transform)(const float* screened, std::int64_t width, std::int64_t block, float* out);
  // The int8 form of screened codes, transformed or not; see CodebookView.
  void (*quantise)(const float* screened, const float* bias, std::int64_t width, float scale, std::int8_t* out,
                   std::int32_t* start, std::int32_t* whole_start, std::int32_t* bias_pairs, CodeExtremes* extremes);

  // distances [count] = |row - code|^2 in float32, of codes of D floats that lie `stride` apart; returns the smallest.
  float (*scan)(const float* codes, std::int64_t stride, std::int64_t count, std::int64_t width, const float* row,
                float* distances);

  // Loops of the layer over rows of D floats each, in float64; see layer_impl.h.
  double (*squared_distance)(const float* row, const float* code, std::int64_t width);
  double (*copy_code)(const float* row, const float* code, std::int64_t width, float* out);
  void (*pull)(const float* gradient, const float* row, const float* code, double pull, std::int64_t width, float* out);
  void (*add_row)(const float* row, std::int64_t width, double* total);
  StageLoops<float> stage;
  StageLoops<double> stage_double;
};

// The kernel in use: the best this machine has, or the one that FASTVQ_CPU_ISA names.
// Throws std::invalid_argument when that names one that is not there.
const RowKernel& row_kernel();

// The names of the kernels that were compiled and run here, the best last.
int available_row_kernels(const RowKernel* out[kMaxKernels]);

}  // namespace fastvq
