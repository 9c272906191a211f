import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, randn, strided

import mekernels
from mekernels import MotionStatistics, VideoTokens, reference
from mekernels.motion_statistics.square_sums import vision_square_sums


def layer(video, seed, heads=3, width=6, fold=1, dtype=torch.float64, scale=1.0):
    query = randn(1, heads, video.length, width, seed=seed, dtype=dtype, scale=scale)
    key = randn(1, heads, fold * video.length, width, seed=seed + 1000, dtype=dtype, scale=scale)
    lse = reference.attention_lse(query.double(), key.double())
    return query, key, lse.to(mekernels.checks.accumulate_dtype(dtype))


def block_of(query, key, video, fold):
    attention = reference.fold_keys(reference.attention_map(query.double(), key.double()), fold)[0]
    return reference.vision_block(attention, video)


def pool(video, layers, fold=1, **options):
    statistics = MotionStatistics(video, layers[0][0].shape[1], pooling="per_layer", **options)
    for query, key, lse in layers:
        statistics.update(query, key, lse, fold=fold)
    return statistics


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(
    seed=st.integers(0, 99),
    grid=GRIDS,
    text=st.integers(0, 3),
    text_first=st.booleans(),
    fold=st.integers(1, 3),
    scale=st.sampled_from([1.0, 8.0]),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_squares_of_the_block_are_exact(seed, grid, text, text_first, fold, scale, backend):
    video = VideoTokens(*grid, text=text, text_first=text_first)
    query, key, lse = layer(video, seed, fold=fold, scale=scale)
    with mekernels.use_backend(backend):
        actual = vision_square_sums(strided(query), strided(key), lse, video, 6**-0.5, fold)
    assert_exact(actual, block_of(query, key, video, fold).square().sum((1, 2)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fold", [1, 2])
def test_error_rule_of_the_squares(dtype, fold):
    video = VideoTokens(4, 3, 3, text=5)
    query, key, lse = layer(video, 4, width=32, fold=fold, dtype=dtype)
    actual = vision_square_sums(query, key, lse, video, 32**-0.5, fold)
    exact = block_of(query, key, video, fold).square().sum((1, 2))
    attention = reference.fold_keys(reference.attention_map(query, key), fold)[0]
    plain = reference.vision_block(attention, video).square().sum((1, 2))
    # The logsumexp of the low-precision CPU kernel has the precision of the dtype.
    assert_error_rule(actual, exact, plain, rounding=dtype)


@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 3),
    grid=GRIDS,
    text=st.integers(0, 3),
    fold=st.integers(1, 2),
    updates=st.integers(1, 3),
    backend=st.sampled_from(["auto", "torch", "reference"]),
)
def test_scores_are_the_mean_of_each_layers_scores(seed, heads, grid, text, fold, updates, backend):
    video = VideoTokens(*grid, text=text)
    layers = [layer(video, seed + index, heads, fold=fold) for index in range(updates)]
    with mekernels.use_backend(backend):
        statistics = pool(video, layers, fold)
        scores = statistics.scores()
    blocks = [block_of(query, key, video, fold) for query, key, _ in layers]
    dfc, tcs, dsr = (
        torch.stack(metric).mean(0)
        for metric in zip(*(reference.motion_scores_of_map(block, video) for block in blocks), strict=True)
    )
    if video.positions > 1:
        assert_exact(scores.dfc, dfc, 1e-8)
    else:
        assert torch.equal(scores.dfc, dfc)
    near = [
        (reference.diagonal(block, video) / block.mean((1, 2))[:, None, None, None] - 1).abs().min() < 1e-9
        for block in blocks
    ]
    if not any(near):
        assert_exact(scores.tcs, tcs)
        assert_exact(scores.dsr, dsr)
    if text:
        pooled = torch.stack(
            [
                reference.fold_keys(reference.attention_map(query, key), fold)[0][
                    :, video.text_slice, video.vision_slice
                ]
                for query, key, _ in layers
            ]
        ).mean(0)
        assert_exact(statistics.text_attention([0]), pooled[0])


def test_it_differs_from_the_pooled_map():
    video = VideoTokens(3, 2, 4)
    layers = [layer(video, seed, scale=2.0) for seed in range(3)]
    pooled = MotionStatistics(video, 3, sampled_rows="all")
    for query, key, lse in layers:
        pooled.update(query, key, lse)
    one = pool(video, layers[:1]).scores()
    several = pool(video, layers).scores()
    alone = MotionStatistics(video, 3, sampled_rows="all")
    alone.update(*layers[0])
    assert_exact(one.dfc, alone.scores().dfc, 1e-9)
    assert ((several.dfc - pooled.scores().dfc).abs() > 1e-3).all()


def test_no_video_row_is_held():
    video = VideoTokens(3, 2, 4, text=5)
    statistics = pool(video, [layer(video, 0)], text_rows=[1, 3], sampled_rows="all")
    assert len(statistics.sampled_rows) == len(statistics.row_weights) == 0
    held = {name: tuple(tensor.shape) for name, tensor in statistics.state_dict().items()}
    assert held == {"rows": (3, 2, 24), "scores": (3, 3), "updates": ()}


def test_merge_and_state():
    video = VideoTokens(3, 2, 2, text=3)
    layers = [layer(video, index) for index in range(4)]
    whole, left, right = pool(video, layers), pool(video, layers[:1]), pool(video, layers[1:])
    assert_exact(left.merge(right).scores().dfc, whole.scores().dfc)
    again = MotionStatistics(video, 3, pooling="per_layer")
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.scores().dsr, whole.scores().dsr)
    with pytest.raises(ValueError, match="other must have pooling per_layer, got pooled"):
        whole.merge(MotionStatistics(video, 3))
    with pytest.raises(ValueError, match="pooling must be one of 'pooled', 'per_layer', got 'mean'"):
        MotionStatistics(video, 3, pooling="mean")


@pytest.mark.parametrize("place", ["query", "key", "lse"])
def test_nan_is_reported_when_read(place):
    video = VideoTokens(2, 2, 2, text=1)
    inputs = dict(zip(("query", "key", "lse"), layer(video, 0), strict=True))
    inputs[place][0, 1, 4] = math.nan
    statistics = MotionStatistics(video, 3, pooling="per_layer")
    statistics.update(**inputs)
    with pytest.raises(ValueError, match="attention statistics must be finite"):
        statistics.scores()


def test_no_gradient_is_kept():
    video = VideoTokens(2, 2, 2, text=1)
    query, key, lse = layer(video, 0)
    statistics = pool(video, [(query.requires_grad_(), key.requires_grad_(), lse)])
    assert not statistics.scores().dfc.requires_grad
