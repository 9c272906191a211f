#include "block.cuh"
#include "mek_dtype.h"
#include "mek_scores.h"

namespace mek {

// A block is one frame of one token.
__global__ void __launch_bounds__(kThreads)
    frame_means(const void *__restrict__ text_attention, int32_t dtype, int64_t positions,
                double *__restrict__ means) {
    const int64_t first = blockIdx.x * positions;
    double sum = 0;
    for (int64_t p = threadIdx.x; p < positions; p += kThreads)
        sum += (double)load_as_float(text_attention, dtype, first + p);
    const double total = block_sum(sum);
    if (threadIdx.x == 0) means[blockIdx.x] = total / (double)positions;
}

__global__ void token_scores(const double *__restrict__ means, int64_t tokens, int64_t frames,
                             float *__restrict__ scores) {
    const int64_t token = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    TokenScore score = token_score_begin();
    for (int64_t f = 0; f < frames; ++f) token_score_add(score, means[token * frames + f]);
    scores[token] = token_score_end(score);
}

}  // namespace mek

using namespace mek;

int32_t mek_cuda_token_motion_scores_workspace(int64_t tokens, int64_t frames, int64_t positions, int64_t *bytes) {
    const char *function = "mek_cuda_token_motion_scores_workspace";
    const int32_t status =
        Check(function).tokens(tokens, frames, positions).pointer("bytes", bytes, alignof(int64_t)).status();
    if (status == MEK_OK) *bytes = tokens * frames * (int64_t)sizeof(double);
    return status;
}

int32_t mek_cuda_token_motion_scores(const void *text_attention, int32_t dtype, int64_t tokens, int64_t frames,
                                     int64_t positions, float *scores, void *workspace, int64_t workspace_bytes,
                                     int32_t device, void *stream) {
    const char *function = "mek_cuda_token_motion_scores";
    int32_t status = Check(function)
                         .dtype("dtype", dtype)
                         .tokens(tokens, frames, positions)
                         .data("text_attention", text_attention, dtype)
                         .floats("scores", scores)
                         .status();
    if (status == MEK_OK) status = check_grid(function, tokens * frames);
    if (status == MEK_OK)
        status = check_device(function, device, {{"text_attention", text_attention}, {"scores", scores}});
    if (status == MEK_OK)
        status = check_workspace(function, workspace, workspace_bytes, tokens * frames * (int64_t)sizeof(double),
                                 device);
    if (status != MEK_OK) return status;
    OnDevice scope(device);
    double *means = static_cast<double *>(workspace);
    MEK_LAUNCH_OR_RETURN(function, frame_means, (unsigned)(tokens * frames), kThreads, stream, text_attention,
                         dtype, positions, means);
    MEK_LAUNCH_OR_RETURN(function, token_scores, (unsigned)ceil_div(tokens, 64), 64, stream, means, tokens, frames,
                         scores);
    return MEK_OK;
}
