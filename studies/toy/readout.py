"""What the pixels under an object's mask say about its motion: ``python -m studies.toy.readout``.

A student whose attention lies exactly on the asked object reads a mean over the object's cells. A small
perceptron is trained to answer from such means, with as many clips per task as the study, and from the
object's true path. Attention alone cannot answer what the perceptron cannot answer, and a student could
learn to answer what the perceptron can.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from motionenhancer.toy.accuracy import FRAMES
from motionenhancer.toy.language import phrase
from motionenhancer.toy.render import SIZE
from motionenhancer.toy.scene import TASKS
from motionenhancer.toy.world import draw_clip

__all__ = ["accuracy_of", "main", "readings"]

#: Cells of 8 x 8 pixels in each direction, and frames of a token, as in the toy student.
_CELLS, _TOKEN = 4, 4


def readings(seed: int, split: str, task: str, count: int) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """For ``count`` clips of a task: features of the asked object, and what the object does.

    Returns:
        Way → ((count, features), answers): "cells", the mean of the pixels of the cells that it covers,
        weighted by its share of each cell; "path", the place of its middle in each shown frame.
    """
    cells, paths, answers = [], [], []
    for k in range(count):
        scene, clip = draw_clip(seed, split, k * len(TASKS) + list(TASKS).index(task))
        shown = np.linspace(0, len(clip.frames) - 1, FRAMES).round().astype(int)
        side = SIZE // _CELLS
        split_up = (FRAMES // _TOKEN, _TOKEN, _CELLS, side, _CELLS, side)
        frames = clip.frames[shown].reshape(*split_up, 3).transpose(0, 2, 4, 1, 3, 5, 6)
        cover = clip.masks[0][shown].reshape(split_up).mean((1, 3, 5)).reshape(FRAMES // _TOKEN, -1)
        tubes = frames.reshape(FRAMES // _TOKEN, _CELLS**2, -1) / 127.5 - 1.0
        cells.append(np.einsum("ts,tsp->tp", cover / cover.sum(-1, keepdims=True), tubes).reshape(-1))
        paths.append(scene.objects[0].path(len(clip.frames))[shown].reshape(-1))
        answers.append(phrase(scene.objects[0]))
    made = {"cells": np.stack(cells), "path": np.stack(paths)}
    return {way: (torch.from_numpy(values).float(), answers) for way, values in made.items()}


def accuracy_of(
    train: tuple[torch.Tensor, list[str]], test: tuple[torch.Tensor, list[str]], seed: int, steps: int = 600
) -> float:
    """Percent of right answers on ``test`` of a perceptron with one hidden layer, trained on ``train``."""
    names = sorted(set(train[1]))
    wanted = torch.tensor([names.index(name) for name in train[1]])
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(nn.Linear(train[0].shape[1], 128), nn.GELU(), nn.Linear(128, len(names)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(steps):
            part = torch.randint(len(wanted), (64,))
            loss = nn.functional.cross_entropy(model((train[0][part] - mean) / deviation), wanted[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        said = model((test[0] - mean) / deviation).argmax(-1).tolist()
    return 100 * float(np.mean([names[i] == answer for i, answer in zip(said, test[1], strict=True)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the accuracy by task and way, and write it if a file is given; 0."""
    parser = argparse.ArgumentParser(prog="python -m studies.toy.readout", description=__doc__)
    add = parser.add_argument
    add("--clips", type=int, default=1600, help="training clips a task (%(default)s)")
    add("--test_clips", type=int, default=400, help="test clips a task (%(default)s)")
    add("--world_seed", type=int, default=1, help="of the clips (%(default)s)")
    add("--seeds", type=int, default=3, help="trainings of the perceptron (%(default)s)")
    add("--output", type=Path, default=None, help="a json file for all figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for task in ("MR", "LM", "MO", "AO", "RC"):
        train = readings(args.world_seed, "train", task, args.clips)
        test = readings(args.world_seed, "test", task, args.test_clips)
        found[task] = {
            way: [accuracy_of(train[way], test[way], seed) for seed in range(args.seeds)] for way in train
        }
        print(
            task, {way: round(float(np.mean(values)), 1) for way, values in found[task].items()}, flush=True
        )
    if args.output is not None:
        about = {"clips": args.clips, "test_clips": args.test_clips, "world_seed": args.world_seed}
        args.output.write_text(json.dumps(about | {"right": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
