#define MEK_KERNELS kernels_avx512
#define MEK_KERNELS_NAME "avx512"
#include "kernels.inc"
