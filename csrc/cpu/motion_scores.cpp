#include <vector>

#include "kernels.h"
#include "mek_check.h"
#include "parallel.h"

using namespace mek;

int32_t mek_motion_scores(const float *diagonal, const float *mean_attention, const float *square_sum,
                          int64_t heads, int64_t frames, int64_t positions, float *dfc, float *tcs, float *dsr,
                          int32_t threads) {
    return guarded("mek_motion_scores", [&]() -> int32_t {
        const int32_t status = check_motion_scores("mek_motion_scores", diagonal, mean_attention, square_sum,
                                                   heads, frames, positions, dfc, tcs, dsr);
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
