#include <vector>

#include "mek_check.h"
#include "mek_dtype.h"
#include "parallel.h"
#include "tables.h"

using namespace mek;

// Runs work(row, scratch) for every row on all workers.
template <typename Work>
static void for_rows(int64_t rows, int32_t threads, const Volumes &volumes, const Work &work) {
    const int workers = worker_count(threads, rows, rows * volume_out(volumes));
    const int64_t size = resample_scratch(volumes);
    std::vector<float> scratch(size * workers);
    parallel_for(rows, workers, [&](int64_t row, int worker) { work(row, scratch.data() + worker * size); });
}

static const void *row_of(const void *data, int32_t dtype, int64_t row, int64_t columns) {
    return static_cast<const char *>(data) + row * columns * dtype_size(dtype);
}

static void zero(float *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

int32_t mek_resample_rows(const float *maps, int64_t rows, int64_t frames_in, int64_t height_in, int64_t width_in,
                          int64_t frames_out, int64_t height_out, int64_t width_out, int32_t normalize,
                          float *resampled, float *sums, int32_t threads) {
    return guarded("mek_resample_rows", [&]() -> int32_t {
        const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
        const int32_t status = Check("mek_resample_rows")
                                   .volumes(rows, volumes)
                                   .floats("maps", maps)
                                   .floats("resampled", resampled)
                                   .optional("sums", sums, alignof(float))
                                   .status();
        if (status != MEK_OK) return status;
        const ResampleStorage storage(volumes);
        const Kernels &table = kernels();
        for_rows(rows, threads, volumes, [&](int64_t row, float *scratch) {
            const double sum = table.resample(storage.tables(), maps + row * volume_in(volumes), normalize != 0,
                                              resampled + row * volume_out(volumes), scratch);
            if (sums) sums[row] = (float)sum;
        });
        return MEK_OK;
    });
}

int32_t mek_resample_rows_backward(const float *grad_resampled, const float *maps, int64_t rows,
                                   int64_t frames_in, int64_t height_in, int64_t width_in, int64_t frames_out,
                                   int64_t height_out, int64_t width_out, int32_t normalize, float *grad_maps,
                                   int32_t threads) {
    return guarded("mek_resample_rows_backward", [&]() -> int32_t {
        const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
        Check check("mek_resample_rows_backward");
        check.volumes(rows, volumes).floats("grad_resampled", grad_resampled).floats("grad_maps", grad_maps);
        if (normalize) check.floats("maps", maps);
        if (check.failed()) return check.status();
        const ResampleStorage storage(volumes);
        const Kernels &table = kernels();
        for_rows(rows, threads, volumes, [&](int64_t row, float *scratch) {
            const float *map = normalize ? maps + row * volume_in(volumes) : nullptr;
            table.resample_backward(storage.tables(), grad_resampled + row * volume_out(volumes), map,
                                    normalize != 0, grad_maps + row * volume_in(volumes), scratch);
        });
        return MEK_OK;
    });
}

int32_t mek_row_l2(const float *student, const void *teacher, int32_t teacher_dtype, const uint8_t *row_mask,
                   int64_t rows, int64_t columns, float *norms, int32_t threads) {
    return guarded("mek_row_l2", [&]() -> int32_t {
        const int32_t status = Check("mek_row_l2")
                                   .rows(rows, columns)
                                   .dtype("teacher_dtype", teacher_dtype)
                                   .floats("student", student)
                                   .data("teacher", teacher, teacher_dtype)
                                   .floats("norms", norms)
                                   .status();
        if (status != MEK_OK) return status;
        const Kernels &table = kernels();
        parallel_for(rows, worker_count(threads, rows, rows * columns), [&](int64_t row, int) {
            const bool kept = !row_mask || row_mask[row];
            const void *other = row_of(teacher, teacher_dtype, row, columns);
            norms[row] =
                kept ? (float)table.distance(student + row * columns, other, teacher_dtype, columns) : 0.0f;
        });
        return MEK_OK;
    });
}

int32_t mek_row_l2_backward(const float *student, const void *teacher, int32_t teacher_dtype,
                            const uint8_t *row_mask, const float *norms, const float *grad_norms, int64_t rows,
                            int64_t columns, float *grad_student, int32_t threads) {
    return guarded("mek_row_l2_backward", [&]() -> int32_t {
        const int32_t status = Check("mek_row_l2_backward")
                                   .rows(rows, columns)
                                   .dtype("teacher_dtype", teacher_dtype)
                                   .floats("student", student)
                                   .data("teacher", teacher, teacher_dtype)
                                   .floats("norms", norms)
                                   .floats("grad_norms", grad_norms)
                                   .floats("grad_student", grad_student)
                                   .status();
        if (status != MEK_OK) return status;
        const Kernels &table = kernels();
        parallel_for(rows, worker_count(threads, rows, rows * columns), [&](int64_t row, int) {
            float *out = grad_student + row * columns;
            if (row_mask && !row_mask[row]) return zero(out, columns);
            const double scale = (double)grad_norms[row] * inverse_norm((double)norms[row]);
            table.scaled_difference(student + row * columns, row_of(teacher, teacher_dtype, row, columns),
                                    teacher_dtype, columns, scale, out);
        });
        return MEK_OK;
    });
}

int32_t mek_align(const float *maps, const void *teacher, int32_t teacher_dtype, const uint8_t *row_mask,
                  int64_t rows, int64_t frames_in, int64_t height_in, int64_t width_in, int64_t frames_out,
                  int64_t height_out, int64_t width_out, int32_t normalize, int32_t normalize_teacher,
                  float *norms, float *row_gradient, int32_t threads) {
    return guarded("mek_align", [&]() -> int32_t {
        const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
        const int32_t status = Check("mek_align")
                                   .volumes(rows, volumes)
                                   .dtype("teacher_dtype", teacher_dtype)
                                   .floats("maps", maps)
                                   .data("teacher", teacher, teacher_dtype)
                                   .floats("norms", norms)
                                   .optional("row_gradient", row_gradient, alignof(float))
                                   .status();
        if (status != MEK_OK) return status;
        const ResampleStorage storage(volumes);
        const Kernels &table = kernels();
        for_rows(rows, threads, volumes, [&](int64_t row, float *scratch) {
            float *gradient = row_gradient ? row_gradient + row * volume_in(volumes) : nullptr;
            if (row_mask && !row_mask[row]) {
                norms[row] = 0;
                if (gradient) zero(gradient, volume_in(volumes));
                return;
            }
            norms[row] = table.align(storage.tables(), maps + row * volume_in(volumes),
                                     row_of(teacher, teacher_dtype, row, volume_out(volumes)), teacher_dtype,
                                     normalize != 0, normalize_teacher != 0, gradient, scratch);
        });
        return MEK_OK;
    });
}

int32_t mek_align_backward(const float *row_gradient, const float *grad_norms, int64_t rows, int64_t columns,
                           float *grad_maps, int32_t threads) {
    return guarded("mek_align_backward", [&]() -> int32_t {
        const int32_t status = Check("mek_align_backward")
                                   .rows(rows, columns)
                                   .floats("row_gradient", row_gradient)
                                   .floats("grad_norms", grad_norms)
                                   .floats("grad_maps", grad_maps)
                                   .status();
        if (status != MEK_OK) return status;
        const Kernels &table = kernels();
        parallel_for(rows, worker_count(threads, rows, rows * columns), [&](int64_t row, int) {
            table.scale(row_gradient + row * columns, grad_norms[row], columns, grad_maps + row * columns);
        });
        return MEK_OK;
    });
}
