"""Is it the video model? A captioner from scratch, pulled towards the teacher's maps and towards controls.

``python -m studies.motion.contest`` trains a captioner for every arm and seed, goes on where it was stopped,
and writes ``results.json``, ``table.md`` and ``plot.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from motionenhancer.data import content_digest
from motionenhancer.files import whole_file, write_json
from motionenhancer.toy.world import WEIGHTS
from studies.motion import maps as makers
from studies.motion.captioner import Captioner, Regime, measure, own_rows, train
from studies.motion.clips import Clips, Maps, make_clips
from studies.motion.outcome import write_outcome

#: Sharpens the teacher's maps, and the captioner's own where so named; the toy study's value.
TEMPERATURE = 0.25


@dataclass
class Material:
    """What the arms' maps are made of, made once for a world."""

    folder: Path
    teachers: Sequence[str]
    regime: Regime
    train: Clips
    test: Clips

    def teacher(
        self, way: str = "level 200", *, heads: bool = True, words: bool = True, number: int = 0
    ) -> Maps:
        regime = self.regime
        return makers.teacher_maps(
            _maps(self.folder, self.teachers[number]),
            regime.world_seed,
            regime.clips,
            way,
            heads=heads,
            words=words,
            temperature=TEMPERATURE,
            movers=regime.movers,
        )

    def ensemble(self, *, heads: bool = True) -> Maps:
        """The maps of all teachers, combined as the package combines their priors."""
        each = [self.teacher(heads=heads, number=number) for number in range(len(self.teachers))]
        return makers.combined(each, self.train.texts)

    def own(self, seed: int, *, trained: bool, temperature: float = 1.0) -> Maps:
        """The maps of the captioner of this seed, untrained or after plain training; the teacher's words."""
        regime = self.regime
        model = Captioner(self.train.tubes.shape[-1], seed, regime.width, regime.layers).eval()
        if trained:
            model.load_state_dict(load_file(self.weights(seed)))
        rows = own_rows(model, self.train)
        return replace(self.teacher(), rows=rows, temperature=temperature)

    def weights(self, seed: int) -> Path:
        """Where the captioner that was plainly trained with this seed is kept."""
        return self.folder / "plain" / f"{seed}.safetensors"


def _placebos(
    suffix: str, way: str = "level 200", *, heads: bool = True
) -> dict[str, Callable[[Material, int], Maps]]:
    """Arms of the teacher's maps in one reading, each with something of the clip exchanged."""
    return {
        f"another clip's{suffix}": lambda m, seed: makers.another_clip(m.teacher(way, heads=heads), seed),
        f"another object's{suffix}": lambda m, seed: makers.another_object(m.teacher(way, heads=heads)),
        f"frames shuffled{suffix}": lambda m, seed: makers.shuffled_frames(m.teacher(way, heads=heads), seed),
        f"frames reversed{suffix}": lambda m, seed: makers.reversed_frames(m.teacher(way, heads=heads)),
        f"mean of all clips{suffix}": lambda m, seed: makers.mean_map(m.teacher(way, heads=heads)),
    }


#: Arms of several teachers, and which these are.
_SEVERAL = {
    "second teacher": slice(1, 2),
    "second teacher, MTTI only": slice(1, 2),
    "second teacher, no selection": slice(1, 2),
    "all teachers": slice(None),
    "all teachers, MTTI only": slice(None),
}
#: Arms that need no teacher.
_FREE = ("plain", "true masks")
#: An arm's maps, made from the material and a seed; None is plain training.
ARMS: dict[str, Callable[[Material, int], Maps | None]] = {
    "plain": lambda m, seed: None,
    "true masks": lambda m, seed: m.train.masks,
    "teacher": lambda m, seed: m.teacher(),
    "own, untrained": lambda m, seed: m.own(seed, trained=False),
    "own, untrained, sharpened": lambda m, seed: m.own(seed, trained=False, temperature=TEMPERATURE),
    "own, trained": lambda m, seed: m.own(seed, trained=True),
    "own, trained, sharpened": lambda m, seed: m.own(seed, trained=True, temperature=TEMPERATURE),
    **_placebos(""),
    "another clip's, no selection": lambda m, seed: makers.another_clip(
        m.teacher(heads=False, words=False), seed
    ),
    **_placebos(", MTTI only", heads=False),
    "uniform": lambda m, seed: makers.uniform(m.teacher()),
    "teacher, no selection": lambda m, seed: m.teacher(heads=False, words=False),
    "teacher, MHS only": lambda m, seed: m.teacher(words=False),
    "teacher, MTTI only": lambda m, seed: m.teacher(heads=False),
    "teacher, not sharpened": lambda m, seed: replace(m.teacher(), temperature=1.0),
    "teacher, mass as it is": lambda m, seed: replace(m.teacher(), temperature=1.0, normalize=False),
    "teacher, squared distance": lambda m, seed: replace(m.teacher(), loss="squared"),
    "teacher, wide diagonal": lambda m, seed: m.teacher("wide diagonal"),
    "teacher, standardized scores": lambda m, seed: m.teacher("standardized"),
    "teacher, standardized scores, MTTI only": lambda m, seed: m.teacher("standardized", heads=False),
    **_placebos(", inverted", "inverted"),
    **_placebos(", inverted, MTTI only", "inverted", heads=False),
    "teacher, inverted": lambda m, seed: m.teacher("inverted"),
    "teacher, inverted, no selection": lambda m, seed: m.teacher("inverted", heads=False, words=False),
    "teacher, inverted, MTTI only": lambda m, seed: m.teacher("inverted", heads=False),
    "second teacher": lambda m, seed: m.teacher(number=1),
    "second teacher, MTTI only": lambda m, seed: m.teacher(heads=False, number=1),
    "second teacher, no selection": lambda m, seed: m.teacher(heads=False, words=False, number=1),
    "all teachers": lambda m, seed: m.ensemble(),
    "all teachers, MTTI only": lambda m, seed: m.ensemble(heads=False),
}


def _maps(folder: Path, teacher: str) -> Path:
    return folder / f"maps-{teacher[:8]}"


def way_of(arm: str) -> str:
    """How the maps of an arm are read: the way that its name has."""
    return next((way for way in makers.WAYS if way in arm), "level 200")


def _about(arm: str, seed: int, material: Material) -> dict[str, Any]:
    teacher = None if arm in _FREE else "+".join(material.teachers[_SEVERAL.get(arm, slice(1))])
    return {"arm": arm, "seed": seed, "regime": asdict(material.regime), "teacher": teacher}


def run(arm: str, seed: int, material: Material) -> dict[str, Any]:
    """Train and test one captioner."""
    began = time.process_time()
    chosen = ARMS[arm](material, seed)
    model = train(material.train, chosen, seed, material.regime)
    if arm == "plain":
        material.weights(seed).parent.mkdir(exist_ok=True)
        with whole_file(material.weights(seed)) as temporary:
            save_file(dict(model.state_dict()), temporary)
    found = _about(arm, seed, material)
    found["test"] = measure(model, material.test)
    if chosen is not None:
        found["lift"] = makers.lift(chosen, material.train.masks)
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet and write the outcome; 0."""
    parser = argparse.ArgumentParser(prog="python -m studies.motion.contest", description=__doc__)
    add, shared = parser.add_argument, Regime()
    add("--output_dir", type=Path, default=Path("runs/contest"), help="receives everything (%(default)s)")
    add("--teacher", type=Path, nargs="+", default=[WEIGHTS / "teacher"], help="folders (the package's)")
    add("--arms", nargs="*", choices=list(ARMS), help="(all; those of several teachers if there are several)")
    add("--seeds", type=int, nargs="*", default=list(range(40, 46)), help="of the trainings (%(default)s)")
    for name, kind in (("clips", int), ("test_clips", int), ("world_seed", int), ("steps", int)):
        add(f"--{name}", type=kind, default=getattr(shared, name), help="(%(default)s)")
    add("--movers", type=int, choices=(1, 2), default=shared.movers, help="objects that move (%(default)s)")
    add("--weight", type=float, default=shared.weight, help="λ at the start (%(default)s)")
    args = parser.parse_args(argv)
    possible = [arm for arm in ARMS if len(args.teacher) > 1 or arm not in _SEVERAL]
    arms = possible if args.arms is None else args.arms
    if not set(arms) <= set(possible):
        parser.error("--arms of several teachers need more than one --teacher")
    # One thread: sums come in one order, so the same seed gives the same weights.
    torch.set_num_threads(1)
    given = {name: value for name, value in vars(args).items() if name in asdict(shared)}
    regime = replace(shared, **given)
    folder = args.output_dir
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    weights = Path("transformer", "diffusion_pytorch_model.safetensors")
    digests = {one: content_digest(one / weights) for one in args.teacher}
    ways: dict[Path, set[str]] = {one: set() for one in args.teacher}
    for arm in set(arms) - set(_FREE):
        for one in args.teacher[_SEVERAL.get(arm, slice(1))]:
            ways[one].add(way_of(arm))
    for one, needed in ways.items():
        into = _maps(folder, digests[one])
        makers.read_teacher(one, into, regime.world_seed, regime.clips, sorted(needed), regime.movers)
    teachers = list(digests.values())
    world, sizes = regime.world_seed, {"train": regime.clips, "test": regime.test_clips}
    clips = {split: make_clips(world, split, count, regime.movers) for split, count in sizes.items()}
    material = Material(folder, teachers, regime, clips["train"], clips["test"])
    wanted = [(seed, arm) for seed in args.seeds for arm in arms]
    for seed, arm in tqdm(wanted, desc="trainings", unit="run"):
        path = folder / "runs" / f"{arm.replace(' ', '_')}-{seed}.json"
        if not path.exists():
            write_json(path, run(arm, seed, material))
            continue
        held, about = json.loads(path.read_text(encoding="utf-8")), _about(arm, seed, material)
        if any(held.get(name) != value for name, value in about.items()):
            parser.error(f"{path} is of another study; name another --output_dir or remove it")
    versions = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "studies.motion.contest", *map(str, argv or sys.argv[1:])]),
        "teacher": "+".join(teachers),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(write_outcome(folder, regime, versions, list(ARMS)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
