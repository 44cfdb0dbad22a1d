// All stages of a residual quantiser in one kernel.

#include "search_screen.h"

namespace fastvq {
namespace {

template <int WIDTH>
void start(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, int stages, cudaStream_t stream) {
  using P = ScreenPolicy<Operand::rounded, __half, float, WIDTH, Source::staged>;
  const dim3 grid(static_cast<unsigned>(plan.row_blocks * heads));
  launch(staged_kernel<P>, grid, dim3(P::kThreads), static_cast<std::size_t>(plan.shared_memory), stream, a, stages);
}

}  // namespace

void start_stages(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, int stages, cudaStream_t stream) {
  switch (plan.width) {
    case 32:
      return start<32>(plan, a, heads, stages, stream);
    case 64:
      return start<64>(plan, a, heads, stages, stream);
    case 128:
      return start<128>(plan, a, heads, stages, stream);
    case 256:
      return start<256>(plan, a, heads, stages, stream);
    default:
      return start<512>(plan, a, heads, stages, stream);
  }
}

}  // namespace fastvq
