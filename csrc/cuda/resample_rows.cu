#include "tables.cuh"

namespace mek {

__global__ void __launch_bounds__(kThreads)
    row_scales(Tables tables, const float *__restrict__ maps, bool normalize, float *__restrict__ sums) {
    const float *map = maps + blockIdx.x * volume_in(tables.volumes);
    const double sum = normalize ? sum_of_row(tables, map) : 1.0;
    if (thread_index()) return;
    tables.row_scales[blockIdx.x] = row_scale(sum);
    if (sums) sums[blockIdx.x] = (float)sum;
}

// A block is one frame of one row.
__global__ void __launch_bounds__(kThreads)
    resample_frames(Tables tables, const float *__restrict__ maps, float *__restrict__ resampled) {
    const int64_t row = blockIdx.x / tables.frames.out;
    const int frame = (int)(blockIdx.x % tables.frames.out);
    const float *map = maps + row * volume_in(tables.volumes);
    float *out = resampled + blockIdx.x * plane_out(tables.volumes);
    const double scale = tables.row_scales[row];
    MEK_FOR_PLANE(y, x, tables.height.out, tables.width.out)
        out[(int64_t)y * tables.width.out + x] = scaled(trilinear(tables, map, frame, y, x), scale);
}

__global__ void __launch_bounds__(kThreads)
    resample_gradients(Tables tables, const float *__restrict__ grad_resampled, const float *__restrict__ maps,
                       int64_t rows, bool normalize, float *__restrict__ grad_maps) {
    float *narrow = tables.slabs + blockIdx.x * slab_size(tables.volumes);
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const float *values = grad_resampled + row * volume_out(tables.volumes);
        const float *map = normalize ? maps + row * volume_in(tables.volumes) : nullptr;
        float *gradient = grad_maps + row * volume_in(tables.volumes);
        clear_gradient(tables, gradient);
        for (int frame = 0; frame < tables.frames.out; ++frame) {
            reduce_frame(tables, frame, values + frame * plane_out(tables.volumes), narrow, gradient);
            __syncthreads();
        }
        if (normalize) finish_gradient(tables, map, true, row_scale(sum_of_row(tables, map)), 1.0, gradient);
    }
}

static int32_t workspace_size(const char *function, const Volumes &volumes, int64_t rows, bool slabs,
                              int64_t *bytes) {
    const int32_t status =
        Check(function).volumes(rows, volumes).pointer("bytes", bytes, alignof(int64_t)).status();
    if (status == MEK_OK) *bytes = lay_out(volumes, rows, slabs, nullptr, nullptr);
    return status;
}

}  // namespace mek

using namespace mek;

int32_t mek_cuda_resample_rows_workspace(int64_t rows, int64_t frames_in, int64_t height_in, int64_t width_in,
                                         int64_t frames_out, int64_t height_out, int64_t width_out,
                                         int64_t *bytes) {
    const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
    return workspace_size("mek_cuda_resample_rows_workspace", volumes, rows, false, bytes);
}

int32_t mek_cuda_resample_rows_backward_workspace(int64_t rows, int64_t frames_in, int64_t height_in,
                                                  int64_t width_in, int64_t frames_out, int64_t height_out,
                                                  int64_t width_out, int64_t *bytes) {
    const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
    return workspace_size("mek_cuda_resample_rows_backward_workspace", volumes, rows, true, bytes);
}

int32_t mek_cuda_resample_rows(const float *maps, int64_t rows, int64_t frames_in, int64_t height_in,
                               int64_t width_in, int64_t frames_out, int64_t height_out, int64_t width_out,
                               int32_t normalize, float *resampled, float *sums, void *workspace,
                               int64_t workspace_bytes, int32_t device, void *stream) {
    const char *function = "mek_cuda_resample_rows";
    const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
    int32_t status = Check(function)
                         .volumes(rows, volumes)
                         .floats("maps", maps)
                         .floats("resampled", resampled)
                         .optional("sums", sums, alignof(float))
                         .status();
    if (status == MEK_OK) status = check_grid(function, rows * frames_out);
    if (status == MEK_OK) status = check_device(
            function, device, {{"maps", maps}, {"resampled", resampled}, {"sums", sums ? sums : resampled}});
    const int64_t needed = status == MEK_OK ? lay_out(volumes, rows, false, nullptr, nullptr) : 0;
    if (status == MEK_OK) status = check_workspace(function, workspace, workspace_bytes, needed, device);
    if (status != MEK_OK) return status;

    OnDevice scope(device);
    Tables tables;
    lay_out(volumes, rows, false, workspace, &tables);
    status = fill_tables(function, tables, stream);
    if (status != MEK_OK) return status;
    const dim3 block(kThreadsX, kThreadsY);
    MEK_LAUNCH_OR_RETURN(function, row_scales, (unsigned)rows, block, stream, tables, maps, normalize != 0,
                         sums);
    MEK_LAUNCH_OR_RETURN(function, resample_frames, (unsigned)(rows * frames_out), block, stream, tables, maps,
                         resampled);
    return MEK_OK;
}

int32_t mek_cuda_resample_rows_backward(const float *grad_resampled, const float *maps, int64_t rows,
                                        int64_t frames_in, int64_t height_in, int64_t width_in,
                                        int64_t frames_out, int64_t height_out, int64_t width_out,
                                        int32_t normalize, float *grad_maps, void *workspace,
                                        int64_t workspace_bytes, int32_t device, void *stream) {
    const char *function = "mek_cuda_resample_rows_backward";
    const Volumes volumes = {frames_in, height_in, width_in, frames_out, height_out, width_out};
    Check check(function);
    check.volumes(rows, volumes).floats("grad_resampled", grad_resampled).floats("grad_maps", grad_maps);
    if (normalize) check.floats("maps", maps);
    int32_t status = check.status();
    if (status == MEK_OK)
        status = check_device(function, device,
                              {{"grad_resampled", grad_resampled},
                               {"grad_maps", grad_maps},
                               {"maps", normalize ? maps : grad_resampled}});
    const int64_t needed = status == MEK_OK ? lay_out(volumes, rows, true, nullptr, nullptr) : 0;
    if (status == MEK_OK) status = check_workspace(function, workspace, workspace_bytes, needed, device);
    if (status != MEK_OK) return status;

    OnDevice scope(device);
    Tables tables;
    lay_out(volumes, rows, true, workspace, &tables);
    status = fill_tables(function, tables, stream);
    if (status != MEK_OK) return status;
    MEK_LAUNCH_OR_RETURN(function, resample_gradients, (unsigned)resident_blocks(rows),
                         dim3(kThreadsX, kThreadsY), stream, tables, grad_resampled, maps, rows, normalize != 0,
                         grad_maps);
    return MEK_OK;
}
