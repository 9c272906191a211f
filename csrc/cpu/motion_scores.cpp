#include <vector>

#include "kernels.h"
#include "mek_check.h"
#include "mek_dtype.h"
#include "parallel.h"

using namespace mek;

int32_t mek_motion_scores(const float *diagonal, const float *mean_attention, const float *square_sum,
                          int64_t heads, int64_t frames, int64_t positions, float *dfc, float *tcs, float *dsr,
                          int32_t threads) {
    return guarded("mek_motion_scores", [&]() -> int32_t {
        const int32_t status = Check("mek_motion_scores")
                                   .motion(heads, frames, positions)
                                   .floats("diagonal", diagonal)
                                   .floats("mean_attention", mean_attention)
                                   .floats("square_sum", square_sum)
                                   .floats("dfc", dfc)
                                   .floats("tcs", tcs)
                                   .floats("dsr", dsr)
                                   .status();
        if (status != MEK_OK) return status;

        const Kernels &table = kernels();
        const int64_t blocks = ceil_div(positions, kMotionBlock), items = heads * blocks;
        const int workers = worker_count(threads, items, heads * frames * frames * positions);
        std::vector<MotionPartial> partials(items);
        std::vector<int32_t> scratch(workers * kMotionScratch);
        parallel_for(items, workers, [&](int64_t item, int worker) {
            const int64_t head = item / blocks, first = item % blocks * kMotionBlock;
            partials[item] = table.motion_block(diagonal + head * frames * frames * positions, frames, positions,
                                                first, min64(kMotionBlock, positions - first),
                                                mean_attention[head], scratch.data() + worker * kMotionScratch);
        });
        for (int64_t head = 0; head < heads; ++head) {
            MotionPartial sums = {0.0, 0.0, 0};
            for (int64_t block = 0; block < blocks; ++block) {
                const MotionPartial &part = partials[head * blocks + block];
                sums.squares += part.squares;
                sums.run_length += part.run_length;
                sums.at_least += part.at_least;
            }
            const HeadScores scores =
                head_scores(sums, mean_attention[head], square_sum[head], frames, positions);
            dfc[head] = scores.dfc;
            tcs[head] = scores.tcs;
            dsr[head] = scores.dsr;
        }
        return MEK_OK;
    });
}

int32_t mek_token_motion_scores(const void *text_attention, int32_t dtype, int64_t tokens, int64_t frames,
                                int64_t positions, float *scores, int32_t threads) {
    return guarded("mek_token_motion_scores", [&]() -> int32_t {
        const int32_t status = Check("mek_token_motion_scores")
                                   .dtype("dtype", dtype)
                                   .tokens(tokens, frames, positions)
                                   .data("text_attention", text_attention, dtype)
                                   .floats("scores", scores)
                                   .status();
        if (status != MEK_OK) return status;

        const Kernels &table = kernels();
        const int workers = worker_count(threads, tokens, tokens * frames * positions);
        parallel_for(tokens, workers, [&](int64_t token, int) {
            TokenScore score = token_score_begin();
            const char *row =
                static_cast<const char *>(text_attention) + token * frames * positions * dtype_size(dtype);
            for (int64_t f = 0; f < frames; ++f) {
                const double mass = table.sum(row + f * positions * dtype_size(dtype), dtype, positions);
                token_score_add(score, mass / (double)positions);
            }
            scores[token] = token_score_end(score);
        });
        return MEK_OK;
    });
}
