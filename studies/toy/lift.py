"""How much attention the toy teacher's words pay to the object that they speak of.

``python -m studies.toy.lift --teacher DIR`` prints, for each noise level and word class, the *lift*:
the share of a word's row that lies on its object, divided by the object's share of the picture. A uniform
row has a lift of 1. It also prints how often the row is densest on its object among the clip's objects, and
compares the chosen heads with all other choices of the same number of heads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mekernels import select_heads
from motionenhancer.priors.prior import read_attention, select_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.teachers import load_teacher
from motionenhancer.toy.language import question
from motionenhancer.toy.render import render
from motionenhancer.toy.scene import TASKS, sample_scene
from studies.toy.arms import BOTH
from studies.toy.masks import grid_mask, word_class


@dataclass
class Lift:
    total: float = 0.0
    count: int = 0

    def add(self, rows: torch.Tensor, mask: torch.Tensor) -> None:
        value = (rows @ mask) / rows.sum(-1) / mask.mean()
        self.total += float(value.sum())
        self.count += len(value)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


def densest(row: torch.Tensor, masks: torch.Tensor) -> int:
    """Index of the mask of ``masks`` (objects, S) with the largest share of ``row`` (S,) for its area."""
    return int(((masks @ row) / masks.sum(-1)).argmax())


def sharpened_lift(rows: torch.Tensor, mask: torch.Tensor) -> float:
    """Lift of ``rows`` (T, S) on ``mask`` (S,), mean over T, sharpened as the study sharpens priors."""
    sharp = (rows / rows.amax(-1, keepdim=True)) ** (1 / BOTH.temperature)
    return float(((sharp @ mask) / sharp.sum(-1) / mask.mean()).mean())


def compare_choices(clips: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Compare choices of the heads that are averaged, by the sharpened lift of all words.

    Args:
        clips: of each, every head's rows (H, T, S), the object's mask (S,) and the chosen heads (k,).

    Returns:
        Mean lifts over the clips: of the ``chosen`` and of ``all`` heads; the ``least``, ``median`` and
        ``largest`` of all choices of k heads (the same for all clips); and ``below``, the share of choices
        below the chosen heads. The last four are left out if there are more than a thousand choices.
    """
    heads, count = len(clips[0][0]), len(clips[0][2])
    found = {
        "chosen": np.mean([sharpened_lift(rows[chosen].mean(0), mask) for rows, mask, chosen in clips]),
        "all": np.mean([sharpened_lift(rows.mean(0), mask) for rows, mask, _ in clips]),
    }
    if math.comb(heads, count) <= 1000:
        every = [
            np.mean([sharpened_lift(rows[list(choice)].mean(0), mask) for rows, mask, _ in clips])
            for choice in itertools.combinations(range(heads), count)
        ]
        found |= {"least": np.min(every), "median": np.median(every), "largest": np.max(every)}
        found["below"] = np.mean(np.array(every) < found["chosen"])
    return {name: round(float(value), 3) for name, value in found.items()}


def measure(teacher: Any, settings: PriorSettings, clips: int, *, seed: int = 0) -> dict[str, Any]:
    """By word class: lift of chosen, other and all heads, how often they find the object, words kept.

    Also the result of :func:`compare_choices`.
    """
    lifts: dict[str, dict[str, Lift]] = defaultdict(lambda: defaultdict(Lift))
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    tasks = [task for task in TASKS if task != "CM"]
    chosen_heads = np.zeros(teacher.heads)
    seen = []
    for index in range(clips):
        task = tasks[index % len(tasks)]
        scene = sample_scene(np.random.default_rng([7_000_303, seed, index]), task, split="train")
        clip = render(scene)
        text = " ".join(question(scene, task))
        reading = read_attention(teacher, clip.frames, text, settings)
        prior = select_prior(reading, settings)
        chosen = select_heads(reading.pool.scores(), settings.head_ratio)
        others = torch.tensor([h for h in range(teacher.heads) if h not in chosen.tolist()])
        chosen_heads[chosen.numpy()] += 1
        objects = torch.stack(
            [torch.from_numpy(grid_mask(mask, prior.grid)).reshape(-1).float() for mask in clip.masks]
        )
        mask = objects[0]
        maps = {
            "chosen": reading.pool.text_attention(chosen),
            "others": reading.pool.text_attention(others),
            "all": reading.pool.text_attention(torch.arange(teacher.heads)),
        }
        each = [reading.pool.text_attention(torch.tensor([h])) for h in range(teacher.heads)]
        seen.append((torch.stack(each).float(), mask, chosen))
        for i, span in enumerate(prior.all_spans):
            word = text[slice(*span)]
            name = word_class(word)
            kept[name][0] += i in prior.kept
            kept[name][1] += 1
            for group, rows in maps.items():
                lifts[name][group].add(rows[i : i + 1].float(), mask)
                found[name][group].append(densest(rows[i].float(), objects) == 0)
            for h, rows in enumerate(each):
                lifts[name][f"head{h}"].add(rows[i : i + 1].float(), mask)
    return {
        "lift": {n: {g: round(v.mean, 3) for g, v in groups.items()} for n, groups in lifts.items()},
        "densest": {n: {g: round(float(np.mean(v)), 3) for g, v in gs.items()} for n, gs in found.items()},
        "kept": {n: round(k / max(1, t), 3) for n, (k, t) in kept.items()},
        "words": {n: t for n, (_, t) in kept.items()},
        "chosen": (chosen_heads / clips).round(2).tolist(),
        "choices": compare_choices(seen),
    }


def lines(name: str, found: dict[str, Any]) -> str:
    """A table of one reading, one line for each word class."""
    rows = [f"{name}: share of clips that choose each head {found['chosen']}"]
    for kind, row in found["lift"].items():
        heads = " ".join(f"{row[f'head{h}']:.2f}" for h in range(len(found["chosen"])))
        right = found["densest"][kind]
        groups = "  ".join(f"{g} {row[g]:.2f} ({right[g]:.0%})" for g in ("chosen", "others", "all"))
        rows.append(f"  {kind:12s} {groups}  each head {heads}  kept {found['kept'][kind]:.0%}")
    rows.append("  all words, sharpened: " + "  ".join(f"{n} {v:.2f}" for n, v in found["choices"].items()))
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.toy.lift", description=__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="a CogVideoX folder made for 32 x 32 pixels")
    add("--levels", type=int, nargs="*", default=[20, 100, 200, 300, 450, 600, 800], help="(%(default)s)")
    add("--clips", type=int, default=60, help="(%(default)s)")
    add(
        "--inverted", type=int, nargs="*", default=[], help="also inversion and reconstruction in these steps"
    )
    add("--output", type=Path, default=None, help="a json file for all figures")
    args = parser.parse_args(argv)
    teacher = load_teacher(args.teacher, dtype=torch.float32)
    ways = {
        f"level {n}": PriorSettings(mode="renoise", noise_level=n, sampled_rows="all") for n in args.levels
    }
    ways |= {f"inverted, {n} steps": PriorSettings(steps=n, sampled_rows="all") for n in args.inverted}
    found = {}
    for name, settings in ways.items():
        found[name] = measure(teacher, settings, args.clips)
        print(lines(name, found[name]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
