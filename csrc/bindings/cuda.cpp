// Python's view of the CUDA operators: nothing but argument passing.
//
// Rows come as (address, type, count, inner, head, outer, step, dim), a matrix as (address, type, head, row, column),
// type being the number of fastvq::Float; a pointer alone as its address, 0 for none. A stream is its address too.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/operators.h"
#include "../cuda/search.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

fastvq::Rows rows(const py::tuple& t) {
  return {pointer<void>(t[0].cast<Address>()),
          static_cast<fastvq::Float>(t[1].cast<int>()),
          t[2].cast<Index>(),
          t[3].cast<Index>(),
          t[4].cast<Index>(),
          t[5].cast<Index>(),
          t[6].cast<Index>(),
          t[7].cast<Index>()};
}

fastvq::Matrix matrix(const py::tuple& t) {
  return {pointer<void>(t[0].cast<Address>()), static_cast<fastvq::Float>(t[1].cast<int>()), t[2].cast<Index>(),
          t[3].cast<Index>(), t[4].cast<Index>()};
}

// (keys, order, starts, stride_rows, stride_starts, N, K).
fastvq::ByCode by_code(const py::tuple& t) {
  const Index K = t[6].cast<Index>();
  return {pointer<std::uint32_t>(t[0].cast<Address>()),
          pointer<std::uint32_t>(t[1].cast<Address>()),
          pointer<Index>(t[2].cast<Address>()),
          t[3].cast<Index>(),
          t[4].cast<Index>(),
          t[5].cast<Index>(),
          K,
          fastvq::code_bits(K)};
}

// (architecture such as 90, multiprocessors, bytes of shared memory that a block may ask for).
fastvq::Device device(const py::tuple& t) {
  return {t[0].cast<int>(), t[1].cast<int>(), t[2].cast<int>()};
}

fastvq::Float type(int number) {
  return static_cast<fastvq::Float>(number);
}

// How a search is cut, as a dict.
py::dict described(const fastvq::SearchPlan& plan) {
  constexpr const char* kOperands[] = {"stored", "rounded", "split"};
  constexpr const char* kSources[] = {"resident", "streamed", "chunked", "none", "staged"};
  return py::dict("operand"_a = kOperands[static_cast<int>(plan.operand)],
                  "source"_a = kSources[static_cast<int>(plan.source)], "width"_a = plan.width, "rows"_a = plan.rows,
                  "group"_a = plan.tiles.group, "tile"_a = plan.tiles.tile, "stages"_a = plan.tiles.stages,
                  "warps"_a = plan.tiles.warps, "shared_memory"_a = plan.shared_memory, "splits"_a = plan.splits,
                  "share"_a = plan.share, "tiles"_a = plan.tile_count, "bits"_a = plan.bits,
                  "scratch_bytes"_a = plan.scratch_bytes);
}

// Queues an operator's kernels without the interpreter's lock; what goes wrong is told with the operator's name.
template <class F>
void run(const char* name, const F& f) {
  const py::gil_scoped_release release;
  try {
    f();
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("fastvq CUDA operator ") + name + ": " + error.what());
  }
}

}  // namespace

// A build for the CPU, against the tests' shim, has another name.
#ifndef FASTVQ_CUDA_MODULE
#define FASTVQ_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(FASTVQ_CUDA_MODULE, m) {
  m.doc() = "fastvq's CUDA kernels";

  m.def("device_count", [] {
    const char* error = nullptr;
    const int count = fastvq::device_count(&error);
    return py::make_tuple(count, error ? py::object(py::str(error)) : py::none());
  });
  m.def("set_device", [](int index) { run("set_device", [&] { fastvq::set_device(index); }); });
  m.def("loss_parts", &fastvq::loss_parts);
  m.def("ema_parts", &fastvq::ema_parts);
  m.def("small_sums_parts", &fastvq::small_sums_parts);

  m.def("plan_search", [](const py::tuple& on, int x, int codes, Index heads, Index N, Index K, int D) {
    return described(fastvq::plan_search(device(on), type(x), type(codes), heads, N, K, D));
  });

  m.def("search",
        [](const py::tuple& on, const py::tuple& x, Address codebook, int code_type, Index heads, Index K, int D,
           bool euclidean, float slack, Address scratch, Address indices, Address distances, Address stream) {
          const fastvq::Device of = device(on);
          const fastvq::SearchProblem problem = {rows(x),         heads,     K,    D, pointer<void>(codebook),
                                                 type(code_type), euclidean, slack};
          run("search", [&] {
            const auto plan = fastvq::plan_search(of, problem.x.type, problem.code_type, heads, problem.x.count, K, D);
            fastvq::search(problem, plan, of, pointer<void>(scratch), pointer<Index>(indices), pointer<void>(distances),
                           stream);
          });
        });

  m.def("plan_stages", [](const py::tuple& on, int x, int codes, Index heads, int stages, Index N, Index K, int D) {
    return described(fastvq::plan_stages(device(on), type(x), type(codes), heads, stages, N, K, D));
  });

  m.def("search_stages",
        [](const py::tuple& on, const py::tuple& x, Address codebooks, int code_type, Index heads, int stages, Index K,
           int D, bool euclidean, float slack, Address scratch, Address indices, Address stream) {
          const fastvq::Device of = device(on);
          const fastvq::SearchProblem problem = {rows(x),         heads,     K,    D, pointer<void>(codebooks),
                                                 type(code_type), euclidean, slack};
          run("residual_quantize", [&] {
            const auto plan =
                fastvq::plan_stages(of, problem.x.type, problem.code_type, heads, stages, problem.x.count, K, D);
            fastvq::search_stages(problem, plan, of, stages, pointer<void>(scratch), pointer<Index>(indices), stream);
          });
        });

  m.def("gather", [](const py::tuple& x, const py::tuple& codes, Address indices, Address mask, Address kept,
                     double weight, Index heads, Index K, int D, Address quantized, Address parts, Address loss,
                     int loss_type, Address counts, Address stream) {
    const fastvq::Rows x_rows = rows(x), code_rows = rows(codes);
    run("vector_quantize", [&] {
      fastvq::gather(x_rows, code_rows, pointer<Index>(indices), pointer<std::uint8_t>(mask), pointer<Index>(kept),
                     weight, heads, K, D, pointer<void>(quantized), pointer<double>(parts), pointer<void>(loss),
                     type(loss_type), pointer<Index>(counts), stream);
    });
  });

  m.def("pull", [](const py::tuple& gradient, const py::tuple& x, const py::tuple& codes, Address indices, Address mask,
                   Address kept, Address grad_loss, int loss_type, double weight, Index heads, int D, Address grad_x,
                   Address stream) {
    const fastvq::Rows gradient_rows = rows(gradient), x_rows = rows(x), code_rows = rows(codes);
    run("vector_quantize_backward", [&] {
      fastvq::pull(gradient_rows, x_rows, code_rows, pointer<Index>(indices), pointer<std::uint8_t>(mask),
                   pointer<Index>(kept), pointer<void>(grad_loss), type(loss_type), weight, heads, D,
                   pointer<void>(grad_x), stream);
    });
  });

  m.def("small_sums", [](const py::tuple& x, Address indices, Address mask, Index heads, Index K, int D, bool checked,
                         Address counts, Address sums, int out_type, Address parts, Address stream) {
    const fastvq::Rows x_rows = rows(x);
    run("code_sums", [&] {
      fastvq::small_sums(x_rows, pointer<Index>(indices), pointer<std::uint8_t>(mask), heads, K, D, checked,
                         pointer<void>(counts), pointer<void>(sums), type(out_type), pointer<double>(parts), stream);
    });
  });

  m.def("small_differences",
        [](const py::tuple& x, const py::tuple& codes, Address indices, Index Q, Address mask, Address kept,
           Address grad_loss, int loss_type, Index heads, Index K, int D, double factor, Address sums,
           Index stride_sums, int out_type, Address parts, Address rest, Address stream) {
          const fastvq::Rows x_rows = rows(x), code_rows = rows(codes);
          run("codebook gradient", [&] {
            fastvq::small_differences(x_rows, code_rows, pointer<Index>(indices), Q, pointer<std::uint8_t>(mask),
                                      pointer<Index>(kept), pointer<void>(grad_loss), type(loss_type), heads, K, D,
                                      factor, pointer<void>(sums), stride_sums, type(out_type), pointer<double>(parts),
                                      pointer<void>(rest), stream);
          });
        });

  // Codebook gradients leave out an index past the codebook, code_sums traps.
  m.def("sort_scratch", [](Index problems, Index N, Index K, bool checked, Address stream) {
    std::size_t bytes = 0;
    run(checked ? "code_sums" : "codebook gradient", [&] { bytes = fastvq::sort_scratch(problems, N, K, stream); });
    return bytes;
  });

  m.def("sort_rows",
        [](Address indices, Address mask, Index heads, Index N, Index Q, Index K, bool checked, Address keys,
           Address order, Address starts, Address scratch, std::size_t scratch_bytes, Address stream) {
          int sorted = 0;
          run(checked ? "code_sums" : "codebook gradient", [&] {
            sorted = fastvq::sort_rows(pointer<Index>(indices), pointer<std::uint8_t>(mask), heads, N, Q, K, checked,
                                       pointer<std::uint32_t>(keys), pointer<std::uint32_t>(order),
                                       pointer<Index>(starts), pointer<void>(scratch), scratch_bytes, stream);
          });
          return sorted;
        });

  m.def("sum_rows", [](const py::tuple& x, const py::tuple& sorted, Index heads, int D, Index size, Address counts,
                       Address sums, int out_type, Address chunks, Address stream) {
    const fastvq::Rows x_rows = rows(x);
    const fastvq::ByCode order = by_code(sorted);
    run("code_sums", [&] {
      fastvq::sum_rows(x_rows, order, heads, D, size, pointer<void>(counts), pointer<void>(sums), type(out_type),
                       pointer<double>(chunks), stream);
    });
  });

  m.def("sum_differences",
        [](const py::tuple& x, const py::tuple& codes, const py::tuple& sorted, Address kept, Address grad_loss,
           int loss_type, Index heads, int D, Index size, double factor, Address sums, Index stride_sums, int out_type,
           Address chunks, Address rest, Address stream) {
          const fastvq::Rows x_rows = rows(x), code_rows = rows(codes);
          const fastvq::ByCode order = by_code(sorted);
          run("codebook gradient", [&] {
            fastvq::sum_differences(x_rows, code_rows, order, pointer<Index>(kept), pointer<void>(grad_loss),
                                    type(loss_type), heads, D, size, factor, pointer<void>(sums), stride_sums,
                                    type(out_type), pointer<double>(chunks), pointer<void>(rest), stream);
          });
        });

  m.def("sum_chunks", [](const py::tuple& sorted, Address parts, Index heads, int D, Index part, Index size,
                         double factor, Address sums, Index stride_sums, int out_type, Address chunks, Address stream) {
    const fastvq::ByCode order = by_code(sorted);
    run("code_sums", [&] {
      fastvq::sum_chunks(order, pointer<double>(parts), heads, D, part, size, factor, pointer<void>(sums), stride_sums,
                         type(out_type), pointer<double>(chunks), stream);
    });
  });

  m.def("ema_update", [](const py::tuple& codebook, const py::tuple& cluster_size, const py::tuple& embed_avg,
                         const py::tuple& counts, const py::tuple& sums, double decay, double eps, Index heads, Index K,
                         int D, Address parts, Address stream) {
    const fastvq::Matrix codes = matrix(codebook), sizes = matrix(cluster_size), averages = matrix(embed_avg);
    const fastvq::Matrix fresh_counts = matrix(counts), fresh_sums = matrix(sums);
    run("ema_update_", [&] {
      fastvq::ema_update(codes, sizes, averages, fresh_counts, fresh_sums, decay, eps, heads, K, D,
                         pointer<double>(parts), stream);
    });
  });

  m.def("take_codes", [](const py::tuple& x, const py::tuple& codes, Address indices, Index heads, Index Q, Index q,
                         int D, Address residual, Address stream) {
    const fastvq::Rows x_rows = rows(x), code_rows = rows(codes);
    run("residual_quantize", [&] {
      fastvq::take_codes(x_rows, code_rows, pointer<Index>(indices), heads, Q, q, D, pointer<void>(residual), stream);
    });
  });

  m.def("gather_stages", [](const py::tuple& x, const py::tuple& codes, Address indices, Index heads, Index Q, int D,
                            Address quantized, Address parts, Address losses, int loss_type, Address stream) {
    const fastvq::Rows x_rows = rows(x), code_rows = rows(codes);
    run("residual_quantize", [&] {
      fastvq::gather_stages(x_rows, code_rows, pointer<Index>(indices), heads, Q, D, pointer<void>(quantized),
                            pointer<double>(parts), pointer<void>(losses), type(loss_type), stream);
    });
  });

  m.def("pull_stages",
        [](const py::tuple& gradient, const py::tuple& x, const py::tuple& codes, Address indices, Address grad_losses,
           int loss_type, Index heads, Index Q, int D, Address grad_x, Address stream) {
          const fastvq::Rows gradient_rows = rows(gradient), x_rows = rows(x), code_rows = rows(codes);
          run("residual_quantize_backward", [&] {
            fastvq::pull_stages(gradient_rows, x_rows, code_rows, pointer<Index>(indices), pointer<void>(grad_losses),
                                type(loss_type), heads, Q, D, pointer<void>(grad_x), stream);
          });
        });
}
