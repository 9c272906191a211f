"""The kinds of `--teacher`: a video diffusion model, or a source of priors without one."""

from __future__ import annotations

from pathlib import Path

from ..files import read_json
from .own_maps import OwnMaps
from .reader import Source
from .regions import Regions

#: Names that --teacher takes beside folders: the data file's own regions, and the student that is trained.
REGIONS, SELF = "regions", "self"


def source_class(teacher: str) -> type[Source] | None:
    """The class that makes the priors of a named teacher; None for a video diffusion model.

    >>> source_class("regions").__name__, source_class("CogVideoX-5b")
    ('Regions', None)
    """
    if teacher == REGIONS:
        return Regions
    return OwnMaps if _is_student(Path(teacher)) else None


def _is_student(folder: Path) -> bool:
    """Whether a folder holds a transformers model: its config has a `model_type`."""
    try:
        return "model_type" in read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
