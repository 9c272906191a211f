// Trilinear resampling with half-pixel centres (torch's interpolate, align_corners=False), one axis at a
// time, and the algebra of scaling rows to sum to one.
//
// With R the resampling matrix, c = R^T 1 its column sums, x a row and s = c.x:
//   y = R x / s;   for a gradient g of y and u = R^T g:   dx = (u - (u.x / s) c) / s.
// So the sum of a resampled row is read off the small row, and no gradient needs y.
#ifndef MEK_RESAMPLE_H
#define MEK_RESAMPLE_H

#include "mek_hd.h"

namespace mek {

// Where one output coordinate reads: low and its upper neighbour high (the same at the border).
struct Tap {
    int64_t low, high;
    double weight_low, weight_high;
};

MEK_HD Tap tap(int64_t output, int64_t size_in, int64_t size_out) {
    double place = ((double)output + 0.5) * (double)size_in / (double)size_out - 0.5;
    if (place < 0) place = 0;
    Tap result;
    result.low = min64((int64_t)place, size_in - 1);
    result.high = min64(result.low + 1, size_in - 1);
    result.weight_high = place - (double)result.low;
    result.weight_low = 1.0 - result.weight_high;
    return result;
}

// Outputs that read an input lie next to each other, since low and high never fall as the output rises.
struct Reach {
    int64_t first, end;
};

// First output whose low (or high) is at least `input`.
MEK_HD int64_t first_output(int64_t input, bool high, int64_t size_in, int64_t size_out) {
    int64_t below = 0, reaches = size_out;
    while (below < reaches) {
        const int64_t middle = (below + reaches) / 2;
        const Tap here = tap(middle, size_in, size_out);
        if ((high ? here.high : here.low) >= input)
            reaches = middle;
        else
            below = middle + 1;
    }
    return below;
}

MEK_HD Reach reach(int64_t input, int64_t size_in, int64_t size_out) {
    Reach result;
    result.first = first_output(input, true, size_in, size_out);
    result.end = max64(result.first, first_output(input + 1, false, size_in, size_out));
    return result;
}

MEK_HD double weight_of(const Tap &one, int64_t input) {
    return (one.low == input ? one.weight_low : 0.0) + (one.high == input ? one.weight_high : 0.0);
}

MEK_HD double column_sum(int64_t input, int64_t size_in, int64_t size_out) {
    const Reach outputs = reach(input, size_in, size_out);
    double sum = 0;
    for (int64_t o = outputs.first; o < outputs.end; ++o) sum += weight_of(tap(o, size_in, size_out), input);
    return sum;
}

// Sizes of one resampling.
struct Volumes {
    int64_t frames_in, height_in, width_in, frames_out, height_out, width_out;
};

MEK_HD int64_t plane_in(const Volumes &v) { return v.height_in * v.width_in; }
MEK_HD int64_t plane_out(const Volumes &v) { return v.height_out * v.width_out; }
MEK_HD int64_t volume_in(const Volumes &v) { return v.frames_in * plane_in(v); }
MEK_HD int64_t volume_out(const Volumes &v) { return v.frames_out * plane_out(v); }

// Scale of a row that is to sum to one; a row that sums to zero becomes zero.
MEK_HD double row_scale(double sum) { return sum == 0 ? 0.0 : 1.0 / sum; }

// One element of it; student and teacher rows are rounded alike, so that equal rows stay equal.
MEK_HD float scaled(float value, double scale) { return (float)((double)value * scale); }

// dx of the header's formula, one element.
MEK_HD float normalized_gradient(double u, double u_dot_y, double column, double scale) {
    return (float)((u - u_dot_y * column) * scale);
}

// 1 / norm, and 0 for no difference: there the gradient is taken as zero.
MEK_HD double inverse_norm(double norm) { return norm == 0 ? 0.0 : 1.0 / norm; }

}  // namespace mek
#endif
