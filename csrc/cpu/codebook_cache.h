// Packed codebooks kept between calls, for codebooks that have not changed.

#pragma once

#include <cstdint>
#include <memory>

#include "codebook.h"

namespace fastvq {

// The codebook packed for the kernel in use: a kept one whose codes equal these bit for bit, or a new one, which is
// kept if it is small. The codes themselves are compared, so nothing that changes them can go unseen; that costs a
// pass over them, far less than packing. Kept codebooks take at most 384 MiB, or what FASTVQ_CPU_KEPT_MIB says.
std::shared_ptr<const PackedCodebook> packed_codebook(const Rows& codes, Metric metric, bool screened, int threads);

// While it lives, the codebooks of this thread's calls count as unchanged since the last call with the same token, and
// are not compared. The token is the caller's word: it never stands for other codes at the same address. 0 is none.
class Unchanged {
 public:
  explicit Unchanged(std::uint64_t token);
  ~Unchanged();
  Unchanged(const Unchanged&) = delete;
  Unchanged& operator=(const Unchanged&) = delete;

 private:
  std::uint64_t before_;
};

// A codebook as a search of `row_count` rows wants it.
struct SearchCodes {
  Rows rows;                                     // the codes where they lie
  std::shared_ptr<const PackedCodebook> packed;  // null for a few rows, which need nothing packed
  CodebookView view;
};
SearchCodes search_codes(const Rows& codes, Metric metric, bool screened, std::int64_t row_count, int threads);

}  // namespace fastvq
