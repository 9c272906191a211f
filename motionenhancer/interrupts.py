"""End a command at SIGINT or SIGTERM with one line: what is kept, and which command continues."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType


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

#: Seconds in which a launcher sends its signal to the other processes when one has ended.
PATIENCE = 10.0

#: torch's errors in a process that waits for another process which has ended.
_LOST = re.compile(r"^Dist\w*Error: |^RuntimeError: .*gloo", re.DOTALL)

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
        sys.excepthook = _after_the_launcher


def on_interrupt(kept: Callable[[], str]) -> None:
    """Register `kept`, which is called at a signal.

    Args:
        kept: writes the final files of the run and returns a text that says what is kept. It may run between
            any two instructions of the run, and must not wait for another process or thread.
    """
    global _kept
    _kept = kept


def _after_the_launcher(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Print an error. If another process has ended, give the launcher time to end this one first."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and _LOST.search(f"{kind.__name__}: {error}"):
        time.sleep(PATIENCE)  # until the launcher's signal
    sys.__excepthook__(kind, error, at)


def _say(kept: str) -> None:
    if int(os.environ.get("RANK", "0")):
        return
    again = shlex.join(["python", *sys.orig_argv[1:]])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        again = "the same launch"
    # Not print: the interrupted code may hold its lock.
    os.write(2, f"\ninterrupted: {kept}; go on with: {again}\n".encode(errors="backslashreplace"))
