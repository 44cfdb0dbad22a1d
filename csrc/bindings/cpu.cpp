// Python's view of the CPU operators: nothing but argument passing.
//
// A tensor comes as (address, dtype, sizes, strides), dtype being the number of fastvq::DType; a pointer alone as its
// address, 0 for none.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "../cpu/codebook_cache.h"
#include "../cpu/memory.h"
#include "../cpu/operators.h"
#include "../cpu/parallel.h"
#include "../cpu/peak.h"
#include "../cpu/row_kernel.h"
#include "../cpu/search_way.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

fastvq::Tensor tensor(const py::tuple& parts) {
  fastvq::Tensor t;
  t.data = pointer<void>(parts[0].cast<Address>());
  t.dtype = static_cast<fastvq::DType>(parts[1].cast<int>());
  const py::tuple sizes = parts[2], strides = parts[3];
  t.dims = static_cast<int>(sizes.size());
  if (t.dims > fastvq::kMaxDims) {
    throw std::invalid_argument("a tensor must have at most " + std::to_string(fastvq::kMaxDims) + " dimensions; got " +
                                std::to_string(t.dims));
  }
  for (int d = 0; d < t.dims; ++d) {
    t.sizes[d] = sizes[d].cast<std::int64_t>();
    t.strides[d] = strides[d].cast<std::int64_t>();
  }
  return t;
}

// Bytes for a tensor of Python's: a buffer that torch.frombuffer takes.
struct Bytes {
  explicit Bytes(std::int64_t count) : memory(count), count(count) {}
  fastvq::Memory memory;
  std::int64_t count;
};

// Runs an operator without the interpreter's lock and with the floating-point environment that the bounds assume.
template <class F>
void run(const F& f) {
  const py::gil_scoped_release release;
  const fastvq::FloatEnvironment environment;
  f();
}

fastvq::Metric metric_of(bool dot) {
  return dot ? fastvq::Metric::kDot : fastvq::Metric::kEuclidean;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastvq's CPU kernels";

  py::class_<Bytes>(m, "Bytes", py::buffer_protocol()).def(py::init<std::int64_t>()).def_buffer([](const Bytes& b) {
    return py::buffer_info(static_cast<char*>(b.memory.data()), b.count);
  });

  m.def("instruction_sets", [] {
    const fastvq::RowKernel* kernels[fastvq::kMaxKernels];
    const int count = fastvq::available_row_kernels(kernels);
    py::list names;
    for (int i = 0; i < count; ++i) names.append(kernels[i]->name);
    return names;
  });
  m.def("instruction_set", [] { return fastvq::row_kernel().name; });
  m.def("float32_operations", &fastvq::float32_operations, py::call_guard<py::gil_scoped_release>());
  m.def("int8_operations", &fastvq::int8_operations, py::call_guard<py::gil_scoped_release>());

  m.def("search", [](const py::tuple& x, const py::tuple& codebook, bool heads, bool dot, bool certify, Address indices,
                     const py::tuple& distances, int threads) {
    const fastvq::Tensor rows = tensor(x), codes = tensor(codebook), out = tensor(distances);
    run([&] {
      fastvq::search(rows, codes, heads, metric_of(dot), certify, pointer<std::int64_t>(indices), out, threads);
    });
  });

  m.def("search_by",
        [](const std::string& way, const py::tuple& x, const py::tuple& codebook, Address indices, int threads) {
          const std::map<std::string, fastvq::Way> ways{{"few", fastvq::Way::kFew},
                                                        {"kept", fastvq::Way::kKept},
                                                        {"float32", fastvq::Way::kFloat32},
                                                        {"int8", fastvq::Way::kInt8}};
          const fastvq::Tensor rows = tensor(x), codes = tensor(codebook);
          run([&] { fastvq::search_by(ways.at(way), rows, codes, pointer<std::int64_t>(indices), threads); });
        });
  m.def("search_way", [](std::int64_t codes, std::int64_t width) {
    const fastvq::SearchWay way = fastvq::search_way(codes, width);
    return py::make_tuple(way.few_rows, way.int8);
  });

  m.def("search_counts", [](const py::tuple& x, const py::tuple& codebook, int threads) {
    const fastvq::Tensor rows = tensor(x), codes = tensor(codebook);
    fastvq::SearchCounts counts;
    run([&] { counts = fastvq::search_counts(rows, codes, threads); });
    return py::make_tuple(counts.rows, counts.open, counts.exact);
  });

  m.def("vector_quantize",
        [](const py::tuple& x, const py::tuple& codebook, bool heads, bool dot, double weight, Address mask,
           Address quantized, Address indices, const py::tuple& loss, Address counts, int threads) {
          const fastvq::Tensor rows = tensor(x), codes = tensor(codebook), out = tensor(loss);
          run([&] {
            fastvq::vector_quantize(rows, codes, heads, metric_of(dot), weight, pointer<std::uint8_t>(mask),
                                    pointer<void>(quantized), pointer<std::int64_t>(indices), out,
                                    pointer<std::int64_t>(counts), threads);
          });
        });

  m.def("vector_quantize_backward",
        [](const py::tuple& grad_quantized, double grad_loss, const py::tuple& x, const py::tuple& codebook, bool heads,
           Address indices, Address mask, double commitment_weight, double codebook_weight, Address grad_x,
           Address grad_codebook, int threads) {
          const fastvq::Tensor gradient = tensor(grad_quantized), rows = tensor(x), codes = tensor(codebook);
          run([&] {
            fastvq::vector_quantize_backward(gradient, grad_loss, rows, codes, heads, pointer<std::int64_t>(indices),
                                             pointer<std::uint8_t>(mask), commitment_weight, codebook_weight,
                                             pointer<void>(grad_x), pointer<void>(grad_codebook), threads);
          });
        });

  m.def("code_sums", [](const py::tuple& x, bool heads, Address indices, Address mask, bool finite_alone,
                        const py::tuple& counts, Address sums, int threads) {
    const fastvq::Tensor rows = tensor(x), out = tensor(counts);
    run([&] {
      fastvq::code_sums(rows, heads, pointer<std::int64_t>(indices), pointer<std::uint8_t>(mask), finite_alone, out,
                        pointer<void>(sums), threads);
    });
  });

  m.def("ema_update", [](const py::tuple& codebook, const py::tuple& cluster_size, const py::tuple& embed_avg,
                         const py::tuple& counts, const py::tuple& sums, double decay, double eps, int threads) {
    const fastvq::Tensor codes = tensor(codebook), sizes = tensor(cluster_size), averages = tensor(embed_avg);
    const fastvq::Tensor fresh_counts = tensor(counts), fresh_sums = tensor(sums);
    run([&] { fastvq::ema_update(codes, sizes, averages, fresh_counts, fresh_sums, decay, eps, threads); });
  });

  m.def("ema_step", [](const py::tuple& codebook, const py::tuple& cluster_size, const py::tuple& embed_avg,
                       const py::tuple& counts, const py::tuple& x, Address indices, Address mask, double decay,
                       double eps, int threads) {
    const fastvq::Tensor codes = tensor(codebook), sizes = tensor(cluster_size), averages = tensor(embed_avg);
    const fastvq::Tensor found = tensor(counts), rows = tensor(x);
    run([&] {
      fastvq::ema_step(codes, sizes, averages, found, rows, pointer<std::int64_t>(indices), pointer<std::uint8_t>(mask),
                       decay, eps, threads);
    });
  });

  m.def("residual_quantize", [](const py::tuple& x, const py::tuple& codebooks, bool heads, bool dot, Address quantized,
                                Address indices, const py::tuple& losses, std::uint64_t unchanged, int threads) {
    const fastvq::Tensor rows = tensor(x), codes = tensor(codebooks), out = tensor(losses);
    run([&] {
      const fastvq::Unchanged scope(unchanged);
      fastvq::residual_quantize(rows, codes, heads, metric_of(dot), pointer<void>(quantized),
                                pointer<std::int64_t>(indices), out, threads);
    });
  });

  m.def("residual_quantize_backward",
        [](const py::tuple& grad_quantized, Address grad_losses, const py::tuple& x, const py::tuple& codebooks,
           bool heads, Address indices, Address grad_x, Address grad_codebooks, int threads) {
          const fastvq::Tensor gradient = tensor(grad_quantized), rows = tensor(x), codes = tensor(codebooks);
          run([&] {
            fastvq::residual_quantize_backward(gradient, pointer<double>(grad_losses), rows, codes, heads,
                                               pointer<std::int64_t>(indices), pointer<void>(grad_x),
                                               pointer<void>(grad_codebooks), threads);
          });
        });

  m.def("rotate_back", [](const py::tuple& gradient, const py::tuple& x, const py::tuple& codes, Address indices,
                          Address out, int threads) {
    const fastvq::Tensor gradients = tensor(gradient), rows = tensor(x), books = tensor(codes);
    run([&] {
      fastvq::rotate_back(gradients, rows, books, pointer<std::int64_t>(indices), pointer<void>(out), threads);
    });
  });

  m.def("residual_code_sums", [](const py::tuple& x, const py::tuple& codebooks, Address indices,
                                 const py::tuple& counts, Address sums, int threads) {
    const fastvq::Tensor rows = tensor(x), codes = tensor(codebooks), out = tensor(counts);
    run([&] {
      fastvq::residual_code_sums(rows, codes, pointer<std::int64_t>(indices), out, pointer<void>(sums), threads);
    });
  });
}
