"""The study's controls: each keeps a prior's words and exchanges its maps in one way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.dataset import Item, MotionCollator
from motionenhancer.data import prompt_text
from motionenhancer.priors.prior import MotionPrior
from motionenhancer.students import capture_attention, load_student
from motionenhancer.students.words import find_words
from motionenhancer.toy.models import save_student
from motionenhancer.toy.world import draw_clip
from studies.toy.arms import LEVEL, SWEEPS
from studies.toy.controls import CONTROLS, own_priors
from studies.toy.masks import mask_prior
from studies.toy.readout import accuracy_of, readings
from studies.toy.train_student import as_sample, as_video

GRID = (5, 4, 4)


@pytest.fixture
def priors() -> list[MotionPrior]:
    """Priors of two clips per task, with two to four words each and different rows."""
    generator, made = torch.Generator().manual_seed(0), []
    plain = mask_prior("The red square moves.", np.ones((9, 32, 32), np.float32), GRID)
    for i in range(12):
        rows = torch.rand(2 + i % 3, 80, generator=generator).half()
        made.append(replace(plain, attention=rows))
    return made


def exchanged(name: str, priors: list[MotionPrior], seed: int = 0) -> list[torch.Tensor]:
    maps = CONTROLS[name](priors, torch.Generator().manual_seed(seed))
    assert [m.shape for m in maps] == [p.attention.shape for p in priors]
    assert all(m.dtype == torch.float16 for m in maps)
    again = CONTROLS[name](priors, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    return maps


def source(row: torch.Tensor, priors: list[MotionPrior]) -> tuple[int, int]:
    (found,) = [
        (i, k)
        for i, p in enumerate(priors)
        for k in range(len(p.attention))
        if torch.equal(p.attention[k], row)
    ]
    return found


def test_another_clips_maps_are_of_its_task_and_never_its_own(priors: list[MotionPrior]) -> None:
    for i, maps in enumerate(exchanged("another clip's", priors)):
        clips, words = zip(*(source(row, priors) for row in maps), strict=True)
        assert set(clips) == {(i + 6) % 12}
        count = len(priors[(i + 6) % 12].attention)
        assert list(words) == [k % count for k in range(len(maps))]


def test_another_words_map_is_of_the_same_clip_and_never_its_own(priors: list[MotionPrior]) -> None:
    for i, maps in enumerate(exchanged("another word's", priors)):
        found = [source(row, priors) for row in maps]
        assert {clip for clip, _ in found} == {i}
        assert all(word != k for k, (_, word) in enumerate(found))
        assert len(set(found)) == len(found)


def test_maps_without_a_clip_are_alike_everywhere(priors: list[MotionPrior]) -> None:
    rows = torch.cat([p.attention for p in priors]).float()
    wanted = (rows / rows.sum(-1, keepdim=True)).mean(0)
    for maps in exchanged("mean of all clips", priors):
        torch.testing.assert_close(maps.float(), wanted.expand_as(maps.float()), atol=1e-5, rtol=1e-3)
    assert all((maps == 1).all() for maps in exchanged("uniform", priors))


def test_frames_change_their_order_and_nothing_else(priors: list[MotionPrior]) -> None:
    for prior, back, mixed in zip(
        priors, exchanged("frames reversed", priors), exchanged("frames shuffled", priors), strict=True
    ):
        frames = prior.attention.view(-1, 5, 16)
        assert torch.equal(back.view(-1, 5, 16), frames[:, [4, 3, 2, 1, 0]])
        seen = mixed.view(-1, 5, 16)
        order = [next(j for j in range(5) if torch.equal(seen[0, i], frames[0, j])) for i in range(5)]
        assert torch.equal(seen, frames[:, order])
    assert any(
        not torch.equal(maps, prior.attention)
        for maps, prior in zip(exchanged("frames shuffled", priors), priors, strict=True)
    )


def test_aligned_to_its_own_maps_a_student_has_nothing_to_learn(tmp_path: Path) -> None:
    model, processor, family = load_student(save_student(tmp_path / "student", layers=1), dtype=torch.float32)
    items = []
    for i in range(3):
        clip = draw_clip(0, "train", i)[1]
        sample = as_sample(str(i), "What does the red square do?", "It moves left then up."[: 9 + 7 * i])
        encoded = family.encode(processor, sample, [as_video(clip.frames[:8])])
        prior = mask_prior(prompt_text(sample)[0], clip.masks[0], GRID)
        items.append(Item(sample.id, encoded, prior, find_words(sample, prior, encoded.layout, "both"), {}))
    own = own_priors(model, processor, family, items)
    assert [p.spans for p in own] == [item.prior.spans for item in items if item.prior is not None]
    distances = []
    for priors in (own, [item.prior for item in items]):
        batch = MotionCollator(family, processor)(items)
        asked = batch.pop("alignment")
        for name in ("ids", "skipped"):
            batch.pop(name)
        with capture_attention(model, asked.rows, asked.columns) as captured, torch.no_grad():
            model(**batch)
        distances.append(float(align(captured, priors, grid=asked.grids, row_tokens=asked.row_tokens)))
    assert distances[0] < 1e-3 < 0.1 < distances[1]


def test_a_control_is_level_200_with_other_maps() -> None:
    assert [arm.control for arm in SWEEPS["controls"]][1:-2] == list(CONTROLS)
    for arm in SWEEPS["controls"][:-2]:
        assert replace(arm, name=LEVEL.name, control="") == LEVEL
    own, sharp = SWEEPS["controls"][-2:]
    assert (own.prior, own.temperature, sharp.temperature) == ("student", 1.0, LEVEL.temperature)


def test_what_a_look_tells_is_read_from_the_cells_it_covers() -> None:
    made = readings(0, "train", "RC", 3)
    assert made["cells"][0].shape == (3, 2 * 4 * 8 * 8 * 3)
    assert made["path"][0].shape == (3, 8 * 2)
    assert all(answer.startswith("hops ") for answer in made["cells"][1])
    features = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    answers = ["a" if value > 0 else "b" for value in features[:, 2]]
    assert accuracy_of((features, answers), (features, answers), 0, steps=200) > 95
    swapped = ["b" if answer == "a" else "a" for answer in answers]
    assert accuracy_of((features, answers), (features, swapped), 0, steps=200) < 5
