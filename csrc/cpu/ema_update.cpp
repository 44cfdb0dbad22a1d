#include <vector>

#include "memory.h"
#include "operators.h"
#include "parallel.h"

namespace fastvq {
namespace {

constexpr std::int64_t kCodesPerTask = 256;

double read(const Tensor& t, std::int64_t offset) {
  double value = 0;
  dispatch(t.dtype,
           [&](auto* type) { value = widen(static_cast<std::remove_pointer_t<decltype(type)>*>(t.data)[offset]); });
  return value;
}

void write(const Tensor& t, std::int64_t offset, double value) {
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static_cast<T*>(t.data)[offset] = narrow<T>(value);
  });
}

// One code: its average and its place. The common case, all float32, gets a loop that the compiler can vectorise.
void update_code(const Rows& codebook, const Rows& average, const Rows& sums, std::int64_t k, double decay,
                 double divisor) {
  const bool plain = codebook.dtype == DType::kFloat32 && average.dtype == DType::kFloat32 &&
                     sums.dtype == DType::kFloat32 && codebook.step == 1 && average.step == 1 && sums.step == 1;
  const double fresh = 1 - decay;
  if (plain) {
    float* __restrict code = codebook.row<float>(k);
    float* __restrict mean = average.row<float>(k);
    const float* __restrict sum = sums.row<float>(k);
    for (std::int64_t d = 0; d < codebook.width; ++d) {
      const double value = decay * mean[d] + fresh * sum[d];
      mean[d] = static_cast<float>(value);
      code[d] = static_cast<float>(value / divisor);
    }
    return;
  }
  const auto flat = [](const Rows& r) {
    Tensor t;
    t.data = r.data;
    t.dtype = r.dtype;
    return t;
  };
  const Tensor code = flat(codebook), mean = flat(average), sum = flat(sums);
  for (std::int64_t d = 0; d < codebook.width; ++d) {
    const std::int64_t at = average.offset(k) + d * average.step;
    const double value = decay * read(mean, at) + fresh * read(sum, sums.offset(k) + d * sums.step);
    write(mean, at, value);
    write(code, codebook.offset(k) + d * codebook.step, value / divisor);
  }
}

// A tensor in memory of its own, not initialised, of the shape of another.
struct Dense {
  Dense(const Tensor& like, DType dtype) : tensor(like) {
    std::int64_t count = 1;
    for (int d = like.dims - 1; d >= 0; --d) {
      tensor.strides[d] = count;
      count *= like.sizes[d];
    }
    memory = Memory(count * element_bytes(dtype));
    tensor.dtype = dtype;
    tensor.data = memory.data();
  }
  Tensor tensor;
  Memory memory;
};

}  // namespace

void ema_update(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_avg, const Tensor& counts,
                const Tensor& sums, double decay, double eps, int threads) {
  if (codebook.dims == 2) {
    return ema_update(codebook.under_head(), cluster_size.under_head(), embed_avg.under_head(), counts.under_head(),
                      sums.under_head(), decay, eps, threads);
  }
  const FloatEnvironment environment;
  for (std::int64_t h = 0; h < codebook.sizes[0]; ++h) {
    const Rows codes = codebook.select(0, h).rows();
    const Rows averages = embed_avg.select(0, h).rows();
    const Rows totals = sums.select(0, h).rows();
    const std::int64_t size = codes.count;
    std::vector<double> sizes(size);
    double total = 0;
    dispatch_pair(cluster_size.dtype, counts.dtype, [&](auto* size_type, auto* count_type) {
      using Size = std::remove_pointer_t<decltype(size_type)>;
      using Count = std::remove_pointer_t<decltype(count_type)>;
      Size* stored = static_cast<Size*>(cluster_size.data) + h * cluster_size.strides[0];
      const Count* fresh = static_cast<const Count*>(counts.data) + h * counts.strides[0];
      for (std::int64_t k = 0; k < size; ++k) {
        Size& at = stored[k * cluster_size.strides[1]];
        sizes[k] = decay * widen(at) + (1 - decay) * widen(fresh[k * counts.strides[1]]);
        at = narrow<Size>(sizes[k]);
        total += sizes[k];
      }
    });
    parallel((size + kCodesPerTask - 1) / kCodesPerTask, threads, [&](Tasks& tasks) {
      for (std::int64_t task; tasks.next(&task);) {
        const std::int64_t end = std::min(size, (task + 1) * kCodesPerTask);
        for (std::int64_t k = task * kCodesPerTask; k < end; ++k) {
          update_code(codes, averages, totals, k, decay, (sizes[k] + eps) / (total + size * eps) * total);
        }
      }
    });
  }
}

void ema_step(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_avg, const Tensor& counts,
              const Tensor& x, const std::int64_t* indices, const std::uint8_t* mask, double decay, double eps,
              int threads) {
  const bool heads = codebook.dims == 3;
  const DType dtype = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const Dense found(counts, dtype), sums(codebook, dtype);
  code_sums(x, heads, indices, mask, true, found.tensor, sums.tensor.data, threads);
  const Tensor to = heads ? counts : counts.under_head();
  dispatch_pair(to.dtype, dtype, [&](auto* to_type, auto* found_type) {
    using To = std::remove_pointer_t<decltype(to_type)>;
    const auto* fresh = static_cast<const std::remove_pointer_t<decltype(found_type)>*>(found.tensor.data);
    for (std::int64_t h = 0; h < to.sizes[0]; ++h)
      for (std::int64_t k = 0; k < to.sizes[1]; ++k)
        static_cast<To*>(to.data)[h * to.strides[0] + k * to.strides[1]] = narrow<To>(widen(*fresh++));
  });
  ema_update(codebook, cluster_size, embed_avg, found.tensor, sums.tensor, decay, eps, threads);
}

}  // namespace fastvq
