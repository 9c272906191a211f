"""JSON files that hold something else: each reader names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motionenhancer import eval as evaluation
from motionenhancer.data.llama_factory import INFO, read_entry
from motionenhancer.files import read_json
from motionenhancer.priors.arguments import source_class
from motionenhancer.priors.extraction import EXTRACTION, ExtractionRecord, read_extraction
from motionenhancer.priors.storage import PriorStore
from motionenhancer.report.page import write_run_page
from motionenhancer.report.run_report import REPORT, RunReport
from motionenhancer.students.load import base_folder, check_config
from motionenhancer.teachers.config import read_folder

WRONG = {
    "list": b"[]",
    "null": b"null",
    "number": b"5",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "cut": b'{"a": ',
    "empty": b"",
    "no utf-8": b'{"a": "\xff"}',
}


def report(folder: Path) -> RunReport:
    return RunReport(folder, {"a": 1})


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "json": ("a.json", lambda folder: read_json(folder / "a.json")),
    "run's report": (REPORT, lambda folder: report(folder).check()),
    "page": (REPORT, write_run_page),
    "frames": (REPORT, evaluation._trained_frames),
    "student": ("config.json", check_config),
    "adapters": ("adapter_config.json", base_folder),
    "teacher": ("model_index.json", read_folder),
    "extraction": (EXTRACTION, read_extraction),
    "data sets": (INFO, lambda folder: read_entry(folder / INFO, "a")),
}


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_object_is_refused_with_its_path(reader: str, content: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(WRONG[content])
    with pytest.raises(ValueError, match=name):
        read(tmp_path)


@pytest.mark.parametrize("content", WRONG)
def test_records_that_cannot_be_read_count_as_missing(content: str, tmp_path: Path) -> None:
    store = PriorStore(tmp_path)
    path = store.refusal_path("a" * 64)
    for file in (tmp_path / REPORT, tmp_path / "config.json", tmp_path / EXTRACTION, path):
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(WRONG[content])
    assert not report(tmp_path).finished()
    assert source_class(str(tmp_path)) is None
    assert store.refusal("a" * 64) is None
    assert ExtractionRecord(tmp_path, [{"teacher": {"path": "a"}}], {}).written is None


@pytest.mark.parametrize("identity", ['"x"', "[1]", "null", "5"])
def test_a_report_whose_identity_is_no_object(identity: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(f'{{"identity": {identity}}}')
    with pytest.raises(ValueError, match=f"{REPORT}: not a run's report"):
        report(tmp_path).check()


@pytest.mark.parametrize(
    "frames",
    ['{"a": 1}', "[1]", "5", '{"fps": "a"}', '{"fps": NaN}', '{"num_frames": -3}', '{"max_pixels": 0}'],
)
def test_frames_of_a_training_that_cannot_be_shown(frames: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(f'{{"frames": {frames}}}')
    with pytest.raises(ValueError, match=rf"{REPORT}: not a training's report \(frames: "):
        evaluation._trained_frames(tmp_path)


@pytest.mark.parametrize("content", ['{"a": [1]}', '{"a": {"file_name": "dataset_info.json"}}', "{}"])
def test_a_list_of_data_sets_that_names_none(content: str, tmp_path: Path) -> None:
    (tmp_path / INFO).write_text(content)
    with pytest.raises(ValueError, match=INFO):
        read_entry(tmp_path / INFO, "a")
