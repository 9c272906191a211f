"""The op behind ``MotionStatistics.update``: add one attention map to the running sums.

Example:
    >>> import torch, mekernels
    >>> video = mekernels.VideoTokens(frames=2, height=1, width=2, text=1)
    >>> statistics = mekernels.MotionStatistics(video, heads=1, sampled_rows=2)
    >>> statistics.update(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8), torch.full((1, 1, 5), 5.0).log())
    >>> statistics.state_dict()["vision_mass"]
    tensor([[0.8000, 0.8000, 0.8000, 0.8000]])
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import backends, launch
from ..diagonal_attention.call import Call
from . import composite
from .sums import Sums


def _fake(sums: Sums, call: Call) -> None:
    return None


motion_statistics_op = backends.Op(
    "motion_statistics_update", _fake, mutates=("diagonal", "rows", "vision_mass")
)
"""Add one map. The first axis of query and key is 1; the ``text`` keys are not video tokens."""


def _triton(sums: Sums, call: Call, more: Sequence[Call] = ()) -> None:
    from . import plan

    plan.update(sums, call, more)


def _triton_reasons(sums: Sums, call: Call, more: Sequence[Call] = ()) -> list[str]:
    return launch.reasons(call.query)


name = motion_statistics_op.name
backends.register(name, "triton", _triton, reasons=_triton_reasons, machine=launch.machine)
backends.register(name, "torch", composite.update)
