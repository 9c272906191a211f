"""The reference of ``align_rows`` spelled out, and every backend that runs here against it."""

from __future__ import annotations

import pytest
import torch

import mekernels


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_both_sides_are_scaled_to_sum_to_one(backend):
    generator = torch.Generator().manual_seed(0)
    student = torch.rand(2, 3, 8, generator=generator, dtype=torch.float64)
    teacher = torch.rand(2, 3, 12, generator=generator, dtype=torch.float64) * 7
    volume = student.view(2, 3, 2, 2, 2)
    rows = torch.nn.functional.interpolate(volume, size=(3, 2, 2), mode="trilinear").flatten(2)
    rows = rows / rows.sum(-1, keepdim=True)
    expected = (rows - teacher / teacher.sum(-1, keepdim=True)).norm(dim=-1).mean()
    with mekernels.use_backend(backend):
        actual = mekernels.align_rows(student, teacher, (2, 2, 2), (3, 2, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
