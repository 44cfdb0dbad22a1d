// Packed codebooks kept between calls, for codebooks that have not changed.

#pragma once

#include <memory>

#include "codebook.h"

namespace fastvq {

// The codebook packed for the kernel in use: a kept one whose codes equal these bit for bit, or a new one, which is
// kept if it is small. The codes themselves are compared, so nothing that changes them can go unseen; that costs a
// pass over them, far less than packing. Kept codebooks take at most 32 MiB.
std::shared_ptr<const PackedCodebook> packed_codebook(const Rows& codes, Metric metric, bool screened, int threads);

}  // namespace fastvq
