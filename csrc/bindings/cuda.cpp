// Python's view of the CUDA kernels: nothing but argument passing.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../cuda/probe.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastvq's CUDA kernels";
  m.def("add_one", [](std::uintptr_t values, long long count, std::uintptr_t stream) {
    if (const char* error = fastvq::add_one(values, count, stream)) {
      throw std::runtime_error(std::string("fastvq CUDA kernel add_one: ") + error);
    }
  });
  m.def("device_count", [] {
    const char* error = nullptr;
    const int count = fastvq::device_count(&error);
    return pybind11::make_tuple(count, error ? pybind11::object(pybind11::str(error)) : pybind11::none());
  });
}
