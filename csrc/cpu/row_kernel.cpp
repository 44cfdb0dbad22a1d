#include "row_kernel.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastvq {

extern const RowKernel row_kernel_portable;
extern const RowKernel row_kernel_avx2;
extern const RowKernel row_kernel_avxvnni;
extern const RowKernel row_kernel_avx512;
extern const RowKernel row_kernel_avx512vnni;

#if defined(FASTVQ_HAS_AVXVNNI)
namespace {

bool has_avx_vnni() {
#if defined(FASTVQ_EVEX)  // tests, on a machine that has only the encoding of AVX-512
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
  return __builtin_cpu_supports("avxvnni");
#endif
}

}  // namespace
#endif

int available_row_kernels(const RowKernel* out[kMaxKernels]) {
  int count = 0;
  out[count++] = &row_kernel_portable;
#if defined(FASTVQ_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    out[count++] = &row_kernel_avx2;
#if defined(FASTVQ_HAS_AVXVNNI)
    if (has_avx_vnni()) out[count++] = &row_kernel_avxvnni;
#endif
  }
#endif
#if defined(FASTVQ_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    out[count++] = &row_kernel_avx512;
#if defined(FASTVQ_HAS_AVX512VNNI)
    if (__builtin_cpu_supports("avx512vnni")) out[count++] = &row_kernel_avx512vnni;
#endif
  }
#endif
  return count;
}

namespace {

const RowKernel& choose() {
  const RowKernel* available[kMaxKernels];
  const int count = available_row_kernels(available);
  const char* wanted = std::getenv("FASTVQ_CPU_ISA");
  if (!wanted || !*wanted) return *available[count - 1];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (!std::strcmp(available[i]->name, wanted)) return *available[i];
    names += (i ? ", " : "") + std::string(available[i]->name);
  }
  throw std::invalid_argument("FASTVQ_CPU_ISA must be one of " + names + " on this machine; got '" + wanted + "'");
}

}  // namespace

const RowKernel& row_kernel() {
  static const RowKernel& chosen = choose();
  return chosen;
}

}  // namespace fastvq
