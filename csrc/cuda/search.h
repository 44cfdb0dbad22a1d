// The nearest code on CUDA devices, and how the work is cut; docs/certified-search.md has the bounds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace fastvq {

struct Device {
  int arch;  // 80, 86, 89, 90, 100, 120
  int multiprocessors;
  int shared_memory;  // bytes a block may use
};

// What is multiplied: rows and codes as they are stored, or centred, scaled and rounded to float16; or each split in
// two bfloat16 parts, of which three products are taken.
enum class Operand : int { stored = 0, rounded = 1, split = 2 };

// Where the codes come from while rows are screened.
enum class Source : int {
  resident = 0,  // shared memory holds the whole codebook
  streamed = 1,  // in tiles, through a pipeline; rows in registers
  chunked = 2,   // rows too: more dimensions than registers hold
  none = 3,      // no screen: every code by the contract
  staged = 4,    // streamed, one codebook after the other: a residual quantiser
};

// The tile constants of a screen: one instantiation each.
struct Tiles {
  int group;   // codes of which the screen keeps one minimum
  int tile;    // codes of a stage of the pipeline
  int stages;  // of the pipeline
  int m;       // times 16 rows are a warp's
  int warps;
};

// Registers a thread of the screen: 4 m width / 16 hold the rows, 8 m to 16 m the products that are under way, 6 m the
// smallest scores, 2 m to 4 m the rest of a row. Shared memory: stages * tile * (2 width + 4) bytes and 8 a row.
constexpr Tiles tiles_for(Operand operand, Source source, int width) {
  if (source == Source::chunked) return {16, 64, 2, 2, 8};
  // The residual of 64 wide rows, 4 width bytes each, leaves room for two tiles of 16 KiB: 97 KiB at 256, 161 at 512.
  if (source == Source::staged && width > 128) return {2048 / width, 8192 / width, 2, 1, 4};
  if (source == Source::staged) return {16, 64, 2, 2, 4};
  const int tile = operand == Operand::split ? 4096 / width : width <= 64 ? 128 : 64;
  const int warps = source == Source::resident ? 8 : width <= 64 ? 4 : 8;
  return {16, tile, width <= 128 ? 3 : 2, width <= 64 ? 4 : 2, warps};
}

// How a search is cut; a pure function of device, shapes and types.
struct SearchPlan {
  Operand operand;
  Source source;
  int width;  // dimensions of an operand, padded; of a split one, its products and the bias
  int chunk;  // of them, that a stage of the pipeline holds
  Tiles tiles;
  int rows;                 // of a block
  int shared_memory;        // bytes
  int held;                 // dimensions of a row scored whole that shared memory holds at a time
  int splits;               // of the codes, among blocks
  int bits;                 // of a score that hold the number of a segment
  std::int64_t row_blocks;  // of a head
  std::int64_t tile_count;  // of a codebook
  std::int64_t share;       // tiles of a split
  std::size_t tile_bytes;   // of packed codes
  std::int64_t residuals;   // float64 values of rows scored whole, all stages, that shared memory has no room for
  std::size_t scratch_bytes;
};

struct SearchProblem {
  Rows x;
  std::int64_t heads, K;
  int D;
  const void*
      codebook;  // (H, K, D) dense: of x's type where that is 16 bits and stays, float64 where either is, or float32
  Float code_type;
  bool euclidean;
  float slack;  // of the certificate: 1; smaller only in tests
};

SearchPlan plan_search(const Device& device, Float x, Float codes, std::int64_t heads, std::int64_t N, std::int64_t K,
                       int D);

// indices (H, N); distances (H, N), float64 or float32 as the inputs are, or nullptr. `scratch` has plan.scratch_bytes,
// aligned to 256. Throws what CUDA complains of.
void search(const SearchProblem& problem, const SearchPlan& plan, const Device& device, void* scratch,
            std::int64_t* indices, void* distances, std::uintptr_t stream);

// All stages of residual quantisers in one kernel: p.codebook is (H, Q, K, D), float32 or float64, indices are
// (H, N, Q). The plan's source is `staged`; `none` for float64; or `chunked`, which search_stages does not take: more
// dimensions than registers and shared memory hold, to be searched stage by stage.
SearchPlan plan_stages(const Device& device, Float x, Float codes, std::int64_t heads, int stages, std::int64_t N,
                       std::int64_t K, int D);
void search_stages(const SearchProblem& p, const SearchPlan& plan, const Device& device, int stages, void* scratch,
                   std::int64_t* indices, std::uintptr_t stream);

}  // namespace fastvq
