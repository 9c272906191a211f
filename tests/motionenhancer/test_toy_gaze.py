"""How much of a toy student's attention lies on the object that a word names."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from motionenhancer.data import prompt_text, read_frames
from motionenhancer.students import load_student
from motionenhancer.toy import gaze
from motionenhancer.toy.accuracy import accuracy_table, samples_of, shown_clip
from motionenhancer.toy.gaze import attention_on_objects, cells_of
from motionenhancer.toy.language import phrase
from motionenhancer.toy.scene import TASKS
from motionenhancer.toy.world import WEIGHTS, ToyFolder, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("gaze"), clips=1, test_clips=12, progress=False)
    # Questions name the first object. Here it comes last, so that its name must be searched.
    scenes = [json.loads(line) for line in folder.worlds.read_text().splitlines()]
    lines = [json.dumps(scene | {"objects": scene["objects"][::-1]}) for scene in scenes]
    folder.worlds.write_text("\n".join(lines))
    return folder.root


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
    """Uniform attention has the share of the area; attention on one cell has a share of 0 or 1."""
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


def test_a_word_is_held_to_its_own_object_at_the_frames_that_are_shown(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cells of each word are counted again, from the boxes and the frames that a shown clip repeats."""
    model, processor, family = load_student(WEIGHTS / "student", dtype=torch.float32)
    rows_of: list[list[tuple[tuple[int, int], int]]] = []
    find = gaze.find_words

    def found_words(sample: Any, spans: Any, layout: Any, source: Any) -> Any:
        tokens = find(sample, spans, layout, source)
        rows_of.append([spans.spans[word] for word in tokens.row_tokens])
        return tokens

    @contextmanager
    def given(model: Any, rows: torch.Tensor, columns: torch.Tensor) -> Any:
        generator = torch.Generator().manual_seed(0)
        yield SimpleNamespace(attention=torch.rand(*rows.shape, columns.shape[1], generator=generator))

    monkeypatch.setattr(gaze, "find_words", found_words)
    monkeypatch.setattr(gaze, "capture_attention", given)
    monkeypatch.setattr(gaze, "_BATCH", 1)
    found = attention_on_objects(model.eval(), processor, family, world)

    folder = ToyFolder(world)
    scenes = {s["video"]: s for s in map(json.loads, folder.worlds.read_text().splitlines())}
    shares = []
    for sample in samples_of(folder.test, folder.videos):
        scene, text = scenes[Path(str(sample.videos[0])).name], prompt_text(sample, "both")[0].lower()
        if not any(one["name"] in text for one in scene["objects"]):
            continue
        whole, shown = read_frames(sample.videos[0]).frames, shown_clip(sample.videos[0], "video", 0).frames
        when = [next(i for i, frame in enumerate(whole) if (frame == one).all()) for one in shown]
        spans = rows_of[len(shares)]
        attention = torch.rand(1, len(spans), 32, generator=torch.Generator().manual_seed(0))[0].numpy()
        share = []
        said = {one["name"]: f"{one['name']}( {phrase(SimpleNamespace(**one))})?" for one in scene["objects"]}
        for row, (start, end) in zip(attention, spans, strict=True):
            (one,) = [
                one
                for one in scene["objects"]
                if any(m.start() <= start < end <= m.end() for m in re.finditer(said[one["name"]], text))
            ]
            boxes = np.array(one["boxes"])[when]
            inside = cells_of(boxes, (scene["height"], scene["width"]), (2, 4, 4))
            share.append(row[inside].sum() / row.sum())
        shares.append(np.mean(share))
    assert found["clips"] == len(shares) > 3
    assert found["share"] == pytest.approx(100 * np.mean(shares), rel=1e-5)


def test_a_student_that_was_taught_by_masks_looks_at_the_object(world: Path) -> None:
    model, processor, family = load_student(WEIGHTS / "student", dtype=torch.float32)
    found = attention_on_objects(model.eval(), processor, family, world)
    assert found["share"] > 3 * found["area"]


def test_words_of_what_an_object_does_are_held_to_it() -> None:
    ring = {"name": "red ring", "motion": "left", "then": "", "times": 0}
    post = {"name": "blue post", "motion": "hop", "then": "", "times": 2}
    text = "What does the red ring do? The red ring moves left and the blue post stays still."
    found = gaze._named(text, [ring, post])
    assert [(text[start:end], which) for (start, end), which in found] == [
        *(("red", 0), ("ring", 0), ("red", 0), ("ring", 0), ("moves", 0), ("left", 0)),
        *(("blue", 1), ("post", 1)),
    ], "a wrong phrase speaks of no object"


def test_the_table_has_a_column_of_it() -> None:
    one = {"overall": 50.0, "tasks": dict.fromkeys(TASKS, 50.0), "gaze": {"share": 75.0}}
    assert accuracy_table({"now": one}).splitlines()[0].endswith("on object")
    assert accuracy_table({"now": one}).splitlines()[1].split()[-1] == "75.0%"
