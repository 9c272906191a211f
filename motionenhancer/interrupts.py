"""End a command at SIGINT or SIGTERM with one line: what is kept, and which command continues."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType


def _runs_a_command(argv: list[str]) -> bool:
    """Whether an interpreter's arguments start one of the commands.

    >>> _runs_a_command(["python", "-u", "-m", "motionenhancer.train", "--seed", "1"])
    True
    >>> _runs_a_command(["python", "-m", "mine", "-m", "motionenhancer"])
    False
    """
    options = [at for at, part in enumerate(argv[1:], 1) if part == "-m" or not part.startswith("-")]
    at = options[0] if options else 0
    program = argv[at + 1] if argv[at : at + 1] == ["-m"] and len(argv) > at + 1 else argv[at] if at else ""
    return Path(program).name.partition(".")[0] == "motionenhancer"


#: Whether this process was started to run one of the commands. In any other, signals are left alone.
COMMAND_LINE = _runs_a_command(sys.orig_argv)

#: Temporary files that are being written, removed when the process ends at a signal.
UNFINISHED: set[Path] = set()

_kept: Callable[[], str] = lambda: "nothing was begun"  # noqa: E731


def watch_signals() -> None:
    """End this process at SIGINT with exit code 130 and at SIGTERM with 143.

    No stack is unwound: a thread may be in the middle of a clip, and another process in a reduction.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        if os.getpid() == owner:  # and not a data loader's worker
            with suppress(Exception):
                _say(_kept())
            for path in tuple(UNFINISHED):
                with suppress(OSError):
                    path.unlink()
        os._exit(128 + number)

    with suppress(ValueError):  # in another thread than the main one
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)


def on_interrupt(kept: Callable[[], str]) -> None:
    """Register `kept`, which is called at a signal.

    Args:
        kept: writes the final files of the run and returns a text that says what is kept. It may run between
            any two instructions of the run, and must not wait for another process or thread.
    """
    global _kept
    _kept = kept


def _say(kept: str) -> None:
    if int(os.environ.get("RANK", "0")):
        return
    again = shlex.join(["python", *sys.orig_argv[1:]])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        again = "the same launch"
    # Not print: the interrupted code may hold its lock.
    os.write(2, f"\ninterrupted: {kept}; go on with: {again}\n".encode(errors="backslashreplace"))
