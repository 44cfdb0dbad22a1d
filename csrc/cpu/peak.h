// What the arithmetic of this machine can do at most: loops that stay in registers, to measure kernels against.

#pragma once

#include <cstdint>

namespace fastvq {

// Runs `rounds` rounds of multiply-adds on each of `threads` threads, with the widest vectors that were compiled and
// that the machine has, whatever FASTVQ_CPU_ISA says. Returns the operations done, two a multiply-add.
double float32_operations(std::int64_t rounds, int threads);

// The same for int8 dot products with int32 sums; 0 where the machine has no such instruction.
double int8_operations(std::int64_t rounds, int threads);

}  // namespace fastvq
