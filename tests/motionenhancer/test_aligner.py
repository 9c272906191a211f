"""The alignment loss against an independent computation in numpy, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionenhancer.alignment.aligner import ALIGNERS, LOSSES, align, build_aligner

GRIDS = [(1, 1, 1), (2, 3, 4), (3, 2, 2), (1, 5, 3), (4, 4, 1), (5, 2, 3)]


def axis_weights(source: int, target: int) -> np.ndarray:
    """(target, source) linear interpolation with half-pixel centres, clamped at the edges."""
    weights = np.zeros((target, source))
    for i in range(target):
        at = min(max((i + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        low = math.floor(at)
        high = min(low + 1, source - 1)
        weights[i, low] += 1.0 - (at - low)
        weights[i, high] += at - low
    return weights


def independent(
    attention: np.ndarray,
    priors: list[Any],
    grids: list[tuple[int, int, int]],
    row_tokens: np.ndarray,
    loss: str,
    normalize: bool = True,
) -> float:
    samples = []
    for maps, prior, grid, tokens in zip(attention, priors, grids, row_tokens, strict=True):
        if prior is None:
            continue
        rows = []
        for token in range(prior.attention.shape[0]):
            members = maps[tokens == token][:, : math.prod(grid)]
            if not len(members):
                continue
            volume = members.mean(axis=0).reshape(grid)
            for axis, (source, target) in enumerate(zip(grid, prior.grid, strict=True)):
                volume = np.moveaxis(np.tensordot(axis_weights(source, target), volume, (1, axis)), 0, axis)
            student = volume.reshape(-1) / (volume.sum() if normalize else 1)
            teacher = prior.attention[token].double().numpy()
            # A row of zeros, which no scale brings to one, stays as it is.
            teacher = teacher / ((teacher.sum() or 1) if normalize else 1)
            if loss == "l2":
                rows.append(np.sqrt(((student - teacher) ** 2).sum()))
            elif loss == "squared":
                rows.append(((student - teacher) ** 2).sum())
            elif loss == "mse":
                rows.append(((student - teacher) ** 2).mean())
            else:
                floored = np.maximum(student, 1e-8)
                share = floored / floored.sum()
                rows.append(sum(t * np.log(t / s) for t, s in zip(teacher, share, strict=True) if t > 0))
        if rows:
            samples.append(np.mean(rows))
    return float(np.mean(samples)) if samples else 0.0


def make_prior(tokens: int, grid: tuple[int, int, int], generator: torch.Generator) -> Any:
    attention = torch.rand(tokens, math.prod(grid), generator=generator).square().half()
    return SimpleNamespace(attention=attention, grid=grid)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    grids = [draw(st.sampled_from(GRIDS)) for _ in range(batch)]
    width = max(math.prod(grid) for grid in grids) + draw(st.integers(0, 2))
    attention = torch.rand(batch, rows, width, dtype=torch.float64, generator=generator) + 1e-3
    priors = [
        make_prior(draw(st.integers(1, 4)), draw(st.sampled_from(GRIDS)), generator)
        if draw(st.integers(0, 4))
        else None
        for _ in range(batch)
    ]
    row_tokens = torch.tensor(
        [
            [draw(st.integers(-1, 0 if prior is None else prior.attention.shape[0] - 1)) for _ in range(rows)]
            for prior in priors
        ]
    )
    return {"attention": attention, "priors": priors, "grids": grids, "row_tokens": row_tokens}


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from(LOSSES), st.sampled_from([None, "identity", "mlp"]), st.booleans())
def test_against_numpy(case: dict[str, Any], loss: str, name: str | None, normalize: bool) -> None:
    normalize |= loss == "kl"
    grids = {prior.grid for prior in case["priors"] if prior is not None}
    aligner = None
    if name == "identity" or (name == "mlp" and len(grids) == 1):
        aligner = build_aligner(name, next(iter(grids), (1, 1, 1)), width=8)
    found = align(
        case["attention"],
        case["priors"],
        grid=case["grids"],
        row_tokens=case["row_tokens"],
        aligner=aligner,
        loss=loss,
        normalize=normalize,
    )
    expected = independent(
        case["attention"].numpy(),
        case["priors"],
        case["grids"],
        case["row_tokens"].numpy(),
        loss,
        normalize,
    )
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(expected, rel=2e-6, abs=2e-7)


@settings(max_examples=15, deadline=None)
@given(cases(), st.sampled_from(LOSSES))
def test_gradients(case: dict[str, Any], loss: str) -> None:
    attention = case["attention"].clone().requires_grad_()

    def scalar(attention: torch.Tensor) -> torch.Tensor:
        options = {"grid": case["grids"], "row_tokens": case["row_tokens"], "loss": loss}
        return align(attention, case["priors"], **options)

    # The distance has a kink where student and teacher agree, as they must on a grid of one token.
    if all(prior is None or math.prod(prior.grid) > 1 for prior in case["priors"]):
        assert torch.autograd.gradcheck(scalar, attention, atol=1e-4)
    scalar(attention).backward()
    assert attention.grad is not None
    assert bool(torch.isfinite(attention.grad).all())
    for sample, prior in enumerate(case["priors"]):
        if prior is None:
            assert not attention.grad[sample].any()


@pytest.mark.parametrize("name", ALIGNERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_aligners_begin_as_the_identity_and_learn(name: str, grid: tuple[int, int, int]) -> None:
    maps = torch.rand(2, 3, math.prod(grid))
    state = torch.get_rng_state()
    aligner = build_aligner(name, grid, width=32, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(aligner(maps), maps)
    again = build_aligner(name, grid, width=32, seed=3).state_dict()
    other = build_aligner(name, grid, width=32, seed=4).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in aligner.state_dict().items())
    if name == "identity":
        assert not list(aligner.parameters())
        return
    assert any(not torch.equal(value, other[key]) for key, value in aligner.state_dict().items())
    target = torch.rand(2, 3, math.prod(grid)) * maps
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (aligner(maps) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_aligner_shapes() -> None:
    kinds = [torch.nn.Linear, torch.nn.GELU, torch.nn.Linear, torch.nn.GELU, torch.nn.Linear]
    mlp = build_aligner("mlp", (2, 3, 4))
    assert [type(layer) for layer in mlp.body] == kinds
    assert [tuple(p.shape) for p in mlp.parameters() if p.dim() == 2] == [(256, 24), (256, 256), (24, 256)]
    conv = build_aligner("conv", (2, 3, 4))
    assert [tuple(m.kernel_size) for m in conv.body if hasattr(m, "kernel_size")] == [(3, 3, 3)] * 3
    pointwise = build_aligner("pointwise", (2, 3, 4))
    assert [tuple(m.kernel_size) for m in pointwise.body if hasattr(m, "kernel_size")] == [(1, 1, 1)] * 3


def test_perceptron_against_numpy() -> None:
    """Three layers with GELU between them on rows in units of 1/S, added to the row."""
    maps = torch.rand(2, 3, 24, dtype=torch.float64)
    aligner = build_aligner("mlp", (2, 3, 4), width=5).double()
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter)
    first, middle, last = [[p.detach().numpy() for p in aligner.body[i].parameters()] for i in (0, 2, 4)]
    erf = np.vectorize(math.erf)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + erf(x / math.sqrt(2)))

    hidden = gelu(gelu(24 * maps.numpy() @ first[0].T + first[1]) @ middle[0].T + middle[1])
    expected = maps.numpy() + (hidden @ last[0].T + last[1]) / 24
    torch.testing.assert_close(aligner(maps).detach().numpy(), expected)


def test_pointwise_and_conv_see_their_neighbourhood_only() -> None:
    grid = (3, 5, 5)
    for name, reach in (("pointwise", 0), ("conv", 3)):
        aligner = build_aligner(name, grid, width=32)
        torch.nn.init.ones_(aligner.body[-1].weight)
        maps = torch.rand(1, 1, 75, requires_grad=True)
        aligner(maps).view(grid)[0, 0, 0].backward()
        assert maps.grad is not None
        touched = maps.grad.view(grid).nonzero().amax(dim=0)
        assert int(touched.max()) == reach


def test_aligner_is_trained_along() -> None:
    generator = torch.Generator().manual_seed(0)
    prior = make_prior(3, (2, 3, 4), generator)
    attention = torch.rand(1, 3, 24, generator=generator, requires_grad=True)
    aligner = build_aligner("mlp", prior.grid)
    align(attention, prior, aligner=aligner).backward()
    assert attention.grad is not None
    assert any(p.grad is not None and p.grad.any() for p in aligner.parameters())


def test_aligner_keeps_its_precision_apart() -> None:
    prior = make_prior(2, (2, 3, 4), torch.Generator().manual_seed(0))
    aligner = build_aligner("mlp", prior.grid).bfloat16()
    loss = align(torch.rand(1, 2, 24), prior, aligner=aligner)
    assert loss.dtype == torch.float32


def test_defaults() -> None:
    """Row i is token i, the grid is the prior's, and rows captured as padding do not count."""
    generator = torch.Generator().manual_seed(0)
    prior = make_prior(3, (2, 3, 4), generator)
    attention = torch.rand(1, 3, 24, generator=generator)
    explicit = align(attention, [prior], grid=(2, 3, 4), row_tokens=torch.tensor([[0, 1, 2]]))
    assert torch.equal(align(attention, prior), explicit)
    captured = SimpleNamespace(attention=attention, rows=torch.tensor([[5, -1, 7]]))
    two = align(attention, prior, row_tokens=torch.tensor([[0, -1, 2]]))
    assert torch.equal(align(captured, prior), two)
    assert not torch.equal(two, explicit)
    assert torch.equal(align(attention, prior, grid=[[2, 3, 4]]), explicit)
    assert float(align(prior.attention.float()[None] * 7, prior)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("priors", [[None, None], "unmapped"])
def test_nothing_to_align(priors: Any) -> None:
    attention = torch.rand(2, 3, 24, requires_grad=True)
    prior = make_prior(2, (2, 3, 4), torch.Generator().manual_seed(0))
    tokens = torch.full((2, 3), -1)
    given = [prior, prior] if priors == "unmapped" else priors
    loss = align(attention, given, row_tokens=tokens)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert attention.grad is not None
    assert not attention.grad.any()


def test_entries_near_zero_and_of_other_kinds() -> None:
    """The divergence has a floor of 1e-8; float64 priors give a float32 loss; negative entries count as 0."""
    prior = SimpleNamespace(attention=torch.tensor([[0.5, 0.5]], dtype=torch.float64), grid=(1, 1, 2))
    found = align(torch.tensor([[[0.0, 1.0]]]), prior, loss="kl")
    assert float(found) == pytest.approx(math.log(0.5) - 0.5 * math.log(1e-8), rel=1e-5)
    for loss in LOSSES:
        assert align(torch.tensor([[[0.0, 1.0]]]), prior, loss=loss).dtype == torch.float32
    below, zero = (
        SimpleNamespace(attention=torch.tensor([[low, 0.5, 0.5]]), grid=(1, 1, 3)) for low in (-0.1, 0.0)
    )
    student = torch.tensor([[[0.2, 0.3, 0.5]]])
    assert align(student, below, temperature=0.3) == align(student, zero, temperature=0.3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_sharpens_the_prior(loss: str) -> None:
    """The student is compared with the prior raised to one over the temperature."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(3, 24, generator=generator)
    rows[0, 5:] = 0
    captured = torch.rand(1, 3, 24, generator=generator, requires_grad=True)
    raised = SimpleNamespace(attention=rows**2, grid=(2, 3, 4))
    plain = SimpleNamespace(attention=rows, grid=(2, 3, 4))
    wanted = align(captured, raised, loss=loss)
    found = align(captured, plain, loss=loss, temperature=0.5)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(one, captured) for one in (found, wanted)))
    assert align(captured, plain, loss=loss) != wanted
    # 1e-4 to the tenth power is nothing in half precision, were the row not scaled first.
    faint = SimpleNamespace(attention=(rows * 1e-4).half(), grid=(2, 3, 4))
    strong = SimpleNamespace(attention=(rows * 1e-4).half().float() * 1e4, grid=(2, 3, 4))
    cold = [align(captured, one, loss=loss, temperature=0.1) for one in (faint, strong)]
    torch.testing.assert_close(*cold)
    empty = SimpleNamespace(attention=torch.zeros(3, 24), grid=(2, 3, 4))
    assert torch.isfinite(align(captured, empty, loss=loss, temperature=0.5))


def test_rows_without_mass_give_no_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    prior = make_prior(2, (2, 3, 4), generator)
    prior.attention[0] = 0
    attention = torch.rand(1, 2, 24, generator=generator)
    attention[0, 1] = 0
    attention.requires_grad_()
    for loss in LOSSES:
        value = align(attention, prior, loss=loss)
        value.backward()
        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(attention.grad).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_named(bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    prior, attention = make_prior(2, (2, 3, 4), generator), torch.rand(2, 2, 24, generator=generator)
    attention[1, 0, 3] = bad
    with pytest.raises(ValueError, match="captured attention holds NaN or infinity"):
        align(attention, [prior, prior])
    attention[1, 0, 3] = 0.1
    broken = make_prior(2, (2, 3, 4), generator)
    broken.attention[1, 5] = bad
    with pytest.raises(ValueError, match="the prior of sample 1 holds NaN or infinity"):
        align(attention, [prior, broken])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": torch.rand(2, 24)}, r"must be \(batch, rows, columns\), or .* got \(2, 24\)"),
        ({"loss": "l1"}, "loss must be one of"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"prior": []}, r"one entry per sample \(1\), got 0"),
        ({"attention": torch.rand(1, 2, 12)}, "12 columns, but the prior has 24: pass the student's grid="),
        ({"grid": (2, 3, 5)}, "has 30 tokens, more than the 24 captured columns"),
        ({"grid": (2, 3)}, "grid must be three positive integers"),
        ({"grid": [(2, 3, 4), (2, 3, 4)]}, r"one grid or one per sample \(1\), got 2"),
        ({"row_tokens": torch.tensor([[0, 2]])}, "below the prior's 2 kept tokens, got 2"),
        ({"row_tokens": torch.tensor([0, 1])}, r"row_tokens must be \(1, 2\) int64"),
        ({"row_tokens": torch.tensor([[0, 1]]).int()}, r"row_tokens must be \(1, 2\) int64"),
        ({"attention": torch.rand(1, 3, 24)}, "row_tokens is None\) must be below the prior's 2 kept tokens"),
        ({"aligner": build_aligner("mlp", (2, 3, 5))}, "must have 30 columns"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    prior = make_prior(2, (2, 3, 4), torch.Generator().manual_seed(0))
    arguments = {"attention": torch.rand(1, 2, 24), "prior": prior, **options}
    attention = arguments.pop("attention")
    with pytest.raises(ValueError, match=message):
        align(attention, arguments.pop("prior"), **arguments)


def test_prior_that_contradicts_its_grid() -> None:
    prior = SimpleNamespace(attention=torch.rand(2, 24), grid=(2, 3, 5))
    with pytest.raises(ValueError, match=r"the prior of sample 0 must be \(tokens, 30\)"):
        align(torch.rand(1, 2, 24), prior, grid=(2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deep", (1, 2, 3)), "name must be one of"),
        (("mlp", (1, 2)), "grid must be three positive integers"),
        (("mlp", (1, 0, 2)), "grid must be three positive integers"),
        (("mlp", (1, 2, 3), 0), "width must be at least 1"),
    ],
)
def test_bad_aligners(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_aligner(*arguments)


@pytest.mark.parametrize(("loss", "temperature"), [("kl", 1.0), ("l2", 0.5)])
def test_mass_as_it_is_has_no_divergence_and_no_temperature(loss: str, temperature: float) -> None:
    prior = make_prior(2, (1, 2, 2), torch.Generator())
    with pytest.raises(ValueError, match=r"normalize_rows must be true with .*(kl|0\.5)"):
        align(torch.rand(1, 2, 4), prior, loss=loss, temperature=temperature, normalize=False)
