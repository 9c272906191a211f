"""The confidence of a motion prior: how concentrated it is, and how much it changes over time.

The paper names diffuse priors of large static subjects as a limitation, and gating by confidence as a remedy.
"""

from __future__ import annotations

import math

import torch


def prior_confidence(attention: torch.Tensor, grid: tuple[int, int, int]) -> dict[str, float]:
    """Compare a prior's rows with the uniform map, which has confidence 0.

    Each row is scaled to sum to one. *Concentration* is 1 − H/log S with the row's entropy H in nats: 0 for a
    uniform row, 1 for a single place. *Variation* is the mean total-variation distance between consecutive
    frames, each scaled to sum to one: 0 if nothing moves, 1 if consecutive frames share no place. Both are
    averaged over the rows. *Confidence* is the geometric mean of the two averages.

    Args:
        attention: (T', S) rows of A_VDM.
        grid: (F, H, W) with S = F·H·W.

    Returns:
        {"concentration", "variation", "confidence"}, each in [0, 1].

    Raises:
        ValueError: S is not the size of the grid.

    Example:
        >>> prior_confidence(torch.ones(2, 12), (3, 2, 2))
        {'concentration': 0.0, 'variation': 0.0, 'confidence': 0.0}
    """
    frames, height, width = grid
    if attention.shape[-1] != frames * height * width:
        raise ValueError(f"attention has {attention.shape[-1]} columns, grid {grid} needs {math.prod(grid)}")
    rows = attention.double()
    rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-300)
    entropy = -torch.special.xlogy(rows, rows).sum(-1)
    most = math.log(rows.shape[-1])
    concentration = float((1 - entropy / most).mean()) if most else 0.0
    places = rows.unflatten(-1, (frames, -1))
    places = places / places.sum(-1, keepdim=True).clamp(min=1e-300)
    variation = float(places.diff(dim=-2).abs().sum(-1).mean() / 2) if frames > 1 else 0.0
    concentration, variation = (min(1.0, max(0.0, round(v, 6))) for v in (concentration, variation))
    return {
        "concentration": concentration,
        "variation": variation,
        "confidence": round(math.sqrt(concentration * variation), 6),
    }
