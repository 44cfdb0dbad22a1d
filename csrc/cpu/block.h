// Rows taken in blocks: a block is loaded, transposed and searched while it is in cache.

#pragma once

#include <algorithm>

#include "codebook_cache.h"
#include "few_rows.h"
#include "memory.h"
#include "row_kernel.h"
#include "tensor.h"

namespace fastvq {

constexpr std::int64_t kTaskRows = 32;  // rows a thread takes at a time; partial sums are a task's, so they do not
                                        // depend on the number of threads

inline std::int64_t row_tasks(std::int64_t rows) {
  return (rows + kTaskRows - 1) / kTaskRows;
}

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

// Blocks of rows as D values of X each (float or double): where they lie, if they do so, else in a copy.
template <class X>
class RowBlocks {
 public:
  RowBlocks(const RowKernel& kernel, const Rows& x)
      : kernel_(kernel), x_(x), in_place_(is_stored_as(x.dtype) && x.step == 1) {
    if (in_place_) return;
    copy_ = Buffer<X>(x.width * kernel.lanes);
    if (x.step != 1) columns_ = Buffer<float>(x.width * kernel.lanes);
  }

  int lanes() const { return kernel_.lanes; }
  const Rows& rows() const { return x_; }

  // Rows first .. first+count-1; the lanes past them repeat the first. Those after them are next() or, where they do
  // not lie in one piece, are asked for now: sixteen strided streams are more than the hardware foresees.
  const X* const* load(std::int64_t first, int count) {
    if (in_place_) {
      x_.rows_from(first, count, row_);
    } else {
      for (int l = 0; l < count; ++l) row_[l] = copy_.get() + l * x_.width;
      dispatch(x_.dtype, [&](auto* type) { copy<std::remove_pointer_t<decltype(type)>>(first, count); });
    }
    for (int l = count; l < kernel_.lanes; ++l) row_[l] = row_[0];
    look_ahead(first + count);
    return row_;
  }

  const Span& next() const { return next_; }

 private:
  static bool is_stored_as(DType dtype) { return dtype == (sizeof(X) == 8 ? DType::kFloat64 : DType::kFloat32); }

  template <class Stored>
  void copy(std::int64_t first, int count) {
    const std::int64_t width = x_.width, step = x_.step;
    if constexpr (std::is_same_v<X, float>) {
      if (step != 1 && count == kernel_.lanes && side_by_side(first, count)) return copy_columns<Stored>(first);
    }
    for (int l = 0; l < count; ++l) {
      const Stored* row = x_.row<Stored>(first + l);
      X* out = copy_.get() + l * width;
      if (step == 1) {  // known to the compiler: vectorised
        for (std::int64_t d = 0; d < width; ++d) out[d] = static_cast<X>(widen(row[d]));
      } else {
        for (std::int64_t d = 0; d < width; ++d) out[d] = static_cast<X>(widen(row[d * step]));
      }
    }
  }

  // Whether rows lie side by side, as in an image (B, D, height, width).
  bool side_by_side(std::int64_t first, int count) const {
    for (int l = 1; l < count; ++l)
      if (x_.offset(first + l) != x_.offset(first) + l) return false;
    return true;
  }

  template <class Stored>
  void copy_columns(std::int64_t first) {
    const Stored* source = x_.row<Stored>(first);
    if constexpr (std::is_same_v<Stored, float>) {
      return kernel_.untranspose(source, x_.step, x_.width, copy_.get());
    }
    for (std::int64_t d = 0; d < x_.width; ++d)
      for (int l = 0; l < kernel_.lanes; ++l)
        columns_[d * kernel_.lanes + l] = static_cast<float>(widen(source[d * x_.step + l]));
    kernel_.untranspose(columns_.get(), kernel_.lanes, x_.width, copy_.get());
  }

  void look_ahead(std::int64_t first) {
    const std::int64_t size = element_bytes(x_.dtype), last = std::min(x_.count, first + kernel_.lanes) - 1;
    const auto at = [&](std::int64_t n) { return static_cast<const char*>(x_.data) + x_.offset(n) * size; };
    if (x_.step == 1 && x_.dims == 1 && x_.strides[0] == x_.width) {
      next_ = first <= last ? Span{at(first), at(last) + x_.width * size} : Span{};
    } else if (x_.step == 1) {
      for (std::int64_t n = first; n <= last; ++n)
        for (const char *line = at(n), *end = line + x_.width * size; line < end; line += 64)
          __builtin_prefetch(line, 0, 2);
    } else if (first <= last && at(last) - at(first) == (last - first) * size) {  // side by side
      for (std::int64_t d = 0; d < x_.width; ++d) __builtin_prefetch(at(first) + d * x_.step * size, 0, 2);
    }
  }

  const RowKernel& kernel_;
  const Rows& x_;
  const bool in_place_;
  Buffer<X> copy_;
  Buffer<float> columns_;
  const X* row_[kMaxLanes];
  Span next_;
};

// Searches blocks of rows of X, float or double: the scratch of one thread.
template <class X>
class BlockSearch {
 public:
  BlockSearch(const RowKernel& kernel, std::int64_t width, std::int64_t groups, int threads)
      : kernel_(kernel), threads_(threads) {
    const std::int64_t lanes = kernel.lanes, fours = (std::min(groups, kScreenGroups) + 3) / 4;
    const bool floats = std::is_same_v<X, float>, int8 = floats && kernel.int8;
    const std::int64_t block = floats ? (width + lanes - 1) / lanes * lanes * lanes : 0;
    centred_ = Buffer<float>(block);
    columns_ = Buffer<float>(block);
    minima_ = Buffer<float>(fours * 4 * lanes);
    fours_ = Buffer<std::int32_t>(int8 ? (fours + 15) / 16 * 16 * lanes : 0);
    bytes_ = Buffer<std::int8_t>(int8 ? (width + 63) / 64 * 64 * lanes : 0);
    packed_ = Buffer<std::int32_t>(int8 ? (width + 3) / 4 * lanes : 0);
    lane_ = Buffer<int>(kMaxCandidates);
    code_ = Buffer<std::int64_t>(kMaxCandidates);
    score_ = Buffer<float>(kMaxCandidates);
  }

  // What becomes of the rows of packed codebooks from now on is added there.
  void count_in(SearchCounts* counts) { counts_ = counts; }

  // The nearest codes of a block of rows, as RowBlocks loads them, and their distances if wanted. Meanwhile the next
  // rows and the output are fetched, and some of the twins compared.
  void nearest(const SearchCodes& codes, const X* const* row, int count, bool certify, bool want_value,
               const Span& next, const Span& output, Nearest* found, Twins* twins = nullptr) {
    if constexpr (std::is_same_v<X, float>) {
      if (!codes.packed) return nearest_of_few(row, count, codes.rows, certify, want_value, threads_, found);
    }
    RowBlock block;
    block.is_double = std::is_same_v<X, double>;
    block.row = reinterpret_cast<const void* const*>(row);
    block.count = count;
    block.certify = certify;
    block.want_value = want_value;
    block.next = next;
    block.output = output;
    block.twins = twins;
    BlockScratch scratch;
    scratch.centred = centred_.get();
    scratch.columns = columns_.get();
    scratch.minima = minima_.get();
    scratch.fours = fours_.get();
    scratch.bytes = bytes_.get();
    scratch.packed = packed_.get();
    scratch.lane = lane_.get();
    scratch.code = code_.get();
    scratch.score = score_.get();
    scratch.trial = &trial_;
    scratch.counts = counts_;
    if (kernel_.nearest(codes.view, block, scratch, found)) return;
    if (twins) {  // of codes that are only likely nothing more is made
      twins->same = false;
      return;
    }
    kernel_.nearest(codes.packed->with_screen(codes.view), block, scratch, found);
  }

 private:
  const RowKernel& kernel_;
  const int threads_;
  Buffer<float> centred_;
  Buffer<float> columns_;
  Buffer<float> minima_;
  Buffer<std::int32_t> fours_;
  Buffer<std::int8_t> bytes_;
  Buffer<std::int32_t> packed_;
  Buffer<int> lane_;
  Buffer<std::int64_t> code_;
  Buffer<float> score_;
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
