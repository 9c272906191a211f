// The table of vector routines.  kernels_*.cpp each compile the same sources for one instruction set.
#ifndef MEK_KERNELS_H
#define MEK_KERNELS_H

#include <stdint.h>

#include "mek_resample.h"
#include "mek_scores.h"

namespace mek {

// Positions a motion_block call may cover, and the int32 words of scratch it needs for them.  Wide enough to
// read memory in one stream at the usual sizes (three times faster than blocks of 512), small enough for the
// first-level cache.
constexpr int64_t kMotionBlock = 2048;
constexpr int64_t kMotionScratch = 3 * kMotionBlock;

// One axis of a resampling: taps by output, and by input the outputs that read it with their weights.
struct AxisTable {
    int64_t in, out;
    const int32_t *low, *high;
    const float *weight_low, *weight_high;
    const int32_t *first, *end, *start;  // input i reads weights[start[i] + o - first[i]] of output o
    const float *weights;
};

struct ResampleTables {
    Volumes volumes;
    AxisTable frames, height, width;
    const double *column_sums;  // of the whole volume, by input element
};

// Floats of scratch a row needs.
MEK_HD int64_t resample_scratch(const Volumes &v) {
    return volume_in(v) + v.height_in * v.width_out + 5 * plane_out(v);
}

struct Kernels {
    const char *name;

    MotionPartial (*motion_block)(const float *diagonal, int64_t frames, int64_t positions, int64_t first,
                                  int64_t count, float tau, int32_t *scratch);

    // Rows of elements; data of any dtype.
    double (*sum)(const void *data, int32_t dtype, int64_t count);
    double (*distance)(const float *student, const void *teacher, int32_t dtype, int64_t count);
    void (*scaled_difference)(const float *student, const void *teacher, int32_t dtype, int64_t count,
                              double scale, float *out);
    void (*scale)(const float *values, float scale, int64_t count, float *out);

    // One row each.  resample returns the sum that the row was divided by.
    double (*resample)(const ResampleTables &tables, const float *map, bool normalize, float *resampled,
                       float *scratch);
    void (*resample_backward)(const ResampleTables &tables, const float *grad_resampled, const float *map,
                              bool normalize, float *grad_map, float *scratch);
    float (*align)(const ResampleTables &tables, const float *map, const void *teacher, int32_t dtype,
                   bool normalize, bool normalize_teacher, float *gradient, float *scratch);
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
