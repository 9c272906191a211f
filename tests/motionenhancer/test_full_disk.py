"""A full disk: the error names the file, and no report says that the run still goes on."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from motionenhancer.files import write_json
from motionenhancer.report.run_report import RunReport


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
