// The search of a few rows: the codes are read once, where they lie. Packing them, or comparing them with a kept copy,
// would cost more than the search.

#pragma once

#include "codebook.h"
#include "row_kernel.h"
#include "tensor.h"

namespace fastvq {

// Whether that many rows are few, and the codes lie so that they can be read as they are: D floats each.
bool few_rows(std::int64_t rows, const Rows& codes, Metric metric);

// The nearest codes of `count` rows of D floats, by squared distances in float32 that a bound certifies
// (docs/certified-search.md, "A few rows") and exact ones where it leaves a choice.
void nearest_of_few(const float* const* rows, int count, const Rows& codes, bool certify, bool want_value, int threads,
                    Nearest* found);

}  // namespace fastvq
