"""Write the toy world to a folder: mp4 files, LLaVA-style jsonl, object boxes and tiny models."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from motionenhancer.data.encode import encode_video
from motionenhancer.files import whole_file, write_text
from motionenhancer.toy.language import caption, question, rest
from motionenhancer.toy.models import save_blank_student
from motionenhancer.toy.render import FRAMES, SIZE, Clip, render
from motionenhancer.toy.scene import TASKS, Scene, sample_scene

__all__ = ["LESSONS", "ToyFolder", "build_toy", "draw_clip", "write_world"]

LESSONS = ("tasks", "motion")

_SPLITS = {"train": 0, "test": 1}
WEIGHTS = Path(__file__).parent / "weights"
"""Folders of the trained toy models, as the commands in ``studies/toy`` write them."""


@dataclass(frozen=True)
class ToyFolder:
    """Where the parts of a toy world lie. ``train`` and ``test`` name their videos relative to ``videos``."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def videos(self) -> Path:
        return self.root / "videos"

    @property
    def train(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def test(self) -> Path:
        return self.root / "test.jsonl"

    @property
    def worlds(self) -> Path:
        return self.root / "worlds.jsonl"


@dataclass(frozen=True)
class _Settings:
    clips: int
    test_clips: int
    seed: int
    frames: int
    size: int
    fps: int
    lesson: str
    version: int = 5


def task_of(index: int, lesson: str = "tasks") -> str:
    """The task of clip ``index``: the tasks take turns, or all clips have motion recognition."""
    return list(TASKS)[index % len(TASKS)] if lesson == "tasks" else "MR"


def draw_clip(
    seed: int, split: str, index: int, *, frames: int = FRAMES, size: int = SIZE, lesson: str = "tasks"
) -> tuple[Scene, Clip]:
    """Draw clip ``index`` of ``split`` ("train" or "test"), each from its own random stream.

    The two splits share colours and shapes, but no pair of colour and shape.
    """
    rng = np.random.default_rng([seed, _SPLITS[split], index])
    movers = 1 if lesson == "motion" else 2
    scene = sample_scene(rng, task_of(index, lesson), split=split, movers=movers)
    return scene, render(scene, frames=frames, height=size, width=size)


def _sample(settings: _Settings, split: str, index: int, scene: Scene) -> dict[str, Any]:
    task = task_of(index, settings.lesson)
    turns = [question(scene, task)]
    if settings.lesson == "motion" and split == "train":
        turns.append(rest(scene))
    said = [text for turn in turns for text in turn]
    said[0] = f"<video>\n{said[0]}"
    speakers = ("human", "gpt")
    return {
        "id": f"{split}-{index:05d}-{task}",
        "video": f"{split}-{index:05d}.mp4",
        "conversations": [{"from": speakers[i % 2], "value": text} for i, text in enumerate(said)],
    }


def _world_row(settings: _Settings, split: str, index: int, scene: Scene, clip: Clip) -> dict[str, Any]:
    objects = []
    for obj, boxes in zip(scene.objects, clip.boxes, strict=True):
        objects.append(
            {"name": obj.name, "moving": obj.moving, **asdict(obj), "boxes": boxes.astype(int).tolist()}
        )
    return {
        "video": f"{split}-{index:05d}.mp4",
        "split": split,
        "caption": caption(scene),
        "fps": settings.fps,
        "height": settings.size,
        "width": settings.size,
        "ground": scene.ground,
        "camera": scene.camera,
        "objects": objects,
    }


def _sweep(folder: Path) -> None:
    """Remove temporary files of runs that died; younger files may belong to another running command."""
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 600:
                left.unlink()


def _claim(folder: ToyFolder, settings: _Settings) -> None:
    """Create the folder, or check that it holds a started or finished copy of this world."""
    if folder.root.exists() and not folder.root.is_dir():
        raise ValueError(f"output_dir must be a folder, {folder.root} is a file")
    marker = folder.root / "world.json"
    mine = asdict(settings)
    if marker.exists():
        try:
            held = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"output_dir {folder.root} holds a world.json that is not json: {error}"
            ) from None
        if held != mine:
            other = ", ".join(f"{k}={held.get(k)!r} (now {v!r})" for k, v in mine.items() if held.get(k) != v)
            raise ValueError(
                f"output_dir {folder.root} already holds a different toy world: {other}; "
                "name another folder or remove that one"
            )
        return
    if folder.root.exists() and any(folder.root.iterdir()):
        raise ValueError(f"output_dir {folder.root} is neither empty nor a toy world; name another folder")
    try:
        folder.videos.mkdir(parents=True, exist_ok=True)
        write_text(marker, json.dumps(mine, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"output_dir {folder.root} cannot be written: {error}") from None


def write_world(
    output_dir: str | Path,
    *,
    clips: int = 64,
    test_clips: int | None = None,
    seed: int = 0,
    frames: int = FRAMES,
    size: int = SIZE,
    fps: int = 8,
    lesson: str = "tasks",
    progress: bool = True,
) -> ToyFolder:
    """Write videos/, train.jsonl, test.jsonl and worlds.jsonl; go on where an interrupted run stopped.

    Everything is determined by the arguments. Clips of train and test come from disjoint random streams.
    A file has its final name only once it is complete.

    Args:
        output_dir: a folder that is empty, does not exist yet, or holds a started copy of this world.
        clips, test_clips: clips of each split, one sample per clip; test_clips defaults to a quarter.
        seed: at least 0.
        frames, size, fps: length, side in pixels (even) and rate of each clip.
        lesson: "tasks": one question for each clip, the six tasks take turns. "motion": one of three objects
            moves, and the question is how; training conversations also say that the others stay still.
        progress: show a progress bar.

    Raises:
        ValueError: a number out of range, an output_dir that holds something else or cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     toy = write_world(folder, clips=1, progress=False)
    ...     sorted(path.name for path in toy.videos.iterdir())
    ['test-00000.mp4', 'train-00000.mp4']
    """
    if test_clips is None:
        test_clips = max(1, clips // 4)
    for name, value, least in (
        ("clips", clips, 1),
        ("test_clips", test_clips, 1),
        ("seed", seed, 0),
        ("frames", frames, 1),
        ("size", size, 16),
        ("fps", fps, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if size % 2:
        raise ValueError(f"size must be even, got {size}")
    if lesson not in LESSONS:
        raise ValueError(f"lesson must be one of {', '.join(LESSONS)}, got {lesson!r}")
    folder = ToyFolder(Path(output_dir))
    settings = _Settings(clips, test_clips, seed, frames, size, fps, lesson)
    _claim(folder, settings)
    folder.videos.mkdir(exist_ok=True)
    todo = [("train", i) for i in range(clips)] + [("test", i) for i in range(test_clips)]
    paths = [folder.videos / f"{split}-{index:05d}.mp4" for split, index in todo]
    if all(path.exists() for path in (folder.train, folder.test, folder.worlds, *paths)):
        return folder

    rows: list[dict[str, Any]] = []
    samples: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for (split, index), path in zip(
        tqdm(todo, desc="toy clips", unit="clip", disable=not progress), paths, strict=True
    ):
        scene, clip = draw_clip(seed, split, index, frames=frames, size=size, lesson=lesson)
        if not path.exists():
            with whole_file(path) as temporary:
                encode_video(temporary, clip.frames, fps=fps)
        samples[split].append(_sample(settings, split, index, scene))
        rows.append(_world_row(settings, split, index, scene, clip))
    for path, lines in (
        (folder.train, samples["train"]),
        (folder.test, samples["test"]),
        (folder.worlds, rows),
    ):
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    _sweep(folder.videos)
    return folder


def _make_once(target: Path, make: Callable[[Path], Any]) -> None:
    """Run ``make`` on a temporary folder and rename it to ``target``, unless ``target`` exists."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        make(temporary)
        os.replace(temporary, target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_toy(
    output_dir: str | Path,
    *,
    clips: int = 64,
    test_clips: int | None = None,
    seed: int = 0,
    lesson: str = "tasks",
    progress: bool = True,
) -> ToyFolder:
    """Write a whole toy world: :func:`write_world`, then ``teacher/`` and ``student/``.

    The teacher is the package's. The student of the lesson "tasks" is the package's, which was trained on
    still pictures and on masks of the objects. The student of the lesson "motion" has random weights.

    Raises:
        ValueError: as :func:`write_world`.
    """
    folder = write_world(
        output_dir, clips=clips, test_clips=test_clips, seed=seed, lesson=lesson, progress=progress
    )
    _make_once(folder.teacher, functools.partial(shutil.copytree, WEIGHTS / "teacher"))
    trained = functools.partial(shutil.copytree, WEIGHTS / "student")
    _make_once(folder.student, save_blank_student if lesson == "motion" else trained)
    return folder
