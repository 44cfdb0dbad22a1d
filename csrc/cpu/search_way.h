// Which way a search goes, by the shape of the codebook: looked up in what `python -m benchmarks.search_ways` measured.

#pragma once

#include <cstdint>

namespace fastvq {

struct SearchWay {
  int few_rows;  // up to so many rows, the codes are read where they lie rather than packed or compared
  bool int8;     // more rows are screened in int8, where the machine can
};

// For K codes of D dimensions: that of the measured shape next to it.
SearchWay search_way(std::int64_t codes, std::int64_t width);

}  // namespace fastvq
