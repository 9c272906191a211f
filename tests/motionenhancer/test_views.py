"""What a page and a picture are made of, on views whose every number is known."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from look_support import make_views, moving_clip, shown
from PIL import Image
from test_store import make_prior

from motionenhancer.data import Clip, read_frames
from motionenhancer.data.encode import encode_video
from motionenhancer.report import page, picture
from motionenhancer.report.page import pick, write_page, write_run_page
from motionenhancer.report.picture import contact_sheet, headings, overlay, scale_of, write_overlay
from motionenhancer.report.views import MOST_FRAMES, SOURCES, Maps, View, load_views, read_clip, save_views

PURPLE, YELLOW = [0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]


# ---- words ----


def test_maps_have_mean_one(tmp_path: Path) -> None:
    view = make_views(tmp_path)[0]
    found = view.sources(2.0)
    assert list(found) == list(SOURCES) == ["teacher", "before", "after"]
    assert (found["teacher"].grid, found["teacher"].times) == ((2, 3, 4), [0.0, 1.5])
    assert (found["before"].grid, found["after"].times) == ((2, 2, 3), [0.25, 1.25])
    assert [list(maps.rows) for maps in found.values()] == [[0, 1], [1], [1]]
    assert found["teacher"].rows[1][[0, 22, 23]].tolist() == [12, 0, 12]
    assert found["after"].rows[1].tolist() == [0] * 5 + [12] + [0] * 6
    assert found["before"].rows[1] == pytest.approx(np.ones(12), rel=1e-3)
    empty = replace(make_prior(), attention=torch.zeros(2, 24).half(), times=[])
    found = View.of_prior(empty).sources(3.0)
    assert found["teacher"].times == [0.0, 3.0], "spread over the clip"
    assert not found["teacher"].rows[0].any()


def test_pieces_of_a_text() -> None:
    """Spans in any order, one that is empty, and words that a student alone has maps of."""
    view = View("v", "It stands. It", spans=[(3, 9), (0, 2), (9, 9), (11, 13)])
    assert view.words() == [
        {"text": "It", "state": "plain", "row": 1},
        {"text": " ", "state": "plain"},
        {"text": "stands", "state": "plain", "row": 0},
        {"text": ". ", "state": "plain"},
        {"text": "It", "state": "plain", "row": 3},
    ]
    assert view.rows_of(["it", "STANDS"]) == [1, 0], "the first of two"
    with pytest.raises(ValueError, match=r"^--word zebra: v has maps of It, stands, It only$"):
        view.rows_of(["zebra"])
    with pytest.raises(ValueError, match="has maps of no words only"):
        View("v", "It").rows_of(["it"])


def test_states_and_scores_of_words() -> None:
    view = View.of_prior(make_prior())
    assert view.id == "prior"
    assert [(p["state"], p["row"], p["score"]) for p in view.words() if "row" in p] == [
        ("dropped", None, 0.1),
        ("kept", 0, 0.3),
        ("dropped", None, 0.1),
        ("kept", 1, 1 / 3),
    ]
    read = replace(view, found=[1], scores={"before": {}})
    assert [p["state"] for p in read.words() if "row" in p] == ["dropped", "missing", "dropped", "kept"]
    assert view.words()[-1]["state"] == "cut"
    assert View.of_prior(replace(make_prior(), truncated=0)).words()[-1]["state"] == "plain"
    assert (view.rows_of(None), view.rows_of(None, most=1)) == ([0, 1], [1])
    scores = [0.1, 0.4, 0.1, 0.3]
    assert View.of_prior(replace(make_prior(), token_scores=scores)).rows_of(None, most=1) == [0]
    five = View("v", "a b c d e", spans=[(2 * i, 2 * i + 1) for i in range(5)])
    assert five.rows_of(None) == [0, 1, 2]


# ---- clips ----


def test_a_clip_is_read_small_and_with_few_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode_video(tmp_path / "long.mp4", np.zeros((MOST_FRAMES + 3, 16, 16, 3), np.uint8))
    encode_video(tmp_path / "large.mp4", np.zeros((1, 640, 480, 3), np.uint8))
    assert len(read_clip(View("v", "it", tmp_path / "long.mp4")).frames) == MOST_FRAMES  # type: ignore[union-attr]
    height, width = read_clip(View("v", "it", tmp_path / "large.mp4")).frames.shape[1:3]  # type: ignore[union-attr]
    assert 0.98 * 480 * 320 < height * width <= 480 * 320
    assert read_clip(View("v", "it")) is None
    assert capsys.readouterr().out == ""
    assert read_clip(View("v", "it", tmp_path / "none.mp4")) is None
    assert capsys.readouterr().out == f"v: its clip is not shown ({tmp_path / 'none.mp4'}: does not exist)\n"


def test_views_come_back_as_they_went_in(tmp_path: Path) -> None:
    views = make_views(tmp_path)
    views[1].video = Clip(tmp_path / "clip.mp4", 0.5, 1.5)
    save_views(tmp_path, views)
    for view, back in zip(views, load_views(tmp_path), strict=True):
        assert (back.video, back.words()) == (view.video, view.words())
        for name in ("id", "prompt", "task", "spans", "grid", "times", "found", "scores", "answer"):
            assert getattr(back, name) == json.loads(json.dumps(getattr(view, name))), name
        assert back.maps.keys() == view.maps.keys()
        assert all(torch.equal(back.maps[name], rows.half()) for name, rows in view.maps.items())
        assert (back.prior is None) == (view.prior is None)
        if view.prior is not None and back.prior is not None:
            assert torch.equal(back.prior.attention, view.prior.attention)
    (tmp_path / "report" / "samples.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a file that a run wrote"):
        load_views(tmp_path)


# ---- pictures ----


def test_headings_and_scale() -> None:
    assert headings({"after", "before"}) == {
        "teacher": "teacher",
        "before": "student before",
        "after": "student after",
    }
    assert headings(["teacher"]) == {"teacher": "teacher", "after": "student"}
    assert scale_of([]) == scale_of([np.zeros(9)]) == 1.0
    row = np.zeros(1001)
    row[:5] = 9
    assert scale_of([row, np.full(9, 0.5)]) == 0.5, "half a percent of the cells are brighter"
    assert scale_of([row[:500]]) == 9


def test_an_overlay_is_the_nearest_map_in_its_colours() -> None:
    maps = Maps((2, 1, 2), [0.0, 1.0], {3: np.float32([0, 2, 1, 0])})
    frame = np.full((2, 4, 3), 100, np.uint8)

    def drawn(time: float, scale: float = 2.0, smooth: bool = False, colours: str = "viridis") -> np.ndarray:
        return overlay(frame, maps, 3, time, scale, smooth=smooth, colours=colours)

    def mixed(colour: list[float], value: float) -> list[int]:
        share = 0.65 * (0.25 + 0.75 * value)
        return [int((1 - share) * 100 + share * int(part)) for part in colour]

    assert drawn(0.4)[1].tolist() == [mixed(PURPLE, 0)] * 2 + [mixed(YELLOW, 1)] * 2  # type: ignore[arg-type]
    between = [(0x26 + 0x1F) / 2, (0x82 + 0x9E) / 2, (0x8E + 0x89) / 2]
    assert drawn(0.6)[0].tolist() == [mixed(between, 0.5)] * 2 + [mixed(PURPLE, 0)] * 2  # type: ignore[arg-type]
    assert drawn(0.4, scale=0.5).tolist() == drawn(0.4).tolist(), "no brighter than the brightest"
    assert drawn(0.4, colours="cividis")[0, 3].tolist() == mixed([0xFE, 0xE8, 0x38], 1)
    assert len(np.unique(drawn(0.4, smooth=True)[0, :, 0])) > 2
    assert overlay(frame, maps, 2, 0.4, 2.0, smooth=False, colours="viridis") is frame


def test_a_sheet_shows_frames_over_a_row_for_each_source(tmp_path: Path) -> None:
    view = make_views(tmp_path)[0]
    sheet = np.asarray(contact_sheet(view, ["moves"], height=60))
    assert sheet.shape == (4 * 64, 110 + 6 * 84, 3)
    frames = read_frames(tmp_path / "clip.mp4")
    sources = view.sources(2.0)
    for column, index in enumerate((0, 1, 3, 4, 6, 7)):
        cell = np.asarray(Image.fromarray(frames.frames[index]).resize((80, 60)))
        left = slice(110 + 84 * column, 110 + 84 * column + 80)
        assert (sheet[:60, left] == cell).all()
        for line, maps in enumerate(sources.values(), start=1):
            over = overlay(cell, maps, 1, frames.timestamps[index], 12.0, smooth=False, colours="viridis")
            assert (sheet[64 * line : 64 * line + 60, left] == over).all()
    assert (sheet[:, 190:194] == 255).all(), "a gap"
    labels = [(sheet[64 * line : 64 * line + 64, :110] < 128).any() for line in range(4)]
    assert labels == [True] * 4
    assert contact_sheet(view, frames=99).width == 110 + 8 * 164
    black = np.asarray(contact_sheet(replace(view, video=None), ["moves"]))
    assert black.shape[1] == 110 + 2 * 124
    assert not black[:120, 110:230].any()


def test_an_overlaid_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[np.ndarray, float]] = []
    monkeypatch.setattr(picture, "encode_video", lambda _, frames, fps: made.append((frames, fps)))
    view = make_views(tmp_path)[0]
    clip, sources = read_frames(tmp_path / "clip.mp4"), view.sources(2.0)

    def drawn(name: str, row: int, **how: object) -> np.ndarray:
        chosen: dict[str, object] = {"smooth": True, "colours": "viridis", **how}
        return overlay(clip.frames[5], sources[name], row, 1.25, 12.0, **chosen)  # type: ignore[arg-type]

    write_overlay("over.mp4", view)
    write_overlay("two.mp4", view, ["red", "moves"], smooth=False, colours="cividis")
    assert [(frames.shape, fps) for frames, fps in made] == [((8, 48, 192, 3), 4), ((8, 96, 192, 3), 4)]
    assert (made[0][0][5] == np.concatenate([drawn(name, 1) for name in SOURCES], axis=1)).all()
    plain = {"smooth": False, "colours": "cividis"}
    rows = [np.concatenate([drawn(name, row, **plain) for name in SOURCES], axis=1) for row in (0, 1)]
    assert (made[1][0][5] == np.concatenate(rows)).all(), "a word without a student's map, over it one with"
    odd = replace(clip, frames=clip.frames[:, :47, :63], duration=16.0)
    monkeypatch.setattr(picture, "read_clip", lambda _: odd)
    write_overlay("odd.mp4", replace(view, maps={}, scores={}))
    assert made[2][0].shape == (8, 46, 62, 3), "encoders take even sides"
    assert (made[2][1], made[2][0].flags.c_contiguous) == (1, True), "not slower"
    monkeypatch.setattr(picture, "read_clip", lambda _: None)
    with pytest.raises(ValueError, match=r"^good: its clip is not shown, so there is no mp4$"):
        write_overlay("none.mp4", view)


# ---- pages ----


def test_what_a_page_holds(tmp_path: Path) -> None:
    views = make_views(tmp_path)
    write_page(tmp_path / "page.html", views, "a page")
    body = shown(tmp_path / "page.html")
    assert (body["title"], body["colours"], body["run"]) == ("a page", picture.COLOURS, None)
    assert body["names"] == headings(SOURCES)
    first, _, plain = body["views"]
    assert (first["id"], first["task"], first["answer"]) == ("good", "turn", views[0].prompt)
    assert (first["scores"], first["words"]) == (views[0].scores, views[0].words())
    assert (first["video"], first["duration"], first["size"]) == (str(tmp_path / "clip.mp4"), 2.0, [64, 48])
    assert first["times"] == [i / 4 for i in range(8)]
    prior = views[0].prior
    assert prior is not None
    assert first["heads"] == {
        "scores": prior.head_scores,
        "chosen": [0, 3],
        "selection": prior.settings.head_selection,
        "ratio": prior.settings.head_ratio,
    }
    assert (first["confidence"], first["timed"]) == (prior.confidence, True)
    assert first["reading"] == "by 2 steps of inversion and 2 steps of reconstruction"
    short = replace(prior, settings=replace(prior.settings, mode="renoise", noise_level=300))
    assert page._about(View.of_prior(short))["reading"].startswith("in one pass at noise level 300;")
    assert "heads" not in plain
    picture_size = Image.open(BytesIO(base64.b64decode(first["frames"][0]))).size
    assert picture_size == (64, 48)
    maps = first["maps"]
    assert (maps["peaks"], maps["tops"]) == ({"0": 12, "1": 12}, {"0": 12, "1": 12})
    teacher = maps["sources"]["teacher"]
    assert (teacher["grid"], teacher["times"], teacher["rows"]) == ([2, 3, 4], [0, 1.5], [0, 1])
    steps = [zlib.decompress(base64.b64decode(one["data"])) for one in maps["sources"].values()]
    assert list(steps[0]) == [255, *[0] * 22, 255] * 2
    assert list(steps[1]) == [round(255 * (1 / 12) ** 0.5)] * 12
    assert list(steps[2]) == [0] * 5 + [255] + [0] * 6


def test_what_a_page_holds_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not the folder of a training run, as it has no "):
        write_run_page(tmp_path)
    log = [{"step": 1, "loss_ar": 2.0}, {"loss_ar": 9.0}, {"step": 2, "loss_ar": 1.0, "lambda": 0.5}]
    report = {
        "status": "finished",
        "identity": {"prior_temperature": 0.25, "seed": 7, "deep": {"name": "x"}, "teacher": ["a", "b"]},
        "plan": {"schedule": "1, constant", "steps": {"total": 2, "batch": 4}},
        "training": {"log": log, "steps": 2},
        "evaluation": {"overall": 50.0},
    }
    (tmp_path / "motion_report.json").write_text(json.dumps(report))
    save_views(tmp_path, make_views(tmp_path))
    assert write_run_page(tmp_path, tmp_path / "other.html", ["plain"]) == tmp_path / "other.html"
    body = shown(tmp_path / "other.html")
    assert (body["title"], [view["id"] for view in body["views"]]) == (
        f"Training run {tmp_path}",
        ["plain"],
    )
    curves = body["run"].pop("curves")
    assert {name: points for name, points in curves.items() if points} == {
        "loss_ar": [[1, 2.0], [2, 1.0]],
        "lambda": [[2, 0.5]],
    }
    assert body["run"] == {
        "name": str(tmp_path),
        "facts": [
            ["status", "finished"],
            ["teacher", "a + b"],
            ["λ, the weight of the alignment loss", "1, constant"],
            ["steps", "2, each of 4 samples"],
        ],
        "evaluation": {"overall": 50.0},
        "settings": [
            ["status", "finished"],
            ["identity.prior_temperature", "0.25"],
            ["identity.seed", "7"],
            ["identity.deep.name", "x"],
            ["identity.teacher", '["a", "b"]'],
            ["plan.schedule", "1, constant"],
            ["plan.steps.total", "2"],
            ["plan.steps.batch", "4"],
        ],
        "temperature": 0.25,
    }


def test_a_page_without_clips_or_maps(tmp_path: Path) -> None:
    prior = replace(make_prior(), heads=[], times=[0.123456, 0.5])
    write_page(tmp_path / "page.html", [View("v", "It"), View.of_prior(prior)], "a page")
    bare, mapped = shown(tmp_path / "page.html")["views"]
    assert {name: bare[name] for name in ("video", "frames", "times", "duration", "size")} == {
        "video": None,
        "frames": [],
        "times": [],
        "duration": 0.0,
        "size": [1, 1],
    }
    assert (mapped["times"], mapped["duration"], mapped["size"]) == ([0.1235, 0.5], 0.5, [4, 3])
    assert mapped["heads"] is None
    empty = View.of_prior(replace(make_prior(), attention=torch.zeros(2, 24).half()))
    write_page(tmp_path / "page.html", [empty], "a page")
    maps = shown(tmp_path / "page.html")["views"][0]["maps"]
    assert maps["peaks"] == maps["tops"] == {"0": 1, "1": 1}


def test_the_first_quality_that_fits_is_taken(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    video = replace(read_frames(moving_clip(tmp_path / "clip.mp4", frames=2)), frames=noise)
    sizes, budget = [], 10**6
    for _ in range(9):
        found = [base64.b64decode(frame) for frame in page._frames(video, budget, {})["frames"]]
        sizes.append(Image.open(BytesIO(found[0])).size)
        budget = sum(map(len, found)) - 1
    assert page._frames(video, budget + 1, {})["frames"] == page._frames(video, 0, {})["frames"]
    assert sizes == [(64, 48), (64, 48), (51, 38), (38, 29), (26, 19), (16, 12), (8, 6), (8, 6), (8, 6)]


def test_maps_are_pooled_by_their_means() -> None:
    maps = Maps((1, 3, 3), [0.0], {0: np.arange(9, dtype=np.float32)})
    assert page._pooled(maps, 1) is maps
    found = page._pooled(maps, 2)
    assert (found.grid, found.times) == ((1, 2, 2), [0.0])
    assert found.rows[0].tolist() == [2, 3, 5, 6]


def test_views_are_picked_in_the_order_of_their_ids() -> None:
    views = [View(name, "it") for name in "abc"]
    assert pick(views, None, "x") == views
    assert [view.id for view in pick(views, ["c", "a"], "x")] == ["c", "a"]
    with pytest.raises(ValueError, match=r"^--id z: not in x; it has a, b, c$"):
        pick(views, ["z"], "x")
    with pytest.raises(ValueError, match=r"it has none$"):
        pick([], ["z"], "x")
