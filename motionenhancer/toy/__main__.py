"""``python -m motionenhancer.toy``: write the toy world, its trained teacher and its base student."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..flags import parse_arguments
from ..settings import ToyArguments
from .world import build_toy

_STUDENTS = {"tasks": "trained on its still pictures", "motion": "with random weights"}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, write the folder, say what is in it; exit code 2 on bad arguments."""
    (given,) = parse_arguments((ToyArguments,), argv, prog="python -m motionenhancer.toy")
    transformers_logging.disable_progress_bar()
    try:
        toy = build_toy(
            Path(given.output_dir),
            clips=given.clips,
            test_clips=given.test_clips,
            seed=given.seed,
            lesson=given.lesson,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, what in (
        (toy.train, "training samples"),
        (toy.test, "test samples"),
        (toy.videos, "clips, the --video_root of both sample files"),
        (toy.worlds, "what is in each clip, with boxes"),
        (toy.teacher, "CogVideoX teacher, trained on this world"),
        (toy.student, f"Qwen2.5-VL student, {_STUDENTS[given.lesson]}"),
    ):
        print(f"{path}  {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
