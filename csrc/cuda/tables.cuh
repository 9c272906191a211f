// Tables of a resampling in the workspace: filled by one kernel, read by the next.
#ifndef MEK_TABLES_CUH
#define MEK_TABLES_CUH

#include "block.cuh"
#include "mek_resample.h"

namespace mek {

struct AxisTable {
    int in, out;
    int *low, *high;                   // by output
    float *weight_low, *weight_high;   // by output
    int *first, *end;                  // by input: the outputs that read it
    double *column_sums;               // by input
};

struct Tables {
    Volumes volumes;
    AxisTable frames, height, width;
    double *row_scales;  // a row each
    float *slabs;        // a resident block each: one frame of differences, and that frame reduced in width
};

// Blocks that walk over the rows together: enough to fill any GPU, few enough for a small workspace.
constexpr int64_t kResidentBlocks = 512;

inline int64_t resident_blocks(int64_t rows) { return min64(rows, kResidentBlocks); }
MEK_HD int64_t slab_size(const Volumes &v) { return plane_out(v) + v.height_out * v.width_in; }

// Lays the tables out from `workspace` on (null to measure) and returns the bytes they take.
int64_t lay_out(const Volumes &volumes, int64_t rows, bool slabs, void *workspace, Tables *tables);

// Fills the axes; returns a status.
int32_t fill_tables(const char *function, const Tables &tables, void *stream);

__device__ __forceinline__ float tap_weight(const AxisTable &axis, int output, int input) {
    return (axis.low[output] == input ? axis.weight_low[output] : 0.0f) +
           (axis.high[output] == input ? axis.weight_high[output] : 0.0f);
}

__device__ __forceinline__ double column_sum_at(const Tables &t, int frame, int y, int x) {
    return t.frames.column_sums[frame] * t.height.column_sums[y] * t.width.column_sums[x];
}

// One input frame, resampled in height and width at one place.
__device__ __forceinline__ float bilinear(const Tables &t, const float *plane, int y, int x) {
    const float *low = plane + (int64_t)t.height.low[y] * t.width.in;
    const float *high = plane + (int64_t)t.height.high[y] * t.width.in;
    const int left = t.width.low[x], right = t.width.high[x];
    const float weight_left = t.width.weight_low[x], weight_right = t.width.weight_high[x];
    return t.height.weight_low[y] * (weight_left * low[left] + weight_right * low[right]) +
           t.height.weight_high[y] * (weight_left * high[left] + weight_right * high[right]);
}

__device__ __forceinline__ float trilinear(const Tables &t, const float *map, int frame, int y, int x) {
    const int64_t plane = plane_in(t.volumes);
    return t.frames.weight_low[frame] * bilinear(t, map + t.frames.low[frame] * plane, y, x) +
           t.frames.weight_high[frame] * bilinear(t, map + t.frames.high[frame] * plane, y, x);
}

// Sum of the resampled row; every thread of the block gets it.
__device__ __forceinline__ double sum_of_row(const Tables &t, const float *map) {
    double sum = 0;
    for (int frame = 0; frame < t.frames.in; ++frame)
        MEK_FOR_PLANE(y, x, t.height.in, t.width.in)
            sum += column_sum_at(t, frame, y, x) *
                   (double)map[((int64_t)frame * t.height.in + y) * t.width.in + x];
    return block_sum(sum);
}

// Adds the transpose of `trilinear` for one output frame of `values` into `gradient`.  Each thread adds to
// its own share of a plane, so the order of the sums is fixed.  `narrow`: height_out x width_in of memory.
__device__ __forceinline__ void reduce_frame(const Tables &t, int frame, const float *values, float *narrow,
                                             float *gradient) {
    MEK_FOR_PLANE(y, x, t.height.out, t.width.in) {
        float total = 0;
        for (int o = t.width.first[x]; o < t.width.end[x]; ++o)
            total += tap_weight(t.width, o, x) * values[(int64_t)y * t.width.out + o];
        narrow[(int64_t)y * t.width.in + x] = total;
    }
    __syncthreads();
    const int64_t plane = plane_in(t.volumes);
    float *low = gradient + t.frames.low[frame] * plane, *high = gradient + t.frames.high[frame] * plane;
    MEK_FOR_PLANE(y, x, t.height.in, t.width.in) {
        float total = 0;
        for (int o = t.height.first[y]; o < t.height.end[y]; ++o)
            total += tap_weight(t.height, o, y) * narrow[(int64_t)o * t.width.in + x];
        const int64_t place = (int64_t)y * t.width.in + x;
        low[place] += t.frames.weight_low[frame] * total;
        high[place] += t.frames.weight_high[frame] * total;
    }
}

__device__ __forceinline__ void clear_gradient(const Tables &t, float *gradient) {
    for (int frame = 0; frame < t.frames.in; ++frame)
        MEK_FOR_PLANE(y, x, t.height.in, t.width.in)
            gradient[((int64_t)frame * t.height.in + y) * t.width.in + x] = 0;
}

// Turns u = R^T g in place into the gradient of the row, times `factor`.
__device__ __forceinline__ void finish_gradient(const Tables &t, const float *map, bool normalize, double scale,
                                                double factor, float *gradient) {
    double dot = 0;
    if (normalize) {
        for (int frame = 0; frame < t.frames.in; ++frame)
            MEK_FOR_PLANE(y, x, t.height.in, t.width.in) {
                const int64_t place = ((int64_t)frame * t.height.in + y) * t.width.in + x;
                dot += (double)gradient[place] * (double)map[place];
            }
        dot = block_sum(dot) * scale;
    }
    for (int frame = 0; frame < t.frames.in; ++frame)
        MEK_FOR_PLANE(y, x, t.height.in, t.width.in) {
            const int64_t place = ((int64_t)frame * t.height.in + y) * t.width.in + x;
            gradient[place] =
                normalized_gradient(gradient[place], dot, column_sum_at(t, frame, y, x), scale * factor);
        }
}

}  // namespace mek
#endif
