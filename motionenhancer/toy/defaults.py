"""The toy world as the default of whatever a command was not given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from .world import ToyFolder, build_toy

FOLDER = "runs/toy"


def use_toy_defaults(data: Any, prior: Any) -> ToyFolder | None:
    """Fill in the toy world for whatever was left out; return it if any of it is used.

    Args:
        data: the command's `DataArguments`.
        prior: its `PriorArguments`.

    Raises:
        ValueError: clips were given without the file that names them.
    """
    if data.data is None and data.video_root is not None:
        raise ValueError(f"--video_root {data.video_root} needs --data, the file that names its clips")
    if prior.teacher is not None and data.data is not None:
        return None
    toy = default_toy()
    prior.teacher = prior.teacher or str(toy.teacher)
    if data.data is None:
        data.data, data.video_root = str(toy.train), str(toy.videos)
    return toy


def default_toy() -> ToyFolder:
    """Return the toy world of commands typed without arguments; one process makes it on first use."""
    with PartialState().main_process_first():
        return build_toy(Path(FOLDER), clips=480, test_clips=120)
