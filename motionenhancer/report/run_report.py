"""`motion_report.json`: settings, samples and skipped samples of a run."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

REPORT = "motion_report.json"


@dataclass(repr=False)
class RunReport:
    """The report of one output folder. It is written when the run starts and again when it ends.

    Attributes:
        identity: settings that identify the run; a folder with the report of another run is refused.
        content: all other entries, free-form and JSON-ready.
        status: as written last; empty if this process has written none.

    Example:
        >>> log = [{"loss": 1.25, "loss_ar": 1.0, "epoch": 1.0}, {"train_loss": 1.5}]
        >>> RunReport(Path("out"), {}, {"training": {"log": log}}, "finished")
        RunReport('out', status='finished', loss=1.25, loss_ar=1)
    """

    folder: Path
    identity: dict[str, Any]
    content: dict[str, Any] = field(default_factory=dict)
    status: str = ""

    def __repr__(self) -> str:
        log = self.content.get("training", {}).get("log", [])
        last: dict[str, Any] = next((entry for entry in reversed(log) if "loss" in entry), {})
        losses = "".join(f", {name}={value:.4g}" for name, value in last.items() if name.startswith("loss"))
        return f"RunReport({str(self.folder)!r}, status={self.status!r}{losses})"

    @property
    def path(self) -> Path:
        return self.folder / REPORT

    def claim(self) -> None:
        """Create the folder for this run, or continue in it.

        Raises:
            ValueError: it holds another run, or files that are not from a run of this package.
            OSError: it cannot be created or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".write_probe_{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OSError(f"--output_dir {self.folder}: cannot be written ({error.strerror})") from error
        self.check()

    def finished(self) -> bool:
        """Whether the folder holds this run, finished, with all current entries of `content`."""
        try:
            report = read_json(self.path)
        except (OSError, ValueError):
            return False
        mine = json.loads(json.dumps({"identity": self.identity, **self.content}))
        return report.get("status") == "finished" and mine.items() <= report.items()

    def check(self) -> None:
        """Check that the folder can be used for this run; nothing is written.

        Raises:
            ValueError: as from `claim`.
        """
        if not self.folder.is_dir():
            return
        if not self.path.is_file():
            held = sorted(p.name for p in self.folder.iterdir())
            if held:
                raise ValueError(
                    f"--output_dir {self.folder}: holds {', '.join(held[:3])} but no {REPORT}; "
                    "give an empty folder"
                )
            return
        try:
            report = read_json(self.path)
            before = dict(report["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a run's report; give an empty --output_dir") from error
        if report.get("status") == "failed" and [p.name for p in self.folder.iterdir()] == [REPORT]:
            return  # a run that failed before it trained anything
        mine = json.loads(json.dumps(self.identity))
        changed = sorted(k for k in {*before, *mine} if before.get(k) != mine.get(k))
        if changed:
            listed = ", ".join(f"{k}: {before.get(k)!r} there, {mine.get(k)!r} now" for k in changed)
            raise ValueError(
                f"--output_dir {self.folder}: already holds a different run ({listed}); give another folder"
            )

    def write(self, status: str) -> None:
        """Write the report whole, by rename.

        Raises:
            OSError: it cannot be written, as on a full disk. An earlier report in the folder then says
                "failed".
        """
        self.status = status
        if status == "interrupted":
            self.content.pop("error", None)  # Another process ended first, and this one missed it.
        body = {"status": status, "identity": self.identity, "versions": versions(), **self.content}
        try:
            write_json(self.path, body)
        except OSError:
            # Written in place and not longer than before, so that it succeeds on a full disk.
            with suppress(OSError), self.path.open("r+b") as file:
                head = file.read(99)
                file.seek(0)
                file.write(head.replace(b'"status": "running",', b'"status": "failed", '))
            raise

    def fail(self, error: BaseException) -> None:
        """Write that an error ended the run, if it had begun."""
        if self.status:
            self.content["error"] = str(error) or type(error).__name__
            with suppress(OSError):
                self.write(status_of(error))


def status_of(error: BaseException) -> str:
    """The status of a run that this error ended."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def versions() -> dict[str, str]:
    """Versions of all packages that affect a run's numbers."""
    names = str.split("motionenhancer torch triton transformers diffusers accelerate tokenizers av")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
