// Packed codebooks kept between calls, for codebooks that have not changed.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "codebook.h"
#include "row_kernel.h"

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

struct Kept;

// A kept codebook that the codes of a search most likely are, for a search that finds out by the way; what it found of
// other codes is of no use.
class LikelyCodebook {
 public:
  LikelyCodebook(const Rows& codes, Metric metric, bool screened, std::int64_t row_count);

  explicit operator bool() const { return entry_ != nullptr; }
  SearchCodes codes() const;
  // What block `block` of `blocks` of a search compares, and what it tells afterwards, with the rest of it.
  Twins twins(std::int64_t block, std::int64_t blocks) const;
  void compared(const Twins& twins);
  // Whether nothing was found to differ so far.
  bool same() const { return same_.load(std::memory_order_relaxed); }
  // The same when all is compared; the cache takes note that this codebook is in use.
  bool found_same() const;

 private:
  const Rows codes_;
  std::shared_ptr<const Kept> entry_;
  std::atomic<bool> same_{true};
};

}  // namespace fastvq
