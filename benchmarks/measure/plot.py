"""Cost against sequence length, ours and baselines, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import OURS, QUANTILES, Figure, Results, ResultsError

SWEPT = 2
"""Lengths a work must have been measured at to be drawn."""
WIDTH, HEIGHT = 4.2, 3.2


def sweeps(results: Results) -> dict[str, dict[str, list[Figure]]]:
    """Work to role to figures in the order of their length, of works measured at several lengths."""
    found: dict[str, dict[str, list[Figure]]] = {}
    for figure in results.figures:
        # A doubled key axis is another workload, not another length.
        if "memory" not in figure.case:
            found.setdefault(figure.work, {}).setdefault(figure.role, []).append(figure)
    lengths = {
        work: {f.length for figures in roles.values() for f in figures} for work, roles in found.items()
    }
    return {
        work: {role: sorted(figures, key=lambda f: f.length) for role, figures in roles.items()}
        for work, roles in found.items()
        if len(lengths[work]) >= SWEPT
    }


def draw(results: Results, path: Path) -> None:
    """Write a PNG: a column a work, time above and extra memory below.

    Raises:
        ResultsError: matplotlib is not installed, or nothing was measured at several lengths.
    """
    try:
        import matplotlib
    except ImportError:
        raise ResultsError('--plot needs matplotlib: pip install -e ".[bench]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = sweeps(results)
    if not found:
        raise ResultsError(f"{results.path}: nothing to plot, no work was measured at several lengths")
    figure, axes = pyplot.subplots(
        2, len(found), figsize=(WIDTH * len(found), 2 * HEIGHT), squeeze=False, layout="constrained"
    )
    named = dict.fromkeys([OURS, *(role for roles in found.values() for role in roles)])
    colors = {role: f"C{place}" for place, role in enumerate(named)}
    for column, (work, roles) in enumerate(found.items()):
        _panel(axes[0][column], roles, colors, "seconds", lambda f: f.best)
        _panel(axes[1][column], roles, colors, "extra MiB", _mebibytes)
        axes[0][column].set_title("\n".join(work.split(", ")), fontsize=9)
        axes[1][column].set_xlabel("tokens")
    figure.suptitle(results.device, fontsize=10)
    figure.savefig(path, format="png", dpi=130)
    pyplot.close(figure)


def _mebibytes(figure: Figure) -> dict[str, float]:
    return dict.fromkeys(QUANTILES, figure.peak_bytes / 2**20)


def _panel(axis: Any, roles: dict[str, list[Figure]], colors: dict[str, str], label: str, value: Any) -> None:
    for role, figures in roles.items():
        lengths, values = [f.length for f in figures], [value(f) for f in figures]
        middle = [v["p50"] for v in values]
        style = {"linewidth": 2.5, "zorder": 3} if role == OURS else {"linewidth": 1.2}
        axis.plot(lengths, middle, marker="o", markersize=4, label=role, color=colors[role], **style)
        low, high = [v["p20"] for v in values], [v["p80"] for v in values]
        axis.fill_between(lengths, low, high, alpha=0.15, color=colors[role])
    axis.set_xscale("log", base=2)
    ticks = sorted({figure.length for figures in roles.values() for figure in figures})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_yscale("log")
    axis.set_ylabel(label)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=7)
