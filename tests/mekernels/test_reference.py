"""The ground truth itself, on cases computed by hand and by loops written apart."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import assert_exact, rand, randn

from mekernels import VideoTokens, reference

DOUBLE = torch.float64


def double(values):
    return torch.tensor(values, dtype=DOUBLE)


def test_attention_by_hand():
    # Scores 0 and ln 3 give weights 1/4 and 3/4.
    query, key = double([[[[1.0]]]]), double([[[[0.0], [math.log(3)]]]])
    value = double([[[[4.0], [8.0]]]])
    out, lse = reference.flash_attention(query, key, value)
    assert_exact(reference.attention_map(query, key), double([[[[0.25, 0.75]]]]))
    assert_exact(out, double([[[[7.0]]]]))
    assert_exact(lse, double([[[math.log(4)]]]))


def test_causal_aligns_the_ends():
    query, key = torch.zeros(1, 1, 2, 1, dtype=DOUBLE), torch.zeros(1, 1, 3, 1, dtype=DOUBLE)
    expected = double([[[[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]]])
    assert_exact(reference.attention_map(query, key, causal=True), expected)
    expected = double([[[[0, 0], [1, 0], [1 / 2, 1 / 2]]]])
    assert_exact(reference.attention_map(key, query, causal=True), expected)


def test_key_mask_and_empty_rows():
    query, key = torch.zeros(2, 1, 1, 1, dtype=DOUBLE), torch.zeros(2, 1, 2, 1, dtype=DOUBLE)
    mask = torch.tensor([[True, False], [False, False]])
    assert_exact(reference.attention_map(query, key, key_mask=mask)[:, 0, 0], double([[1, 0], [0, 0]]))
    assert reference.attention_lse(query, key, key_mask=mask)[1].item() == -math.inf


def test_causal_fold_restarts_in_every_part():
    query, key = torch.zeros(1, 1, 2, 1, dtype=DOUBLE), torch.zeros(1, 1, 4, 1, dtype=DOUBLE)
    attention = reference.attention_map(query, key, causal=True, fold=2)[0, 0]
    assert_exact(attention, double([[0.5, 0, 0.5, 0], [0.25] * 4]))


def test_attention_rows_by_hand():
    query, key = double([[[[1.0], [0.0]]]]), double([[[[0.0], [math.log(3)]]]])
    rows, columns = torch.tensor([[1, 0, -1]]), torch.tensor([[1, -1]])
    picked = reference.attention_rows(query, key, rows, columns)
    assert_exact(picked, double([[[0.5, 0], [0.75, 0], [0, 0]]]))
    sliced = reference.attention_rows(query, key, rows, slice(0, 2), reduce="none")
    assert_exact(sliced, double([[[[0.5, 0.5], [0.25, 0.75], [0, 0]]]]))


def test_fold_adds_own_and_reference_keys():
    assert_exact(reference.fold_keys(double([[1.0, 2, 3, 4]]), 2), double([[4.0, 6.0]]))


def test_identical_streams_fold_to_plain_attention():
    query, key = randn(1, 2, 5, 4), randn(1, 2, 5, 4, seed=1)
    folded = reference.fold_keys(reference.attention_map(query, torch.cat([key, key], 2)), 2)
    assert_exact(folded, reference.attention_map(query, key))


def test_diagonal_by_loops():
    video = VideoTokens(3, 2, 2)
    block = rand(2, video.vision, video.vision)
    diagonal = reference.diagonal(block, video)
    assert diagonal.shape == (2, 3, 3, 4)
    for f in range(3):
        for g in range(3):
            for p in range(4):
                assert (diagonal[:, f, g, p] == block[:, f * 4 + p, g * 4 + p]).all()


def test_diagonal_attention_is_the_diagonal_of_the_map():
    video = VideoTokens(2, 1, 3, text=2, text_first=False)
    query, key = randn(1, 2, 8, 4), randn(1, 2, 16, 4, seed=1)
    lse = reference.attention_lse(query, key)
    folded = reference.fold_keys(reference.attention_map(query, key), 2)
    expected = reference.diagonal(folded[:, :, :6, :6], video)
    assert_exact(reference.diagonal_attention(query, key, lse, video, fold=2), expected)


# Two frames, two positions. Position 0 has 0.9 everywhere, position 1 only within frames.
BLOCK = double([[0.9, 0.1, 0.9, 0.0], [0.2, 0.8, 0.0, 0.1], [0.9, 0.0, 0.9, 0.1], [0.0, 0.1, 0.2, 0.8]])


def test_motion_scores_by_hand():
    video = VideoTokens(2, 1, 2)
    block = BLOCK[None]
    tau = 6.0 / 16
    inside = 4 * 0.81 + 2 * 0.64 + 2 * 0.01
    outside = 2 * 0.01 + 2 * 0.04
    # Position 0: one run of two in each row. Position 1: one run of one in each row.
    expected = (inside / outside, (2 + 1) / 2, 6 / 8)
    for scores in (
        reference.motion_scores_of_map(block, video),
        reference.motion_scores(reference.diagonal(block, video), double([tau]), block.square().sum((1, 2))),
    ):
        for actual, value in zip(scores, expected, strict=True):
            assert_exact(actual, double([value]))


def test_band_width_by_hand():
    video = VideoTokens(2, 1, 2)
    dfc, tcs, dsr = reference.motion_scores_of_map(BLOCK[None], video, width=1)
    assert dfc.item() == math.inf
    assert_exact(dsr, double([6 / 16]))
    assert_exact(tcs, double([1.5]))


def test_band_width_by_loops():
    video = VideoTokens(2, 1, 4)
    block = rand(1, 8, 8, seed=3)
    tau = block.mean().item()
    for width in range(3):
        inside = outside = above = count = 0.0
        for i in range(8):
            for j in range(8):
                value = block[0, i, j].item()
                if abs(i % 4 - j % 4) <= width:
                    inside, count, above = inside + value**2, count + 1, above + (value >= tau)
                else:
                    outside += value**2
        dfc, _, dsr = reference.motion_scores_of_map(block, video, width=width)
        assert_exact(dfc, double([inside / outside]))
        assert_exact(dsr, double([above / count]))


def test_runs_are_pooled_over_the_rows_of_a_position():
    # Rows 11011, 00000, 10000: runs 2, 2, 1, mean 5/3 although the rows' own means average to 1.
    rows = [[1, 1, 0, 1, 1], [0] * 5, [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    diagonal = double(rows)[None, :, :, None]
    assert_exact(reference.temporal_consistency(diagonal, double([0.5])), double([5 / 3]))


def test_thresholds_are_strict_for_tcs_and_not_for_dsr():
    diagonal = torch.full((1, 2, 2, 3), 0.25, dtype=DOUBLE)
    dfc, tcs, dsr = reference.motion_scores(diagonal, double([0.25]), double([1.75]))
    assert (dfc.item(), tcs.item(), dsr.item()) == (0.75, 0.0, 1.0)


def test_degenerate_energy_ratios():
    ratio = reference.energy_ratio(double([1, 0, 1, 0, math.nan]), double([2, 2, 0, 0, 0]))
    assert ratio[:4].tolist() == [0.5, 0, math.inf, 0]
    assert ratio[4].isnan()


def test_standardise_by_hand():
    # Mean 2, population deviation sqrt(2 / 3).
    expected = double([-1, 0, 1]) / math.sqrt(2 / 3)
    assert_exact(reference.standardise(double([1, 2, 3])), expected)
    assert reference.standardise(double([0.1] * 3)).tolist() == [0, 0, 0]
    assert reference.standardise(double([math.inf] * 2)).tolist() == [0, 0]
    assert_exact(reference.standardise(double([1, math.inf, 3])), double([-2, 1, 1]) / math.sqrt(2))


def test_composite_is_the_sum():
    one = double([1.0, 3.0])
    assert_exact(reference.composite(one, one, double([5.0, 5.0])), double([-2.0, 2.0]))


@pytest.mark.parametrize(
    ("scores", "ratio", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, [0, 2]),  # 1.5 rounds up
        ([3.0, 1.0, 2.0], 0.0, [0]),
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 1]),
        ([1.0, 2.0, 2.0, 2.0], 0.5, [1, 2]),
        ([5.0], 0.5, [0]),
        ([1.0, 2.0], 1.0, [0, 1]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.3, [3, 4]),  # 1.5 rounds up
    ],
)
def test_select_by_hand(scores, ratio, expected):
    assert reference.select(double(scores), ratio).tolist() == expected


def test_token_motion_scores_by_hand():
    video = VideoTokens(3, 1, 2)
    text = double([[1, 3, 0, 0, 4, 4], [1, 1, 1, 1, 1, 1]])
    # Frame means 2, 0, 4: mean 2, changes 2 and 4 over two steps.
    assert_exact(reference.token_motion_scores(text, video), double([2 + 3, 1]))
    assert_exact(reference.token_motion_scores(text, VideoTokens(1, 2, 3)), double([2, 1]))


def test_pooling_is_before_the_metrics():
    video = VideoTokens(2, 1, 1, text=1)
    maps = [randn(2, 3, 3, seed=seed).softmax(-1) for seed in range(3)]
    pooled = sum(maps) / 3
    statistics = reference.motion_statistics(maps, video)
    assert_exact(statistics.diagonal[..., 0], pooled[:, 1:, 1:])
    assert_exact(statistics.mean_attention, pooled[:, 1:, 1:].mean((1, 2)))
    assert_exact(statistics.square_sum, pooled[:, 1:, 1:].square().sum((1, 2)))
    assert_exact(statistics.text_attention, pooled[:, :1, 1:])
    assert_exact(reference.motion_statistics(maps, video, [0, 0]).text_attention, pooled[:, [0, 0], 1:])


sizes = st.tuples(*[st.integers(1, 5)] * 3)


@given(sizes, sizes)
def test_resampling_is_torch_interpolation(source, target):
    maps = rand(2, 3, math.prod(source))
    expected = torch.nn.functional.interpolate(
        maps.unflatten(-1, source), size=target, mode="trilinear", align_corners=False
    ).flatten(-3)
    assert_exact(reference.resample_rows(maps, source, target, normalize=False), expected)
    normalised = reference.resample_rows(maps, source, target)
    assert_exact(normalised, expected / expected.sum(-1, keepdim=True))


def test_resampling_by_hand():
    maps = double([[[1.0, 3.0], [0.0, 0.0]]])
    plain = reference.resample_rows(maps, (1, 1, 2), (1, 1, 4), normalize=False)
    assert_exact(plain, double([[[1, 1.5, 2.5, 3], [0, 0, 0, 0]]]))
    scaled = reference.resample_rows(maps, (1, 1, 2), (1, 1, 4))
    assert_exact(scaled, double([[[1 / 8, 1.5 / 8, 2.5 / 8, 3 / 8], [0, 0, 0, 0]]]))


def test_row_l2_loss_by_hand():
    student = double([[[3, 4], [0, 1]], [[5, 12], [9, 9]]])
    teacher = torch.zeros_like(student)
    mask = torch.tensor([[True, True], [True, False]])
    assert reference.row_l2_loss(student, teacher, mask).item() == (3 + 13) / 2
    mask = torch.tensor([[False, False], [True, False]])
    assert reference.row_l2_loss(student, teacher, mask).item() == 13
    assert reference.row_l2_loss(student, teacher, torch.zeros_like(mask)).item() == 0


def test_row_l2_loss_gradient_at_zero():
    student = torch.zeros(1, 2, 3, dtype=DOUBLE, requires_grad=True)
    reference.row_l2_loss(student, torch.zeros(1, 2, 3, dtype=DOUBLE)).backward()
    assert (student.grad == 0).all()
