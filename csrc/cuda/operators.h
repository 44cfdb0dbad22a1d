// The CUDA operators but for the search: what the bindings call. Every pointer is to device memory, every call only
// queues work on a stream of the current device, and throws what CUDA complains of.
//
// Codes (H, K, D) come as rows: of x's type, float32 or float64. Indices are (H, N) int64 and dense, masks (H, N) bytes
// or nullptr; `kept` is how many rows of all heads a mask keeps, nullptr for all. What is named out is dense.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace fastvq {

// A matrix (H, rows, columns) that is updated or read once, under any strides.
struct Matrix {
  void* data;
  Float type;
  std::int64_t head, row, column;  // strides
};

// How many devices the driver shows; 0 and *error set where there is no driver.
int device_count(const char** error);

// Makes a device the current one of this thread.
void set_device(int index);

// How many float64 partial sums a head's loss takes.
std::int64_t loss_parts(std::int64_t N, int D);

// quantized (H, N, D) in x's type, the codes at the indices; loss () = weight * mean((x - code)^2). The finite rows
// that the mask keeps are added to counts (H, K), unless that is null. `parts` holds H * loss_parts(N, D) float64.
void gather(const Rows& x, const Rows& codes, const std::int64_t* indices, const std::uint8_t* mask,
            const std::int64_t* kept, double weight, std::int64_t heads, std::int64_t K, int D, void* quantized,
            double* parts, void* loss, Float loss_type, std::int64_t* counts, std::uintptr_t stream);

// grad_x (H, N, D) in x's type: the gradient that came, which is of x's type too, and the pull of the commitment loss.
void pull(const Rows& gradient, const Rows& x, const Rows& codes, const std::int64_t* indices, const std::uint8_t* mask,
          const std::int64_t* kept, const void* grad_loss, Float loss_type, double weight, std::int64_t heads, int D,
          void* grad_x, std::uintptr_t stream);

// Of how many blocks' sums a head's are made where all fit shared memory; 0 where they do not.
std::int64_t small_sums_parts(std::int64_t N, std::int64_t K, int D, int element_bytes);

// counts (H, K) and sums (H, K, D) where they do. `parts` holds H * small_sums_parts * K * (D + 1) float64; it is not
// touched if that is one block. With `checked` an index past the codebook traps.
void small_sums(const Rows& x, const std::int64_t* indices, const std::uint8_t* mask, std::int64_t heads,
                std::int64_t K, int D, bool checked, void* counts, void* sums, Float type, double* parts,
                std::uintptr_t stream);

// The same of (row - code) * 2 grad_loss / elements, times `factor`, for indices (H, N, Q), of which the first a row
// counts; sums (H, K, D) with head stride `stride_sums`. row - code goes to `rest` (H, N, D) of the working type, which
// may be what x is, or nullptr.
void small_differences(const Rows& x, const Rows& codes, const std::int64_t* indices, std::int64_t Q,
                       const std::uint8_t* mask, const std::int64_t* kept, const void* grad_loss, Float loss_type,
                       std::int64_t heads, std::int64_t K, int D, double factor, void* sums, std::int64_t stride_sums,
                       Float type, double* parts, void* rest, std::uintptr_t stream);

// ---- rows sorted by code: csrc/cuda/sort.cu -----------------------------------------------------------------------

// The rows of each of P problems, sorted by code, in row order. P * N and every key are below 2^32.
struct ByCode {
  const std::uint32_t* keys;   // (P, N), ascending: the problem's number above the bits of a code, K for rows left out
  const std::uint32_t* order;  // (P, N), the row at each place
  const std::int64_t* starts;  // (P, K + 1), the first place of each code
  std::int64_t stride_rows, stride_starts, N, K;
  int code_bits;
};

// How many bits 0 .. K take.
constexpr int code_bits(std::int64_t K) {
  int bits = 1;
  while (K >> bits) ++bits;
  return bits;
}

// Bytes of scratch that sorting takes.
std::size_t sort_scratch(std::int64_t problems, std::int64_t N, std::int64_t K, std::uintptr_t stream);

// Sorts the rows of H * Q problems, indices (H, N, Q); with `checked` an index past the codebook traps. Keys and order
// are (2, H * Q, N): which of the two has become what ByCode describes is returned, the other is scratch.
int sort_rows(const std::int64_t* indices, const std::uint8_t* mask, std::int64_t heads, std::int64_t N, std::int64_t Q,
              std::int64_t K, bool checked, std::uint32_t* keys, std::uint32_t* order, std::int64_t* starts,
              void* scratch, std::size_t scratch_bytes, std::uintptr_t stream);

// ---- sums by code: csrc/cuda/code_sums.cu explains chunks, levels and slots ----------------------------------------

// Chunks of `size` rows: counts (H, K), sums (H, K, D) of codes of one chunk, and the chunks (H, 2 ceil(N / size), D)
// of the others. Elements of a row of x lie together.
void sum_rows(const Rows& x, const ByCode& by_code, std::int64_t heads, int D, std::int64_t size, void* counts,
              void* sums, Float type, double* chunks, std::uintptr_t stream);

// The same of the differences of `small_differences`.
void sum_differences(const Rows& x, const Rows& codes, const ByCode& by_code, const std::int64_t* kept,
                     const void* grad_loss, Float loss_type, std::int64_t heads, int D, std::int64_t size,
                     double factor, void* sums, std::int64_t stride_sums, Float type, double* chunks, void* rest,
                     std::uintptr_t stream);

// The next level: chunks of `size` rows from those of `part` rows.
void sum_chunks(const ByCode& by_code, const double* parts, std::int64_t heads, int D, std::int64_t part,
                std::int64_t size, double factor, void* sums, std::int64_t stride_sums, Float type, double* chunks,
                std::uintptr_t stream);

// ---- moving averages ------------------------------------------------------------------------------------------------

// How many float64 partial sums a head's total of cluster sizes takes.
std::int64_t ema_parts(std::int64_t K);

void ema_update(const Matrix& codebook, const Matrix& cluster_size, const Matrix& embed_avg, const Matrix& counts,
                const Matrix& sums, double decay, double eps, std::int64_t heads, std::int64_t K, int D, double* parts,
                std::uintptr_t stream);

// ---- residual quantisation: codes (H * Q, K, D), whose heads are a head's stages one after the other
// -----------------------

// residual (H, N, D) of the working type = x - codes at the indices (H, N, Q), stage q.
void take_codes(const Rows& x, const Rows& codes, const std::int64_t* indices, std::int64_t heads, std::int64_t Q,
                std::int64_t q, int D, void* residual, std::uintptr_t stream);

// quantized (H, N, D) in x's type; losses (Q,). `parts` holds Q * H * loss_parts(N, D) float64.
void gather_stages(const Rows& x, const Rows& codes, const std::int64_t* indices, std::int64_t heads, std::int64_t Q,
                   int D, void* quantized, double* parts, void* losses, Float loss_type, std::uintptr_t stream);

// grad_x (H, N, D) in x's type: the gradient that came, and the pull of every stage's loss.
void pull_stages(const Rows& gradient, const Rows& x, const Rows& codes, const std::int64_t* indices,
                 const void* grad_losses, Float loss_type, std::int64_t heads, std::int64_t Q, int D, void* grad_x,
                 std::uintptr_t stream);

}  // namespace fastvq
