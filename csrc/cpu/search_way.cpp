#include "search_way.h"

#include <algorithm>
#include <cmath>

#include "search_way_table.h"

namespace fastvq {
namespace {

// Which of the sizes, first 2^`low` and each 2^`step` times the last, is next to `size`.
int nearest_size(std::int64_t size, int low, int step, int count) {
  const double place = (std::log2(static_cast<double>(std::max<std::int64_t>(1, size))) - low) / step;
  return static_cast<int>(std::clamp(std::lround(place), 0L, static_cast<long>(count) - 1));
}

}  // namespace

SearchWay search_way(std::int64_t codes, std::int64_t width) {
  const int d = nearest_size(width, kLowestWidth, kWidthStep, kWidths);
  return kSearchWays[d][nearest_size(codes, kLowestCodes, kCodesStep, kSizes)];
}

}  // namespace fastvq
