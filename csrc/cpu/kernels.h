// The table of vector routines.  kernels_*.cpp each compile the same sources for one instruction set.
#ifndef MEK_KERNELS_H
#define MEK_KERNELS_H

#include <stdint.h>

#include "mek_scores.h"

namespace mek {

// Positions a motion_block call may cover, and the int32 words of scratch it needs for them.
constexpr int64_t kMotionBlock = 512;
constexpr int64_t kMotionScratch = 3 * kMotionBlock;

struct Kernels {
    const char *name;
    MotionPartial (*motion_block)(const float *diagonal, int64_t frames, int64_t positions, int64_t first,
                                  int64_t count, float tau, int32_t *scratch);
};

extern const Kernels kernels_baseline;
#if defined(MEK_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(MEK_HAVE_AVX512)
extern const Kernels kernels_avx512;
#endif

const Kernels &kernels();  // the ones in use

}  // namespace mek
#endif
