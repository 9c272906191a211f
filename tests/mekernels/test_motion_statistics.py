import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, randn, strided

import mekernels
from mekernels import MotionStatistics, VideoTokens, reference
from mekernels.motion_statistics import composite as statistics_update
from mekernels.motion_statistics import statistics as motion_statistics


def layer(video, seed, heads=3, width=6, fold=1, dtype=torch.float64, scale=1.0):
    query = randn(1, heads, video.length, width, seed=seed, dtype=dtype, scale=scale)
    key = randn(1, heads, fold * video.length, width, seed=seed + 1000, dtype=dtype, scale=scale)
    lse = reference.attention_lse(query.double(), key.double())
    return query, key, lse.to(mekernels.checks.accumulate_dtype(dtype))


def pool(video, layers, fold=1, **options):
    statistics = MotionStatistics(video, layers[0][0].shape[1], **options)
    for query, key, lse in layers:
        statistics.update(query, key, lse, fold=fold)
    return statistics


def maps(layers, fold=1):
    return [
        reference.fold_keys(reference.attention_map(q.double(), k.double()), fold)[0] for q, k, _ in layers
    ]


@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 3),
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    text=st.integers(0, 3),
    text_first=st.booleans(),
    fold=st.integers(1, 2),
    updates=st.integers(1, 3),
    chunk=st.sampled_from([1, 30, 1 << 20]),
    backend=st.sampled_from(["auto", "reference"]),
    scale=st.sampled_from([1.0, 10.0]),
    diagonal_width=st.integers(0, 3),
)
def test_all_rows_give_the_pooled_map_exactly(
    seed, heads, grid, text, text_first, fold, updates, chunk, backend, scale, diagonal_width
):
    video = VideoTokens(*grid, text=text, text_first=text_first)
    layers = [layer(video, seed + index, heads, fold=fold, scale=scale) for index in range(updates)]
    pooled = torch.stack(maps(layers, fold)).mean(0)
    with pytest.MonkeyPatch.context() as patch, mekernels.use_backend(backend):
        patch.setattr(motion_statistics, "CHUNK_ELEMENTS", chunk)
        patch.setattr(statistics_update, "CHUNK_ELEMENTS", chunk)
        statistics = pool(
            video,
            [(strided(q), strided(k), lse) for q, k, lse in layers],
            fold,
            sampled_rows="all",
            diagonal_width=diagonal_width,
        )
        scores = statistics.scores()
    block = reference.vision_block(pooled, video)
    dfc, tcs, dsr = reference.motion_scores_of_map(block, video, diagonal_width)
    if video.positions > 1 + diagonal_width:
        assert_exact(1 / scores.dfc, 1 / dfc, 1e-9)
    else:
        assert torch.equal(scores.dfc, dfc)
    tau = block.mean((1, 2))[:, None, None, None]
    if ((block[:, None] - tau).abs() > 1e-9 * tau).all():
        assert_exact(scores.tcs, tcs)
        assert_exact(scores.dsr, dsr)
    if text:
        every = torch.arange(heads)
        expected = pooled[:, video.text_slice, video.vision_slice].mean(0)
        assert_exact(statistics.text_attention(every), expected)
        assert_exact(statistics.text_attention([heads - 1]), pooled[-1, video.text_slice, video.vision_slice])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_rule(dtype, seed):
    video = VideoTokens(4, 3, 3, text=5)
    layers = [layer(video, seed + index, width=32, dtype=dtype) for index in range(4)]
    statistics = pool(video, layers, sampled_rows="all")
    exact = reference.motion_statistics(maps(layers), video)
    plain_maps = [reference.attention_map(query, key)[0] for query, key, _ in layers]
    plain = reference.motion_statistics(plain_maps, video)
    state = statistics.state_dict()
    assert state["diagonal"].dtype == torch.float32
    assert_error_rule(state["diagonal"] / 4, exact.diagonal, plain.diagonal)
    assert_error_rule(state["rows"][:, :5] / 4, exact.text_attention, plain.text_attention)
    tau = state["vision_mass"].mean(1) / (4 * video.vision)
    assert_error_rule(tau, exact.mean_attention, plain.mean_attention)


def test_sampling_is_close_and_all_rows_are_exact():
    video = VideoTokens(4, 6, 6, text=4)
    layers = [layer(video, index, heads=6) for index in range(2)]
    whole = pool(video, layers, sampled_rows="all").scores()
    # 144 samples of 144 rows draw every row.
    assert_exact(pool(video, layers, sampled_rows=144).scores().dfc, whole.dfc)
    assert_exact(pool(video, layers, sampled_rows=9999).scores().dfc, whole.dfc)
    sampled = pool(video, layers, sampled_rows=48).scores()
    assert_exact(sampled.tcs, whole.tcs)
    assert_exact(sampled.dsr, whole.dsr)
    assert not torch.equal(sampled.dfc, whole.dfc)
    assert ((sampled.dfc / whole.dfc - 1).abs() < 0.2).all()


def test_the_sampled_estimate_is_unbiased():
    video = VideoTokens(3, 2, 4)
    layers = [layer(video, 3, heads=1)]
    outside = 1 / pool(video, layers, sampled_rows="all").scores().dfc
    estimates = torch.stack(
        [1 / pool(video, layers, sampled_rows=7, seed=seed).scores().dfc for seed in range(200)]
    )
    standard_error = estimates.std() / math.sqrt(len(estimates))
    assert (estimates.mean() - outside).abs() < 4 * standard_error
    assert estimates.std() > 0


@pytest.mark.parametrize("count", [1, 5, 13, 64])
def test_sampled_rows_are_seeded_and_spread_over_the_frames(count):
    video = VideoTokens(13, 4, 5)
    one, same, other = (MotionStatistics(video, 1, sampled_rows=count, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.sampled_rows, same.sampled_rows)
    assert not torch.equal(one.sampled_rows, other.sampled_rows)
    assert one.row_weights.sum() == video.vision
    assert (one.sampled_rows.diff() > 0).all()
    per_frame = torch.bincount(one.sampled_rows // video.positions, minlength=13)
    assert per_frame.max() - per_frame.min() <= 2
    if count >= 2 * 13:
        assert per_frame.min() >= 1


def test_text_rows_keep_their_order():
    video = VideoTokens(2, 2, 2, text=4, text_first=False)
    layers = [layer(video, 0)]
    pooled = maps(layers)[0]
    statistics = pool(video, layers, text_rows=[10, 8])
    assert_exact(statistics.text_attention([1, 2]), pooled[1:3, [10, 8], :8].mean(0))
    assert pool(video, layers, text_rows=[]).text_attention([0]).shape == (0, 8)
    assert_exact(pool(video, layers, text_rows=torch.tensor([9])).text_attention([0]), pooled[0, [9], :8])


def test_padding_tokens_stay_keys_when_they_are_no_rows():
    video = VideoTokens(2, 2, 2, text=4)
    layers = [layer(video, 0)]
    whole, some = pool(video, layers).scores(), pool(video, layers, text_rows=[0]).scores()
    for name in ("dfc", "tcs", "dsr"):  # text rows share matrix products with the video's rows
        assert_exact(getattr(whole, name), getattr(some, name))


@pytest.mark.parametrize("width", [0, 2])
def test_merge_counts_every_update_the_same(width):
    video = VideoTokens(3, 2, 2, text=3)
    layers = [layer(video, index) for index in range(5)]
    parts = layers, layers[:1], layers[1:]
    whole, left, right = (pool(video, part, diagonal_width=width) for part in parts)
    assert left.merge(right) is left
    assert left.updates == 5
    for name in ("dfc", "tcs", "dsr"):
        assert_exact(getattr(left.scores(), name), getattr(whole.scores(), name))
    assert_exact(left.text_attention([0]), whole.text_attention([0]))
    empty, other = (MotionStatistics(video, 3, diagonal_width=width) for _ in range(2))
    assert_exact(empty.merge(whole).text_attention([0]), whole.text_attention([0]))
    assert whole.merge(other).updates == 5


def test_merged_sums_are_not_shared():
    video = VideoTokens(2, 1, 2, text=1)
    first, second = MotionStatistics(video, 3), pool(video, [layer(video, 0)])
    first.merge(second)
    first.update(*layer(video, 1))
    assert_exact(second.text_attention([0]), pool(video, [layer(video, 0)]).text_attention([0]))


def test_merge_refuses_what_does_not_fit():
    video = VideoTokens(3, 2, 2, text=3)
    statistics = MotionStatistics(video, 2)
    for other, message in (
        (MotionStatistics(VideoTokens(3, 4, 1, text=3), 2), "other must have video"),
        (MotionStatistics(video, 3), "other must have heads 2, got 3"),
        (MotionStatistics(video, 2, text_rows=[0]), "text_rows"),
        (MotionStatistics(video, 2, sampled_rows=5), "sampled_rows"),
        (MotionStatistics(video, 2, diagonal_width=1), "other must have diagonal_width 0, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.merge(other)
    with pytest.raises(TypeError, match="other must be a MotionStatistics, got dict"):
        statistics.merge({})
    double, single = pool(video, [layer(video, 0)]), pool(video, [layer(video, 0, dtype=torch.float32)])
    with pytest.raises(TypeError, match=r"sums of dtype torch\.float64, got torch\.float32"):
        double.merge(single)
    assert double.updates == 1


@pytest.mark.parametrize("width", [0, 1])
def test_state_dict_round_trip(width):
    video = VideoTokens(2, 2, 2, text=3)
    statistics = pool(video, [layer(video, 0), layer(video, 1)], diagonal_width=width)
    state = {name: tensor.clone() for name, tensor in statistics.state_dict().items()}
    other = MotionStatistics(video, 3, diagonal_width=width)
    other.load_state_dict(state)
    assert other.updates == 2
    assert torch.equal(other.scores().dfc, statistics.scores().dfc)
    other.update(*layer(video, 2))
    statistics.update(*layer(video, 2))
    assert torch.equal(other.text_attention([0]), statistics.text_attention([0]))
    with pytest.raises(ValueError, match="state must have the entries"):
        other.load_state_dict({"updates": torch.tensor(1), "rows": state["rows"]})
    with pytest.raises(ValueError, match=r"state\['diagonal'\] must have shape"):
        MotionStatistics(VideoTokens(2, 4, 1, text=3), 2, diagonal_width=width).load_state_dict(state)
    fresh = MotionStatistics(video, 3, diagonal_width=width)
    other.load_state_dict(fresh.state_dict())
    assert other.updates == 0


def test_updates_do_not_track_gradients():
    video = VideoTokens(2, 2, 2, text=3)
    query, key, lse = layer(video, 0)
    statistics = MotionStatistics(video, 3)
    statistics.update(query.requires_grad_(), key.requires_grad_(), lse.requires_grad_())
    assert not statistics.scores().dfc.requires_grad
    assert not statistics.text_attention([0]).requires_grad


def test_updates_are_deterministic():
    video = VideoTokens(3, 5, 5, text=3)
    layers = [layer(video, index, dtype=torch.float32) for index in range(3)]
    first, second = pool(video, layers), pool(video, layers)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("place", ["query", "key", "lse"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_reported_when_read(place, value):
    video = VideoTokens(2, 2, 2, text=1)
    inputs = dict(zip(("query", "key", "lse"), layer(video, 0), strict=True))
    inputs[place][0, 1, 4] = value if place != "lse" else -value
    statistics = MotionStatistics(video, 3)
    statistics.update(**inputs)
    for read in (statistics.scores, lambda: statistics.text_attention([0])):
        with pytest.raises(ValueError, match="attention statistics must be finite, got NaN or infinity"):
            read()


def test_reading_before_any_update():
    statistics = MotionStatistics(VideoTokens(2, 2, 2, text=1), 3)
    with pytest.raises(ValueError, match="no update yet"):
        statistics.scores()
    with pytest.raises(ValueError, match="no update yet"):
        statistics.text_attention([0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"video": 3}, TypeError, "video must be a mekernels.VideoTokens, got int"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "heads must be an int, got float"),
        ({"sampled_rows": 0}, ValueError, "sampled_rows must be at least 1, got 0"),
        ({"sampled_rows": "some"}, ValueError, "sampled_rows must be one of 'all', got 'some'"),
        ({"sampled_rows": 1.5}, TypeError, "sampled_rows must be an int or 'all', got float"),
        ({"diagonal_width": -1}, ValueError, "diagonal_width must be at least 0, got -1"),
        ({"diagonal_width": 1.0}, TypeError, "diagonal_width must be an int, got float"),
        ({"diagonal_width": 1, "pooling": "per_layer"}, ValueError, "diagonal_width must be 0 with pooling"),
        ({"text_rows": [3]}, ValueError, "text_rows must be positions of text tokens, 0 to 2, got"),
        ({"text_rows": [0.5]}, TypeError, "text_rows must be a sequence of integers"),
        ({"text_rows": [[0]]}, TypeError, "text_rows must be a sequence of integers"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        MotionStatistics(**({"video": VideoTokens(2, 2, 2, text=3), "heads": 2} | arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 11, 6)}, ValueError, "key must have the batch size"),
        ({"query": torch.zeros(1, 3, 10, 6)}, ValueError, "query must have video.length = 11 tokens, got 10"),
        ({"key": torch.zeros(1, 3, 22, 6)}, ValueError, "key must have fold"),
        ({"lse": torch.zeros(1, 3, 11, 1)}, ValueError, "lse must have 3 dimensions"),
        ({"fold": True}, TypeError, "fold must be an int, got bool"),
        ({"softmax_scale": "big"}, TypeError, "softmax_scale must be a float or None, got str"),
    ],
)
def test_bad_updates_change_nothing(change, error, message):
    video = VideoTokens(2, 2, 2, text=3)
    query, key, lse = layer(video, 0, dtype=torch.float32)
    statistics = MotionStatistics(video, 3)
    with pytest.raises(error, match=message):
        statistics.update(**({"query": query, "key": key, "lse": lse} | change))
    assert statistics.updates == 0


def test_updates_must_agree_with_the_sums():
    video = VideoTokens(2, 2, 2, text=3)
    statistics = MotionStatistics(video, 3)
    with pytest.raises(ValueError, match=r"query must have shape \(1, 3, 11, 6\)"):
        statistics.update(*layer(video, 0, heads=2))
    statistics.update(*layer(video, 0, dtype=torch.float16))
    statistics.update(*layer(video, 0, dtype=torch.float32))
    with pytest.raises(TypeError, match=r"query must be summed in torch\.float32 like earlier updates"):
        statistics.update(*layer(video, 0))
    assert statistics.updates == 2


@pytest.mark.parametrize("heads", [[], [3], [-1], [0.5], 0, [[0]], [True]])
def test_bad_heads(heads):
    video = VideoTokens(2, 2, 2, text=3)
    statistics = pool(video, [layer(video, 0)])
    with pytest.raises(ValueError, match="heads must"):
        statistics.text_attention(heads)


def test_constant_rows():
    video = VideoTokens(3, 2, 2, text=4)
    query, key = torch.zeros(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    statistics = MotionStatistics(video, 2, sampled_rows="all")
    statistics.update(query, key, torch.full((1, 2, 16), math.log(16)))
    torch.testing.assert_close(statistics.text_attention([0, 1]), torch.full((4, 12), 1 / 16))
    torch.testing.assert_close(statistics.scores().dfc, torch.full((2,), 1 / 3))
    assert mekernels.select_heads(statistics.scores()).shape == (1,)


def test_keys_that_no_row_sees():
    """Scores of minus infinity are weights of zero, in video and in text."""
    video = VideoTokens(3, 2, 3, text=4)
    query, key, _ = layer(video, 0)
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, [1, 7, 21], 0] = -math.inf
    layers = [(query, key, reference.attention_lse(query, key))]
    state = pool(video, layers, sampled_rows="all").state_dict()
    attention = maps(layers)[0]
    assert_exact(state["rows"][:, :4], attention[:, :4, 4:])
    assert (state["rows"][:, :, 3] == 0).all()
    assert_exact(state["vision_mass"], attention[:, 4:, 4:].sum(-1))


def test_text_that_takes_everything():
    """Rounding leaves no negative mass on the video."""
    video = VideoTokens(2, 2, 2, text=4)
    query, key, _ = layer(video, 0, dtype=torch.float32)
    query[..., 0], key[..., 0], key[:, :, :4, 0] = 30.0, 0.0, 30.0
    lse = reference.attention_lse(query, key)
    state = pool(video, [(query, key, lse)]).state_dict()
    assert (state["vision_mass"] >= 0).all()
    assert (state["vision_mass"] < 1e-4).all()
    assert pool(video, [(query, key, lse)]).scores().dsr.isfinite().all()
