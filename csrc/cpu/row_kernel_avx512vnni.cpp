#define FASTVQ_ISA avx512vnni
#include "row_kernel_impl.h"
