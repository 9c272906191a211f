// Head scores (DFC, TCS, DSR) from the diagonals of the pooled vision-to-vision attention.
#ifndef MEK_SCORES_H
#define MEK_SCORES_H

#include "mek_hd.h"

namespace mek {

// Sums over a set of positions of one head.
struct MotionPartial {
    double squares;     // sum of squared entries
    double run_length;  // sum over positions of the mean run length
    int64_t at_least;   // entries >= tau
};

// Runs of set bits in a row that is fed word by word, lowest bit first.
struct RunCount {
    int64_t total;   // set bits = summed length of all runs
    int64_t runs;    // number of maximal runs
    uint64_t carry;  // highest bit of the previous word of this row
};

MEK_HD void begin_row(RunCount &count) { count.carry = 0; }

// A run starts at a set bit whose lower neighbour is clear; bits at and above `bits` must be clear.
MEK_HD void add_word(RunCount &count, uint64_t word, int bits) {
    count.total += popcount64(word);
    count.runs += popcount64(word & ~((word << 1) | count.carry));
    count.carry = (word >> (bits - 1)) & 1;
}

MEK_HD double mean_run_length(int64_t total, int64_t runs) {
    return runs ? (double)total / (double)runs : 0.0;
}

// One row f of one position: entries at row[0], row[stride], ...
MEK_HD void scan_row(const float *row, int64_t frames, int64_t stride, float tau, RunCount &count,
                     MotionPartial &sums) {
    begin_row(count);
    for (int64_t start = 0; start < frames; start += 64) {
        const int bits = (int)min64(64, frames - start);
        uint64_t word = 0;
        for (int b = 0; b < bits; ++b) {
            const float value = row[(start + b) * stride];
            word |= (uint64_t)(value > tau) << b;
            sums.at_least += value >= tau;
            sums.squares += (double)value * (double)value;
        }
        add_word(count, word, bits);
    }
}

struct HeadScores {
    float dfc, tcs, dsr;
};

// With nothing off the diagonal DFC is infinite, or 0 where there is nothing on it either; with a single
// position that is so whatever the rounding of the sum.  NaN stays NaN.
MEK_HD double energy_ratio(double inside, double square_sum, int64_t positions) {
    if (is_nan(inside) || is_nan(square_sum)) return quiet_nan();
    const double outside = positions > 1 ? square_sum - inside : 0.0;
    if (outside <= 0) return inside > 0 ? positive_infinity() : 0.0;
    return inside / outside;
}

// A sum of squares is NaN exactly when an entry is, so it stands in for all of them.
MEK_HD HeadScores head_scores(MotionPartial sums, float tau, float square_sum, int64_t frames,
                              int64_t positions) {
    double tcs = sums.run_length / (double)positions;
    double dsr = (double)sums.at_least / ((double)frames * (double)frames * (double)positions);
    if (is_nan(sums.squares) || is_nan((double)tau)) tcs = dsr = quiet_nan();
    HeadScores scores = {(float)energy_ratio(sums.squares, (double)square_sum, positions), (float)tcs, (float)dsr};
    return scores;
}

// A token's score: mean over frames of its mean attention, plus the mean change from frame to frame.
struct TokenScore {
    double sum, change, previous;
    int64_t frames;
};

MEK_HD TokenScore token_score_begin() {
    TokenScore score = {0.0, 0.0, 0.0, 0};
    return score;
}

MEK_HD void token_score_add(TokenScore &score, double frame_mean) {
    const double step = frame_mean - score.previous;
    if (score.frames) score.change += step < 0 ? -step : step;
    score.sum += frame_mean;
    score.previous = frame_mean;
    ++score.frames;
}

MEK_HD float token_score_end(const TokenScore &score) {
    const double change = score.frames > 1 ? score.change / (double)(score.frames - 1) : 0.0;
    return (float)(score.sum / (double)score.frames + change);
}

}  // namespace mek
#endif
