"""NaN and infinity in the Triton kernels; see ``test_triton_rows.py`` for where they run."""

import nonfinite
import pytest
import torch

import mekernels
from mekernels import VideoTokens, launch, reference

DEVICE = "cpu" if launch.interpreted() else "cuda"
pytestmark = [
    pytest.mark.skipif(bool(launch.machine()), reason="; ".join(launch.machine())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("place", nonfinite.PLACES)
@pytest.mark.parametrize(("options", "columns"), [("plain", "slice"), ("all limits", "index")])
def test_attention_rows(value, place, options, columns):
    chosen = nonfinite.COLUMNS[columns], nonfinite.OPTIONS[options]
    nonfinite.compare("triton", place, value, *chosen, device=DEVICE)


@pytest.mark.parametrize("value", nonfinite.VALUES)
def test_half_precision_keeps_other_rows_finite(value):
    """The backward scales a whole tile of gradients, and takes the scale from its finite entries only."""
    arguments = ("gradient", value, slice(2, 9), {"key_mask": nonfinite.KEY_MASK, "reduce": "none"})
    _, grad_query, _ = nonfinite.read("triton", *arguments, device=DEVICE, dtype=torch.float16)
    assert not grad_query[:, :, 8].isfinite().any()
    assert grad_query[:, :, [1, 3]].isfinite().all()
    assert (grad_query[:, :, [1, 3]] != 0).any()


def test_key_ranges_are_any_64_bit_number():
    query, key = torch.randn(1, 2, 5, 16, device=DEVICE), torch.randn(1, 2, 5, 16, device=DEVICE)
    rows = torch.tensor([[1, 2, 3, 4]], device=DEVICE)
    wide = [[[-(2**63), 2**63 - 1], [2**32, 2**33], [1, 2**32 + 1], [-(2**32), 3]]]
    options = {"key_range": torch.tensor(wide, device=DEVICE)}
    with mekernels.use_backend("triton"):
        actual = mekernels.attention_rows(query, key, rows, slice(0, 5), **options)
    torch.testing.assert_close(
        actual, reference.attention_rows(query, key, rows, slice(0, 5), **options), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("which", range(3))
def test_diagonals(value, which):
    video = VideoTokens(3, 1, 2, text=1)
    inputs = [torch.randn(1, 1, 7, 16), torch.randn(1, 1, 7, 16), torch.randn(1, 1, 7)]
    inputs[which][0, 0, 4] = value
    with mekernels.use_backend("triton"):
        actual = mekernels.diagonal_attention(*(item.to(DEVICE) for item in inputs), video).cpu()
    expected = reference.diagonal_attention(*inputs, video)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("token", [1, 6], ids=["text", "video"])
@pytest.mark.parametrize("which", ["query", "key", "lse"])
@pytest.mark.parametrize("fold", [1, 2])
def test_motion_statistics(value, token, which, fold):
    """Sums have NaN where the reference has NaN and equal values elsewhere, and reading scores is refused."""
    video = VideoTokens(3, 1, 3, text=3)
    query = nonfinite.randn(1, 2, 12, 16, dtype=torch.float32)
    key = nonfinite.randn(1, 2, 12 * fold, 16, seed=1, dtype=torch.float32)
    if which != "lse":
        {"query": query, "key": key}[which][0, 1, token, 3] = value
    lse = reference.attention_lse(query, key)
    if which == "lse":
        lse[0, 1, token] = value
    inputs = [item.to(DEVICE) for item in (query, key, lse)]

    def state(backend):
        statistics = mekernels.MotionStatistics(video, 2, sampled_rows="all")
        with mekernels.use_backend(backend):
            statistics.update(*inputs, fold=fold)
            with pytest.raises(ValueError, match="attention statistics must be finite"):
                statistics.scores()
        return statistics.state_dict()

    actual, expected = state("triton"), state("reference")
    for name in ("diagonal", "rows", "vision_mass"):
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert not all(expected[name][1].isfinite().all() for name in ("diagonal", "rows", "vision_mass"))


@pytest.mark.parametrize("value", nonfinite.VALUES)
def test_motion_statistics_without_text(value):
    video = VideoTokens(2, 1, 3)
    query, key = (nonfinite.randn(1, 1, 6, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
    lse = reference.attention_lse(query, key)
    lse[0, 0, 4] = value
    statistics = mekernels.MotionStatistics(video, 1)
    with mekernels.use_backend("triton"):
        statistics.update(*(item.to(DEVICE) for item in (query, key, lse)))
    assert statistics.state_dict()["vision_mass"].cpu().isnan().nonzero().tolist() == [[0, 4]]
