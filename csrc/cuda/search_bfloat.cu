// The screens of rows and codes that are stored as bfloat16.

#include "search_screen.h"

namespace fastvq {

void start_bfloat_screen(const SearchPlan& plan, const ScreenArguments& a, unsigned heads, unsigned multiprocessors,
                         cudaStream_t stream) {
  start_screen_of<Operand::stored, __nv_bfloat16, __nv_bfloat16>(plan, a, heads, multiprocessors, stream);
}

}  // namespace fastvq
