// The screens of few dimensions: three bfloat16 products of float32 rows and codes, the bias among them.

#include "search_screen.h"

namespace fastvq {
namespace {

template <int WIDTH, Source SOURCE>
using Split = ScreenPolicy<Operand::split, __nv_bfloat16, float, WIDTH, SOURCE>;

}  // namespace

void start_split_screen(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, unsigned multiprocessors,
                        cudaStream_t stream) {
  const auto start = [&](auto policy) { start_screen<decltype(policy)>(plan, a, heads, multiprocessors, stream); };
  const bool resident = plan.source == Source::resident;
  switch (plan.width) {
    case 16:
      return resident ? start(Split<16, Source::resident>()) : start(Split<16, Source::streamed>());
    case 32:
      return resident ? start(Split<32, Source::resident>()) : start(Split<32, Source::streamed>());
    default:
      return resident ? start(Split<64, Source::resident>()) : start(Split<64, Source::streamed>());
  }
}

}  // namespace fastvq
