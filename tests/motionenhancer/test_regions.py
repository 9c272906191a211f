"""Priors of the regions that a data file gives for words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extract_support import report_in
from tiny_world import World
from train_support import flags, report_of

from motionenhancer import extract, look, store, train
from motionenhancer.data import Clip, SkipLog, read_samples
from motionenhancer.data.encode import encode_video
from motionenhancer.data.masks import decode_mask
from motionenhancer.priors.prior import PriorError
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.reader import Reader
from motionenhancer.priors.regions import Regions
from motionenhancer.priors.requests import Made, PriorRequest
from motionenhancer.priors.storage import PriorStore
from motionenhancer.toy.world import write_world

TEXT = "Where is the Red square? The red square moves, the red circle stays."
BOX = [8, 0, 24, 12]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 frames of 24 x 32 pixels, 8 a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    encode_video(path, np.random.default_rng(0).integers(0, 255, (16, 24, 32, 3), np.uint8), fps=8)
    return path


def read(clip: Path | Clip, *regions: Any, grid: tuple[int, int, int] = (4, 6, 8)) -> Made:
    reader = Reader(Regions(grid), PriorSettings())
    request = PriorRequest(clip, TEXT, said=json.dumps(regions))
    return reader.read(request, reader.decode(request))


def row(made: Made, word: int = 0) -> torch.Tensor:
    return made.prior.attention[word].double().view(made.prior.grid)


def test_masks_are_those_of_coco() -> None:
    mask = np.zeros((24, 40), bool)
    mask[5:17, 8:31] = True
    mask[9:11, 12:14] = False
    mask[20:, :3] = True
    # What pycocotools 2.0 makes of this mask.
    text = "d04d0000Y38_L000000HF2:NF2:600000000000000000000000000000000c6"
    assert np.array_equal(decode_mask({"size": [24, 40], "counts": text}), mask)
    flat = mask.T.flatten()
    starts = np.flatnonzero(np.diff(np.concatenate([[False], flat]))).tolist()
    runs = np.diff([0, *starts, flat.size]).tolist()
    assert np.array_equal(decode_mask({"size": [24, 40], "counts": runs}), mask)


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ([], "rle must be"),
        ({"size": [2], "counts": [4]}, "rle must be"),
        ({"size": [2, 0], "counts": []}, "rle must be"),
        ({"size": [2, 2]}, "counts must be runs"),
        ({"size": [2, 2], "counts": [5, -1]}, "counts must be runs"),
        ({"size": [2, 2], "counts": [1, 2]}, "fill 2 x 2 pixels, they fill 3"),
        ({"size": [2, 2], "counts": "d"}, "end in the middle"),
        ({"size": [2, 2], "counts": "1!"}, "must not hold '!'"),
    ],
)
def test_what_is_no_mask(rle: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_mask(rle)


def test_a_box_covers_its_share_of_each_cell(clip: Path) -> None:
    made = read(
        clip, {"words": "red square", "box": [8, 0, 24, 12]}, {"words": "circle", "box": [2, 3, 6, 4]}
    )
    prior = made.prior
    words = ["Red", "square", "red", "square", "circle"]
    assert prior.tokens == words == [TEXT[slice(*span)] for span in prior.spans]
    assert (prior.grid, prior.prompt, prior.heads, made.left_out) == ((4, 6, 8), TEXT, [], ())
    # Cells of 4 x 4 pixels: three rows of four cells, in every frame.
    inside = torch.zeros(4, 6, 8, dtype=torch.float64)
    inside[:, :3, 2:6] = 1 / 48
    for word in range(4):
        assert torch.equal(row(made, word), inside.half().double())
    # Two halves of a cell's height and width: an eighth of one cell each.
    part = torch.zeros(4, 6, 8, dtype=torch.float64)
    part[:, 0, 0] = part[:, 0, 1] = 1 / 8
    assert torch.equal(row(made, 4), part)


def test_a_mask_equals_the_box_of_the_same_pixels(clip: Path) -> None:
    mask = np.zeros((24, 32), bool)
    mask[5:17, 7:19] = True
    flat = mask.T.flatten()
    runs = np.diff([0, *np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist(), flat.size]).tolist()
    rle = {"size": [24, 32], "counts": runs}
    by_mask, by_box = (
        read(clip, {"words": "moves", "rle": rle}),
        read(clip, {"words": "moves", "box": [7, 5, 19, 17]}),
    )
    assert torch.equal(by_mask.prior.attention, by_box.prior.attention)
    # A grid whose cells end within pixels.
    odd = [
        read(clip, region, grid=(2, 5, 7))
        for region in ({"words": "moves", "rle": rle}, {"words": "moves", "box": [7, 5, 19, 17]})
    ]
    assert torch.allclose(odd[0].prior.attention.float(), odd[1].prior.attention.float(), atol=1e-4)


def test_frames_and_times_choose_frames_of_the_grid(clip: Path) -> None:
    def shown(**region: Any) -> list[float]:
        return row(read(clip, {"words": "moves", **region})).sum((1, 2)).round(decimals=3).tolist()

    assert shown(box=BOX, frames=[0, 3, 15]) == [0.5, 0, 0, 0.5]
    assert shown(box=BOX, frames=4) == [0, 1, 0, 0]
    assert shown(box=BOX, times=[0.0, 2.0]) == [0.5, 0, 0, 0.5]
    # A frame lies where the middle of its time is, and times count from the start of the clip's file.
    sixth = read(clip, {"words": "moves", "box": BOX, "frames": [5]}, grid=(3, 6, 8))
    assert row(sixth).sum((1, 2)).tolist() == [0, pytest.approx(1, abs=1e-3), 0]
    second = read(Clip(clip, 1.0), {"words": "moves", "box": BOX, "times": [1.1]})
    assert row(second).sum((1, 2)).tolist() == [pytest.approx(1, abs=1e-3), 0, 0, 0]
    assert second.prior.times == [1.125, 1.375, 1.625, 1.875]
    # A frame of the grid has the mean of its clip frames: the object is in one of two.
    assert shown(box=[BOX, None, BOX, BOX], frames=[0, 1, 4, 5]) == [0.333, 0.667, 0, 0]
    track = row(read(clip, {"words": "moves", "track": [[0, 0], [31.9, 23.9]], "frames": [0, 8]}))
    assert track.nonzero().tolist() == [[0, 0, 0], [2, 5, 7]]
    assert row(read(clip, {"words": "moves", "point": [9, 5]})).nonzero().tolist() == [
        [f, 1, 2] for f in range(4)
    ]


def test_regions_of_one_word_are_joined(clip: Path) -> None:
    one = {"words": "circle", "box": [0, 0, 8, 4], "frames": [0]}
    other = {"words": "circle", "box": [4, 0, 12, 4], "frames": [0, 8]}
    made = read(clip, one, other)
    expected = torch.zeros(4, 6, 8, dtype=torch.float64)
    expected[0, 0, :3] = expected[2, 0, 1:3] = 1 / 5
    assert torch.equal(row(made), expected.half().double())
    both = read(clip, one, {"words": "moves", "box": BOX})
    assert both.prior.tokens == ["moves", "circle"], "in the order of the text"
    assert read(clip, {"span": [13, 23], "box": BOX}).prior.tokens == ["Red", "square"]


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ("red", "must be an object"),
        ({"box": BOX}, "must have one of words, span, has 0"),
        ({"words": "moves", "span": [0, 2], "box": BOX}, "must have one of words, span, has 2"),
        ({"words": "moves"}, "must have one of box, rle, point, track, has 0"),
        ({"words": "moves", "box": BOX, "frames": [0], "times": [0]}, "at most one of frames, times"),
        ({"words": "moves", "box": BOX, "label": 3}, "unknown key 'label'"),
        ({"words": "dog", "box": BOX}, "words 'dog' are not in the text"),
        ({"words": "qua", "box": BOX}, "words 'qua' are not in the text"),
        ({"words": 3, "box": BOX}, "words must be a text, got 3"),
        ({"span": [60, 90], "box": BOX}, r"two places in the 68 characters of the text, got \[60, 90\]"),
        ({"words": "moves", "box": BOX, "frames": [16]}, "frames must be from 0 to 15 in this clip, got 16"),
        ({"words": "moves", "box": BOX, "frames": [-1]}, "frames must be from 0 to 15"),
        ({"words": "moves", "box": BOX, "frames": ["a"]}, "frames must be whole numbers"),
        ({"words": "moves", "box": BOX, "times": [2.5]}, "times must be from 0 to 2 s in this clip, got 2.5"),
        ({"words": "moves", "box": [32, 0, 40, 8]}, "lies outside the picture of 32 x 24 pixels"),
        ({"words": "moves", "box": [9, 0, 4, 8]}, "x0 < x1 and y0 < y1"),
        ({"words": "moves", "box": [0, 0, 4, float("nan")]}, "in pixels"),
        ({"words": "moves", "box": [False, 0, 4, 4]}, "in pixels"),
        ({"words": "moves", "box": [BOX, BOX], "frames": [0]}, r"one entry for each of .* \(1\), has 2"),
        ({"words": "moves", "box": [BOX]}, r"one entry for each of its frames or times \(0\), has 1"),
        ({"words": "moves", "track": [3, 4]}, "one entry for each"),
        ({"words": "moves", "box": [None, None], "frames": [0, 1]}, "in pixels"),
        ({"words": "moves", "point": [32, 4]}, r"\[x, y\] in the picture of 32 x 24 pixels"),
        ({"words": "moves", "rle": {"size": [32, 24], "counts": [768]}}, r"must be \[24, 32\], the picture"),
        ({"words": "moves", "rle": {"size": [24, 32], "counts": [768]}}, "rle covers nothing"),
    ],
)  # fmt: skip
def test_bad_regions_are_left_out(clip: Path, region: Any, says: str) -> None:
    good = {"words": "circle", "box": BOX}
    made = read(clip, region, good)
    assert torch.equal(made.prior.attention, read(clip, good).prior.attention)
    ((reason, detail),) = made.left_out
    assert reason == "region left out"
    assert re.search(says, detail), detail
    with pytest.raises(PriorError, match="none of 1 regions can be used"):
        read(clip, region)


@pytest.fixture(scope="module")
def annotated(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A toy world whose rows name where the first object of each clip is, from the world's own boxes."""
    toy = write_world(tmp_path_factory.mktemp("annotated") / "world", clips=4, test_clips=1, progress=False)
    worlds = {row["video"]: row for row in map(json.loads, toy.worlds.read_text().splitlines())}
    rows = [json.loads(line) for line in toy.train.read_text().splitlines()]
    for row in rows:
        thing = worlds[row["video"]]["objects"][0]
        shown = {"box": thing["boxes"], "frames": list(range(9))}
        row["regions"] = [{"words": "the", **shown}, {"words": "unicorn", **shown}]
    del rows[-1]["regions"]
    toy.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(toy.train, toy.videos, world.teacher, world.student)


def test_regions_are_extracted_like_any_prior(
    annotated: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    priors = tmp_path / "priors"
    options = {"student": None, "teacher": "regions", "prior_dir": priors, "region_grid": "5x4x4"}
    assert extract.main([*annotated.flags(**options), "--dry_run", "true"]) == 1
    assert "priors: 0 stored, 3 to make; no video model is needed" in capsys.readouterr().out
    assert extract.main(annotated.flags(**options)) == 1
    report = report_in(priors)
    assert (report["teacher"]["path"], report["samples"], report["made"]) == ("regions", 3, 3)
    skipped = {"region left out": 3, "no prior: the sample has no regions": 1}
    assert report["skipped"]["counts"] == skipped
    entry = next(e for e in report["skipped"]["entries"] if e["reason"] == "region left out")
    assert entry["line"] == 1
    assert "words 'unicorn' are not in the text" in entry["detail"]
    capsys.readouterr()
    assert extract.main(annotated.flags(**options)) == 1
    assert "3 samples have their prior in" in capsys.readouterr().out
    assert report_in(priors)["stored"] == 3
    store.main(["list", "--prior_dir", str(priors)])
    assert capsys.readouterr().out.count("grid 5×4×4") == 3
    # The extraction's record names the clips, so a page shows them.
    assert look.main(["--prior_dir", str(priors)]) == 0
    assert "3 clips:" in capsys.readouterr().out
    # The record also names the data file, so the page has the ids.
    assert '"video": "' in (priors / "look.html").read_text()
    assert "train-00000-MR" in (priors / "look.html").read_text()
    # Other regions or another grid make other priors.
    rows = [json.loads(line) for line in annotated.data.read_text().splitlines()]
    rows[0]["regions"].pop()
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract.main(annotated.flags(**{**options, "data": data}))
    assert report_in(priors)["made"] == 1
    extract.main(annotated.flags(**{**options, "region_grid": "5x8x8"}))
    assert report_in(priors)["made"] == 3


def test_a_student_is_trained_towards_regions(annotated: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = flags(
        annotated, out, teacher="regions", region_grid="3x4x4", ddim_steps=None, prior_source="hybrid"
    )
    assert train.main(chosen) == 0
    report = report_of(out)
    assert report["teacher"]["online"]["made"] == 3
    assert {entry["grid"] == [3, 4, 4] for entry in report["samples"]} == {True}
    assert report["skipped"]["counts"] == {"region left out": 3, "no prior: the sample has no regions": 1}
    assert all("loss_align" in entry for entry in report["training"]["log"][:-1])
    (sample,) = list(read_samples(annotated.data, annotated.videos, limit=1))
    assert sample.regions[0]["words"] == "the"
    kept = PriorStore(out.parent / "priors")
    assert {kept.read(key).teacher for key in kept} == {"regions (3, 4, 4)"}


def test_regions_have_no_attention_mass(
    annotated: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"teacher": "regions", "ddim_steps": None, "normalize_rows": "false"}
    assert train.main(flags(annotated, tmp_path / "out", prior_source="hybrid", **options)) == 2
    assert "error: --normalize_rows false: rows of regions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ddim_steps": 10}, "--ddim_steps does nothing with --teacher regions"),
        ({"vae_tiling": "true"}, "--vae_tiling does nothing with --teacher regions"),
        ({"region_grid": "8x16"}, "--region_grid must be FRAMESxHEIGHTxWIDTH like 8x16x16"),
        ({"teacher": None, "region_grid": "8x8x8"}, "--region_grid does nothing with --teacher"),
    ],
)  # fmt: skip
def test_what_does_nothing_with_regions_is_refused(
    world: World, tmp_path: Path, options: dict, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"student": None, "teacher": "regions", "prior_dir": tmp_path / "priors", **options}
    if given["teacher"] is None:
        given["teacher"] = world.teacher
    assert extract.main(world.flags(**given)) == 2
    assert f"error: {says}" in capsys.readouterr().err
    assert not (tmp_path / "priors").exists()


def test_regions_that_are_no_list_are_ignored(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<video>What moves?"}, {"from": "gpt", "value": "A ring."}]
    (tmp_path / "a.mp4").touch()
    row = {"video": "a.mp4", "conversations": turns, "regions": {"words": "ring"}}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    log = SkipLog()
    (sample,) = read_samples(tmp_path / "data.json", on_skip=log)
    assert sample.regions == ()
    assert log.notes == {"regions ignored: they must be a list": 1}
