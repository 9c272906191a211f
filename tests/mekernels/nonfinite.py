"""Non-finite input against the reference; shared by the tests of all backends."""

from __future__ import annotations

import math

import torch
from kernel_support import randn

import mekernels

VALUES = (math.nan, math.inf, -math.inf)
PLACES = (
    "query of a row that is read",
    "query of a row that is not read",
    "visible key",
    "key that the mask hides",
    "key that is hidden from some rows",
    "gradient",
    "gradient of a padded row",
)
ROWS = torch.tensor([[1, 8, -1, 3]])
KEY_MASK = torch.ones(1, 11, dtype=torch.bool)
KEY_MASK[0, 4] = False
LIMITS = torch.tensor([[[0, 9], [2, 2**40], [0, 11], [-(2**33), 2**33]]])
OPTIONS = {
    "plain": {},
    "all limits": {"causal": True, "key_mask": KEY_MASK, "key_range": LIMITS},
    "mask per head": {"key_mask": KEY_MASK, "reduce": "none"},
}
COLUMNS = {"slice": slice(2, 9), "index": torch.tensor([[0, 3, 3, 10, -1, 4]])}


def read(backend, place, value, columns, options, device="cpu", dtype=torch.float32):
    """Values and gradients with ``value`` at one place; None if the options have no such place."""
    query, key = randn(1, 4, 9, 16, dtype=dtype), randn(1, 2, 11, 16, seed=1, dtype=dtype)
    where = {
        PLACES[0]: (query, (0, 1, 8, 2)),
        PLACES[1]: (query, (0, 1, 0, 2)),
        PLACES[2]: (key, (0, 0, 3, 3)),
        PLACES[3]: (key, (0, 0, 4, 3)),
        PLACES[4]: (key, (0, 0, 10, 3)),
    }
    if place in where:
        tensor, index = where[place]
        tensor[index] = value
    pair = [item.to(device).requires_grad_() for item in (query, key)]
    masks = {name: item.to(device) for name, item in options.items() if isinstance(item, torch.Tensor)}
    columns = columns if isinstance(columns, slice) else columns.to(device)
    with mekernels.use_backend(backend):
        result = mekernels.attention_rows(*pair, ROWS.to(device), columns, **options | masks)
    given = torch.linspace(0.5, 1, result.shape[-1], device=device).expand(result.shape).clone()
    if place.startswith("gradient"):
        given[..., 2 if "padded" in place else 1, 1] = value
    return [item.detach().cpu() for item in (result, *torch.autograd.grad(result, pair, given))]


def compare(backend, place, value, columns, options, **where):
    """The same values, NaN where the reference has NaN, and no gradient lost that the reference has."""
    actual = read(backend, place, value, columns, options, **where)
    expected = read("reference", place, value, columns, options)
    torch.testing.assert_close(actual[0], expected[0], equal_nan=True, rtol=1e-4, atol=1e-5)
    for name, one, other in zip(("query", "key"), actual[1:], expected[1:], strict=True):
        lost = ~one.isfinite() & other.isfinite()
        assert not lost.any(), f"{int(lost.sum())} entries of the gradient of {name} are not finite"
        both = one.isfinite() & other.isfinite()
        torch.testing.assert_close(one[both], other[both], rtol=1e-4, atol=1e-5)
    # What a row that is read sees is never silently finite: nothing hides in a plain call.
    if not options and not place.endswith(("not read", "padded row")):
        rows = [row for row in ROWS[0].tolist() if row >= 0]
        assert torch.equal(actual[1][:, :, rows].isfinite(), expected[1][:, :, rows].isfinite())
    others = [row for row in range(actual[1].shape[2]) if row not in ROWS]
    assert (actual[1][:, :, others] == 0).all()
    if place == PLACES[1] or (place == PLACES[3] and "key_mask" in options):
        assert all(item.isfinite().all() for item in actual)
