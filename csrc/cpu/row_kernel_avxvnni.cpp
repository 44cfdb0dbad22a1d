#define FASTVQ_ISA avxvnni
#include "row_kernel_impl.h"
