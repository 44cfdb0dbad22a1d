// The screens of float32 codes rounded to float16.

#include "search_screen.h"

namespace fastvq {

void start_rounded_screen(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, unsigned multiprocessors,
                          cudaStream_t stream) {
  start_screen_of<Operand::rounded, __half, float>(plan, a, heads, multiprocessors, stream);
}

}  // namespace fastvq
