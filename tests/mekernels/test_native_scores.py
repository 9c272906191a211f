import math

import pytest
import torch
from kernel_support import assert_error_rule, rand, strided
from native_support import needs_library, run_on_host, target  # noqa: F401

from mekernels import native

SHAPES = [
    (1, 1, 1),
    (3, 2, 5),
    (2, 5, 17),
    (2, 13, 91),
    (1, 63, 3),
    (1, 64, 4),
    (2, 65, 5),
    (1, 130, 2),
    (2, 3, 1100),
    (1, 2, 4099),
]


def run_lengths(row):
    """Lengths of the maximal runs of true values."""
    lengths, length = [], 0
    for value in [*row, False]:
        if value:
            length += 1
        elif length:
            lengths.append(length)
            length = 0
    return lengths


def by_hand(diagonal, tau, square_sum):
    """The three scores in plain Python and float64, one entry at a time."""
    rows = []
    for head, threshold, total in zip(diagonal.double(), tau.tolist(), square_sum.tolist(), strict=True):
        values = head.permute(2, 0, 1).tolist()  # by position, a matrix of frames
        inside = math.fsum(v * v for matrix in values for row in matrix for v in row)
        outside = total - inside if len(values) > 1 else 0.0
        dfc = inside / outside if outside > 0 else (math.inf if inside > 0 else 0.0)
        means = []
        for matrix in values:
            lengths = [n for row in matrix for n in run_lengths([v > threshold for v in row])]
            means.append(sum(lengths) / len(lengths) if lengths else 0.0)
        entries = [v >= threshold for matrix in values for row in matrix for v in row]
        rows.append((dfc, sum(means) / len(means), sum(entries) / len(entries)))
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]


def case(heads, frames, positions, seed):
    diagonal = rand(heads, frames, frames, positions, seed=seed, dtype=torch.float32).pow(4)
    tau = diagonal.mean((1, 2, 3)) * (0.2 + rand(heads, seed=seed + 1, dtype=torch.float32))
    square_sum = diagonal.square().sum((1, 2, 3)) * (1.5 + rand(heads, seed=seed + 2, dtype=torch.float32))
    return diagonal, tau, square_sum


def plain(diagonal, tau, square_sum):
    """The same in torch's float32."""
    above = diagonal > tau[:, None, None, None]
    starts = above.clone()
    starts[:, :, 1:] &= ~above[:, :, :-1]
    total, runs = above.sum((1, 2)), starts.sum((1, 2))
    inside = diagonal.square().sum((1, 2, 3))
    tcs = (total / runs.clamp(min=1)).mean(-1)
    outside = square_sum - inside
    dfc = inside / outside if diagonal.shape[-1] > 1 else torch.full_like(inside, math.inf)
    return dfc, tcs, (diagonal >= tau[:, None, None, None]).float().mean((1, 2, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 7])
def test_motion_scores_against_counting_by_hand(target, shape, seed):  # noqa: F811
    inputs = case(*shape, seed)
    found = native.motion_scores(*(tensor.to(target) for tensor in inputs))
    for one, exact, other in zip(found, by_hand(*inputs), plain(*inputs), strict=True):
        assert one.dtype == torch.float32
        if exact.isinf().any():
            assert torch.equal(one.cpu().double(), exact)
        else:
            assert_error_rule(one.cpu(), exact, other)


def test_entries_at_the_threshold(target):  # noqa: F811
    """An entry equal to tau counts for DSR, but belongs to no run."""
    diagonal = torch.full((2, 3, 3, 4), 0.25)
    diagonal[1, :, 1] = 0.5
    tau, square_sum = torch.tensor([0.25, 0.25]), torch.tensor([10.0, 10.0])
    _, tcs, dsr = native.motion_scores(diagonal.to(target), tau.to(target), square_sum.to(target))
    assert tcs.tolist() == [0.0, 1.0]
    assert dsr.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("frames", [1, 2, 63, 64, 65, 128, 129])
def test_one_run_crosses_the_words(target, frames):  # noqa: F811
    diagonal = torch.ones(1, frames, frames, 3)
    _, tcs, dsr = native.motion_scores(
        diagonal.to(target), torch.tensor([0.5]).to(target), torch.tensor([1e6]).to(target)
    )
    assert tcs.item() == frames
    assert dsr.item() == 1


@pytest.mark.parametrize("place", [(1, 0, 0, 0), (1, 4, 4, 18), (1, 2, 3, 9)])
def test_nan_stays_nan_and_in_its_head(target, place):  # noqa: F811
    diagonal, tau, square_sum = case(3, 5, 19, 3)
    diagonal[place] = math.nan
    tau[2] = math.nan
    found = native.motion_scores(*(tensor.to(target) for tensor in (diagonal, tau, square_sum)))
    dfc, tcs, dsr = (scores.isnan().tolist() for scores in found)
    assert dfc == [False, True, False]
    assert tcs == [False, True, True]
    assert dsr == [False, True, True]


def test_nothing_off_the_diagonal(target):  # noqa: F811
    diagonal = torch.ones(4, 2, 2, 3)
    diagonal[1] = 0
    square_sum = torch.tensor([12.0, 0.0, 11.0, math.nan])
    tau = torch.full((4,), 0.5)
    dfc, _, _ = native.motion_scores(diagonal.to(target), tau.to(target), square_sum.to(target))
    assert dfc[:3].tolist() == [math.inf, 0.0, math.inf]
    assert dfc[3].isnan()
    single = native.motion_scores(
        torch.ones(1, 2, 2, 1, device=target),
        torch.zeros(1, device=target),
        torch.tensor([9.0], device=target),
    )
    assert single[0].item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 7), (3, 13, 91), (2, 4, 1031), (7, 70, 3)])
def test_token_motion_scores(target, dtype, shape):  # noqa: F811
    tokens, frames, positions = shape
    attention = rand(tokens, frames * positions, seed=sum(shape), dtype=dtype)
    found = native.token_motion_scores(attention.to(target), frames)

    def scores(values):
        level = values.unflatten(1, (frames, positions)).mean(-1)
        return level.mean(-1) + level.diff(dim=-1).abs().sum(-1) / max(1, frames - 1)

    assert_error_rule(found.cpu(), scores(attention.double()), scores(attention.float()))


def test_token_nan_stays_in_its_row(target):  # noqa: F811
    attention = torch.ones(3, 8)
    attention[1, 5] = math.nan
    assert native.token_motion_scores(attention.to(target), 2).isnan().tolist() == [False, True, False]


def test_half_precision_is_read_exactly(target):  # noqa: F811
    """Every finite half, subnormals included: one value a token."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()][:: 211 if native.functions.run is run_on_host else 1, None]
        assert torch.equal(native.token_motion_scores(values.to(target), 1).cpu(), values[:, 0].float())
        special = torch.tensor([[math.inf], [-math.inf]], dtype=dtype)
        assert native.token_motion_scores(special.to(target), 1).tolist() == [math.inf, -math.inf]


@needs_library
def test_threads_do_not_change_the_result():
    inputs = case(5, 13, 1350, 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.motion_scores(*inputs)
        torch.set_num_threads(7)
        together = native.motion_scores(*inputs)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@needs_library
def test_strided_and_empty_input():
    diagonal, tau, square_sum = case(3, 4, 6, 1)
    expected = native.motion_scores(diagonal, tau, square_sum)
    found = native.motion_scores(strided(diagonal), tau, square_sum)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert [len(one) for one in native.motion_scores(diagonal[:0], tau[:0], square_sum[:0])] == [0, 0, 0]
    assert native.token_motion_scores(torch.ones(0, 4), 2).shape == (0,)


@needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"diagonal": torch.ones(2, 3, 3, 4).double()}, TypeError, "diagonal must have dtype torch.float32"),
        ({"diagonal": torch.ones(2, 3, 2, 4)}, ValueError, "diagonal must have shape"),
        ({"diagonal": torch.ones(2, 3, 3)}, ValueError, "diagonal must have shape"),
        ({"diagonal": torch.ones(2, 3, 3, 0)}, ValueError, "P at least 1"),
        ({"diagonal": [1.0]}, TypeError, "diagonal must be a torch.Tensor, got list"),
        ({"mean_attention": torch.ones(3)}, ValueError, r"mean_attention must have shape \(2\), got \(3,\)"),
        ({"square_sum": torch.ones(2, device="meta")}, ValueError, "square_sum must be on cpu, got meta"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "diagonal": torch.ones(2, 3, 3, 4),
        "mean_attention": torch.ones(2),
        "square_sum": torch.ones(2),
    }
    with pytest.raises(error, match=message):
        native.motion_scores(**{**good, **change})


@needs_library
@pytest.mark.parametrize(
    ("frames", "error"), [(0, ValueError), (3, ValueError), (True, TypeError), (2.0, TypeError)]
)
def test_bad_frames(frames, error):
    with pytest.raises(error, match="frames"):
        native.token_motion_scores(torch.ones(2, 8), frames)
