// Rows taken in blocks: a block is loaded, transposed and searched while it is in cache.

#pragma once

#include <algorithm>
#include <memory>

#include "codebook_cache.h"
#include "few_rows.h"
#include "row_kernel.h"
#include "tensor.h"

namespace fastvq {

constexpr std::int64_t kTaskRows = 32;  // rows a thread takes at a time; partial sums are a task's, so they do not
                                        // depend on the number of threads

inline std::int64_t row_tasks(std::int64_t rows) {
  return (rows + kTaskRows - 1) / kTaskRows;
}

// Memory for vectors.
struct AlignedFree {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using AlignedBuffer = std::unique_ptr<T[], AlignedFree>;
template <class T>
AlignedBuffer<T> aligned_buffer(std::int64_t count) {
  return AlignedBuffer<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
}

// Whether a block of float32 rows lies side by side, as in an image (B, D, height, width).
inline bool side_by_side(const Rows& x, std::int64_t first, int count) {
  for (int l = 1; l < count; ++l)
    if (x.offset(first + l) != x.offset(first) + l) return false;
  return true;
}

// Blocks of float32 rows as D floats each: where they lie, if they do so, else in a copy.
class FloatRows {
 public:
  FloatRows(const RowKernel& kernel, const Rows& x)
      : kernel_(kernel), x_(x), copy_(aligned_buffer<float>(x.step == 1 ? 0 : x.width * kernel.lanes)) {}

  const float* const* load(std::int64_t first, int count) {
    for (int l = 0; l < count; ++l) rows_[l] = x_.row<float>(first + l);
    if (x_.step == 1) return rows_;
    if (count == kernel_.lanes && side_by_side(x_, first, count)) {
      kernel_.untranspose(rows_[0], x_.step, x_.width, copy_.get());
    } else {
      for (int l = 0; l < count; ++l)
        for (std::int64_t d = 0; d < x_.width; ++d) copy_[l * x_.width + d] = rows_[l][d * x_.step];
    }
    for (int l = 0; l < count; ++l) rows_[l] = copy_.get() + l * x_.width;
    return rows_;
  }

 private:
  const RowKernel& kernel_;
  const Rows& x_;
  AlignedBuffer<float> copy_;
  const float* rows_[kMaxLanes];
};

// A row as D numbers in float or double: where it lies, if it does so, else in `copy`.
template <class Working>
const Working* working_row(const Rows& x, std::int64_t n, Working* copy) {
  constexpr DType kDType = std::is_same_v<Working, double> ? DType::kFloat64 : DType::kFloat32;
  if (x.dtype == kDType && x.step == 1) return x.row<Working>(n);
  dispatch(x.dtype, [&](auto* type) {
    const auto* row = x.row<std::remove_pointer_t<decltype(type)>>(n);
    for (std::int64_t d = 0; d < x.width; ++d) copy[d] = static_cast<Working>(widen(row[d * x.step]));
  });
  return copy;
}

// Blocks of rows of any dtype, each as D numbers in float or double.
template <class Working>
class WorkingRows {
 public:
  WorkingRows(const RowKernel& kernel, const Rows& x)
      : x_(x),
        as_floats_(std::is_same_v<Working, float> && x.dtype == DType::kFloat32),
        floats_(kernel, x),
        copy_(aligned_buffer<Working>(as_floats_ ? 0 : x.width * kernel.lanes)) {}

  const Working* const* load(std::int64_t first, int count) {
    if constexpr (std::is_same_v<Working, float>)
      if (as_floats_) return floats_.load(first, count);
    for (int l = 0; l < count; ++l) rows_[l] = working_row(x_, first + l, copy_.get() + l * x_.width);
    return rows_;
  }

 private:
  const Rows& x_;
  const bool as_floats_;
  FloatRows floats_;
  AlignedBuffer<Working> copy_;
  const Working* rows_[kMaxLanes];
};

// The scratch of one thread: a block of rows [D][lanes] in X (float or double), and what the kernel needs.
template <class X>
class BlockSearch {
 public:
  BlockSearch(const RowKernel& kernel, std::int64_t width, std::int64_t groups, int threads)
      : kernel_(kernel),
        threads_(threads),
        width_(width),
        rows_(aligned_buffer<X>(width * kernel.lanes)),
        centred_(aligned_buffer<float>(width * kernel.lanes)),
        minima_(aligned_buffer<float>(fours_of(groups) * 4 * kernel.lanes)),
        packed_(aligned_buffer<std::int32_t>(kernel.int8 ? (width + 3) / 4 * kernel.lanes : 0)),
        row_major_(aligned_buffer<float>(width * kernel.lanes)),
        fours_(aligned_buffer<std::int32_t>(fours_of(groups))),
        masks_(aligned_buffer<std::uint64_t>(fours_of(groups))),
        lane_(aligned_buffer<int>(kMaxCandidates)),
        code_(aligned_buffer<std::int64_t>(kMaxCandidates)),
        score_(aligned_buffer<float>(kMaxCandidates)) {}

  int lanes() const { return kernel_.lanes; }
  const X* rows() const { return rows_.get(); }

  // The rows that are loaded, each as D floats.
  const float* const* row_major() {
    static_assert(std::is_same_v<X, float>);
    if (in_place_) return source_;
    kernel_.untranspose(rows_.get(), kernel_.lanes, width_, row_major_.get());
    for (int l = 0; l < kernel_.lanes; ++l) source_[l] = row_major_.get() + l * width_;
    return source_;
  }

  // What becomes of the rows of packed codebooks from now on is added there.
  void count_in(SearchCounts* counts) { counts_ = counts; }

  // Loads rows first .. first+count-1, widened; the lanes past them are zero. Those after them are fetched into the
  // cache meanwhile: sixteen strided streams are more than the hardware foresees.
  void load(const Rows& x, std::int64_t first, int count) {
    dispatch(x.dtype, [&](auto* type) { load_as<std::remove_pointer_t<decltype(type)>>(x, first, count); });
    prefetch(x, first + count);
  }

  // The nearest codes of the rows that are loaded, and their distances if wanted.
  void nearest(const SearchCodes& codes, int count, bool certify, bool want_value, Nearest* found) {
    if constexpr (std::is_same_v<X, float>) {
      if (!codes.packed) return nearest_of_few(row_major(), count, codes.rows, certify, want_value, threads_, found);
    }
    RowBlock block;
    block.is_double = std::is_same_v<X, double>;
    block.rows = rows_.get();
    block.row = in_place_ ? source_ : nullptr;
    block.count = count;
    block.certify = certify;
    block.want_value = want_value;
    BlockScratch scratch;
    scratch.centred = centred_.get();
    scratch.minima = minima_.get();
    scratch.packed = packed_.get();
    scratch.row_major = row_major_.get();
    scratch.fours = fours_.get();
    scratch.masks = masks_.get();
    scratch.lane = lane_.get();
    scratch.code = code_.get();
    scratch.score = score_.get();
    scratch.trial = &trial_;
    scratch.counts = counts_;
    kernel_.nearest(codes.view, block, scratch, found);
  }

 private:
  static std::int64_t fours_of(std::int64_t groups) { return (std::min(groups, kScreenGroups) + 3) / 4; }

  // Inlined by order: gcc takes a function that only prefetches for one without effect and drops the call.
  __attribute__((always_inline)) void prefetch(const Rows& x, std::int64_t first) const {
    const std::int64_t size = element_bytes(x.dtype), last = std::min(x.count, first + kernel_.lanes) - 1;
    const auto at = [&](std::int64_t n) { return static_cast<const char*>(x.data) + x.offset(n) * size; };
    if (x.step == 1) {
      for (std::int64_t n = first; n <= last; ++n)
        for (const char *line = at(n), *end = line + width_ * size; line < end; line += 64)
          __builtin_prefetch(line, 0, 2);
    } else if (first <= last && at(last) - at(first) == (last - first) * size) {  // side by side
      for (std::int64_t d = 0; d < width_; ++d) __builtin_prefetch(at(first) + d * x.step * size, 0, 2);
    }
  }

  template <class Stored>
  void load_as(const Rows& x, std::int64_t first, int count) {
    const int lanes = kernel_.lanes;
    const Stored* source[kMaxLanes];
    for (int l = 0; l < count; ++l) source[l] = x.row<Stored>(first + l);
    X* out = rows_.get();
    in_place_ = std::is_same_v<Stored, float> && std::is_same_v<X, float> && x.step == 1;
    if constexpr (std::is_same_v<Stored, float> && std::is_same_v<X, float>) {
      std::copy(source, source + count, source_);
      if (count == lanes && x.step == 1) return kernel_.load_rows(source, width_, out);
    }
    bool adjacent = count == lanes;  // as in an image (B, D, height, width), where a block of rows lies side by side
    for (int l = 1; l < count; ++l) adjacent = adjacent && source[l] == source[0] + l;
    if (adjacent) {
      for (std::int64_t d = 0; d < width_; ++d, out += lanes) {
        const Stored* column = source[0] + d * x.step;
        for (int l = 0; l < lanes; ++l) out[l] = static_cast<X>(widen(column[l]));
      }
      return;
    }
    for (std::int64_t d = 0; d < width_; ++d, out += lanes) {
      for (int l = 0; l < count; ++l) out[l] = static_cast<X>(widen(source[l][d * x.step]));
      for (int l = count; l < lanes; ++l) out[l] = 0;
    }
  }

  const RowKernel& kernel_;
  const int threads_;
  const std::int64_t width_;
  AlignedBuffer<X> rows_;
  AlignedBuffer<float> centred_;
  AlignedBuffer<float> minima_;
  AlignedBuffer<std::int32_t> packed_;
  AlignedBuffer<float> row_major_;
  AlignedBuffer<std::int32_t> fours_;
  AlignedBuffer<std::uint64_t> masks_;
  AlignedBuffer<int> lane_;
  AlignedBuffer<std::int64_t> code_;
  AlignedBuffer<float> score_;
  const float* source_[kMaxLanes];  // where the rows that are loaded lie, if they do as D floats each
  bool in_place_ = false;
  Int8Trial trial_;
  SearchCounts* counts_ = nullptr;
};

// Calls f with a null float or double pointer: what rows are widened to.
template <class F>
void dispatch_working(bool is_double, F&& f) {
  if (is_double) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

// Calls body(first, count) for each block of a task.
template <class Body>
void for_each_block(std::int64_t task, std::int64_t rows, int lanes, const Body& body) {
  const std::int64_t end = std::min(rows, (task + 1) * kTaskRows);
  for (std::int64_t first = task * kTaskRows; first < end; first += lanes) {
    body(first, static_cast<int>(std::min<std::int64_t>(lanes, end - first)));
  }
}

// sum of (x_i - c_i)^2 in float64, for a row that lies with stride `stride` and a code as it is stored. Eight partial
// sums, whatever the instruction set, so that the result is the same everywhere.
template <class X, class Code>
double squared_distance(const X* row, std::int64_t stride, const Code* code, std::int64_t step, std::int64_t width) {
  constexpr int kParts = 8;
  double parts[kParts] = {};
  const auto difference = [&](std::int64_t d) {
    return static_cast<double>(row[d * stride]) - static_cast<double>(widen(code[d * step]));
  };
  std::int64_t d = 0;
  for (; d + kParts <= width; d += kParts)
    for (int i = 0; i < kParts; ++i) parts[i] += difference(d + i) * difference(d + i);
  for (int i = 0; d < width; ++d, ++i) parts[i] += difference(d) * difference(d);
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

}  // namespace fastvq
