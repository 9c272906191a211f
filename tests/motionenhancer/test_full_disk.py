"""A full disk: the error names the file, and no report says that the run still goes on."""

from __future__ import annotations

import errno
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from motionenhancer.files import write_json
from motionenhancer.report.run_report import RunReport
from motionenhancer.weights import saving


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, body: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)


def test_the_file_is_named(tmp_path: Path, full: None) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'") as caught:
        write_json(tmp_path / "a.json", {})
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_report_is_not_left_at_running(tmp_path: Path, status: str, request: pytest.FixtureRequest) -> None:
    report = RunReport(tmp_path, {"a": 1})
    report.write("running")
    before = json.loads(report.path.read_text())
    request.getfixturevalue("full")
    with pytest.raises(OSError, match=r"motion_report\.json"):
        report.write(status)
    assert json.loads(report.path.read_text()) == {**before, "status": "failed"}


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: save_file({"a": torch.zeros(9999)}, folder / "a.safetensors"),
        lambda folder: torch.save({"a": torch.zeros(9999)}, folder / "optimizer.pt"),
        lambda folder: (folder / "a.json").write_bytes(b"a" * 9999),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path, save: Callable[[Path], object]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"{tmp_path}: cannot be saved (")), saving(tmp_path):
            save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_of_saving_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), saving(tmp_path):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(FileNotFoundError, match=r"none/a\.json"), saving(tmp_path):
        (tmp_path / "none" / "a.json").write_text("")
