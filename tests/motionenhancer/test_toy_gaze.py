"""How much of a toy student's attention lies on the object that a word names."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from motionenhancer.students import load_student
from motionenhancer.toy.accuracy import accuracy_table
from motionenhancer.toy.gaze import attention_on_objects, cells_of
from motionenhancer.toy.scene import TASKS
from motionenhancer.toy.world import WEIGHTS, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("gaze"), clips=1, test_clips=12, progress=False).root


def test_an_object_touches_the_cells_that_its_box_overlaps() -> None:
    boxes = np.array([[0, 0, 8, 8], [7, 0, 9, 8], [20, 20, 24, 24], [0, 0, 0, 0]])
    found = cells_of(boxes, (24, 32), (2, 3, 4)).reshape(2, 3, 4)
    first = np.zeros((3, 4), bool)
    first[0, :2] = True
    second = np.zeros((3, 4), bool)
    second[2, 2] = True
    assert (found[0] == first).all()
    assert (found[1] == second).all()


@pytest.mark.parametrize("where", ["even", "one cell"])
def test_the_share_is_that_of_the_captured_rows(
    world: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Even attention has the share of the area; attention on the clip's first cell has all or nothing."""
    model, processor, family = load_student(WEIGHTS / "student", dtype=torch.float32)

    @contextmanager
    def given(model: Any, rows: torch.Tensor, columns: torch.Tensor) -> Any:
        attention = torch.full((*rows.shape, columns.shape[1]), 0.01)
        if where == "one cell":
            attention[..., 1:] = 0
        yield SimpleNamespace(attention=attention)

    monkeypatch.setattr("motionenhancer.toy.gaze.capture_attention", given)
    found = attention_on_objects(model.eval(), processor, family, world)
    assert found["clips"] == sum(task in ("MR", "AO", "RC") for task in TASKS) * 2
    if where == "even":
        assert found["share"] == pytest.approx(found["area"])
        assert 1 < found["area"] < 60
    else:
        clips = found["clips"] * found["share"] / 100
        assert clips == pytest.approx(round(clips))


def test_a_student_that_was_taught_by_masks_looks_at_the_object(world: Path) -> None:
    model, processor, family = load_student(WEIGHTS / "student", dtype=torch.float32)
    found = attention_on_objects(model.eval(), processor, family, world)
    assert found["share"] > 3 * found["area"]


def test_the_table_has_a_column_of_it() -> None:
    one = {"overall": 50.0, "tasks": dict.fromkeys(TASKS, 50.0), "gaze": {"share": 75.0}}
    assert accuracy_table({"now": one}).splitlines()[0].endswith("on object")
    assert accuracy_table({"now": one}).splitlines()[1].split()[-1] == "75.0%"
