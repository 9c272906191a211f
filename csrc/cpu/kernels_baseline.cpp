#define MEK_KERNELS kernels_baseline
#define MEK_KERNELS_NAME "baseline"
#include "kernels.inc"
