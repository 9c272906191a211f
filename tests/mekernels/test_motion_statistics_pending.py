"""Maps that wait to be added together. On a CPU, no map waits."""

import copy

import pytest
import torch
from kernel_support import randn

import mekernels
from mekernels import MotionStatistics, VideoTokens, backends, launch, reference
from mekernels.diagonal_attention.call import Call
from mekernels.motion_statistics.pending import Pending
from mekernels.motion_statistics.statistics import PENDING_BYTES
from mekernels.motion_statistics.sums import MAPS, padded

VIDEO = VideoTokens(3, 2, 3, text=4)


def inputs(seed=0):
    query, key = randn(1, 2, 22, 8, seed=seed), randn(1, 2, 22, 8, seed=seed + 1)
    return query, key, reference.attention_lse(query, key)


@pytest.mark.parametrize("place", range(3))
def test_a_cpu_update_keeps_nothing(place):
    statistics, expected = MotionStatistics(VIDEO, 2), MotionStatistics(VIDEO, 2, pending_bytes=0)
    given = inputs()
    expected.update(*(item.clone() for item in given))
    statistics.update(*given)
    given[place].fill_(7.0)
    assert statistics._pending.bytes == 0
    for name, tensor in expected.state_dict().items():
        assert torch.equal(statistics.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "pending_bytes must be at least 0, got -1"),
        (1.5, TypeError, "pending_bytes must be an int, got float"),
        (True, TypeError, "pending_bytes must be an int, got bool"),
    ],
)
def test_bad_bound(value, error, message):
    with pytest.raises(error, match=message):
        MotionStatistics(VIDEO, 2, pending_bytes=value)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_bound_counts_the_memory_that_a_map_holds(batch, monkeypatch):
    """A map that is a view of a batch, as from a teacher, keeps the batch: its whole storage counts, once."""
    flushed = []
    monkeypatch.setattr(backends, "dispatch", lambda *args: flushed.append(1 + len(args[-1])))
    query, key = randn(batch, 2, 22, 8), randn(batch, 2, 22, 8, seed=1)
    lse = reference.attention_lse(query, key)
    held = sum(item.numel() * item.element_size() for item in (query, key, lse))

    def call():
        own = (item.clone()[batch - 1 :] for item in (query, key, lse))
        return Call.of(*own, VIDEO, 1.0, 1)

    pending = Pending(2 * held)
    for _ in range(2):
        pending.add({}, call())
    assert pending.bytes == 2 * held
    assert flushed == []
    pending.add({}, call())
    assert (pending.bytes, flushed) == (0, [3])
    shared = [item[batch - 1 :] for item in (query, key, lse)]
    for _ in range(2):
        pending.add({}, Call.of(*shared, VIDEO, 1.0, 1))
    assert pending.bytes == held


@pytest.mark.parametrize("positions", [9, 32, 33])
def test_padding_of_the_sums_is_not_seen(positions):
    """Results contain neither the zeros in the padding nor values that a kernel writes there."""
    video = VideoTokens(2, 1, positions, text=3)
    query, key = randn(1, 2, video.length, 8), randn(1, 2, video.length, 8, seed=1)
    statistics = MotionStatistics(video, 2, sampled_rows="all")
    statistics.update(query, key, reference.attention_lse(query, key))
    before = statistics.scores(), statistics.text_attention([0]).clone()
    statistics._sums["rows"][..., video.vision :] = float("nan")
    assert torch.equal(statistics.scores().dfc, before[0].dfc)
    assert torch.equal(statistics.text_attention([0]), before[1])
    state = statistics.state_dict()
    assert state["rows"].shape == (2, 3 + video.vision, video.vision)
    other = MotionStatistics(video, 2, sampled_rows="all")
    other.load_state_dict(state)
    assert torch.equal(other.merge(copy.deepcopy(statistics)).scores().dfc, before[0].dfc)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("token", [1, 9])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("text", [0, 4])
def test_a_row_without_a_softmax_is_never_finite(value, token, backend, text):
    """A row with an infinite score, or a row that sees no key, has an infinite logsumexp."""
    video = VideoTokens(3, 2, 3, text=text)
    query, key = randn(1, 2, video.length, 8), randn(1, 2, video.length, 8, seed=1)
    lse = reference.attention_lse(query, key)
    lse[0, 1, token] = value
    statistics = MotionStatistics(video, 2)
    with mekernels.use_backend(backend):
        statistics.update(query, key, lse)
    with pytest.raises(ValueError, match="attention statistics must be finite"):
        statistics.scores()
    if token >= text:
        mass = statistics.state_dict()["vision_mass"]
        assert mass[1, token - text].isnan()
        assert mass[0].isfinite().all()


def test_bytes_a_layer_at_the_default():
    """48 heads, 13 x 30 x 45 video tokens, 104 rows, bfloat16: sums read and written once in a launch."""
    shape = launch.SHAPES["CogVideoX-5B"]
    layer = sum(item.numel() * item.element_size() for item in launch.meta_inputs(shape, torch.bfloat16))
    vision = shape.frames * shape.positions
    sums = 4 * shape.heads * (104 * padded(vision) + shape.frames * vision + vision)
    maps = min(MAPS, PENDING_BYTES // layer + 1)
    assert layer + 2 * sums > 1.01e9
    assert layer + 2 * sums / maps <= 0.33e9
