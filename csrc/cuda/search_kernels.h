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
};

// Clears the figures; packs the codes, and the rows where they are chunked.
void pack_codes(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, cudaStream_t stream);

// The best of the splits' winners, in the order of the splits; rows that a split could not settle are queued.
void merge_splits(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch, std::int64_t* indices,
                  void* distances, cudaStream_t stream);

// Queued rows (all rows, where queue is nullptr) against every code of every stage, by the contract.
void score_rest(const SearchProblem& p, int stages, const CodebookFigures* figures, const std::int64_t* queue,
                int multiprocessors, std::int64_t* indices, void* distances, cudaStream_t stream);

}  // namespace fastvq
