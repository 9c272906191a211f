"""Does the method work? The toy world's ablation study: one base student, fine-tuned in several ways.

``python -m studies.toy.study`` runs every arm with every seed, goes on where it was stopped, writes
``results.json``, ``tables.md`` and ``plots.png``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from motionenhancer.files import write_json
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.toy.scene import TASKS
from motionenhancer.toy.world import WEIGHTS, write_world
from studies.toy.arms import ARMS, SWEEPS, Arm, Regime
from studies.toy.study_report import write_report

#: Added to the seed of the clips: settings may be chosen on the clips of that seed.
VALIDATION = 2
#: Number of clips whose priors a process makes at a time.
_PART = 100


@dataclass(frozen=True)
class Run:
    """One fine-tuning: an arm with a seed, in a regime."""

    arm: Arm
    seed: int
    regime: Regime

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}".replace(" ", "_").replace("/", "_")


def planned(
    regime: Regime, seeds: int, names: Sequence[str], sweeps: Sequence[str], sweep_seeds: int
) -> list[Run]:
    """All runs, seed after seed, so that a stopped study has nearly the same seeds in all arms."""
    arms = [arm for arm in ARMS if not names or arm.name in names]
    runs = [Run(arm, seed, regime) for seed in range(seeds) for arm in arms]
    for seed in range(sweep_seeds):
        runs += [Run(arm, seed, regime) for sweep in sweeps for arm in SWEEPS[sweep]]
    return list(dict.fromkeys(runs))


def _one(run: Run, folder: Path, teacher: Path, student: Path) -> str:
    """Run in a worker process; the result's file appears complete or not at all."""
    from studies.toy.fine_tuning import fine_tune, models

    began = time.process_time()
    outcome = fine_tune(run.arm, run.regime, run.seed, folder, teacher, student)
    record = {"arm": asdict(run.arm), "seed": run.seed, "regime": asdict(run.regime)}
    record |= {"models": models(run.arm, teacher, student), **outcome}
    record["cpu_seconds"] = round(time.process_time() - began, 1)
    path = folder / "runs" / f"{run.name}.json"
    write_json(path, record)
    return run.name


def _read(wanted: Sequence[PriorSettings], folder: Path, teacher: Path, clips: range) -> int:
    from studies.toy.fine_tuning import make_priors

    return make_priors(wanted, folder, teacher, clips)


def wanted_priors(runs: Sequence[Run]) -> list[PriorSettings]:
    """The different settings of these runs' priors."""
    return list(dict.fromkeys(run.arm.settings() for run in runs if run.arm.prior in ("teacher", "student")))


def unfinished(runs: Sequence[Run], folder: Path, teacher: Path, student: Path) -> Iterator[Run]:
    """The runs without a result.

    Raises:
        ValueError: a result of the same name has another arm, regime or models.
    """
    from studies.toy.fine_tuning import models

    for run in runs:
        path = folder / "runs" / f"{run.name}.json"
        if not path.exists():
            yield run
            continue
        held = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"regime": asdict(run.regime), "arm": asdict(run.arm)}
        wanted["models"] = models(run.arm, teacher, student)
        if any(held.get(name) != value for name, value in wanted.items()):
            raise ValueError(f"{path} is of another study; name another --output_dir or remove it")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.toy.study", description=__doc__)
    add = parser.add_argument
    shared = Regime()
    add("--output_dir", type=Path, default=Path("runs/study"), help="receives everything (%(default)s)")
    add(
        "--teacher", type=Path, default=WEIGHTS / "teacher", help="as train_teacher writes it (the package's)"
    )
    add(
        "--student", type=Path, default=WEIGHTS / "student", help="as train_student writes it (the package's)"
    )
    add("--arms", nargs="*", default=[], help=f"some of {', '.join(a.name for a in ARMS)}; all by default")
    add("--seeds", type=int, default=5, help="fine-tunings of each arm (%(default)s)")
    add("--sweeps", nargs="*", default=[], choices=list(SWEEPS), help="settings to vary as well (none)")
    add("--sweep_seeds", type=int, default=2, help="fine-tunings of each setting (%(default)s)")
    add("--clips", type=int, default=shared.clips, help="training clips (%(default)s)")
    add("--test_clips", type=int, default=shared.test_clips, help="test clips (%(default)s)")
    add("--steps", type=int, default=shared.steps, help="steps of each fine-tuning (%(default)s)")
    add("--batch", type=int, default=shared.batch, help="clips a step (%(default)s)")
    add("--learning_rate", type=float, default=shared.learning_rate, help="of each fine-tuning (%(default)s)")
    add("--world_seed", type=int, default=shared.world_seed, help="of the clips (%(default)s)")
    add("--first_seed", type=int, default=0, help="of the fine-tunings (%(default)s)")
    add("--processes", type=int, default=2, help="fine-tunings side by side, a thread each (%(default)s)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.arms) - {arm.name for arm in ARMS})
    if unknown:
        parser.error(f"--arms: no arm {', '.join(unknown)}; there are {', '.join(a.name for a in ARMS)}")
    regime = Regime(args.clips, args.test_clips, args.steps, args.batch, args.learning_rate, args.world_seed)
    runs = planned(regime, args.seeds, args.arms, args.sweeps, args.sweep_seeds)
    runs = [Run(r.arm, r.seed + args.first_seed, r.regime) for r in runs]

    if args.test_clips < len(TASKS):
        parser.error(f"--test_clips must be at least {len(TASKS)}, one a task, got {args.test_clips}")
    teacher, student = args.teacher, args.student
    try:
        (args.output_dir / "runs").mkdir(parents=True, exist_ok=True)
        left = list(unfinished(runs, args.output_dir, teacher, student))
        for name, clips, seed in (
            ("world", args.clips, args.world_seed),
            ("validation", 1, args.world_seed + VALIDATION),
        ):
            write_world(args.output_dir / name, clips=clips, test_clips=args.test_clips, seed=seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    os.environ["OMP_NUM_THREADS"] = "1"
    failed: list[str] = []
    wanted = wanted_priors(left)
    clips = range(args.clips) if wanted else range(0)
    parts = [clips[i : i + _PART] for i in range(0, len(clips), _PART)]
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), desc="fine-tunings", unit="run")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool, bar:
        reading = [pool.submit(_read, wanted, args.output_dir, teacher, part) for part in parts]
        with tqdm(total=len(clips), desc="priors", unit="clip", disable=not clips) as priors:
            for read in as_completed(reading):
                priors.update(read.result())
        waiting = {pool.submit(_one, run, args.output_dir, teacher, student): run for run in left}
        for done in as_completed(waiting):
            if done.exception() is None:
                bar.update()
            else:
                failed.append(waiting[done].name)
                bar.write(f"{waiting[done].name} failed: {done.exception()}", file=sys.stderr)
    print(write_report(args.output_dir, regime))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
