// The bound that makes screening exact; derived in docs/certified-search.md, whose names are used here.

#pragma once

#include <cstdint>

#ifndef FASTVQ_BOUND_FACTOR
#define FASTVQ_BOUND_FACTOR 1.0  // tests build with less, to see that the bound is needed
#endif

namespace fastvq {
namespace {

// What the bound needs to know of a codebook, computed once a block.
struct Certificate {
  double gamma;       // relative error of a sum of D + 2 rounded terms in float32
  double bias_max;    // max |c~|^2 / 2
  double norm;        // C
  double residual;    // E
  double double_sum;  // relative error of the float64 distance itself, with a margin
  bool usable;        // false where D is so large that float32 bounds nothing

  Certificate(std::int64_t width, double screen_norm, double code_residual, bool euclidean) {
    const double terms = static_cast<double>(width) + 2;
    const double u = 0x1p-24;
    usable = terms * u < 0.25;
    gamma = terms * u / (1 - terms * u) * (1 + 1e-6);
    bias_max = euclidean ? screen_norm * screen_norm / 2 : 0;
    norm = screen_norm;
    residual = code_residual;
    double_sum = (terms + 4) * 0x1p-52;
  }

  // eta: how far a screened score of a row with |x~| <= row_norm can be from the exact score of the rounded points.
  double accumulation(double row_norm) const {
    return gamma * (bias_max + row_norm * norm) + (gamma / 0x1p-24) * 0x1p-147;
  }

  // r: at least the distance of the row from a code with the screened score `best`, with a margin for the canonical
  // winner, which in float64 may lie that little farther.
  double distance(double best, double row_norm, double row_residual) const {
    const double squared = 2 * (best + accumulation(row_norm)) + row_norm * row_norm;
    return (__builtin_sqrt(squared > 0 ? squared : 0) + row_residual + residual) * (1 + double_sum);
  }

  // At least |e_k| of every code.
  double farthest() const { return norm + residual; }

  // At least |e_w|^2 / 2 - x~ . e_w of the canonical winner w; `best` and `reach` as given to and by distance().
  double score(double best, double row_norm, double row_residual, double reach) const {
    return best + accumulation(row_norm) + residual * (reach + residual) + 2 * row_residual * farthest() +
           double_sum * reach * reach;
  }

  // The same for the dot product: at least -(x~ + xi) . e_w, where |xi| <= row_residual.
  double product(double best, double row_norm, double row_residual) const {
    return best + accumulation(row_norm) + row_residual * farthest() + row_norm * residual +
           2 * double_sum * (row_norm + row_residual) * farthest();
  }

  // No code whose screened score lies above this can be the canonical nearest. best: the smallest screened score;
  // row_norm >= |x~|, row_residual >= |(x - m) S - x~|.
  double threshold(double best, double row_norm, double row_residual, bool euclidean) const {
    const double eta = accumulation(row_norm);
    double slack;
    if (euclidean) {
      const double reach = distance(best, row_norm, row_residual);
      const double by_distance = 2 * (row_residual + residual) * (reach + row_residual + residual);
      const double by_score = 2 * residual * (reach + row_residual + residual) + 2 * row_residual * farthest();
      slack = 2 * eta + (by_distance < by_score ? by_distance : by_score) + double_sum * reach * reach;
    } else {
      const double exact_norms = (row_norm + row_residual) * (norm + residual);
      slack = 2 * eta + 2 * (row_residual * (norm + residual) + row_norm * residual) + 2 * double_sum * exact_norms;
    }
    return best + FASTVQ_BOUND_FACTOR * slack;
  }
};

}  // namespace
}  // namespace fastvq
