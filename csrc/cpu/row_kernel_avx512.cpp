#define FASTVQ_ISA avx512
#include "row_kernel_impl.h"
