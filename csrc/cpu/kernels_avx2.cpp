#define MEK_KERNELS kernels_avx2
#define MEK_KERNELS_NAME "avx2"
#include "kernels.inc"
