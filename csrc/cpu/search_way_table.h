// Written by `python -m benchmarks.search_ways`, from benchmarks/results/search_ways.csv.
// AMD EPYC, avx512vnni, threads: 2, 2026-11-27.

#pragma once

#include "search_way.h"

namespace fastvq {

constexpr int kLowestWidth = 2, kWidthStep = 1, kWidths = 9;
constexpr int kLowestCodes = 4, kCodesStep = 2, kSizes = 7;

// clang-format off
// K = 16, 64, 256, 1024, 4096, 16384, 65536
constexpr SearchWay kSearchWays[kWidths][kSizes] = {
    {{0, false}, {1, false}, {0, false}, {0, true}, {0, true}, {0, true}, {0, true}},  // D = 4
    {{2, false}, {2, false}, {1, true}, {0, true}, {0, true}, {0, true}, {0, true}},  // D = 8
    {{6, false}, {3, false}, {2, true}, {1, true}, {1, true}, {1, true}, {1, true}},  // D = 16
    {{6, false}, {4, false}, {2, true}, {2, true}, {1, true}, {1, true}, {3, true}},  // D = 32
    {{16, false}, {6, true}, {3, true}, {2, true}, {2, true}, {3, true}, {2, true}},  // D = 64
    {{16, true}, {8, true}, {4, true}, {3, true}, {2, true}, {4, true}, {2, true}},  // D = 128
    {{16, true}, {6, true}, {4, true}, {3, true}, {4, true}, {4, true}, {4, true}},  // D = 256
    {{16, false}, {4, true}, {2, true}, {2, true}, {4, true}, {6, true}, {6, true}},  // D = 512
    {{16, false}, {12, false}, {2, true}, {4, true}, {8, true}, {8, true}, {8, true}},  // D = 1024
};
// clang-format on

}  // namespace fastvq
