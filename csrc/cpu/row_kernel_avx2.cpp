#define FASTVQ_ISA avx2
#include "row_kernel_impl.h"
