// All of this project's inline PTX: the matrix product of a warp, the loads that feed it and the asynchronous copies.
// The tests' CPU build takes the same functions from its own <shim_ptx.h>.
//
// Fragments, from the PTX manual ("Matrix Fragments for mma.m16n8k16 with .f16 / .bf16"), with g = lane / 4 and
// t = lane % 4; two 16-bit elements a register, the one of the smaller column (A) or row (B) in the low half:
//
//   A (16 x 16)   a[0]: row g,   columns 2t, 2t+1      a[1]: row g+8, columns 2t, 2t+1
//                 a[2]: row g,   columns 2t+8, 2t+9    a[3]: row g+8, columns 2t+8, 2t+9
//   B (16 x 8)    b[0]: rows 2t, 2t+1, column g        b[1]: rows 2t+8, 2t+9, column g
//   C, D (16 x 8) c[0], c[1]: row g, columns 2t, 2t+1  c[2], c[3]: row g+8, columns 2t, 2t+1
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__

namespace fastvq::ptx {

// c += a b, float16 in, float32 accumulated.
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with bfloat16 in.
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 i + r gives the 16-byte aligned address of row r of
// matrix i; r[i] gets elements 2t, 2t+1 of row g of matrix i.
__device__ __forceinline__ void ldmatrix(std::uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16.
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
}

// Makes the copies that this thread has started since the last commit a group; groups may be empty.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most Pending of this thread's groups are under way.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// threadIdx.x and blockIdx.x, read anew each time: no register keeps them through a loop that needs all there are.
__device__ __forceinline__ unsigned thread_again() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ unsigned block_again() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

}  // namespace fastvq::ptx

#else
#include <shim_ptx.h>
#endif
