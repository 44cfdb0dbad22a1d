// The operators on CPUs. Tensors are as torch has them; outputs are contiguous, made by the caller, of the shapes that
// fastvq/ops.py declares. A tensor of codes with `heads` has a leading dimension H that x shares. Masks are contiguous
// bytes, one a row, or null. Bad values (an index past the codebook) throw std::invalid_argument.

#pragma once

#include <cstdint>

#include "codebook.h"
#include "row_kernel.h"
#include "tensor.h"

namespace fastvq {

// indices (...); distances (...), float or double as `distances.dtype` says, or null data.
void search(const Tensor& x, const Tensor& codebook, bool heads, Metric metric, bool certify, std::int64_t* indices,
            const Tensor& distances, int threads);

// The ways of a search, to be measured and compared: reading the codes where they lie, packed codes that are kept, and
// codes packed anew for the screen in float32 or, where the machine can, in int8.
enum class Way : int { kFew, kKept, kFloat32, kInt8 };

// The search of float rows among float codes of D floats each, neither with heads, by one way whatever the shape.
void search_by(Way way, const Tensor& x, const Tensor& codebook, std::int64_t* indices, int threads);

// What becomes of the rows of x when they are searched for their nearest codes; both float, without heads.
SearchCounts search_counts(const Tensor& x, const Tensor& codebook, int threads);

// quantized (..., D) in the dtype of x; loss (), `weight` times the mean squared difference of the unmasked rows;
// counts
// ([H,] K) of the unmasked rows that are finite, or null.
void vector_quantize(const Tensor& x, const Tensor& codebook, bool heads, Metric metric, double weight,
                     const std::uint8_t* mask, void* quantized, std::int64_t* indices, const Tensor& loss,
                     std::int64_t* counts, int threads);

// grad_x (..., D) = grad_quantized + commitment_weight * 2 grad_loss (x - q) / elements, and grad_codebook, contiguous
// in the dtype of the codebook; either may be null.
void vector_quantize_backward(const Tensor& grad_quantized, double grad_loss, const Tensor& x, const Tensor& codebook,
                              bool heads, const std::int64_t* indices, const std::uint8_t* mask,
                              double commitment_weight, double codebook_weight, void* grad_x, void* grad_codebook,
                              int threads);

// counts ([H,] K) and sums ([H,] K, D), both of the dtype of `counts`; of all rows, or of those that are finite alone.
void code_sums(const Tensor& x, bool heads, const std::int64_t* indices, const std::uint8_t* mask, bool finite_alone,
               const Tensor& counts, void* sums, int threads);

// codebook, embed_avg and sums ([H,] K, D), cluster_size and counts ([H,] K), strided; the first three are updated in
// place.
void ema_update(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_avg, const Tensor& counts,
                const Tensor& sums, double decay, double eps, int threads);

// The same from the finite ones of the rows x ([H,] ..., D) and their codes; counts ([H,] K), strided, becomes how many
// took each code.
void ema_step(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_avg, const Tensor& counts,
              const Tensor& x, const std::int64_t* indices, const std::uint8_t* mask, double decay, double eps,
              int threads);

// codebooks ([H,] Q, K, D); quantized (..., D) in the dtype of x; indices (..., Q); losses (Q).
void residual_quantize(const Tensor& x, const Tensor& codebooks, bool heads, Metric metric, void* quantized,
                       std::int64_t* indices, const Tensor& losses, int threads);

// grad_losses (Q) in float64; grad_x (..., D), grad_codebooks contiguous in the dtype of the codebooks; either may be
// null.
void residual_quantize_backward(const Tensor& grad_quantized, const double* grad_losses, const Tensor& x,
                                const Tensor& codebooks, bool heads, const std::int64_t* indices, void* grad_x,
                                void* grad_codebooks, int threads);

// out (..., D), in the dtype of x: the sum over the stages of the gradient (..., D), turned from each stage's code back
// to its residual; codebooks (Q, K, D) with indices (..., Q), or, with null indices, the code (..., D) of each row.
void rotate_back(const Tensor& gradient, const Tensor& x, const Tensor& codes, const std::int64_t* indices, void* out,
                 int threads);

// counts (Q, K) and sums (Q, K, D), both of the dtype of `counts`: of the residuals of each stage, finite ones alone.
void residual_code_sums(const Tensor& x, const Tensor& codebooks, const std::int64_t* indices, const Tensor& counts,
                        void* sums, int threads);

}  // namespace fastvq
