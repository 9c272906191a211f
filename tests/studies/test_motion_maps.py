"""What the captioner's maps are: the clip's own, and controls that each take one thing from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motionenhancer.priors.confidence import prior_confidence
from motionenhancer.priors.prior import extract_prior
from motionenhancer.teachers import load_teacher
from motionenhancer.toy.language import caption
from motionenhancer.toy.models import save_teacher
from motionenhancer.toy.render import FRAMES
from studies.motion import maps as makers
from studies.motion.clips import GRID, MAP_GRID, Maps, draw, make_clips, words_of

WORDS = 16


@pytest.fixture
def maps() -> Maps:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(6, WORDS, 80, generator=generator).half()
    return Maps(rows, torch.rand(6, WORDS, generator=generator) < 0.5, 0.25)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "teacher"
    return save_teacher(folder, layers=1, frames=FRAMES, height=32, width=32, temporal_compression=2)


def test_a_caption_names_the_objects_in_any_order() -> None:
    """Where an object stands in the caption does not tell whether it moves."""
    still = [[o.moving for o in draw(0, "train", i)[0].objects].index(False) for i in range(30)]
    assert set(still) == {0, 1, 2}
    names = {
        split: {(o.colour, o.shape) for i in range(30) for o in draw(0, split, i)[0].objects}
        for split in ("train", "test")
    }
    assert not names["train"] & names["test"]


def test_a_clip_may_have_one_mover(teacher: Path, tmp_path: Path) -> None:
    one = [draw(0, "train", i, movers=1)[0] for i in range(30)]
    assert {sum(o.moving for o in scene.objects) for scene in one} == {1}
    assert {[o.moving for o in scene.objects].index(True) for scene in one} == {0, 1, 2}
    assert make_clips(0, "train", 3, movers=1).texts == [caption(scene) for scene in one[:3]]
    for movers in (1, 2):
        makers.read_teacher(teacher, tmp_path, 0, 1, ["level 200"], movers)
    rows = [
        makers.teacher_maps(
            tmp_path, 0, 1, "level 200", heads=False, words=False, temperature=1.0, movers=movers
        ).rows
        for movers in (1, 2)
    ]
    assert not torch.equal(*rows), "each has its own file"


def test_a_token_holds_four_frames_of_its_cell() -> None:
    clips = make_clips(0, "train", 2)
    frames = draw(0, "train", 1)[1].frames
    assert clips.tubes.shape == (2, 32, 4 * 8 * 8 * 3)
    cell = frames[5:9, 8:16, 24:32].reshape(-1)  # the second of two times, second row, last column
    found = clips.tubes[1].unflatten(0, GRID)[1, 1, 3].float()
    np.testing.assert_allclose(found.numpy(), cell / 127.5 - 1, atol=1e-3)


def test_true_masks_are_those_of_the_object_that_a_word_speaks_of() -> None:
    masks = make_clips(0, "train", 4).masks
    for i in range(4):
        scene, clip = draw(0, "train", i)
        text = caption(scene)
        words = [text[slice(*span)] for span in words_of(text)]
        colour = words.index(scene.objects[1].colour)
        assert masks.kept[i, colour]
        where = masks.rows[i, colour].unflatten(0, MAP_GRID).float().numpy()
        seen = clip.masks[1][0].reshape(4, 8, 4, 8).mean((1, 3))  # the first cell in time is one frame
        np.testing.assert_allclose(where[0], seen, atol=1e-3)
        assert not masks.kept[i, words.index("and")]


def test_the_teachers_maps_are_those_of_an_extraction(teacher: Path, tmp_path: Path) -> None:
    makers.read_teacher(teacher, tmp_path, 3, 2, ["level 200"])
    loaded = load_teacher(teacher, dtype=torch.float32)
    scene, clip = draw(3, "train", 1)
    text = caption(scene)
    for heads in (True, False):
        options = {"mode": "renoise", "noise_level": 200, "sampled_rows": "all"}
        options["head_selection"] = "mhs" if heads else "off"
        whole = extract_prior(loaded, clip.frames, text, **options)
        found = makers.teacher_maps(tmp_path, 3, 2, "level 200", heads=heads, words=True, temperature=0.5)
        spans = words_of(text)
        kept = [span for span, one in zip(spans, found.kept[1], strict=True) if one]
        assert kept == [span for span in whole.spans if span in spans]
        for row, span in zip(whole.attention, whole.spans, strict=True):
            assert span not in spans or torch.equal(found.rows[1, spans.index(span)], row)
        every = makers.teacher_maps(tmp_path, 3, 2, "level 200", heads=heads, words=False, temperature=0.5)
        assert every.kept.all()
        assert torch.equal(every.rows, found.rows)


def test_what_was_read_is_not_read_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(makers, "_PART", 2)
    makers.read_teacher(teacher, tmp_path, 3, 2, ["level 200"])
    reads = []
    read = makers.read_attention
    monkeypatch.setattr(makers, "read_attention", lambda *given: reads.append(1) or read(*given))
    makers.read_teacher(teacher, tmp_path, 3, 3, ["level 200"])
    assert len(reads) == 1


def test_several_teachers_maps_are_weighted_by_their_confidence() -> None:
    texts = [caption(draw(0, "train", i)[0]) for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(2, WORDS, 80, generator=generator).half() ** power for power in (1, 6)]
    kept = [torch.rand(2, WORDS, generator=generator) < 0.5 for _ in rows]
    found = makers.combined([Maps(*both, 0.25) for both in zip(rows, kept, strict=True)], texts)
    assert torch.equal(found.kept, kept[0] | kept[1])
    assert found.temperature == 0.25
    for i in range(2):
        sure = [prior_confidence(r[i, k[i]], MAP_GRID)["confidence"] for r, k in zip(rows, kept, strict=True)]
        for word in range(WORDS):
            used = [n for n in range(2) if kept[n][i, word]]
            wanted = torch.zeros(80, dtype=torch.float64)
            for n in used:
                row = rows[n][i, word].double()
                wanted += sure[n] / sum(sure[m] for m in used) * row / row.sum()
            torch.testing.assert_close(found.rows[i, word].double(), wanted, atol=1e-4, rtol=2e-3)


def test_another_clips_maps_are_those_of_another_clip(maps: Maps) -> None:
    found = makers.another_clip(maps, 1)
    source = [(maps.rows == rows).all((1, 2)).nonzero().item() for rows in found.rows]
    assert sorted(source) == list(range(6))
    assert all(i != j for i, j in enumerate(source))
    assert torch.equal(found.kept, maps.kept)
    assert found.temperature == maps.temperature


def test_frames_are_moved_and_nothing_else(maps: Maps) -> None:
    shape = (6, WORDS, *MAP_GRID)
    back = makers.reversed_frames(maps)
    assert torch.equal(back.rows.view(shape), maps.rows.view(shape).flip(2))
    mixed = makers.shuffled_frames(maps, 0)
    assert not torch.equal(mixed.rows, maps.rows)
    for one, other in zip(mixed.rows.view(shape), maps.rows.view(shape), strict=True):
        order = [next(j for j in range(5) if torch.equal(one[0, i], other[0, j])) for i in range(5)]
        assert sorted(order) == list(range(5))
        assert torch.equal(one, other[:, order])


def test_maps_of_no_clip_are_the_same_in_all(maps: Maps) -> None:
    flat = makers.uniform(maps)
    assert (flat.rows == flat.rows[0, 0, 0]).all()
    mean = makers.mean_map(maps)
    scaled = maps.rows.float() / maps.rows.float().sum(-1, keepdim=True)
    torch.testing.assert_close(mean.rows[3].float(), scaled.mean(0), atol=1e-4, rtol=2e-3)


def test_another_objects_row_is_that_of_the_same_place_in_its_phrase() -> None:
    text = "The red ring moves up, the blue bar stays still and the white post moves left."
    words = [text[slice(*span)] for span in words_of(text)]
    rows = torch.arange(WORDS, dtype=torch.float16).view(1, WORDS, 1).expand(1, WORDS, 80)
    found = makers.another_object(Maps(rows, torch.ones(1, WORDS, dtype=torch.bool)))
    seen = {word: words[int(found.rows[0, i, 0])] for i, word in enumerate(words)}
    assert (seen["red"], seen["up"], seen["bar"], seen["still"]) == ("blue", "still", "post", "left")
    assert (seen["white"], seen["left"], seen["and"]) == ("red", "up", "and")


def test_lift_is_one_where_blind_and_grows_with_sharpness() -> None:
    masks = make_clips(0, "train", 3).masks
    blind = Maps(torch.ones_like(masks.rows), torch.ones_like(masks.kept))
    assert makers.lift(blind, masks) == pytest.approx(1.0)
    soft = Maps(masks.rows + 0.2, masks.kept)
    assert 1 < makers.lift(soft, masks) < makers.lift(replace(soft, temperature=0.5), masks)
    assert makers.lift(masks, masks) > makers.lift(replace(soft, temperature=0.5), masks)
