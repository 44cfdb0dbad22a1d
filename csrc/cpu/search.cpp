#include <stdexcept>

#include "block.h"
#include "codebook_cache.h"
#include "operators.h"
#include "parallel.h"

namespace fastvq {
namespace {

// With codes that are only likely, each block compares its share of them; once some differ, nothing more is searched.
template <class X>
void search_head(const Rows& x, const SearchCodes& codes, LikelyCodebook* likely, bool certify, std::int64_t* indices,
                 const Tensor& distances, std::int64_t first_row, int threads) {
  const RowKernel& kernel = row_kernel();
  const std::int64_t blocks_in_all = (x.count + kernel.lanes - 1) / kernel.lanes;
  parallel(row_tasks(x.count), threads, [&](Tasks& tasks) {
    RowBlocks<X> blocks(kernel, x);
    BlockSearch<X> search(kernel, x.width, codes.view.groups, threads);
    Nearest nearest;
    for (std::int64_t task; tasks.next(&task);) {
      for_each_block(task, x.count, kernel.lanes, [&](std::int64_t first, int count) {
        const X* const* row = blocks.load(first, count);
        Twins twins;
        if (likely) {
          if (!likely->same()) return;
          twins = likely->twins(first / kernel.lanes, blocks_in_all);
        }
        search.nearest(codes, row, count, certify, distances.data != nullptr, blocks.next(), {}, &nearest,
                       likely ? &twins : nullptr);
        if (likely) likely->compared(twins);
        for (int l = 0; l < count; ++l) {
          const std::int64_t n = first_row + first + l;
          indices[n] = nearest.index[l];
          if (!distances.data) continue;
          if (distances.dtype == DType::kFloat64) {
            static_cast<double*>(distances.data)[n] = nearest.value[l];
          } else {
            static_cast<float*>(distances.data)[n] = static_cast<float>(nearest.value[l]);
          }
        }
      });
    }
  });
}

}  // namespace

void search(const Tensor& x, const Tensor& codebook, bool heads, Metric metric, bool certify, std::int64_t* indices,
            const Tensor& distances, int threads) {
  const bool is_double = x.dtype == DType::kFloat64;
  const std::int64_t head_count = heads ? codebook.sizes[0] : 1;
  for (std::int64_t h = 0; h < head_count; ++h) {
    const Rows rows = (heads ? x.select(0, h) : x).rows();
    if (rows.count == 0) return;
    const Rows codes = (heads ? codebook.select(0, h) : codebook).rows();
    const int worth = worth_threads(rows.count * rows.width * codes.count, threads);
    const auto search_in = [&](const SearchCodes& ready, LikelyCodebook* likely) {
      dispatch_working(is_double, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        search_head<X>(rows, ready, likely, certify, indices, distances, h * rows.count, worth);
      });
    };
    LikelyCodebook likely(codes, metric, !is_double, rows.count);
    if (likely) search_in(likely.codes(), &likely);
    if (!likely || !likely.found_same())
      search_in(search_codes(codes, metric, !is_double, rows.count, threads), nullptr);
  }
}

void search_by(Way way, const Tensor& x, const Tensor& codebook, std::int64_t* indices, int threads) {
  const Rows rows = x.rows(), codes = codebook.rows();
  if (x.dtype != DType::kFloat32 || codes.dtype != DType::kFloat32 || codes.step != 1)
    throw std::invalid_argument("x and codebook must be float32, the codebook with a last stride of 1");
  SearchCodes ready{codes, nullptr, {}};
  if (way == Way::kKept) {
    ready.packed = packed_codebook(codes, Metric::kEuclidean, true, threads);
  } else if (way != Way::kFew) {
    const bool int8 = way == Way::kInt8 && row_kernel().int8;
    ready.packed = std::make_shared<const PackedCodebook>(codes, Metric::kEuclidean, true, int8, nullptr, threads);
  }
  if (ready.packed) ready.view = ready.packed->view(codes);
  search_head<float>(rows, ready, nullptr, true, indices, {}, 0,
                     worth_threads(rows.count * rows.width * codes.count, threads));
}

SearchCounts search_counts(const Tensor& x, const Tensor& codebook, int threads) {
  const bool is_double = x.dtype == DType::kFloat64;
  const Rows rows = x.rows(), codes = codebook.rows();
  // Packed, however few the rows: that is what the counts are of.
  const auto packed = packed_codebook(codes, Metric::kEuclidean, !is_double, threads);
  const SearchCodes ready{codes, packed, packed->view(codes)};
  SearchCounts total;
  std::mutex mutex;
  dispatch_working(is_double, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    parallel(row_tasks(rows.count), threads, [&](Tasks& tasks) {
      RowBlocks<X> blocks(row_kernel(), rows);
      BlockSearch<X> search(row_kernel(), rows.width, ready.view.groups, threads);
      SearchCounts counts;
      search.count_in(&counts);
      Nearest nearest;
      for (std::int64_t task; tasks.next(&task);) {
        for_each_block(task, rows.count, blocks.lanes(), [&](std::int64_t first, int count) {
          const X* const* row = blocks.load(first, count);
          search.nearest(ready, row, count, true, false, blocks.next(), {}, &nearest);
        });
      }
      const std::lock_guard<std::mutex> lock(mutex);
      total.rows += counts.rows;
      total.open += counts.open;
      total.exact += counts.exact;
    });
  });
  return total;
}

}  // namespace fastvq
