// The rows of each code, in row order: what counts, sums and codebook gradients are made of.

#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "tensor.h"

namespace fastvq {

// Rows sorted by their code, the order of the rows kept (a counting sort).
class RowsByCode {
 public:
  // Rows with a negative index or a false mask are left out; throws std::invalid_argument for an index past `codes`.
  RowsByCode(const std::int64_t* indices, const std::uint8_t* mask, std::int64_t rows, std::int64_t codes, int threads);

  std::int64_t count(std::int64_t code) const { return starts_[code + 1] - starts_[code]; }
  const std::int64_t* begin(std::int64_t code) const { return order_.get() + starts_[code]; }
  const std::int64_t* end(std::int64_t code) const { return order_.get() + starts_[code + 1]; }
  const std::int64_t* last() const { return order_.get() + starts_.back(); }  // past the last row of the last code

  // Calls body(code) for every code, a share of about equally many rows a thread at a time.
  template <class MakeBody>
  void for_each_code(int threads, const MakeBody& make_body) const {
    const std::int64_t codes = static_cast<std::int64_t>(starts_.size()) - 1;
    const std::int64_t share = std::max<std::int64_t>(256, (starts_.back() + codes) / (8 * threads));
    std::vector<std::int64_t> bounds{0};
    for (std::int64_t k = 0, work = 0; k < codes; ++k) {
      work += count(k) + 1;
      if (work >= share || k + 1 == codes) {
        bounds.push_back(k + 1);
        work = 0;
      }
    }
    parallel(static_cast<std::int64_t>(bounds.size()) - 1, threads, [&](Tasks& tasks) {
      auto body = make_body();
      for (std::int64_t task; tasks.next(&task);)
        for (std::int64_t k = bounds[task]; k < bounds[task + 1]; ++k) body(k);
    });
  }

 private:
  std::vector<std::int64_t> starts_;  // K + 1
  Buffer<std::int64_t> order_;
};

// out[k] (K, D) = factor * the sum over the rows of code k of (row - code), in float64 and row order.
template <class Code>
void sum_differences(const Rows& rows, const Rows& codes, const std::int64_t* indices, const std::uint8_t* mask,
                     double factor, Code* out, int threads) {
  if (factor == 0) {
    std::fill_n(reinterpret_cast<char*>(out), codes.count * codes.width * sizeof(Code), 0);
    return;
  }
  const RowsByCode by_code(indices, mask, rows.count, codes.count, threads);
  dispatch(rows.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    by_code.for_each_code(threads, [&] {
      return [&, total = std::vector<double>(rows.width)](std::int64_t k) mutable {
        std::fill(total.begin(), total.end(), 0.0);
        const Code* code = codes.row<Code>(k);
        for (const std::int64_t* n = by_code.begin(k); n != by_code.end(k); ++n) {
          const X* row = rows.row<X>(*n);
          for (std::int64_t d = 0; d < rows.width; ++d)
            total[d] += static_cast<double>(widen(row[d * rows.step])) - widen(code[d * codes.step]);
        }
        for (std::int64_t d = 0; d < rows.width; ++d) out[k * rows.width + d] = narrow<Code>(factor * total[d]);
      };
    });
  });
}

}  // namespace fastvq
