// The screens of rows and codes that are stored as float16.

#include "search_screen.h"

namespace fastvq {

void start_half_screen(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, unsigned multiprocessors,
                       cudaStream_t stream) {
  start_screen_of<Operand::stored, __half, __half>(plan, a, heads, multiprocessors, stream);
}

}  // namespace fastvq
