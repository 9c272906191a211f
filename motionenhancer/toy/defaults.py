"""The toy world as the default of a command without data and models of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from .world import ToyFolder, build_toy

#: Folder, training clips and test clips of the world of each lesson.
_WORLDS = {"tasks": ("runs/toy", 480, 120), "motion": ("runs/toy_motion", 1000, 500)}


def use_toy_defaults(data: Any, prior: Any, student: Any = None) -> ToyFolder | None:
    """Fill in the toy world if no data and models were named; return it if it is used.

    A student is trained on the lesson "motion", from random weights. Without a student it is "tasks".

    Args:
        data: the command's `DataArguments`.
        prior: the command's `PriorArguments`.
        student: its `StudentArguments`, if the command trains a student.

    Raises:
        ValueError: some of student, teacher and data are named but other required ones are not; or clips are
            named without their data file.
    """
    if data.data is None and data.video_root is not None:
        raise ValueError(f"--video_root {data.video_root} needs --data, the file that names its clips")
    named = {"data": data.data, "teacher": prior.teacher}
    if student is not None:
        named["student"] = student.student
    aligned = student is None or student.aligned
    needed = {f"--{name}": value for name, value in named.items() if aligned or name != "teacher"}
    require_all(needed, {"--teacher": prior.teacher})
    if data.data is not None:
        return None
    toy = default_toy("tasks" if student is None else "motion")
    data.data, data.video_root, prior.teacher = str(toy.train), str(toy.videos), str(toy.teacher)
    if student is not None:
        student.student = str(toy.student)
    return toy


def require_all(needed: dict[str, Any], others: dict[str, Any] | None = None) -> None:
    """Refuse flags that name only a part of a run, so that the toy would supply the rest.

    Args:
        needed: flags that must be given together, each with its value, or None.
        others: other flags that cannot be combined with the toy.

    Raises:
        ValueError: a flag of `needed` or `others` is given, but not all of `needed`.
    """
    given = [name for name, value in {**needed, **(others or {})}.items() if value is not None]
    missing = [name for name, value in needed.items() if value is None]
    if given and missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given with {given[0]}; only a command that names none of "
            f"{', '.join(needed)} runs the toy"
        )


def default_toy(lesson: str = "tasks") -> ToyFolder:
    """Return the toy world of commands typed without arguments; one process makes it on first use."""
    folder, clips, test_clips = _WORLDS[lesson]
    with PartialState().main_process_first():
        return build_toy(Path(folder), clips=clips, test_clips=test_clips, lesson=lesson)
