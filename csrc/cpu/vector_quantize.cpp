#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "block.h"
#include "code_counts.h"
#include "code_sums.h"
#include "codebook_cache.h"
#include "operators.h"
#include "parallel.h"

namespace fastvq {
namespace {

// out = the code, in the dtype of x; returns |row - code|^2.
template <class Working, class X, class Code>
double copy_code(const RowKernel& kernel, const Working* row, const Code* code, std::int64_t step, std::int64_t width,
                 X* out) {
  if constexpr (std::is_same_v<X, float> && std::is_same_v<Code, float>) {
    if (step == 1) return kernel.copy_code(row, code, width, out);
  }
  for (std::int64_t d = 0; d < width; ++d) out[d] = narrow<X>(widen(code[d * step]));
  return squared_distance(row, 1, code, step, width);
}

std::int64_t counted_rows(const std::uint8_t* mask, std::int64_t rows) {
  return mask ? std::count(mask, mask + rows, std::uint8_t{1}) : rows;
}

template <class Working>
bool is_finite(const Working* row, std::int64_t width) {
  return std::all_of(row, row + width, [](Working value) { return std::isfinite(value); });
}

// Returns the sum of the squared differences of the unmasked rows; their codes are counted where they are finite.
template <class Working, class X, class Code>
double quantize_head(const Rows& x, const SearchCodes& codes, const std::uint8_t* mask, X* quantized,
                     std::int64_t* indices, std::int64_t* counts, int threads) {
  const RowKernel& kernel = row_kernel();
  std::vector<double> partial(row_tasks(x.count), 0.0);
  CodeCounts all_counts(counts, codes.rows.count, static_cast<int>(std::min<std::int64_t>(threads, partial.size())));
  parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
    CodeCounts::Share counted(all_counts);
    RowBlocks<Working> blocks(kernel, x);
    BlockSearch<Working> search(kernel, x.width, codes.view.groups, threads);
    Nearest nearest;
    for (std::int64_t task; tasks.next(&task);) {
      double sum = 0;  // here, since the sums of two threads may lie in one cache line
      for_each_block(task, x.count, kernel.lanes, [&](std::int64_t first, int count) {
        const Working* const* row = blocks.load(first, count);
        X* const out = quantized + first * x.width;
        const Span output{reinterpret_cast<const char*>(out), reinterpret_cast<const char*>(out + count * x.width)};
        search.nearest(codes, row, count, true, false, blocks.next(), output, &nearest);
        for (int l = 0; l < count; ++l) {
          indices[first + l] = nearest.index[l];
          const Code* code = codes.rows.row<Code>(nearest.index[l]);
          const double distance = copy_code(kernel, row[l], code, codes.rows.step, x.width, out + l * x.width);
          if (mask && !mask[first + l]) continue;
          sum += distance;
          if (std::isfinite(distance) || is_finite(row[l], x.width)) counted.add(nearest.index[l]);
        }
      });
      partial[task] = sum;
    }
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

}  // namespace

void vector_quantize(const Tensor& x, const Tensor& codebook, bool heads, Metric metric, double weight,
                     const std::uint8_t* mask, void* quantized, std::int64_t* indices, const Tensor& loss,
                     std::int64_t* counts, int threads) {
  const bool is_double = x.dtype == DType::kFloat64;
  const std::int64_t head_count = heads ? codebook.sizes[0] : 1;
  double total = 0;
  std::int64_t counted = 0;
  for (std::int64_t h = 0; h < head_count; ++h) {
    const Rows rows = (heads ? x.select(0, h) : x).rows();
    const Rows codes = (heads ? codebook.select(0, h) : codebook).rows();
    std::int64_t* const head_counts = counts ? counts + h * codes.count : nullptr;
    if (rows.count == 0) {
      if (counts) std::fill_n(head_counts, codes.count, 0);
      continue;
    }
    const std::int64_t first = h * rows.count;
    const std::uint8_t* head_mask = mask ? mask + first : nullptr;
    const SearchCodes ready = search_codes(codes, metric, !is_double, rows.count, threads);
    const int worth = worth_threads(rows.count * rows.width * codes.count, threads);
    counted += counted_rows(head_mask, rows.count);
    dispatch_pair(x.dtype, codes.dtype, [&](auto* x_type, auto* code_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using Code = std::remove_pointer_t<decltype(code_type)>;
      using Working = std::conditional_t<std::is_same_v<X, double>, double, float>;
      total += quantize_head<Working, X, Code>(rows, ready, head_mask, static_cast<X*>(quantized) + first * rows.width,
                                               indices + first, head_counts, worth);
    });
  }
  const double elements = static_cast<double>(std::max<std::int64_t>(1, counted * x.sizes[x.dims - 1]));
  const double value = weight * (total / elements);
  if (loss.dtype == DType::kFloat64) {
    *static_cast<double*>(loss.data) = value;
  } else {
    *static_cast<float*>(loss.data) = static_cast<float>(value);
  }
}

namespace {

// out [N][D] = gradient + pull * (row - code), for masked rows the gradient alone.
template <class X, class Code>
void pull_head(const Rows& x, const Rows& gradients, const Rows& codes, const std::int64_t* indices,
               const std::uint8_t* mask, double pull, X* out, int threads, const Code* = nullptr) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t width = x.width;
  const auto pull_of = [&](std::int64_t n) { return mask && !mask[n] ? 0.0 : pull; };
  parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
    if constexpr (std::is_same_v<X, float> && std::is_same_v<Code, float>) {
      if (codes.step == 1) {
        RowBlocks<float> row_blocks(kernel, x), gradient_blocks(kernel, gradients);
        for (std::int64_t task; tasks.next(&task);) {
          for_each_block(task, x.count, kernel.lanes, [&](std::int64_t first, int count) {
            const float* const* row = row_blocks.load(first, count);
            const float* const* gradient = gradient_blocks.load(first, count);
            for (int l = 0; l < count; ++l) {
              float* target = out + (first + l) * width;
              if (pull_of(first + l) == 0) {
                std::copy(gradient[l], gradient[l] + width, target);
              } else {
                kernel.pull(gradient[l], row[l], codes.row<float>(indices[first + l]), pull, width, target);
              }
            }
          });
        }
        return;
      }
    }
    for (std::int64_t task; tasks.next(&task);) {
      for_each_block(task, x.count, 1, [&](std::int64_t n, int) {
        const X* row = x.row<X>(n);
        const X* gradient = gradients.row<X>(n);
        const Code* code = codes.row<Code>(indices[n]);
        const double weight = pull_of(n);
        X* target = out + n * width;
        for (std::int64_t d = 0; d < width; ++d) {
          const X g = gradient[d * gradients.step];
          const double difference = static_cast<double>(widen(row[d * x.step])) - widen(code[d * codes.step]);
          target[d] = weight == 0 ? g : narrow<X>(widen(g) + weight * difference);
        }
      });
    }
  });
}

}  // namespace

void vector_quantize_backward(const Tensor& grad_quantized, double grad_loss, const Tensor& x, const Tensor& codebook,
                              bool heads, const std::int64_t* indices, const std::uint8_t* mask,
                              double commitment_weight, double codebook_weight, void* grad_x, void* grad_codebook,
                              int threads) {
  const std::int64_t head_count = heads ? codebook.sizes[0] : 1;
  const std::int64_t all_rows = x.rows().count;
  const std::int64_t elements = std::max<std::int64_t>(1, counted_rows(mask, all_rows) * x.sizes[x.dims - 1]);
  const double scale = 2 * grad_loss / static_cast<double>(elements);
  for (std::int64_t h = 0; h < head_count; ++h) {
    const Rows rows = (heads ? x.select(0, h) : x).rows();
    const Rows gradients = (heads ? grad_quantized.select(0, h) : grad_quantized).rows();
    const Rows codes = (heads ? codebook.select(0, h) : codebook).rows();
    const std::int64_t first = h * rows.count;
    const std::uint8_t* head_mask = mask ? mask + first : nullptr;
    dispatch_pair(x.dtype, codes.dtype, [&](auto* x_type, auto* code_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using Code = std::remove_pointer_t<decltype(code_type)>;
      if (grad_x) {
        X* out = static_cast<X*>(grad_x) + first * rows.width;
        pull_head(rows, gradients, codes, indices + first, head_mask, commitment_weight * scale, out, threads,
                  static_cast<const Code*>(nullptr));
      }
      if (grad_codebook) {
        Code* out = static_cast<Code*>(grad_codebook) + h * codes.count * codes.width;
        sum_differences(rows, codes, indices + first, head_mask, -codebook_weight * scale, out, threads);
      }
    });
  }
}

}  // namespace fastvq
