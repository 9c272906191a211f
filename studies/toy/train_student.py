"""Train the toy's base student on still pictures: ``python -m studies.toy.train_student``.

The training clips stand still at their middle frame. The student learns what objects look like and where they
are, to attend to what it names, and how answers about motion are phrased. It cannot see what moved, so its
answers about motion are guesses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from motionenhancer.alignment.dataset import Item, MotionCollator
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.data import prompt_text
from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.students import student_family
from motionenhancer.students.layout import Encoded
from motionenhancer.students.words import find_words
from motionenhancer.toy.accuracy import FRAMES
from motionenhancer.toy.language import question, still_question
from motionenhancer.toy.models import STUDENT, make_student, widen
from motionenhancer.toy.render import Clip, render
from motionenhancer.toy.scene import TASKS, Scene, sample_scene
from motionenhancer.training.arguments import TrainArguments
from studies.toy.masks import looks_prior

FAMILY = student_family("qwen2_5_vl")
_STREAM = 7_000_202
FPS = 8.0
FRAMES_A_TOKEN = STUDENT["temporal_patch_size"]
#: One in this number of pictures is shown as a whole clip that stands still, not as one token frame.
LONG = 4


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


def still_sample(seed: int, index: int, *, motion: float = 0.15) -> tuple[Sample, Scene, Clip]:
    """Return sample ``index``, its scene and its picture; a share ``motion`` of samples asks about motion."""
    rng = np.random.default_rng([_STREAM, seed, index])
    task = str(rng.choice(list(TASKS)))
    scene = sample_scene(rng, task)
    asked, answer = question(scene, task) if rng.random() < motion else still_question(scene, rng)
    return as_sample(f"still-{index}", asked, answer), scene, render(scene, frames=1)


def narrowed(encoded: Encoded) -> Encoded:
    """Keep pixels in half precision, so that many samples fit into memory."""
    inputs = {
        n: v.half() if v.dtype == torch.float32 and v.dim() > 1 else v
        for n, v in encoded.vision_inputs.items()
    }
    return replace(encoded, vision_inputs=inputs)


def widened(encoded: Encoded) -> Encoded:
    """Undo :func:`narrowed`."""
    inputs = {n: v.float() if v.dtype == torch.float16 else v for n, v in encoded.vision_inputs.items()}
    return replace(encoded, vision_inputs=inputs)


class Items(Dataset[Item]):
    """Samples tokenised once; pixels are kept in half precision."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return replace(self.items[index], encoded=widened(self.items[index].encoded))


def still_item(processor: Any, seed: int, index: int) -> Item:
    """A picture as a clip that stands still, with the masks of the objects that its text names as prior."""
    sample, scene, picture = still_sample(seed, index)
    frames = picture.frames.repeat(FRAMES if index % LONG == 0 else FRAMES_A_TOKEN, 0)
    encoded = narrowed(FAMILY.encode(processor, sample, [as_video(frames)]))
    prior = looks_prior(prompt_text(sample)[0], scene, picture.masks, (1, 4, 4))
    words = None if prior is None else find_words(sample, prior, encoded.layout, "both")
    return Item(sample.id, encoded, prior, words, {})


def save(model: Any, folder: Path) -> None:
    """Write weights in half precision; loading them in full precision allows training on a CPU."""
    model.half().save_pretrained(folder)
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"')
    config.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the settings of ``argv`` and write a folder; 0."""
    parser = argparse.ArgumentParser(prog="python -m studies.toy.train_student", description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/toy_student"), help="transformers folder (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, pictures and their order (%(default)s)")
    add("--pictures", type=int, default=8000, help="different pictures (%(default)s)")
    add("--steps", type=int, default=2000, help="(%(default)s)")
    add("--batch", type=int, default=32, help="pictures a step (%(default)s)")
    add("--learning_rate", type=float, default=2e-3, help="its peak (%(default)s)")
    add("--alignment_weight", type=float, default=1.0, help="of the masks of what is named (%(default)s)")
    args = parser.parse_args(argv)
    # One thread: sums come in one order, so the same seed gives the same weights.
    torch.set_num_threads(1)
    model, processor = make_student(seed=args.seed, layers=3, **STUDENT)
    widen(model, args.seed)
    pictures = tqdm(range(args.pictures), desc="pictures", unit="picture", mininterval=2)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MotionTrainer(
            model=model,
            args=TrainArguments(
                output_dir=scratch,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                learning_rate=args.learning_rate,
                weight_decay=0.05,
                adam_beta2=0.98,
                seed=args.seed,
                use_cpu=True,
                save_strategy="no",
                logging_steps=min(100, args.steps),
            ),
            train_dataset=Items([still_item(processor, args.seed, i) for i in pictures]),
            data_collator=MotionCollator(FAMILY, processor),
            processing_class=processor,
            alignment_weight=args.alignment_weight,
        )
        trainer.train()
    save(model.eval(), args.output_dir)
    processor.save_pretrained(args.output_dir)
    record: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "output_dir"}
    for name in ("loss_ar", "loss_align"):
        record[name] = [round(entry[name], 5) for entry in trainer.state.log_history if name in entry]
    (args.output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
