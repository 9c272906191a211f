// What host and device code share.  Everything here has internal linkage: the same header is compiled
// with different instruction sets, and the linker must never pick one file's copy for another.
#ifndef MEK_HD_H
#define MEK_HD_H

#include <stdint.h>

#if defined(__CUDACC__)
#define MEK_HD static __host__ __device__ __forceinline__
#else
#define MEK_HD static inline
#endif

namespace mek {

MEK_HD int popcount64(uint64_t x) {
#if defined(__CUDA_ARCH__)
    return __popcll(x);
#elif defined(__GNUC__)
    return __builtin_popcountll(x);
#else
    int n = 0;
    for (; x; x &= x - 1) ++n;
    return n;
#endif
}

MEK_HD bool is_nan(double x) { return x != x; }

MEK_HD double quiet_nan() {
#if defined(__CUDA_ARCH__)
    return __longlong_as_double(0x7ff8000000000000LL);
#else
    return __builtin_nan("");
#endif
}

MEK_HD double positive_infinity() {
#if defined(__CUDA_ARCH__)
    return __longlong_as_double(0x7ff0000000000000LL);
#else
    return __builtin_inf();
#endif
}

MEK_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MEK_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
MEK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mek
#endif
