#include "mek_dtype.h"
#include "tables.cuh"

namespace mek {

// What the alignment of one row reads, beside its map.
struct Teacher {
    const void *data;
    int32_t dtype;
    int64_t first;  // element of the row's start
    double scale;
};

__device__ __forceinline__ float teacher_value(const Teacher &teacher, int64_t place) {
    return scaled(load_as_float(teacher.data, teacher.dtype, teacher.first + place), teacher.scale);
}

// Blocks walk over the rows; a block works through a row one frame of the teacher at a time.
__global__ void __launch_bounds__(kThreads)
    align_rows(Tables tables, const float *__restrict__ maps, const void *__restrict__ teachers, int32_t dtype,
               const uint8_t *__restrict__ row_mask, int64_t rows, bool normalize, bool normalize_teacher,
               float *__restrict__ norms, float *__restrict__ row_gradient) {
    const int64_t plane = plane_out(tables.volumes), volume = volume_out(tables.volumes);
    float *differences = tables.slabs + blockIdx.x * slab_size(tables.volumes), *narrow = differences + plane;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const float *map = maps + row * volume_in(tables.volumes);
        float *gradient = row_gradient ? row_gradient + row * volume_in(tables.volumes) : nullptr;
        if (gradient) clear_gradient(tables, gradient);
        if (row_mask && !row_mask[row]) {
            if (thread_index() == 0) norms[row] = 0;
            continue;
        }
        const double scale = normalize ? row_scale(sum_of_row(tables, map)) : 1.0;
        Teacher teacher = {teachers, dtype, row * volume, 1.0};
        if (normalize_teacher) {
            double sum = 0;
            for (int64_t i = thread_index(); i < volume; i += kThreads) sum += (double)teacher_value(teacher, i);
            teacher.scale = row_scale(block_sum(sum));
        }
        double squares = 0;
        for (int frame = 0; frame < tables.frames.out; ++frame) {
            MEK_FOR_PLANE(y, x, tables.height.out, tables.width.out) {
                const int64_t place = (int64_t)y * tables.width.out + x;
                const float value = scaled(trilinear(tables, map, frame, y, x), scale);
                const float difference = value - teacher_value(teacher, frame * plane + place);
                squares += (double)difference * (double)difference;
                if (gradient) differences[place] = difference;
            }
            if (gradient) {
                __syncthreads();
                reduce_frame(tables, frame, differences, narrow, gradient);
            }
        }
        const double norm = sqrt(block_sum(squares));
        if (thread_index() == 0) norms[row] = (float)norm;
        if (gradient) finish_gradient(tables, map, normalize, scale, inverse_norm(norm), gradient);
    }
}

__global__ void __launch_bounds__(kThreads)
    row_norms(const float *__restrict__ student, const void *__restrict__ teacher, int32_t dtype,
              const uint8_t *__restrict__ row_mask, int64_t columns, float *__restrict__ norms) {
    const int64_t row = blockIdx.x;
    double squares = 0;
    if (!row_mask || row_mask[row])
        for (int64_t i = row * columns + threadIdx.x; i < (row + 1) * columns; i += kThreads) {
            const double difference = (double)student[i] - (double)load_as_float(teacher, dtype, i);
            squares += difference * difference;
        }
    const double total = block_sum(squares);
    if (threadIdx.x == 0) norms[row] = (float)sqrt(total);
}

__global__ void __launch_bounds__(kThreads)
    row_norm_gradients(const float *__restrict__ student, const void *__restrict__ teacher, int32_t dtype,
                       const uint8_t *__restrict__ row_mask, const float *__restrict__ norms,
                       const float *__restrict__ grad_norms, int64_t columns, float *__restrict__ grad_student) {
    const int64_t row = blockIdx.x;
    const bool kept = !row_mask || row_mask[row];
    const double scale = kept ? (double)grad_norms[row] * inverse_norm((double)norms[row]) : 0.0;
    for (int64_t i = row * columns + threadIdx.x; i < (row + 1) * columns; i += kThreads)
        grad_student[i] = kept ? scaled(student[i] - load_as_float(teacher, dtype, i), scale) : 0.0f;
}

// Not __restrict__: the result may replace the values.
__global__ void __launch_bounds__(kThreads)
    scale_rows(const float *values, const float *__restrict__ scales, int64_t columns, float *out) {
    const int64_t row = blockIdx.x;
    const float scale = scales[row];
    for (int64_t i = row * columns + threadIdx.x; i < (row + 1) * columns; i += kThreads) out[i] = scale * values[i];
}

}  // namespace mek

using namespace mek;

int32_t mek_cuda_align_workspace(int64_t rows, int64_t frames_in, int64_t height_in, int64_t width_in,
                                 int64_t frames_out, int64_t height_out, int64_t width_out, int64_t *bytes) {
    const char *function = "mek_cuda_align_workspace";
    const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
    const int32_t status =
        Check(function).volumes(rows, volumes).pointer("bytes", bytes, alignof(int64_t)).status();
    if (status == MEK_OK) *bytes = lay_out(volumes, rows, true, nullptr, nullptr);
    return status;
}

int32_t mek_cuda_align(const float *maps, const void *teacher, int32_t teacher_dtype, const uint8_t *row_mask,
                       int64_t rows, int64_t frames_in, int64_t height_in, int64_t width_in, int64_t frames_out,
                       int64_t height_out, int64_t width_out, int32_t normalize, int32_t normalize_teacher,
                       float *norms, float *row_gradient, void *workspace, int64_t workspace_bytes,
                       int32_t device, void *stream) {
    const char *function = "mek_cuda_align";
    const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
    int32_t status = Check(function)
                         .volumes(rows, volumes)
                         .dtype("teacher_dtype", teacher_dtype)
                         .floats("maps", maps)
                         .data("teacher", teacher, teacher_dtype)
                         .floats("norms", norms)
                         .optional("row_gradient", row_gradient, alignof(float))
                         .status();
    if (status == MEK_OK)
        status = check_device(function, device,
                              {{"maps", maps},
                               {"teacher", teacher},
                               {"norms", norms},
                               {"row_mask", row_mask ? (const void *)row_mask : norms},
                               {"row_gradient", row_gradient ? row_gradient : norms}});
    const int64_t needed = status == MEK_OK ? lay_out(volumes, rows, true, nullptr, nullptr) : 0;
    if (status == MEK_OK) status = check_workspace(function, workspace, workspace_bytes, needed, device);
    if (status != MEK_OK) return status;

    OnDevice scope(device);
    Tables tables;
    lay_out(volumes, rows, true, workspace, &tables);
    status = fill_tables(function, tables, stream);
    if (status != MEK_OK) return status;
    MEK_LAUNCH_OR_RETURN(function, align_rows, (unsigned)resident_blocks(rows), dim3(kThreadsX, kThreadsY), stream,
                         tables, maps, teacher, teacher_dtype, row_mask, rows, normalize != 0,
                         normalize_teacher != 0, norms, row_gradient);
    return MEK_OK;
}

int32_t mek_cuda_row_l2(const float *student, const void *teacher, int32_t teacher_dtype, const uint8_t *row_mask,
                        int64_t rows, int64_t columns, float *norms, int32_t device, void *stream) {
    const char *function = "mek_cuda_row_l2";
    int32_t status = Check(function)
                         .rows(rows, columns)
                         .dtype("teacher_dtype", teacher_dtype)
                         .floats("student", student)
                         .data("teacher", teacher, teacher_dtype)
                         .floats("norms", norms)
                         .status();
    if (status == MEK_OK)
        status = check_device(function, device,
                              {{"student", student},
                               {"teacher", teacher},
                               {"norms", norms},
                               {"row_mask", row_mask ? (const void *)row_mask : norms}});
    if (status == MEK_OK) status = check_grid(function, rows);
    if (status != MEK_OK) return status;
    OnDevice scope(device);
    MEK_LAUNCH_OR_RETURN(function, row_norms, (unsigned)rows, kThreads, stream, student, teacher, teacher_dtype,
                         row_mask, columns, norms);
    return MEK_OK;
}

int32_t mek_cuda_row_l2_backward(const float *student, const void *teacher, int32_t teacher_dtype,
                                 const uint8_t *row_mask, const float *norms, const float *grad_norms,
                                 int64_t rows, int64_t columns, float *grad_student, int32_t device,
                                 void *stream) {
    const char *function = "mek_cuda_row_l2_backward";
    int32_t status = Check(function)
                         .rows(rows, columns)
                         .dtype("teacher_dtype", teacher_dtype)
                         .floats("student", student)
                         .data("teacher", teacher, teacher_dtype)
                         .floats("norms", norms)
                         .floats("grad_norms", grad_norms)
                         .floats("grad_student", grad_student)
                         .status();
    if (status == MEK_OK)
        status = check_device(function, device,
                              {{"student", student},
                               {"teacher", teacher},
                               {"norms", norms},
                               {"grad_norms", grad_norms},
                               {"grad_student", grad_student},
                               {"row_mask", row_mask ? (const void *)row_mask : norms}});
    if (status == MEK_OK) status = check_grid(function, rows);
    if (status != MEK_OK) return status;
    OnDevice scope(device);
    MEK_LAUNCH_OR_RETURN(function, row_norm_gradients, (unsigned)rows, kThreads, stream, student, teacher,
                         teacher_dtype, row_mask, norms, grad_norms, columns, grad_student);
    return MEK_OK;
}

int32_t mek_cuda_align_backward(const float *row_gradient, const float *grad_norms, int64_t rows, int64_t columns,
                                float *grad_maps, int32_t device, void *stream) {
    const char *function = "mek_cuda_align_backward";
    int32_t status = Check(function)
                         .rows(rows, columns)
                         .floats("row_gradient", row_gradient)
                         .floats("grad_norms", grad_norms)
                         .floats("grad_maps", grad_maps)
                         .status();
    if (status == MEK_OK)
        status = check_device(
            function, device,
            {{"row_gradient", row_gradient}, {"grad_norms", grad_norms}, {"grad_maps", grad_maps}});
    if (status == MEK_OK) status = check_grid(function, rows);
    if (status != MEK_OK) return status;
    OnDevice scope(device);
    MEK_LAUNCH_OR_RETURN(function, scale_rows, (unsigned)rows, kThreads, stream, row_gradient, grad_norms, columns,
                         grad_maps);
    return MEK_OK;
}
