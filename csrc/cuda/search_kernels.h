// The steps of a search, one file each, and the memory they share.
#pragma once

#include "search_device.h"

namespace fastvq {

// Where the parts of the scratch memory begin.
struct SearchScratch {
  CodebookFigures* figures;  // (H)
  float* frame;              // (H, width)
  unsigned char* packed;     // (H, tiles, tile_bytes)
  unsigned char* rounded;    // rows, where they are chunked
  float* row_figures;        // (H, row blocks * rows, 3)
  std::int64_t* queue;       // (H, N)
  double* part_scores;       // (splits, H, N), where the codes are split
  int* part_indices;         // (splits, H, N)
  double* residuals;         // (H, N, D), where rows scored whole need it
};

// Clears the figures; packs the codes, and the rows where they are chunked.
void pack_codes(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, cudaStream_t stream);

// The best of the splits' winners, in the order of the splits; rows that a split could not settle are queued.
void merge_splits(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, std::int64_t* indices,
                  void* distances, cudaStream_t stream);

// Queued rows (all rows, where nothing was screened) against every code of every stage, by the contract.
void score_rest(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, int stages,
                int multiprocessors, std::int64_t* indices, void* distances, cudaStream_t stream);

constexpr int kWholeRows = 8, kWholeThreads = 256;  // of a block that scores rows whole

// The shared memory of such a block: `held` dimensions of its rows, and of each row and warp a score and a code.
constexpr std::int64_t whole_bytes(int held) {
  return kWholeRows * (8 * static_cast<std::int64_t>(held) + kWholeThreads / 32 * 12);
}

}  // namespace fastvq
