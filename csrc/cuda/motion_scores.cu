#include "launch.h"
#include "mek_scores.h"

namespace mek {

constexpr int kColumns = 32, kRows = 8;  // a block: neighbouring positions x rows f of the F x F matrices

__global__ void __launch_bounds__(kColumns *kRows)
    motion_partials(const float *__restrict__ diagonal, const float *__restrict__ mean_attention, int64_t frames,
                    int64_t positions, int64_t blocks, MotionPartial *__restrict__ partials) {
    __shared__ int64_t total[kRows][kColumns], runs[kRows][kColumns];
    __shared__ MotionPartial part[kRows][kColumns];
    const int x = threadIdx.x, y = threadIdx.y;
    const int64_t head = blockIdx.x / blocks, position = blockIdx.x % blocks * kColumns + x;
    const float tau = mean_attention[head];

    RunCount count = {0, 0, 0};
    MotionPartial sums = {0.0, 0.0, 0};
    if (position < positions)
        for (int64_t f = y; f < frames; f += kRows)
            scan_row(diagonal + (head * frames + f) * frames * positions + position, frames, positions, tau, count,
                     sums);
    total[y][x] = count.total;
    runs[y][x] = count.runs;
    part[y][x] = sums;
    __syncthreads();
    if (y == 0) {
        for (int row = 1; row < kRows; ++row) {
            count.total += total[row][x];
            count.runs += runs[row][x];
            sums.squares += part[row][x].squares;
            sums.at_least += part[row][x].at_least;
        }
        sums.run_length = mean_run_length(count.total, count.runs);
        part[0][x] = sums;
    }
    __syncthreads();
    if (x == 0 && y == 0) {
        for (int column = 1; column < kColumns; ++column) {
            sums.squares += part[0][column].squares;
            sums.run_length += part[0][column].run_length;
            sums.at_least += part[0][column].at_least;
        }
        partials[blockIdx.x] = sums;
    }
}

__global__ void motion_finish(const MotionPartial *__restrict__ partials, const float *__restrict__ mean_attention,
                              const float *__restrict__ square_sum, int64_t heads, int64_t frames,
                              int64_t positions, int64_t blocks, float *__restrict__ dfc, float *__restrict__ tcs,
                              float *__restrict__ dsr) {
    const int64_t head = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    MotionPartial sums = {0.0, 0.0, 0};
    for (int64_t block = 0; block < blocks; ++block) {
        const MotionPartial part = partials[head * blocks + block];
        sums.squares += part.squares;
        sums.run_length += part.run_length;
        sums.at_least += part.at_least;
    }
    const HeadScores scores = head_scores(sums, mean_attention[head], square_sum[head], frames, positions);
    dfc[head] = scores.dfc;
    tcs[head] = scores.tcs;
    dsr[head] = scores.dsr;
}

static int64_t motion_workspace(int64_t heads, int64_t positions) {
    return heads * ceil_div(positions, kColumns) * (int64_t)sizeof(MotionPartial);
}

}  // namespace mek

using namespace mek;

int32_t mek_cuda_motion_scores_workspace(int64_t heads, int64_t frames, int64_t positions, int64_t *bytes) {
    const char *function = "mek_cuda_motion_scores_workspace";
    const int32_t status =
        Check(function).motion(heads, frames, positions).pointer("bytes", bytes, alignof(int64_t)).status();
    if (status == MEK_OK) *bytes = motion_workspace(heads, positions);
    return status;
}

int32_t mek_cuda_motion_scores(const float *diagonal, const float *mean_attention, const float *square_sum,
                               int64_t heads, int64_t frames, int64_t positions, float *dfc, float *tcs,
                               float *dsr, void *workspace, int64_t workspace_bytes, int32_t device,
                               void *stream) {
    const char *function = "mek_cuda_motion_scores";
    int32_t status = Check(function)
                         .motion(heads, frames, positions)
                         .floats("diagonal", diagonal)
                         .floats("mean_attention", mean_attention)
                         .floats("square_sum", square_sum)
                         .floats("dfc", dfc)
                         .floats("tcs", tcs)
                         .floats("dsr", dsr)
                         .status();
    if (status == MEK_OK)
        status = check_device(function, device,
                              {{"diagonal", diagonal},
                               {"mean_attention", mean_attention},
                               {"square_sum", square_sum},
                               {"dfc", dfc},
                               {"tcs", tcs},
                               {"dsr", dsr}});
    if (status == MEK_OK)
        status = check_workspace(function, workspace, workspace_bytes, motion_workspace(heads, positions), device);
    if (status != MEK_OK) return status;
    const int64_t blocks = ceil_div(positions, kColumns);
    status = check_grid(function, heads * blocks);
    if (status != MEK_OK) return status;

    OnDevice scope(device);
    MotionPartial *partials = static_cast<MotionPartial *>(workspace);
    MEK_LAUNCH_OR_RETURN(function, motion_partials, (unsigned)(heads * blocks), dim3(kColumns, kRows), stream,
                         diagonal, mean_attention, frames, positions, blocks, partials);
    MEK_LAUNCH_OR_RETURN(function, motion_finish, (unsigned)ceil_div(heads, 64), 64, stream, partials,
                         mean_attention, square_sum, heads, frames, positions, blocks, dfc, tcs, dsr);
    return MEK_OK;
}
