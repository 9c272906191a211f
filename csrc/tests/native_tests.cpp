// Numbers of every function against plain loops in double precision, under the sanitizers: exact-sized
// buffers, so that one element too many is seen.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <functional>
#include <string>
#include <vector>

#include "host_device.h"
#include "mek.h"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

static int failures = 0, checks = 0;

static void expect(bool condition, const std::string &what) {
    ++checks;
    if (condition) return;
    ++failures;
    fprintf(stderr, "FAILED %s: %s\n", what.c_str(), mek_last_error());
}

static void expect_close(const Floats &found, const Doubles &exact, double tolerance, const std::string &what) {
    double largest = 1e-30, error = 0;
    for (double value : exact) largest = fmax(largest, fabs(value));
    for (size_t i = 0; i < exact.size(); ++i) {
        const double here = fabs((double)found[i] - exact[i]);
        if (!(here <= error)) error = here;  // NaN is kept
    }
    char text[160];
    snprintf(text, sizeof text, "%s (error %.2e of %.2e)", what.c_str(), error, largest);
    expect(found.size() == exact.size() && error <= tolerance * largest, text);
}

static Floats random_floats(Random &random, int64_t count) {
    Floats values(count);
    for (float &value : values) value = random.uniform();
    return values;
}

struct Shape {
    int64_t f, h, w;
    int64_t size() const { return f * h * w; }
};

// A place to run: the CPU at one level, or the CUDA kernels on the host.
struct Target {
    std::string name;
    bool cuda;
};

// Memory of the emulated device for the length of a call.
class Device {
  public:
    explicit Device(int64_t workspace_bytes) : memory_(workspace_bytes + 256) {
        cuda_on_host_clear();
        workspace_ = memory_.data() + (256 - (uintptr_t)memory_.data() % 256) % 256;
        cuda_on_host_register(workspace_, workspace_bytes, 0);
    }
    template <typename T>
    Device &with(const std::vector<T> &values) {
        cuda_on_host_register(values.data(), (int64_t)(values.size() * sizeof(T)), 0);
        return *this;
    }
    void *workspace() { return workspace_; }

  private:
    std::vector<char> memory_;
    char *workspace_;
};

// ---- the mathematics again, as plainly as possible ----

struct Weights {
    int64_t low, high;
    double to_high;
};

static Weights axis(int64_t out, int64_t size_in, int64_t size_out) {
    const double place = fmax((out + 0.5) * (double)size_in / (double)size_out - 0.5, 0.0);
    int64_t low = (int64_t)floor(place);
    if (low > size_in - 1) low = size_in - 1;
    return {low, low + 1 < size_in ? low + 1 : low, place - (double)low};
}

// Dense (out, in) matrix of the resampling.
static Doubles resample_matrix(Shape in, Shape out) {
    Doubles matrix(out.size() * in.size());
    for (int64_t t = 0; t < out.f; ++t)
        for (int64_t y = 0; y < out.h; ++y)
            for (int64_t x = 0; x < out.w; ++x) {
                const Weights a = axis(t, in.f, out.f), b = axis(y, in.h, out.h), c = axis(x, in.w, out.w);
                for (int corner = 0; corner < 8; ++corner) {
                    const int64_t i = corner & 1 ? a.high : a.low, j = corner & 2 ? b.high : b.low;
                    const int64_t k = corner & 4 ? c.high : c.low;
                    const double weight = (corner & 1 ? a.to_high : 1 - a.to_high) *
                                          (corner & 2 ? b.to_high : 1 - b.to_high) *
                                          (corner & 4 ? c.to_high : 1 - c.to_high);
                    matrix[((t * out.h + y) * out.w + x) * in.size() + (i * in.h + j) * in.w + k] += weight;
                }
            }
    return matrix;
}

struct RowResult {
    Doubles rows;  // resampled and scaled to sum to one
    double total;
};

static RowResult resample_row(const Doubles &matrix, const float *map, Shape in, Shape out) {
    RowResult result{Doubles(out.size()), 0};
    for (int64_t o = 0; o < out.size(); ++o) {
        for (int64_t i = 0; i < in.size(); ++i) result.rows[o] += matrix[o * in.size() + i] * (double)map[i];
        result.total += result.rows[o];
    }
    for (double &value : result.rows) value /= result.total;
    return result;
}

// Gradient of the map from that of the scaled row.
static Doubles row_gradient(const Doubles &matrix, const RowResult &row, const Doubles &grad, Shape in, Shape out) {
    double dot = 0;
    for (int64_t o = 0; o < out.size(); ++o) dot += grad[o] * row.rows[o];
    Doubles result(in.size());
    for (int64_t o = 0; o < out.size(); ++o)
        for (int64_t i = 0; i < in.size(); ++i)
            result[i] += matrix[o * in.size() + i] * (grad[o] - dot) / row.total;
    return result;
}

// ---- the tests ----

static void test_motion_scores(const Target &target, int64_t heads, int64_t frames, int64_t positions, uint64_t seed) {
    Random random(seed);
    const Floats diagonal = random_floats(random, heads * frames * frames * positions);
    const Floats tau(heads, 0.6f), squares(heads, (float)(frames * frames * positions) * 3);
    Floats dfc(heads), tcs(heads), dsr(heads);
    int32_t status;
    if (target.cuda) {
        int64_t bytes = 0;
        mek_cuda_motion_scores_workspace(heads, frames, positions, &bytes);
        Device device(bytes);
        device.with(diagonal).with(tau).with(squares).with(dfc).with(tcs).with(dsr);
        status = mek_cuda_motion_scores(diagonal.data(), tau.data(), squares.data(), heads, frames, positions,
                                        dfc.data(), tcs.data(), dsr.data(), device.workspace(), bytes, 0, nullptr);
    } else {
        status = mek_motion_scores(diagonal.data(), tau.data(), squares.data(), heads, frames, positions,
                                   dfc.data(), tcs.data(), dsr.data(), 2);
    }
    Doubles exact_dfc(heads), exact_tcs(heads), exact_dsr(heads);
    for (int64_t h = 0; h < heads; ++h) {
        double inside = 0;
        for (int64_t p = 0; p < positions; ++p) {
            int64_t above = 0, runs = 0;
            for (int64_t f = 0; f < frames; ++f)
                for (int64_t g = 0; g < frames; ++g) {
                    auto at = [&](int64_t j) { return diagonal[((h * frames + f) * frames + j) * positions + p]; };
                    above += at(g) > tau[h];
                    runs += at(g) > tau[h] && (g == 0 || !(at(g - 1) > tau[h]));
                    exact_dsr[h] += at(g) >= tau[h];
                    inside += (double)at(g) * (double)at(g);
                }
            if (runs) exact_tcs[h] += (double)above / (double)runs / (double)positions;
        }
        exact_dsr[h] /= (double)(frames * frames * positions);
        exact_dfc[h] = positions > 1 ? inside / ((double)squares[h] - inside) : INFINITY;
    }
    const std::string what = "motion_scores " + target.name;
    expect(status == MEK_OK, what);
    if (positions > 1) expect_close(dfc, exact_dfc, 1e-6, what + " dfc");
    expect_close(tcs, exact_tcs, 1e-6, what + " tcs");
    expect_close(dsr, exact_dsr, 1e-6, what + " dsr");
}

static void test_token_motion_scores(const Target &target, int64_t tokens, int64_t frames, int64_t positions) {
    Random random(5);
    const Floats attention = random_floats(random, tokens * frames * positions);
    Floats scores(tokens);
    int32_t status;
    if (target.cuda) {
        int64_t bytes = 0;
        mek_cuda_token_motion_scores_workspace(tokens, frames, positions, &bytes);
        Device device(bytes);
        device.with(attention).with(scores);
        status = mek_cuda_token_motion_scores(attention.data(), MEK_FLOAT32, tokens, frames, positions,
                                              scores.data(), device.workspace(), bytes, 0, nullptr);
    } else {
        status = mek_token_motion_scores(attention.data(), MEK_FLOAT32, tokens, frames, positions, scores.data(), 0);
    }
    Doubles exact(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
        Doubles level(frames);
        for (int64_t i = 0; i < frames * positions; ++i)
            level[i / positions] += (double)attention[t * frames * positions + i] / (double)positions;
        for (int64_t f = 0; f < frames; ++f) {
            exact[t] += level[f] / (double)frames;
            if (f) exact[t] += fabs(level[f] - level[f - 1]) / (double)(frames - 1);
        }
    }
    expect(status == MEK_OK, "token_motion_scores " + target.name);
    expect_close(scores, exact, 1e-6, "token_motion_scores " + target.name);
}

static void test_resampling(const Target &target, Shape in, Shape out, uint64_t seed) {
    const int64_t rows = 3;
    Random random(seed);
    const Floats maps = random_floats(random, rows * in.size()), grad = random_floats(random, rows * out.size());
    Floats teacher = random_floats(random, rows * out.size());
    const std::vector<uint8_t> mask = {1, 0, 1};
    Floats resampled(rows * out.size()), sums(rows), grad_maps(rows * in.size()), norms(rows), gradient(rows * in.size());
    int32_t status[3];
    if (target.cuda) {
        int64_t bytes = 0, more = 0;
        mek_cuda_resample_rows_workspace(rows, in.f, in.h, in.w, out.f, out.h, out.w, &bytes);
        mek_cuda_align_workspace(rows, in.f, in.h, in.w, out.f, out.h, out.w, &more);
        expect(more > bytes, "the slabs need memory");
        Device device(more);
        device.with(maps).with(grad).with(teacher).with(mask);
        device.with(resampled).with(sums).with(grad_maps).with(norms).with(gradient);
        status[0] = mek_cuda_resample_rows(maps.data(), rows, in.f, in.h, in.w, out.f, out.h, out.w, 1,
                                           resampled.data(), sums.data(), device.workspace(), bytes, 0, nullptr);
        status[1] = mek_cuda_resample_rows_backward(grad.data(), maps.data(), rows, in.f, in.h, in.w, out.f, out.h,
                                                    out.w, 1, grad_maps.data(), device.workspace(), more, 0, nullptr);
        status[2] = mek_cuda_align(maps.data(), teacher.data(), MEK_FLOAT32, mask.data(), rows, in.f, in.h, in.w,
                                   out.f, out.h, out.w, 1, 0, norms.data(), gradient.data(), device.workspace(),
                                   more, 0, nullptr);
    } else {
        status[0] = mek_resample_rows(maps.data(), rows, in.f, in.h, in.w, out.f, out.h, out.w, 1, resampled.data(), sums.data(), 2);
        status[1] = mek_resample_rows_backward(grad.data(), maps.data(), rows, in.f, in.h, in.w, out.f, out.h, out.w,
                                               1, grad_maps.data(), 2);
        status[2] = mek_align(maps.data(), teacher.data(), MEK_FLOAT32, mask.data(), rows, in.f, in.h, in.w, out.f,
                              out.h, out.w, 1, 0, norms.data(), gradient.data(), 2);
    }
    const Doubles matrix = resample_matrix(in, out);
    Doubles exact_rows, exact_sums, exact_grad, exact_norms, exact_gradient;
    for (int64_t r = 0; r < rows; ++r) {
        const RowResult row = resample_row(matrix, maps.data() + r * in.size(), in, out);
        exact_sums.push_back(row.total);
        exact_rows.insert(exact_rows.end(), row.rows.begin(), row.rows.end());
        Doubles upstream(out.size()), direction(out.size());
        double squares = 0;
        for (int64_t o = 0; o < out.size(); ++o) {
            upstream[o] = grad[r * out.size() + o];
            direction[o] = row.rows[o] - (double)teacher[r * out.size() + o];
            squares += direction[o] * direction[o];
        }
        for (double &value : direction) value = mask[r] ? value / sqrt(squares) : 0;
        exact_norms.push_back(mask[r] ? sqrt(squares) : 0);
        const Doubles first = row_gradient(matrix, row, upstream, in, out);
        const Doubles second = row_gradient(matrix, row, direction, in, out);
        exact_grad.insert(exact_grad.end(), first.begin(), first.end());
        exact_gradient.insert(exact_gradient.end(), second.begin(), second.end());
    }
    for (int i = 0; i < 3; ++i) expect(status[i] == MEK_OK, "resampling " + target.name);
    expect_close(resampled, exact_rows, 1e-5, "resample_rows " + target.name);
    expect_close(sums, exact_sums, 1e-6, "sums of " + target.name);
    expect_close(grad_maps, exact_grad, 1e-5, "resample_rows_backward " + target.name);
    expect_close(norms, exact_norms, 1e-5, "align " + target.name);
    expect_close(gradient, exact_gradient, 1e-5, "align gradient " + target.name);
}

static void test_row_l2(const Target &target, int64_t rows, int64_t columns) {
    Random random(9);
    const Floats student = random_floats(random, rows * columns), grad_norms = random_floats(random, rows);
    std::vector<uint16_t> teacher(rows * columns);
    for (uint16_t &value : teacher) value = (uint16_t)(0x3f00 + random.below(128));  // bfloat16 of [0.5, 1)
    Floats norms(rows), grad(rows * columns), scaled(rows * columns);
    int32_t status[3];
    if (target.cuda) {
        Device device(0);
        device.with(student).with(teacher).with(grad_norms).with(norms).with(grad).with(scaled);
        status[0] = mek_cuda_row_l2(student.data(), teacher.data(), MEK_BFLOAT16, nullptr, rows, columns,
                                    norms.data(), 0, nullptr);
        status[1] = mek_cuda_row_l2_backward(student.data(), teacher.data(), MEK_BFLOAT16, nullptr, norms.data(),
                                             grad_norms.data(), rows, columns, grad.data(), 0, nullptr);
        status[2] = mek_cuda_align_backward(student.data(), grad_norms.data(), rows, columns, scaled.data(), 0, nullptr);
    } else {
        status[0] = mek_row_l2(student.data(), teacher.data(), MEK_BFLOAT16, nullptr, rows, columns, norms.data(), 0);
        status[1] = mek_row_l2_backward(student.data(), teacher.data(), MEK_BFLOAT16, nullptr, norms.data(),
                                        grad_norms.data(), rows, columns, grad.data(), 0);
        status[2] = mek_align_backward(student.data(), grad_norms.data(), rows, columns, scaled.data(), 0);
    }
    Doubles exact_norms(rows), exact_grad(rows * columns), exact_scaled(rows * columns);
    for (int64_t r = 0; r < rows; ++r) {
        for (int pass = 0; pass < 2; ++pass)
            for (int64_t i = r * columns; i < (r + 1) * columns; ++i) {
                const double other = 0.5 + (double)(teacher[i] - 0x3f00) / 256;
                const double difference = (double)student[i] - other;
                if (pass == 0) exact_norms[r] += difference * difference;
                if (pass == 1) exact_grad[i] = (double)grad_norms[r] * difference / exact_norms[r];
                exact_scaled[i] = (double)grad_norms[r] * (double)student[i];
            }
        // The first pass leaves the square, the second wants the root.
        const double norm = sqrt(exact_norms[r]);
        for (int64_t i = r * columns; i < (r + 1) * columns; ++i) exact_grad[i] *= norm;
        exact_norms[r] = norm;
    }
    for (int i = 0; i < 3; ++i) expect(status[i] == MEK_OK, "row_l2 " + target.name);
    expect_close(norms, exact_norms, 1e-6, "row_l2 " + target.name);
    expect_close(grad, exact_grad, 1e-5, "row_l2_backward " + target.name);
    expect_close(scaled, exact_scaled, 1e-6, "align_backward " + target.name);
}

int main() {
    std::vector<Target> targets;
    for (const char *level : {"baseline", "avx2", "avx512"})
        if (mek_cpu_set_level(level) == MEK_OK) targets.push_back({level, false});
    targets.push_back({"cuda", true});
    targets.push_back({"cuda reversed", true});
    for (const Target &target : targets) {
        if (!target.cuda) expect(mek_cpu_set_level(target.name.c_str()) == MEK_OK, "level");
        cuda_on_host_reverse(target.name == "cuda reversed");
        test_motion_scores(target, 1, 1, 1, 1);
        test_motion_scores(target, 2, 5, 37, 2);
        test_motion_scores(target, 1, 66, 3, 3);
        test_motion_scores(target, 2, 3, 4100, 4);
        test_token_motion_scores(target, 3, 1, 5);
        test_token_motion_scores(target, 2, 7, 601);
        test_resampling(target, {2, 3, 4}, {3, 5, 7}, 5);
        test_resampling(target, {5, 7, 9}, {2, 3, 4}, 6);
        test_resampling(target, {1, 1, 2}, {3, 1, 40}, 7);
        test_resampling(target, {3, 8, 17}, {4, 9, 33}, 8);
        test_row_l2(target, 1, 1);
        test_row_l2(target, 5, 1027);
    }
    printf("%d passed, %d failed\n", checks - failures, failures);
    return failures != 0;
}
