"""Train the toy's base student on still pictures: ``python -m motionenhancer.toy.train_student``.

It learns what things look like and where they are, and how answers about motion are phrased, from clips that
stand still at their middle frame. What moved cannot be seen there, so at motion it is left to guess.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.toy.language import question, still_question
from motionenhancer.toy.models import make_student
from motionenhancer.toy.render import render
from motionenhancer.toy.scene import TASKS, sample_scene
from motionenhancer.vlm.base import Encoded
from motionenhancer.vlm.qwen2_5_vl import FAMILY

_STREAM = 7_000_202
FRAMES, FPS = 8, 8.0
STUDENT: dict[str, Any] = {"layers": 3, "vision_hidden_size": 48, "tokens_per_second": 4}


def as_video(frames: np.ndarray) -> Video:
    stamps = np.arange(len(frames)) / FPS
    return Video(frames, stamps, FPS, len(frames) / FPS, len(frames), len(frames))


def as_sample(id: str, asked: str, answer: str) -> Sample:
    return Sample(
        id,
        [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    )


def still_sample(seed: int, index: int, *, motion: float = 0.15) -> tuple[Sample, np.ndarray]:
    """Return sample ``index`` and its (1, 32, 32, 3) picture; a share ``motion`` asks what cannot be seen."""
    rng = np.random.default_rng([_STREAM, seed, index])
    task = str(rng.choice(list(TASKS)))
    scene = sample_scene(rng, task)
    picture = render(scene, frames=1).frames
    asked, answer = question(scene, task) if rng.random() < motion else still_question(scene, rng)
    return as_sample(f"still-{index}", asked, answer), picture


def narrowed(encoded: Encoded) -> Encoded:
    """Hold pixels in half precision: many samples fit into memory."""
    inputs = {
        n: v.half() if v.dtype == torch.float32 and v.dim() > 1 else v
        for n, v in encoded.vision_inputs.items()
    }
    return replace(encoded, vision_inputs=inputs)


def widened(encoded: Encoded) -> Encoded:
    """Undo :func:`narrowed`."""
    inputs = {n: v.float() if v.dtype == torch.float16 else v for n, v in encoded.vision_inputs.items()}
    return replace(encoded, vision_inputs=inputs)


class Stills(torch.utils.data.Dataset):
    """Pictures tokenised once, as a clip of two frames that stands still and as one of :data:`FRAMES`."""

    def __init__(self, processor: Any, seed: int, count: int) -> None:
        self.short: list[Encoded] = []
        self.long: list[Encoded] = []
        for i in tqdm(range(count), desc="pictures", unit="picture", mininterval=2):
            sample, picture = still_sample(seed, i)
            self.short.append(narrowed(FAMILY.encode(processor, sample, [as_video(picture.repeat(2, 0))])))
            if i % 4 == 0:
                whole = FAMILY.encode(processor, sample, [as_video(picture.repeat(FRAMES, 0))])
                # All token frames are the same: they are unfolded when asked for.
                patches = whole.vision_inputs["pixel_values_videos"]
                whole.vision_inputs["pixel_values_videos"] = patches[: len(patches) // (FRAMES // 2)].clone()
                self.long.append(narrowed(whole))

    def draw(self, count: int, rng: np.random.Generator, *, short: bool) -> list[Encoded]:
        """Draw ``count`` of them."""
        if short:
            return [widened(self.short[i]) for i in rng.integers(0, len(self.short), count)]
        drawn = []
        for i in rng.integers(0, len(self.long), count):
            encoded = widened(self.long[i])
            patches = encoded.vision_inputs["pixel_values_videos"].repeat(FRAMES // 2, 1)
            inputs = {**encoded.vision_inputs, "pixel_values_videos": patches}
            drawn.append(replace(encoded, vision_inputs=inputs))
        return drawn


def widen(model: nn.Module, seed: int) -> None:
    """Draw weights anew with a deviation of one over the root of their inputs, embeddings with one half.

    The family's 0.02 is made for wide models; at a width of 64 attention then takes thousands of steps to
    leave uniformity.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                std = 0.5 if "embed_tokens" in name else weight[0].numel() ** -0.5
                weight.normal_(0.0, std, generator=generator)


def train(
    model: Any, processor: Any, data: Stills, *, seed: int, steps: int, long: int, batch: int, rate: float
) -> Iterator[float]:
    """Teach ``model`` its answers, the last ``long`` steps on whole clips; yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps)) + 0.01
    )
    rng = np.random.default_rng([_STREAM, seed])
    model.train()
    for step in range(steps):
        drawn = data.draw(batch, rng, short=step < steps - long)
        inputs = FAMILY.collate(drawn, pad_token_id=processor.tokenizer.pad_token_id, padding_side="right")
        inputs.pop("layouts")
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def save(model: Any, folder: Path) -> None:
    """Write weights in half precision, to be loaded in full, in which they can be trained on a CPU."""
    model.half().save_pretrained(folder)
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"')
    config.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the settings of ``argv`` and write a folder; 0."""
    parser = argparse.ArgumentParser(prog="python -m motionenhancer.toy.train_student", description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/toy_student"), help="transformers folder (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, pictures and their order (%(default)s)")
    add("--pictures", type=int, default=8000, help="different pictures (%(default)s)")
    add("--steps", type=int, default=1500, help="(%(default)s)")
    add("--long_steps", type=int, default=50, help="the last of them, on clips of full length (%(default)s)")
    add("--batch", type=int, default=32, help="pictures a step (%(default)s)")
    add("--learning_rate", type=float, default=2e-3, help="its peak (%(default)s)")
    args = parser.parse_args(argv)
    # One thread: sums come in one order, so the same seed gives the same weights.
    torch.set_num_threads(1)
    model, processor = make_student(seed=args.seed, **STUDENT)
    widen(model, args.seed)
    steps = train(
        model,
        processor,
        Stills(processor, args.seed, args.pictures),
        seed=args.seed,
        steps=args.steps,
        long=args.long_steps,
        batch=args.batch,
        rate=args.learning_rate,
    )
    losses: list[float] = []
    with tqdm(steps, total=args.steps, desc="student", unit="step", mininterval=2) as bar:
        for loss in bar:
            losses.append(loss)
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
    save(model, args.output_dir)
    processor.save_pretrained(args.output_dir)
    record: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "output_dir"}
    record["losses"] = [round(float(np.mean(losses[i : i + 100])), 5) for i in range(0, len(losses), 100)]
    (args.output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
