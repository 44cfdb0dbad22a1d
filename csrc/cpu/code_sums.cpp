#include "code_sums.h"

#include <stdexcept>
#include <string>

#include "block.h"
#include "operators.h"
#include "row_kernel.h"

namespace fastvq {

RowsByCode::RowsByCode(const std::int64_t* indices, const std::uint8_t* mask, std::int64_t rows, std::int64_t codes,
                       int threads)
    : starts_(codes + 1, 0) {
  // Each part of the rows counts by itself, and then knows where its rows of each code begin.
  constexpr std::int64_t kPartRows = 4096;
  const std::int64_t parts = std::clamp<std::int64_t>(rows / std::max(kPartRows, codes), 1, threads);
  std::vector<std::int64_t> next(parts * codes, 0);
  const auto for_each_row = [&](const auto& body) {
    parallel(parts, threads, [&](Tasks& tasks) {
      for (std::int64_t part; tasks.next(&part);) {
        const std::int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
        std::int64_t* const of_code = next.data() + part * codes;
        for (std::int64_t n = first; n < last; ++n) {
          const std::int64_t k = indices[n];
          if (k >= codes) {
            throw std::invalid_argument("indices must be below codebook_size = " + std::to_string(codes) + "; got " +
                                        std::to_string(k));
          }
          if (k >= 0 && (!mask || mask[n])) body(n, &of_code[k]);
        }
      }
    });
  };
  for_each_row([](std::int64_t, std::int64_t* count) { ++*count; });
  std::int64_t start = 0;
  for (std::int64_t k = 0; k < codes; ++k) {
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t count = next[part * codes + k];
      next[part * codes + k] = start;
      start += count;
    }
    starts_[k + 1] = start;
  }
  order_ = Buffer<std::int64_t>(start);
  std::int64_t* const order = order_.get();
  for_each_row([order](std::int64_t n, std::int64_t* place) { order[(*place)++] = n; });
}

namespace {

// Rounds `count` totals to sums; returns whether all are finite.
template <class Sum>
bool round_totals(const double* total, std::int64_t count, std::int64_t step, Sum* sums) {
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    sums[i * step] = static_cast<Sum>(total[i]);
    finite &= total[i] - total[i] == 0;
  }
  return finite;
}

// Rows that lie one after another: each code gathers its rows, which are asked for many rows ahead, since the
// first-level cache alone waits for too few lines at a time. Returns whether all sums are finite.
template <class X, class Sum>
bool sums_by_code(const Rows& x, const RowsByCode& by_code, Sum* sums, int threads) {
  constexpr std::int64_t kAhead = 32;
  const std::int64_t bytes = std::min<std::int64_t>(x.width * sizeof(X), 1024);
  std::atomic<bool> finite{true};
  by_code.for_each_code(threads, [&] {
    return [&, total = std::vector<double>(x.width)](std::int64_t k) mutable {
      std::fill(total.begin(), total.end(), 0.0);
      for (const std::int64_t* n = by_code.begin(k); n != by_code.end(k); ++n) {
        const X* row = x.row<X>(*n);
        if (n + kAhead < by_code.last()) {
          const char* later = reinterpret_cast<const char*>(x.row<X>(n[kAhead]));
          for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(later + b, 0, 2);
        }
        if constexpr (std::is_same_v<X, float>) {
          row_kernel().add_row(row, x.width, total.data());
        } else {
          for (std::int64_t d = 0; d < x.width; ++d) total[d] += widen(row[d]);
        }
      }
      if (!round_totals(total.data(), x.width, 1, sums + k * x.width)) finite = false;
    };
  });
  return finite;
}

// Rows that lie side by side, as in an image (B, D, height, width): each dimension is read through once. The order of
// the rows of a code, and so the sum, is the same.
template <class X, class Sum>
bool sums_by_dimension(const Rows& x, const RowsByCode& by_code, std::int64_t codes, Sum* sums, int threads) {
  std::vector<std::int64_t> offsets(x.count, -1), owners(x.count, -1);
  for (std::int64_t k = 0; k < codes; ++k)
    for (const std::int64_t* n = by_code.begin(k); n != by_code.end(k); ++n) owners[*n] = k;
  std::int64_t kept = 0;
  for (std::int64_t n = 0; n < x.count; ++n) {
    if (owners[n] < 0) continue;
    offsets[kept] = x.offset(n);
    owners[kept++] = owners[n];
  }
  std::atomic<bool> finite{true};
  parallel(x.width, threads, [&](Tasks& tasks) {
    std::vector<double> total(codes);
    for (std::int64_t d; tasks.next(&d);) {
      std::fill(total.begin(), total.end(), 0.0);
      const X* column = static_cast<const X*>(x.data) + d * x.step;
      for (std::int64_t i = 0; i < kept; ++i) total[owners[i]] += widen(column[offsets[i]]);
      if (!round_totals(total.data(), codes, x.width, sums + d)) finite = false;
    }
  });
  return finite;
}

// Which rows that the mask keeps are finite.
template <class X>
std::vector<std::uint8_t> finite_rows(const Rows& x, const std::uint8_t* mask, int threads) {
  std::vector<std::uint8_t> finite(x.count);
  parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
    for (std::int64_t task; tasks.next(&task);) {
      for_each_block(task, x.count, 1, [&](std::int64_t n, int) {
        const X* row = x.row<X>(n);
        bool is_finite = !mask || mask[n];
        for (std::int64_t d = 0; d < x.width; ++d) {
          const auto value = widen(row[d * x.step]);
          is_finite &= value - value == 0;
        }
        finite[n] = is_finite;
      });
    }
  });
  return finite;
}

}  // namespace

void code_sums(const Tensor& x, bool heads, const std::int64_t* indices, const std::uint8_t* mask, bool finite_alone,
               const Tensor& counts, void* sums, int threads) {
  const std::int64_t codes = counts.sizes[counts.dims - 1];
  const std::int64_t head_count = heads ? x.sizes[0] : 1;
  for (std::int64_t h = 0; h < head_count; ++h) {
    const Rows rows = (heads ? x.select(0, h) : x).rows();
    const std::int64_t first = h * rows.count;
    const std::uint8_t* const head_mask = mask ? mask + first : nullptr;
    dispatch(x.dtype, [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      using Sum = std::conditional_t<std::is_same_v<X, double>, double, float>;
      Sum* head_counts = static_cast<Sum*>(counts.data) + h * codes;
      Sum* head_sums = static_cast<Sum*>(sums) + h * codes * rows.width;
      const auto sum_up = [&](const std::uint8_t* kept) {
        const RowsByCode by_code(indices + first, kept, rows.count, codes, threads);
        for (std::int64_t k = 0; k < codes; ++k) head_counts[k] = static_cast<Sum>(by_code.count(k));
        return rows.step == 1 ? sums_by_code<X, Sum>(rows, by_code, head_sums, threads)
                              : sums_by_dimension<X, Sum>(rows, by_code, codes, head_sums, threads);
      };
      // A row that is not finite shows in its sum: where there is none, no pass is spent on looking for it.
      if (!sum_up(head_mask) && finite_alone) sum_up(finite_rows<X>(rows, head_mask, threads).data());
    });
  }
}

}  // namespace fastvq
