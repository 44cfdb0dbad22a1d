#include <algorithm>
#include <vector>

#include "block.h"
#include "code_sums.h"
#include "codebook_cache.h"
#include "operators.h"
#include "parallel.h"

namespace fastvq {
namespace {

// All stages of a block of rows while it is in cache. `losses` gets the sums of squared differences, a stage each.
template <class Working>
void quantize_head(const Rows& x, const std::vector<SearchCodes>& stages, void* quantized, std::int64_t* indices,
                   std::vector<double>* losses, int threads) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t stage_count = static_cast<std::int64_t>(stages.size()), width = x.width;
  std::vector<double> partial(row_tasks(x.count) * stage_count, 0.0);
  parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
    BlockSearch<Working> block(kernel, width, stages[0].view.groups, threads);
    std::vector<Working> residuals(width * block.lanes()), sums(width * block.lanes());
    const Rows residual_rows = dense_rows(residuals.data(), block.lanes(), width);
    Nearest nearest;
    for (std::int64_t task; tasks.next(&task);) {
      for_each_block(task, x.count, block.lanes(), [&](std::int64_t first, int count) {
        dispatch(x.dtype, [&](auto* type) {
          using X = std::remove_pointer_t<decltype(type)>;
          for (int l = 0; l < count; ++l) {
            const X* row = x.row<X>(first + l);
            for (std::int64_t d = 0; d < width; ++d)
              residuals[l * width + d] = static_cast<Working>(widen(row[d * x.step]));
          }
        });
        for (std::int64_t q = 0; q < stage_count; ++q) {
          const Rows& codes = stages[q].rows;
          block.load(residual_rows, 0, count);
          block.nearest(stages[q], count, true, false, &nearest);
          dispatch(codes.dtype, [&](auto* type) {
            for (int l = 0; l < count; ++l) {
              const auto* code = codes.row<std::remove_pointer_t<decltype(type)>>(nearest.index[l]);
              Working* residual = residuals.data() + l * width;
              Working* sum = sums.data() + l * width;
              indices[(first + l) * stage_count + q] = nearest.index[l];
              partial[task * stage_count + q] += squared_distance(residual, 1, code, codes.step, width);
              const auto subtract = [&](std::int64_t step) {
                for (std::int64_t d = 0; d < width; ++d) {
                  const Working c = static_cast<Working>(widen(code[d * step]));
                  residual[d] -= c;
                  sum[d] = q == 0 ? c : sum[d] + c;
                }
              };
              if (codes.step == 1) {  // known to the compiler: vectorised
                subtract(1);
              } else {
                subtract(codes.step);
              }
            }
          });
        }
        dispatch(x.dtype, [&](auto* type) {
          using X = std::remove_pointer_t<decltype(type)>;
          X* out = static_cast<X*>(quantized) + first * width;
          for (std::int64_t i = 0; i < count * width; ++i) out[i] = narrow<X>(sums[i]);
        });
      });
    }
  });
  for (std::int64_t task = 0; task < row_tasks(x.count); ++task)
    for (std::int64_t q = 0; q < stage_count; ++q) (*losses)[q] += partial[task * stage_count + q];
}

bool works_in_double(const Tensor& x, const Tensor& codebooks) {
  return x.dtype == DType::kFloat64 || codebooks.dtype == DType::kFloat64;
}

}  // namespace

void residual_quantize(const Tensor& x, const Tensor& codebooks, bool heads, Metric metric, void* quantized,
                       std::int64_t* indices, const Tensor& losses, int threads) {
  const bool is_double = works_in_double(x, codebooks);
  const std::int64_t head_count = heads ? codebooks.sizes[0] : 1;
  const std::int64_t stage_count = codebooks.sizes[codebooks.dims - 3];
  const std::int64_t all_rows = x.rows().count;
  std::vector<double> sums(stage_count, 0.0);
  for (std::int64_t h = 0; h < head_count && all_rows > 0; ++h) {
    const Rows rows = (heads ? x.select(0, h) : x).rows();
    const Tensor head_codebooks = heads ? codebooks.select(0, h) : codebooks;
    std::vector<SearchCodes> stages;
    for (std::int64_t q = 0; q < stage_count; ++q) {
      const Rows codes = head_codebooks.select(0, q).rows();
      stages.push_back(search_codes(codes, metric, !is_double, rows.count, threads));
    }
    const int worth =
        worth_threads(rows.count * rows.width * stage_count * codebooks.sizes[codebooks.dims - 2], threads);
    char* out = static_cast<char*>(quantized) + h * rows.count * rows.width * element_bytes(x.dtype);
    dispatch_working(is_double, [&](auto* type) {
      quantize_head<std::remove_pointer_t<decltype(type)>>(rows, stages, out, indices + h * rows.count * stage_count,
                                                           &sums, worth);
    });
  }
  const double elements = static_cast<double>(std::max<std::int64_t>(1, all_rows * x.sizes[x.dims - 1]));
  for (std::int64_t q = 0; q < stage_count; ++q) {
    if (losses.dtype == DType::kFloat64) {
      static_cast<double*>(losses.data)[q] = sums[q] / elements;
    } else {
      static_cast<float*>(losses.data)[q] = static_cast<float>(sums[q] / elements);
    }
  }
}

namespace {

// The residuals are made again, stage by stage, in `residual` (N, D): their storage is O(N D), whatever Q.
template <class Working>
void backward_head(const Rows& gradients, const double* scales, const Rows& x, const Tensor& codebooks,
                   const std::int64_t* indices, void* grad_x, char* grad_codebooks, int threads) {
  const std::int64_t stage_count = codebooks.sizes[0], width = x.width, rows = x.count;
  std::vector<Working> residual(rows * width);
  std::vector<double> gradient(grad_x ? rows * width : 0);
  std::vector<std::int64_t> stage_indices(rows);
  const auto for_each_row = [&](const auto& body) {
    parallel(row_tasks(rows), threads, [&](Tasks& tasks) {
      for (std::int64_t task; tasks.next(&task);) for_each_block(task, rows, 1, [&](std::int64_t n, int) { body(n); });
    });
  };
  dispatch(x.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    for_each_row([&](std::int64_t n) {
      const X* row = x.row<X>(n);
      const X* incoming = gradients.row<X>(n);
      for (std::int64_t d = 0; d < width; ++d) residual[n * width + d] = static_cast<Working>(widen(row[d * x.step]));
      if (!grad_x) return;
      for (std::int64_t d = 0; d < width; ++d) gradient[n * width + d] = widen(incoming[d * gradients.step]);
    });
  });
  const Rows residual_rows = dense_rows(residual.data(), rows, width);
  for (std::int64_t q = 0; q < stage_count; ++q) {
    const Rows codes = codebooks.select(0, q).rows();
    for (std::int64_t n = 0; n < rows; ++n) stage_indices[n] = indices[n * stage_count + q];
    dispatch(codes.dtype, [&](auto* type) {
      using Code = std::remove_pointer_t<decltype(type)>;
      if (grad_codebooks) {
        Code* out = reinterpret_cast<Code*>(grad_codebooks) + q * codes.count * width;
        sum_differences(residual_rows, codes, stage_indices.data(), nullptr, -scales[q], out, threads);
      }
      for_each_row([&](std::int64_t n) {
        const Code* code = codes.row<Code>(stage_indices[n]);
        for (std::int64_t d = 0; d < width; ++d) {
          const double c = widen(code[d * codes.step]);
          Working& r = residual[n * width + d];
          if (grad_x && scales[q] != 0) gradient[n * width + d] += scales[q] * (static_cast<double>(r) - c);
          r -= static_cast<Working>(c);
        }
      });
    });
  }
  if (!grad_x) return;
  dispatch(x.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    X* out = static_cast<X*>(grad_x);
    for_each_row([&](std::int64_t n) {
      for (std::int64_t i = n * width; i < (n + 1) * width; ++i) out[i] = narrow<X>(gradient[i]);
    });
  });
}

}  // namespace

void residual_quantize_backward(const Tensor& grad_quantized, const double* grad_losses, const Tensor& x,
                                const Tensor& codebooks, bool heads, const std::int64_t* indices, void* grad_x,
                                void* grad_codebooks, int threads) {
  const std::int64_t head_count = heads ? codebooks.sizes[0] : 1;
  const std::int64_t stage_count = codebooks.sizes[codebooks.dims - 3];
  const std::int64_t all_rows = x.rows().count;
  const double elements = static_cast<double>(std::max<std::int64_t>(1, all_rows * x.sizes[x.dims - 1]));
  std::vector<double> scales(grad_losses, grad_losses + stage_count);
  for (double& scale : scales) scale *= 2 / elements;
  for (std::int64_t h = 0; h < head_count; ++h) {
    const Rows rows = (heads ? x.select(0, h) : x).rows();
    const Rows gradients = (heads ? grad_quantized.select(0, h) : grad_quantized).rows();
    const Tensor head_codebooks = heads ? codebooks.select(0, h) : codebooks;
    const std::int64_t codes = head_codebooks.sizes[1];
    char* head_grad_x =
        grad_x ? static_cast<char*>(grad_x) + h * rows.count * rows.width * element_bytes(x.dtype) : nullptr;
    char* head_grad_codebooks =
        grad_codebooks
            ? static_cast<char*>(grad_codebooks) + h * stage_count * codes * rows.width * element_bytes(codebooks.dtype)
            : nullptr;
    dispatch_working(works_in_double(x, codebooks), [&](auto* type) {
      backward_head<std::remove_pointer_t<decltype(type)>>(gradients, scales.data(), rows, head_codebooks,
                                                           indices + h * rows.count * stage_count, head_grad_x,
                                                           head_grad_codebooks, threads);
    });
  }
}

}  // namespace fastvq
