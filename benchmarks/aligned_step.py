"""What alignment to stored priors adds to a step of the trainer on a CPU, its aligner included.

`python benchmarks/aligned_step.py [--rounds N] [--threads N]` trains the toy student on the toy world, at a
learning rate of 0, in turns without alignment, with the identity as the aligner and with the default one. It
prints the least process CPU time of each kind of step and its ratio to the plain one: on a busy machine both
are to be trusted, single times are not. Clips are decoded beforehand; collation is part of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from motionenhancer.alignment.aligner import build_aligner
from motionenhancer.alignment.dataset import MotionCollator, MotionDataset
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.data import SkipLog, content_digest, read_samples
from motionenhancer.priors.maker import LocalMaker, Made, Stored, make_all
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import request_priors
from motionenhancer.priors.storage import PriorStore, prior_keys
from motionenhancer.students import load_student
from motionenhancer.teachers import load_teacher, teacher_id
from motionenhancer.toy.world import build_toy
from motionenhancer.training.arguments import TrainArguments

BATCH = 8


def trainers(folder: Path) -> tuple[dict[str, MotionTrainer], list[Any]]:
    """A trainer of each kind after its first step, and the items of one batch."""
    toy = build_toy(folder / "toy", clips=BATCH, test_clips=1, progress=False)
    samples, skips = list(read_samples(toy.train, toy.videos, SkipLog())), SkipLog()
    store, settings = PriorStore(folder / "priors"), PriorSettings(steps=1)
    name = prior_keys(teacher_id(toy.teacher), settings)
    pairs = request_priors(samples, "both", skips, name=name, digest=content_digest)
    maker = Stored(store, LocalMaker(lambda: load_teacher(toy.teacher, "cpu"), settings), name, strict=True)
    with closing(maker):
        keys = {s.id: r.key for s, r, made in make_all(pairs, maker) if isinstance(made, Made)}
    grid = store.read(next(iter(keys.values()))).grid
    kinds: dict[str, dict[str, Any]] = {
        "plain step": {"alignment_weight": 0.0},
        "aligned, identity": {},
        "aligned, perceptron": {"aligner": build_aligner("mlp", grid)},
    }
    found = {}
    for name, options in kinds.items():
        model, processor, family = load_student(toy.student)
        dataset = MotionDataset(samples, family, processor, keys=keys, store=store, fps=4)
        settings_of_it = TrainArguments(
            output_dir=str(folder / "out"),
            max_steps=1,
            per_device_train_batch_size=BATCH,
            learning_rate=0.0,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        found[name] = MotionTrainer(
            model=model,
            args=settings_of_it,
            train_dataset=dataset,
            data_collator=MotionCollator(family, processor),
            **options,
        )
        found[name].train()
    return found, [dataset[index] for index in range(BATCH)]


def step(trainer: MotionTrainer, items: list[Any]) -> float:
    """CPU seconds of one step as `Trainer._run_epoch` takes it."""
    began = time.process_time()
    batches, count = trainer.get_batch_samples(iter([trainer.data_collator(items)]), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model_wrapped, batches[0], count)
    trainer._clip_grad_norm(trainer.model)
    state = (trainer.args, trainer.state, trainer.control)
    trainer.callback_handler.on_pre_optimizer_step(*state)
    trainer.optimizer.step()
    trainer.callback_handler.on_optimizer_step(*state)
    trainer.model.zero_grad()
    trainer.callback_handler.on_step_end(*state)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        kinds, items = trainers(Path(folder))
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(options.rounds):
        for name in list(kinds)[:: -1 if turn % 2 else 1]:
            spent[name].append(step(kinds[name], items))
    least = min(spent["plain step"])
    for name, times in spent.items():
        print(f"{name:<20} {1000 * min(times):8.1f} ms of CPU   {min(times) / least:.3f} x the plain step")


if __name__ == "__main__":
    main()
