#define FASTVQ_ISA portable
#include "row_kernel_impl.h"
