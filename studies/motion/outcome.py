"""Table and plot of the contest, from the result files of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from studies.motion.captioner import Regime
from studies.toy.study_report import finite, interval, shown

__all__ = ["rank_correlation", "seeds_needed", "summarise", "write_outcome"]

_MEASURES = ("direction", "verb", "right", "colour", "distance")
#: Measures that are compared seed by seed; table and plot show the first one.
_COMPARED = ("direction", "right", "verb", "colour")
#: Arms with which every other arm is compared, seed by seed, and their names in the table's head.
_AGAINST = {
    "plain": "plain",
    "teacher": "the teacher's",
    "teacher, MTTI only": "MTTI only",
    "teacher, inverted": "inverted",
    "teacher, inverted, MTTI only": "inverted, MTTI only",
}


def seeds_needed(differences: Sequence[float], half: float = 1.0) -> int | None:
    """Number of seeds for a 95 % interval of ± ``half``, at the spread of these paired differences."""
    if len(differences) < 2:
        return None
    return max(2, math.ceil((1.96 * float(np.std(differences, ddof=1)) / half) ** 2))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Spearman's rank correlation of pairs, with the 95 % interval of 10,000 bootstrap draws of the pairs.

    Returns:
        "mean", "low", "high" and "pairs". A draw in which all ranks of one variable are equal counts as 0.
    """
    x, y = np.asarray(one, float), np.asarray(other, float)
    chosen = np.random.default_rng(0).integers(0, len(x), (10_000, len(x)))
    drawn = np.array([_spearman(x[some], y[some]) for some in chosen])
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"mean": _spearman(x, y), "low": float(low), "high": float(high), "pairs": len(x)}


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [(v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1) for v in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _foretelling(arms: dict[str, Any]) -> dict[str, Any]:
    """How well the lift of an arm's maps predicts its gain, over all maps but the true masks."""
    found = {}
    for name, prefix in (("all maps", ""), ("readings of the teacher", "teacher")):
        known = [
            (row["lift"], row["over plain"][_COMPARED[0]]["mean"])
            for arm, row in arms.items()
            if arm.startswith(prefix) and arm != "true masks" and "lift" in row and "over plain" in row
        ]
        if len(known) > 2:
            found[name] = rank_correlation(*zip(*known, strict=True))
    return found


def _difference(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    gains = [one - other for one, other in pairs]
    mean, half = interval(gains)
    return {"mean": mean, "half": half, "runs": len(gains), "seeds for ±1": seeds_needed(gains)}


def summarise(folder: Path, regime: Regime) -> dict[str, Any]:
    """Every run's figures; each arm's means and 95 % intervals; its differences to plain and teacher."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["regime"] == asdict(regime):
            runs.setdefault(record["arm"], {})[record["seed"]] = record
    arms: dict[str, Any] = {}
    for arm, by_seed in runs.items():
        seeds = sorted(by_seed)
        row: dict[str, Any] = {"seeds": seeds}
        for name in _MEASURES:
            values = [round(by_seed[seed]["test"][name], 4) for seed in seeds]
            row[name] = dict(zip(("mean", "half"), interval(values), strict=True), values=values)
        if "lift" in by_seed[seeds[0]]:
            row["lift"] = float(np.mean([by_seed[seed]["lift"] for seed in seeds]))
        for other in _AGAINST:
            shared = sorted(set(seeds) & set(runs.get(other, {})))
            if shared and arm != other:
                row[f"over {other}"] = {
                    name: _difference(
                        [(by_seed[s]["test"][name], runs[other][s]["test"][name]) for s in shared]
                    )
                    for name in _COMPARED
                }
        arms[arm] = row
    return {"regime": asdict(regime), "arms": arms, "lift against gain, ranks": _foretelling(arms)}


def table(summary: dict[str, Any], order: Sequence[str]) -> str:
    """A Markdown table with one row for each arm, in ``order``."""
    against = [other for other in _AGAINST if other in summary["arms"]]
    head = ["maps", "seeds", "direction, %", *(f"over {_AGAINST[other]}" for other in against)]
    head += ["verb", "both", "colour", "lift"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for arm in order:
        row = summary["arms"].get(arm)
        if row is None:
            continue
        gains = [row.get(f"over {other}", {}).get(_COMPARED[0]) for other in against]
        cells = [arm, str(len(row["seeds"])), shown(row["direction"]), *(shown(g, "+") for g in gains)]
        cells += [f"{row[name]['mean']:.1f}" if name in row else "" for name in ("verb", "right", "colour")]
        cells.append(f"{row['lift']:.2f}" if "lift" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], order: Sequence[str], path: Path) -> None:
    """Draw each arm's gain over plain, and the gain against how much the maps lie on the objects."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = {arm: summary["arms"][arm] for arm in order if "over plain" in summary["arms"].get(arm, {})}
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 0.3 * len(arms) + 1.2), width_ratios=(3, 2), layout="constrained"
    )
    for i, row in enumerate(arms.values()):
        gain = row["over plain"][_COMPARED[0]]
        half = 0.0 if math.isinf(gain["half"]) else gain["half"]
        left.errorbar(gain["mean"], i, xerr=half, fmt="o", color="black", capsize=3)
        right.errorbar(row["lift"], gain["mean"], yerr=half, fmt="o", color="black", markersize=3)
    left.axvline(0.0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(arms)), list(arms))
    left.invert_yaxis()
    left.set_xlabel("gain in direction over plain training, points, 95 % interval")
    right.axhline(0.0, color="grey", linewidth=0.8)
    right.set_xlabel("lift of the maps on the objects (1 is blind)")
    right.set_ylabel("gain, points")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_outcome(folder: Path, regime: Regime, about: dict[str, str], order: Sequence[str]) -> str:
    """Write ``results.json``, ``table.md`` and, where matplotlib is, ``plot.png``; returns the table."""
    summary = {**about, **summarise(folder, regime)}
    text = json.dumps(finite(summary), indent=1) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    found = table(summary, order)
    (folder / "table.md").write_text(found, encoding="utf-8")
    try:
        plot(summary, order, folder / "plot.png")
    except ImportError:
        found += "\nno plot.png: matplotlib is not installed\n"
    return found
