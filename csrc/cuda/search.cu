// How a search is cut, and its steps in order.

#include "search_kernels.h"
#include "search_screen.h"

namespace fastvq {
namespace {

constexpr std::size_t kAlignment = 256;

// Lays out the scratch memory of so many codebooks and heads of rows from `base` on; the end is *bytes. A null base
// only measures.
SearchScratch lay_out(const SearchPlan& plan, std::int64_t books, std::int64_t heads, std::int64_t N, void* base,
                      std::size_t* bytes) {
  std::size_t at = 0;
  const auto part = [&](std::int64_t size) {
    void* start = base == nullptr ? nullptr : static_cast<char*>(base) + at;
    at += ceil_div(static_cast<std::size_t>(size), kAlignment) * kAlignment;
    return start;
  };
  const bool screened = plan.source != Source::none, chunked = plan.source == Source::chunked;
  const std::int64_t rows = chunked ? heads * plan.row_blocks * plan.rows : 0;
  const std::int64_t parts = plan.splits > 1 ? plan.splits * heads * N : 0;
  SearchScratch scratch;
  scratch.figures = static_cast<CodebookFigures*>(part(books * static_cast<std::int64_t>(sizeof(CodebookFigures))));
  scratch.frame = static_cast<float*>(part(books * plan.width * 4));
  scratch.packed =
      static_cast<unsigned char*>(part(books * plan.tile_count * static_cast<std::int64_t>(plan.tile_bytes)));
  scratch.rounded = static_cast<unsigned char*>(part(rows * plan.width * 2));
  scratch.row_figures = static_cast<float*>(part(rows * 3 * 4));
  scratch.queue = static_cast<std::int64_t*>(part(screened ? heads * N * 8 : 0));
  scratch.part_scores = static_cast<double*>(part(parts * 8));
  scratch.part_indices = static_cast<int*>(part(parts * 4));
  scratch.residuals = static_cast<double*>(part(plan.residuals * 8));
  *bytes = at;
  return scratch;
}

int bits_for(std::int64_t numbers) {
  int bits = 0;
  while ((std::int64_t{1} << bits) < numbers) ++bits;
  return bits;
}

// The width of an operand, 0 where it goes through the pipeline in chunks.
int width_for(Operand operand, int D) {
  const int needed = operand == Operand::split ? 3 * D + 3 : D;
  for (int width : {16, 32, 64, 128, 256}) {
    if (width == 16 && operand != Operand::split) continue;
    if (needed <= width) return width;
  }
  return 0;
}

constexpr int kSplitDims = 16;      // at most, of a split operand
constexpr int kHeldDims = 64;       // of a row scored whole that no stage comes after: more blocks at a time
constexpr int kMostDims = 1 << 16;  // beyond, the bound is of no use
constexpr std::int64_t kMostCodes = std::int64_t{1} << 24;

bool vectors_fit(const void* data, std::int64_t element, std::initializer_list<std::int64_t> strides) {
  if (reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(4 * element) != 0) return false;
  for (std::int64_t stride : strides) {
    if (stride % 4 != 0) return false;
  }
  return true;
}

std::int64_t bytes_of(Float type) {
  return type == Float::float32 ? 4 : type == Float::float64 ? 8 : 2;
}

ScreenArguments arguments_of(const SearchProblem& p, const SearchPlan& plan, const SearchScratch& scratch,
                             std::int64_t* indices) {
  ScreenArguments a = {};
  a.x = p.x;
  a.K = p.K;
  a.D = p.D;
  a.euclidean = p.euclidean;
  a.row_vectors = p.x.dim == 1 && vectors_fit(p.x.data, bytes_of(p.x.type), {p.D, p.x.head, p.x.outer, p.x.step});
  a.code_vectors = vectors_fit(p.codebook, bytes_of(p.code_type), {p.D});
  a.slack = p.slack;
  a.bits = plan.bits;
  a.tiles = plan.tile_count;
  a.share = plan.share;
  a.row_blocks = plan.row_blocks;
  a.codebook = p.codebook;
  a.frame = scratch.frame;
  a.figures = scratch.figures;
  a.packed = scratch.packed;
  a.rounded = scratch.rounded;
  a.row_figures = scratch.row_figures;
  a.queue = scratch.queue;
  a.indices = indices;
  return a;
}

}  // namespace

SearchPlan plan_search(const Device& device, Float x, Float codes, std::int64_t heads, std::int64_t N, std::int64_t K,
                       int D) {
  SearchPlan plan = {};
  plan.splits = 1;
  plan.held = kHeldDims;
  plan.source = Source::none;
  const bool same = x == codes && (x == Float::float16 || x == Float::bfloat16);
  if (x != Float::float64 && codes != Float::float64 && (same || codes == Float::float32) && D <= kMostDims &&
      K <= kMostCodes) {
    plan.operand = same ? Operand::stored : D <= kSplitDims ? Operand::split : Operand::rounded;
    const int width = width_for(plan.operand, D);
    plan.source = width == 0 ? Source::chunked : Source::streamed;
    plan.chunk = width == 0 ? 64 : width;
    plan.width = width == 0 ? ceil_div(D, plan.chunk) * plan.chunk : width;
    const auto cut = [&](Source source) {
      plan.source = source;
      plan.tiles = tiles_for(plan.operand, source, plan.width);
      plan.rows = 16 * plan.tiles.m * plan.tiles.warps;
      plan.row_blocks = ceil_div<std::int64_t>(N, plan.rows);
      plan.tile_count = ceil_div<std::int64_t>(K, plan.tiles.tile);
      plan.tile_bytes = static_cast<std::size_t>(plan.tiles.tile) * (2 * plan.width + 4);
      const int lengths = plan.rows * 8;
      if (source == Source::resident) {
        return plan.tile_count * static_cast<std::int64_t>(plan.tile_bytes) + lengths;
      }
      const int code_bytes = source == Source::chunked ? 2 * plan.chunk * (plan.tiles.tile + plan.rows)
                                                       : static_cast<int>(plan.tile_bytes);
      return std::int64_t{plan.tiles.stages} * code_bytes + lengths;
    };
    std::int64_t shared = cut(plan.source);
    plan.share = plan.tile_count;
    // Few rows: the codes are split, so that all multiprocessors have work.
    const std::int64_t blocks = plan.row_blocks * heads;
    if (blocks > 0 && 2 * blocks <= device.multiprocessors) {
      std::int64_t splits = device.multiprocessors / blocks;
      if (splits > 64) splits = 64;
      if (splits > (plan.tile_count + 1) / 2) splits = (plan.tile_count + 1) / 2;
      plan.share = ceil_div(plan.tile_count, splits);
      plan.splits = static_cast<int>(ceil_div(plan.tile_count, plan.share));
    } else if (plan.source == Source::streamed && plan.width <= 64) {
      const std::int64_t resident = cut(Source::resident);
      if (resident <= device.shared_memory && plan.row_blocks * heads >= device.multiprocessors) {
        shared = resident;
      } else {
        shared = cut(Source::streamed);
      }
      plan.share = plan.tile_count;
    }
    plan.shared_memory = static_cast<int>(shared);
    plan.bits = bits_for(plan.share * (plan.tiles.tile / (4 * plan.tiles.group)));
  }
  lay_out(plan, heads, heads, N, nullptr, &plan.scratch_bytes);
  return plan;
}

void search(const SearchProblem& p, const SearchPlan& plan, const Device& device, void* scratch_memory,
            std::int64_t* indices, void* distances, std::uintptr_t stream_address) {
  if (p.heads == 0 || p.x.count == 0) return;
  auto* stream = stream_of(stream_address);
  std::size_t bytes;
  const SearchScratch scratch = lay_out(plan, p.heads, p.heads, p.x.count, scratch_memory, &bytes);
  if (plan.source == Source::none) {
    return score_rest(p, plan, scratch, 1, device.multiprocessors, indices, distances, stream);
  }
  pack_codes(p, plan, scratch, stream);
  ScreenArguments a = arguments_of(p, plan, scratch, indices);
  a.distances = distances;
  if (plan.splits > 1) {
    a.part_scores = scratch.part_scores;
    a.part_indices = scratch.part_indices;
  }
  ScreenStarter* start = plan.operand == Operand::split     ? start_split_screen
                         : plan.operand == Operand::rounded ? start_rounded_screen
                         : p.code_type == Float::float16    ? start_half_screen
                                                            : start_bfloat_screen;
  start(plan, a, static_cast<unsigned>(p.heads), static_cast<unsigned>(device.multiprocessors), stream);
  if (plan.splits > 1) merge_splits(p, plan, scratch, indices, distances, stream);
  score_rest(p, plan, scratch, 1, device.multiprocessors, indices, distances, stream);
}

SearchPlan plan_stages(const Device& device, Float x, Float codes, std::int64_t heads, int stages, std::int64_t N,
                       std::int64_t K, int D) {
  SearchPlan plan = {};
  plan.splits = 1;
  plan.source = Source::none;
  plan.held = whole_bytes(D) <= device.shared_memory ? D : kHeldDims;
  if (x == Float::float64 || codes != Float::float32 || D > kMostDims || K > kMostCodes) {
    if (plan.held < D) plan.residuals = heads * N * D;
    lay_out(plan, heads, heads, N, nullptr, &plan.scratch_bytes);
    return plan;
  }
  const int width = D <= 256 ? width_for(Operand::rounded, D) : 512;
  plan.operand = Operand::rounded;
  plan.source = Source::staged;
  plan.width = plan.chunk = width;
  plan.tiles = tiles_for(plan.operand, plan.source, width);
  plan.rows = 16 * plan.tiles.m * plan.tiles.warps;
  plan.row_blocks = ceil_div<std::int64_t>(N, plan.rows);
  plan.tile_count = plan.share = ceil_div<std::int64_t>(K, plan.tiles.tile);
  plan.tile_bytes = static_cast<std::size_t>(plan.tiles.tile) * (2 * width + 4);
  plan.bits = bits_for(plan.tile_count * (plan.tiles.tile / (4 * plan.tiles.group)));
  // The pipeline, and of each row its lengths, its code and its residual.
  plan.shared_memory = plan.tiles.stages * static_cast<int>(plan.tile_bytes) + plan.rows * (12 + 4 * width);
  if (D > width || plan.shared_memory > device.shared_memory) {
    plan.source = Source::chunked;
    return plan;
  }
  lay_out(plan, heads * stages, heads, N, nullptr, &plan.scratch_bytes);
  return plan;
}

void search_stages(const SearchProblem& p, const SearchPlan& plan, const Device& device, int stages,
                   void* scratch_memory, std::int64_t* indices, std::uintptr_t stream_address) {
  if (p.heads == 0 || p.x.count == 0) return;
  auto* stream = stream_of(stream_address);
  SearchProblem books = p;
  books.heads *= stages;
  std::size_t bytes;
  const SearchScratch scratch = lay_out(plan, books.heads, p.heads, p.x.count, scratch_memory, &bytes);
  if (plan.source == Source::staged) {
    pack_codes(books, plan, scratch, stream);
    const ScreenArguments a = arguments_of(p, plan, scratch, indices);
    start_stages(plan, a, static_cast<unsigned>(p.heads), stages, stream);
  }
  score_rest(p, plan, scratch, stages, device.multiprocessors, indices, nullptr, stream);
}

}  // namespace fastvq
