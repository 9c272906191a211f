"""Tables and plots of a toy study, from the result files of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from motionenhancer.toy.scene import TASKS
from studies.toy.arms import ARMS, LEVEL, PAIRS, SWEEPS, Regime

__all__ = ["finite", "interval", "shown", "summarise", "write_report"]

#: Two-sided 95 % quantiles of Student's t, from one degree of freedom on.
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval (Student's t); infinite for one value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    count = len(values)
    if count < 1:
        raise ValueError("values must hold at least one number")
    if count == 1:
        return float(values[0]), math.inf
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96 + 2.6 / (count - 1)
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(count)


def _load(folder: Path, regime: Regime) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm's name → seed → the run's result."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["regime"] == asdict(regime):
            found.setdefault(record["arm"]["name"], {})[record["seed"]] = record
    return found


def summarise(folder: Path, regime: Regime) -> dict[str, Any]:
    """Means and 95 % intervals of every arm, and of its gain over plain fine-tuning, seed by seed."""
    found = _load(folder, regime)
    plain = found.get("plain", {})
    arms: dict[str, Any] = {}
    for name, by_seed in found.items():
        one = next(iter(by_seed.values()))
        row: dict[str, Any] = {"arm": one["arm"], "models": one.get("models"), "seeds": sorted(by_seed)}
        for measure in ("overall", "average"):
            values = [by_seed[seed]["accuracy"][measure] for seed in sorted(by_seed)]
            row[measure] = dict(zip(("mean", "half"), interval(values), strict=True), values=values)
            shared = sorted(set(by_seed) & set(plain))
            gains = [by_seed[s]["accuracy"][measure] - plain[s]["accuracy"][measure] for s in shared]
            if gains and name != "plain":
                row[f"{measure}_gain"] = dict(zip(("mean", "half"), interval(gains), strict=True))
        seen = [r["validation"]["overall"] for r in by_seed.values() if "validation" in r]
        if seen:
            row["validation"] = dict(zip(("mean", "half"), interval(seen), strict=True), runs=len(seen))
        row["tasks"] = {
            task: float(np.mean([r["accuracy"]["tasks"][task] for r in by_seed.values()])) for task in TASKS
        }
        if shared and name != "plain":
            row["tasks_gain"] = {}
            for task in TASKS:
                both = [[one[s]["accuracy"]["tasks"][task] for s in shared] for one in (by_seed, plain)]
                gains = [after - before for after, before in zip(*both, strict=True)]
                row["tasks_gain"][task] = dict(zip(("mean", "half"), interval(gains), strict=True))
        arms[name] = row
    return {"regime": asdict(regime), "arms": arms, "pairs": _pairs(found)}


def _pairs(found: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each of `PAIRS` with common seeds: the difference of Overall, first arm minus second."""
    rows = []
    for one, other in PAIRS:
        shared = sorted(set(found.get(one, {})) & set(found.get(other, {})))
        if shared:
            overall = [[found[name][seed]["accuracy"]["overall"] for seed in shared] for name in (one, other)]
            mean, half = interval([a - b for a, b in zip(*overall, strict=True)])
            rows.append({"arm": one, "over": other, "seeds": shared, "mean": mean, "half": half})
    return rows


def shown(entry: dict[str, Any] | None, sign: str = "") -> str:
    """Mean and half width of a table's cell; no width for a single run, nothing for no entry."""
    if entry is None:
        return ""
    half = "" if math.isinf(entry["half"]) else f" ± {entry['half']:.1f}"
    return f"{entry['mean']:{sign}.1f}{half}"


def _row(name: str, row: dict[str, Any]) -> str:
    cells = [name, str(len(row["seeds"])), shown(row["overall"]), shown(row.get("overall_gain"), "+")]
    cells += [shown(row.get("validation")), *(f"{row['tasks'][task]:.1f}" for task in TASKS)]
    return "| " + " | ".join(cells) + " |"


def _groups(summary: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the arms that were run: by title, those of the ablation and of each sweep."""
    named = {"Arms": ARMS, **{f"Sweep: {sweep}": arms for sweep, arms in SWEEPS.items()}}
    there = {title: [a.name for a in arms if a.name in summary["arms"]] for title, arms in named.items()}
    # The first row of a sweep is the unchanged arm; a sweep needs more rows than this.
    return {title: names for title, names in there.items() if set(names) - {LEVEL.name}}


def tables(summary: dict[str, Any]) -> str:
    """Markdown: the arms, then each sweep, in percent with 95 % intervals over the seeds."""
    head = ["", "runs", "Overall", "gain over plain", "validation", *TASKS]
    lines: list[str] = []
    for title, names in _groups(summary).items():
        lines += [f"### {title}", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        lines += [*(_row(name, summary["arms"][name]) for name in names), ""]
    if summary["pairs"]:
        lines += ["### Seed by seed", "", "| arm | over | runs | gain |", "| --- | --- | --- | --- |"]
        for pair in summary["pairs"]:
            cells = [pair["arm"], pair["over"], str(len(pair["seeds"])), shown(pair, "+")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    gains = {a.name: summary["arms"].get(a.name, {}).get("tasks_gain") for a in ARMS}
    if any(gains.values()):
        lines += ["### Gain over plain by task", "", "| | " + " | ".join(TASKS) + " |"]
        lines.append("| --- " * (1 + len(TASKS)) + "|")
        for name, row in gains.items():
            if row:
                lines.append(f"| {name} | " + " | ".join(shown(row[t], "+") for t in TASKS) + " |")
        lines.append("")
    return "\n".join(lines)


def _plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(summary)
    sizes = [len(names) + 1 for names in groups.values()]
    figure, panels = pyplot.subplots(
        len(groups),
        figsize=(8, 0.35 * sum(sizes) + 1.5),
        sharex=True,
        squeeze=False,
        height_ratios=sizes,
        layout="constrained",
    )
    for axes, (title, names) in zip(panels[:, 0], groups.items(), strict=True):
        for i, name in enumerate(names):
            overall = summary["arms"][name]["overall"]
            half = 0.0 if math.isinf(overall["half"]) else overall["half"]
            axes.errorbar(overall["mean"], i, xerr=half, fmt="o", color="black", capsize=3)
            axes.scatter(overall["values"], [i] * len(overall["values"]), s=10, alpha=0.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.invert_yaxis()
    panels[-1, 0].set_xlabel("Overall accuracy, %, mean and 95 % interval over seeds")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def finite(value: Any) -> Any:
    """Replace the infinite interval of a single run by null: json has no infinity."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


def write_report(folder: Path, regime: Regime) -> str:
    """Write ``results.json``, ``tables.md`` and, with matplotlib, ``plots.png``; returns the tables.

    Without any result there is nothing to plot, and the tables are empty.
    """
    summary = summarise(folder, regime)
    (folder / "results.json").write_text(json.dumps(finite(summary), indent=1) + "\n", encoding="utf-8")
    text = tables(summary)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    try:
        if summary["arms"]:
            _plot(summary, folder / "plots.png")
    except ImportError:
        text += "\nno plots.png: matplotlib is not installed\n"
    return text
