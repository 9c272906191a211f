"""``python -m motionenhancer.toy``: write the toy world, its trained teacher and its base student."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, write the folder, say what is in it; exit code 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m motionenhancer.toy", description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/toy"), help="folder to write (%(default)s)")
    add("--clips", type=int, default=64, help="training clips (%(default)s)")
    add("--test_clips", type=int, default=None, help="test clips (a quarter of --clips)")
    add("--seed", type=int, default=0, help="seed of the clips (%(default)s)")
    args = parser.parse_args(argv)

    from transformers.utils import logging as transformers_logging

    from motionenhancer.toy.world import build_toy

    transformers_logging.disable_progress_bar()
    try:
        toy = build_toy(args.output_dir, clips=args.clips, test_clips=args.test_clips, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    for path, what in (
        (toy.train, "training samples"),
        (toy.test, "test samples"),
        (toy.videos, "clips, the --video_root of both"),
        (toy.worlds, "what is in each clip, with boxes"),
        (toy.teacher, "CogVideoX teacher, trained on this world"),
        (toy.student, "Qwen2.5-VL student, trained on its still pictures"),
    ):
        print(f"{path}  {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
