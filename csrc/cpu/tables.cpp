#include "tables.h"

namespace mek {

AxisTable ResampleStorage::fill(Axis &axis, int64_t in, int64_t out) {
    axis.indices.resize(2 * out + 3 * in);
    axis.weights.resize(4 * out);  // taps, and at most two inputs for each output
    axis.column_sums.resize(in);
    int32_t *low = axis.indices.data(), *high = low + out;
    int32_t *first = high + out, *end = first + in, *start = end + in;
    float *weight_low = axis.weights.data(), *weight_high = weight_low + out, *weights = weight_high + out;
    for (int64_t o = 0; o < out; ++o) {
        const Tap one = tap(o, in, out);
        low[o] = (int32_t)one.low;
        high[o] = (int32_t)one.high;
        weight_low[o] = (float)one.weight_low;
        weight_high[o] = (float)one.weight_high;
    }
    int64_t filled = 0;
    for (int64_t i = 0; i < in; ++i) {
        const Reach outputs = reach(i, in, out);
        first[i] = (int32_t)outputs.first;
        end[i] = (int32_t)outputs.end;
        start[i] = (int32_t)filled;
        axis.column_sums[i] = 0;
        for (int64_t o = outputs.first; o < outputs.end; ++o) {
            const double weight = weight_of(tap(o, in, out), i);
            weights[filled++] = (float)weight;
            axis.column_sums[i] += weight;
        }
    }
    AxisTable table = {in, out, low, high, weight_low, weight_high, first, end, start, weights};
    return table;
}

ResampleStorage::ResampleStorage(const Volumes &v) : column_sums_(volume_in(v)) {
    tables_.volumes = v;
    tables_.frames = fill(axes_[0], v.frames_in, v.frames_out);
    tables_.height = fill(axes_[1], v.height_in, v.height_out);
    tables_.width = fill(axes_[2], v.width_in, v.width_out);
    double *next = column_sums_.data();
    for (double t : axes_[0].column_sums)
        for (double h : axes_[1].column_sums)
            for (double w : axes_[2].column_sums) *next++ = t * h * w;
    tables_.column_sums = column_sums_.data();
}

}  // namespace mek
