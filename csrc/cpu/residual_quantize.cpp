#include <algorithm>
#include <vector>

#include "block.h"
#include "code_sums.h"
#include "codebook_cache.h"
#include "operators.h"
#include "parallel.h"

namespace fastvq {
namespace {

// |residual - code|^2
template <class Working, class Code>
double distance(const RowKernel& kernel, const Working* residual, const Code* code, std::int64_t step,
                std::int64_t width) {
  if constexpr (std::is_same_v<Working, float> && std::is_same_v<Code, float>) {
    if (step == 1) return kernel.squared_distance(residual, code, width);
  }
  return squared_distance(residual, 1, code, step, width);
}

// How many tasks a thread takes through the stages together: a stage's codes come from afar once for all of them, while
// their residuals, and the sums of their codes, stay in cache.
std::int64_t tasks_together(std::int64_t rows, std::int64_t width, int threads) {
  constexpr std::int64_t kMost = 4, kElements = 1 << 15;
  const std::int64_t fitting = std::min(kMost, kElements / (width * kTaskRows));
  return std::max<std::int64_t>(1, std::min(fitting, row_tasks(rows) / threads));
}

// All stages of some rows while they are in cache. `losses` gets the sums of squared differences, a stage each.
template <class Working>
void quantize_head(const Rows& x, const std::vector<SearchCodes>& stages, void* quantized, std::int64_t* indices,
                   std::vector<double>* losses, int threads) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t stage_count = static_cast<std::int64_t>(stages.size()), width = x.width;
  std::vector<double> partial(row_tasks(x.count) * stage_count, 0.0);
  const std::int64_t together = tasks_together(x.count, width, threads), most_rows = together * kTaskRows;
  parallel((row_tasks(x.count) + together - 1) / together, threads, [&](Tasks& tasks) {
    BlockSearch<Working> search(kernel, width, stages[0].view.groups, threads);
    Buffer<Working> residuals(width * most_rows), sums(width * most_rows);
    const Rows residual_rows = dense_rows(residuals.get(), most_rows, width);
    RowBlocks<Working> blocks(kernel, residual_rows);
    Nearest nearest;
    for (std::int64_t share; tasks.next(&share);) {
      const std::int64_t begin = share * most_rows, rows = std::min(most_rows, x.count - begin);
      dispatch(x.dtype, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        for (std::int64_t n = 0; n < rows; ++n) {
          const X* row = x.row<X>(begin + n);
          for (std::int64_t d = 0; d < width; ++d)
            residuals[n * width + d] = static_cast<Working>(widen(row[d * x.step]));
        }
      });
      for (std::int64_t q = 0; q < stage_count; ++q) {
        const Rows& codes = stages[q].rows;
        for (std::int64_t first = 0; first < rows; first += kernel.lanes) {
          const int count = static_cast<int>(std::min<std::int64_t>(kernel.lanes, rows - first));
          search.nearest(stages[q], blocks.load(first, count), count, true, false, {}, {}, &nearest);
          dispatch(codes.dtype, [&](auto* type) {
            for (int l = 0; l < count; ++l) {
              const auto* code = codes.row<std::remove_pointer_t<decltype(type)>>(nearest.index[l]);
              const std::int64_t n = begin + first + l;
              Working* residual = residuals.get() + (first + l) * width;
              Working* sum = sums.get() + (first + l) * width;
              indices[n * stage_count + q] = nearest.index[l];
              partial[n / kTaskRows * stage_count + q] += distance(kernel, residual, code, codes.step, width);
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
      }
      dispatch(x.dtype, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        X* out = static_cast<X*>(quantized) + begin * width;
        for (std::int64_t i = 0; i < rows * width; ++i) out[i] = narrow<X>(sums[i]);
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

std::vector<Rows> stage_codes(const Tensor& codebooks) {
  std::vector<Rows> stages;
  for (std::int64_t q = 0; q < codebooks.sizes[0]; ++q) stages.push_back(codebooks.select(0, q).rows());
  return stages;
}

const StageLoops<float>& stage_loops(float) {
  return row_kernel().stage;
}
const StageLoops<double>& stage_loops(double) {
  return row_kernel().stage_double;
}

// Gradients to the rows of x, made row by row: visit(q, gradient, residual, code, total) adds what stage q passes on to
// `total`, in float64, and leaves the next residual. Without indices row n has the code n of the one stage. `out` has
// the dtype of x.
template <class Working, class Visit>
void through_stages(const Rows& x, const Rows& gradients, const std::vector<Rows>& stages, const std::int64_t* indices,
                    void* out, int threads, const Visit& visit) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t stage_count = static_cast<std::int64_t>(stages.size()), width = x.width;
  parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
    RowBlocks<Working> rows(kernel, x), row_gradients(kernel, gradients);
    std::vector<Working> residual(width), code_copy(width);
    std::vector<double> total(width);
    for (std::int64_t task; tasks.next(&task);) {
      for_each_block(task, x.count, kernel.lanes, [&](std::int64_t first, int count) {
        const Working* const* row = rows.load(first, count);
        const Working* const* gradient = row_gradients.load(first, count);
        for (int l = 0; l < count; ++l) {
          const std::int64_t n = first + l;
          std::copy(row[l], row[l] + width, residual.begin());
          std::fill(total.begin(), total.end(), 0.0);
          for (std::int64_t q = 0; q < stage_count; ++q) {
            const std::int64_t index = indices ? indices[n * stage_count + q] : n;
            const Working* code = working_row(stages[q], index, code_copy.data());
            visit(q, gradient[l], residual.data(), code, total.data());
          }
          dispatch(x.dtype, [&](auto* type) {
            using X = std::remove_pointer_t<decltype(type)>;
            X* target = static_cast<X*>(out) + n * width;
            for (std::int64_t d = 0; d < width; ++d) target[d] = narrow<X>(total[d]);
          });
        }
      });
    }
  });
}

// Calls visit(q, residuals, indices) for each stage, with what it quantises, (N, D) in Working, and its indices, (N).
template <class Working, class Visit>
void for_each_stage(const Rows& x, const std::vector<Rows>& stages, const std::int64_t* indices, int threads,
                    const Visit& visit) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t stage_count = static_cast<std::int64_t>(stages.size()), width = x.width;
  std::vector<Working> residuals(x.count * width);
  std::vector<std::int64_t> stage_indices(x.count);
  for (std::int64_t q = 0; q < stage_count; ++q) {
    parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
      RowBlocks<Working> rows(kernel, x);
      std::vector<Working> code_copy(width);
      for (std::int64_t task; tasks.next(&task);) {
        for_each_block(task, x.count, kernel.lanes, [&](std::int64_t first, int count) {
          const Working* const* row = q == 0 ? rows.load(first, count) : nullptr;
          for (int l = 0; l < count; ++l) {
            const std::int64_t n = first + l;
            Working* residual = residuals.data() + n * width;
            if (q == 0) {
              std::copy(row[l], row[l] + width, residual);
            } else {
              const Working* code = working_row(stages[q - 1], stage_indices[n], code_copy.data());
              for (std::int64_t d = 0; d < width; ++d) residual[d] -= code[d];
            }
            stage_indices[n] = indices[n * stage_count + q];
          }
        });
      }
    });
    visit(q, dense_rows(residuals.data(), x.count, width), stage_indices.data());
  }
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
    const std::vector<Rows> stages = stage_codes(heads ? codebooks.select(0, h) : codebooks);
    const std::int64_t first = h * rows.count, codes = stages[0].count, width = rows.width;
    dispatch_working(works_in_double(x, codebooks), [&](auto* type) {
      using Working = std::remove_pointer_t<decltype(type)>;
      const StageLoops<Working>& loops = stage_loops(Working{});
      if (grad_x) {
        char* out = static_cast<char*>(grad_x) + first * width * element_bytes(x.dtype);
        through_stages<Working>(
            rows, gradients, stages, indices + first * stage_count, out, threads,
            [&](std::int64_t q, const Working* gradient, Working* residual, const Working* code, double* total) {
              if (q == 0)
                for (std::int64_t d = 0; d < width; ++d) total[d] = static_cast<double>(gradient[d]);
              loops.pull(residual, code, scales[q], width, total);
            });
      }
      if (!grad_codebooks) return;
      for_each_stage<Working>(
          rows, stages, indices + first * stage_count, threads,
          [&](std::int64_t q, const Rows& residuals, const std::int64_t* stage_indices) {
            dispatch(codebooks.dtype, [&](auto* code_type) {
              using Code = std::remove_pointer_t<decltype(code_type)>;
              Code* out = static_cast<Code*>(grad_codebooks) + (h * stage_count + q) * codes * width;
              sum_differences(residuals, stages[q], stage_indices, nullptr, -scales[q], out, threads);
            });
          });
    });
  }
}

void rotate_back(const Tensor& gradient, const Tensor& x, const Tensor& codes, const std::int64_t* indices, void* out,
                 int threads) {
  const std::vector<Rows> stages = indices ? stage_codes(codes) : std::vector<Rows>{codes.rows()};
  const std::int64_t width = x.sizes[x.dims - 1];
  const int worth = worth_threads(8 * x.rows().count * width * static_cast<std::int64_t>(stages.size()), threads);
  dispatch_working(works_in_double(x, codes), [&](auto* type) {
    using Working = std::remove_pointer_t<decltype(type)>;
    const StageLoops<Working>& loops = stage_loops(Working{});
    through_stages<Working>(x.rows(), gradient.rows(), stages, indices, out, worth,
                            [&](std::int64_t, const Working* g, Working* residual, const Working* code, double* total) {
                              loops.turn(g, residual, code, width, total);
                            });
  });
}

void residual_code_sums(const Tensor& x, const Tensor& codebooks, const std::int64_t* indices, const Tensor& counts,
                        void* sums, int threads) {
  const Rows rows = x.rows();
  const std::int64_t codes = codebooks.sizes[1];
  dispatch_working(works_in_double(x, codebooks), [&](auto* type) {
    using Working = std::remove_pointer_t<decltype(type)>;
    for_each_stage<Working>(rows, stage_codes(codebooks), indices, threads,
                            [&](std::int64_t q, const Rows& residuals, const std::int64_t* stage_indices) {
                              Tensor stage;
                              stage.data = residuals.data;
                              stage.dtype = residuals.dtype;
                              stage.dims = 2;
                              stage.sizes[0] = residuals.count;
                              stage.sizes[1] = stage.strides[0] = residuals.width;
                              stage.strides[1] = 1;
                              code_sums(stage, false, stage_indices, nullptr, true, counts.select(0, q),
                                        static_cast<Working*>(sums) + q * codes * rows.width, threads);
                            });
  });
}

}  // namespace fastvq
