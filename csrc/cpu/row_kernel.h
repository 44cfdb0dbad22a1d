// The search of one block of rows, compiled once for each instruction set and chosen at run time.

#pragma once

#include <cstdint>

#include "codebook.h"

namespace fastvq {

constexpr int kMaxLanes = 16;                 // the widest block of rows of any instruction set
constexpr std::int64_t kScreenGroups = 2048;  // groups screened before candidates are taken: bounds the scratch

struct RowBlock {
  bool is_double = false;      // what `rows` points to: double or float
  const void* rows = nullptr;  // [D][lanes]; lanes past `count` are zero
  int count = 0;               // rows that are there
  bool certify = true;         // false: only the best screened group is re-scored (precision="fast")
};

// One a thread. `centred` and `minima` are aligned to 64 bytes.
struct BlockScratch {
  float* centred = nullptr;  // [D][lanes]
  float* minima = nullptr;   // [min(groups, kScreenGroups)][lanes]
};

struct Nearest {
  std::int64_t index[kMaxLanes];
  double value[kMaxLanes];  // squared distance, or dot product
};

struct RowKernel {
  const char* name;
  int lanes;  // rows in a block
  void (*nearest)(const CodebookView&, const RowBlock&, const BlockScratch&, Nearest*);
};

// The kernel in use: the best this machine has, or the one that FASTVQ_CPU_ISA names.
// Throws std::invalid_argument when that names one that is not there.
const RowKernel& row_kernel();

// The names of the kernels that were compiled and run here, the best last.
int available_row_kernels(const RowKernel* out[4]);

}  // namespace fastvq
