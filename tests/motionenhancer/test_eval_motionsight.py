"""MotionSight's visual prompts: which pixels a student is shown, and which questions get them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from students_support import clip, sharp_student

from motionenhancer import eval as evaluate
from motionenhancer.data import Clip, read_frames
from motionenhancer.data.encode import encode_video
from motionenhancer.data.question import Question
from motionenhancer.evaluation.generate import Asked
from motionenhancer.evaluation.motionsight import lit, looks, read_boxes, spotlight, trails
from motionenhancer.toy.world import ToyFolder, write_world


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyFolder:
    return write_world(
        tmp_path_factory.mktemp("sight_world"), clips=1, test_clips=6, size=160, progress=False
    )


# ---- what is lit ----


def test_near_boxes_share_one_light_and_far_ones_begin_another() -> None:
    """The running centre: 50, 0.7 x 50 + 0.3 x 60 = 53, 58.1; more than 0.3 x 100 pixels from it is far."""
    boxes = [[[40, 40, 60, 60]], [[50, 40, 70, 60]], [[60, 40, 80, 60]], [[85, 40, 105, 60]]]
    found = lit(boxes, 100, 200)
    assert found == [(20, 20, 100, 80)] * 3 + [(65, 20, 125, 80)]
    almost = lit([*boxes[:3], [[75, 40, 95, 60]]], 100, 200)
    assert almost == [(20, 20, 115, 80)] * 4


def test_a_segment_of_two_boxes_goes_on() -> None:
    assert (
        lit([[[40, 40, 60, 60]], [[41, 40, 61, 60]], [[150, 40, 170, 60]]], 100, 200)
        == [(20, 20, 190, 80)] * 3
    )


def test_two_objects_count_by_their_mean_and_frames_without_boxes_keep_the_first() -> None:
    both = [[10, 40, 30, 60], [70, 40, 90, 60]]
    assert lit([both, [], both], 100, 200) == [(0, 20, 110, 80)] * 3
    # The second segment begins in a frame without boxes, with the first box only.
    two = [[150, 30, 170, 50], [150, 70, 170, 90]]
    assert lit([[[40, 40, 60, 60]], two, []], 100, 200)[2] == (130, 10, 190, 70)


def test_before_any_box_the_whole_picture_is_lit() -> None:
    assert lit([[], [[90, 40, 110, 60]]], 100, 200) == [(0, 0, 200, 100)] * 2


def test_a_small_box_is_enlarged() -> None:
    assert lit([[[100, 100, 105, 130]]], 300, 300) == [(32, 45, 173, 185)]


def test_the_rest_is_dimmed() -> None:
    video = clip(4, 120, 160)
    shown = spotlight(video, [{"box": [60, 50, 90, 80]}])
    inside = np.zeros((120, 160), bool)
    inside[30:100, 40:110] = True
    assert (shown.frames[:, inside] == video.frames[:, inside]).all()
    assert (shown.frames[:, ~inside] == np.rint(video.frames[:, ~inside] * 0.1)).all()
    assert shown.timestamps is video.timestamps


@pytest.mark.parametrize("named", ["frames", "times"])
def test_a_frame_has_the_box_of_its_time(named: str) -> None:
    """Every second frame of eight is shown; in the other frames the object is elsewhere."""
    video = clip(8, 120, 200, fps=4.0)
    seen = type(video)(video.frames[::2], video.timestamps[::2], 4.0, 2.0, decoded=8, source_frames=8)
    boxes = [[10, 10, 30, 30] if n % 2 == 0 else [150, 80, 170, 100] for n in range(8)]
    places = [n if named == "frames" else n / 4 for n in range(8)]
    shown = spotlight(seen, [{"box": boxes, named: places}])
    assert (shown.frames[:, 80:, 150:] <= 26).all()
    assert (shown.frames[:, :50, :50] == seen.frames[:, :50, :50]).all()


def test_an_object_that_is_not_seen_in_a_frame() -> None:
    video = clip(2, 120, 200, fps=1.0)
    boxes = [[[10, 10, 30, 30], None], [[80, 10, 99, 30], None]]
    shown = spotlight(video, [{"box": box, "frames": [0, 1]} for box in boxes])
    assert (shown.frames[:, :50, :119] == video.frames[:, :50, :119]).all()


@pytest.mark.parametrize(
    ("region", "why"),
    [
        ({"box": [10, 10, 5, 30]}, r"regions\[0\]: box must be \[x0, y0, x1, y1\]"),
        ({"box": [300, 10, 320, 30]}, "outside the picture of 64 x 64 pixels"),
        ({"box": [[1, 1, 9, 9]], "frames": [0, 1]}, "one entry for each of its frames or times"),
        ({"box": [1, 1, 9, 9], "frames": [0]}, "one entry for each of its frames or times"),
        ({"box": [[1, 1, 9, 9]], "frames": [4]}, "frames must be from 0 to 3"),
        ({"box": [[1, 1, 9, 9]], "times": [9.0]}, "times must be from 0 to 2 s"),
        ({"box": "all"}, "box must be"),
    ],
)
def test_boxes_that_do_not_fit_the_clip(region: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        spotlight(clip(4, 64, 64), [region])


def test_one_frame_has_no_time() -> None:
    with pytest.raises(ValueError, match="spotlight needs clips of two frames"):
        spotlight(clip(1, 64, 64), [{"box": [1, 1, 9, 9]}])


# ---- trails ----


def test_trails_weigh_the_frames_before(tmp_path: Path) -> None:
    """The grey level of frame 9 is the weighted sum of seven frames: the shown frame and six before it."""
    levels = np.array([20, 220, 40, 200, 60, 180, 80, 160, 100, 140], np.uint8)
    encode_video(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (10, 32, 32, 3)), fps=5)
    whole = read_frames(tmp_path / "a.mp4")
    video = read_frames(tmp_path / "a.mp4", num_frames=4)
    shown = trails(video, tmp_path / "a.mp4", None)
    assert (shown.frames[0] == whole.frames[0]).all(), "no frame is before the first"
    level = whole.frames.mean((1, 2, 3))
    for place, index in enumerate((0, 3, 6, 9)):
        wanted = level[index]
        for back in range(1, 7):
            if back <= index:
                share = 0.65 ** (back + 1)
                wanted = (1 - share) * wanted + share * level[index - back]
        assert shown.frames[place].mean() == pytest.approx(wanted, abs=0.6)
    segment = Clip(tmp_path / "a.mp4", start=1.0)
    first = trails(read_frames(segment, num_frames=2), segment, None)
    assert (first.frames[0] == whole.frames[5]).all(), "nor before the first of a part"


# ---- which question gets which ----


def question(id: str, task: str, video: str = "a.mp4") -> Asked:
    return Asked(Question(id, video, "What?", "x", (task,)), "What?", Path("a.mp4"))


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("spotlight", [spotlight, spotlight, None]),
        ("trails", [trails, trails, trails]),
        ("motionsight", [trails, spotlight, None]),
    ],
)
def test_questions_about_the_camera_see_trails(prompt: str, found: list[Any]) -> None:
    asked = [question("c", "CM"), question("o", "MR"), question("n", "MR", "none.mp4")]
    boxes = {"a": [{"box": [1, 1, 9, 9]}]}
    absent = [replace(item, video=None) for item in asked]
    assert looks(prompt, absent, boxes, None) == absent, "no clip, nothing to show"
    assert [getattr(item.look, "func", None) for item in looks(prompt, asked, boxes, None)] == found


def test_boxes_of_a_question_come_before_those_of_its_clip(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4", "regions": [{"box": [1, 1, 9, 9]}]},
        {"id": "o", "video": "a.mp4", "regions": [{"box": [2, 2, 9, 9], "words": "dog"}]},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [question("o", "MR"), question("p", "MR")]
    first, second = looks("spotlight", asked, read_boxes(tmp_path / "b.jsonl"), None)
    assert first.look.keywords["regions"][0]["box"] == [2, 2, 9, 9]  # type: ignore[union-attr]
    assert second.look.keywords["regions"][0]["box"] == [1, 1, 9, 9]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "line 1: must be an object"),
        ('{"regions": []}', "needs 'regions'"),
        ('{"video": "a.mp4"}', "needs 'regions'"),
        ('{"video": "a.mp4", "regions": [3]}', "needs 'regions', a list of objects"),
        ('{"video": "a.mp4", "regions": [{"point": [1, 2]}]}', "a region needs 'box', got point"),
        ('{"video": "a.mp4", ', "line 1"),
    ],
)
def test_files_that_hold_no_boxes(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(ValueError, match=why):
        read_boxes(tmp_path / "b.jsonl")


def test_a_run(toy: ToyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A visual prompt makes a separate run; questions without boxes are counted."""
    file = tmp_path / "b.jsonl"
    rows = [{"video": f"test-0000{n}.mp4", "regions": [{"box": [40, 40, 60, 60]}]} for n in range(2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    for part in sharp_student(layers=2):
        part.save_pretrained(tmp_path / "student")

    def run(out: str, *flags: str) -> int:
        where = ["--student", tmp_path / "student", "--data", toy.test, "--video_root", toy.videos]
        more = ["--output_dir", tmp_path / out, "--bootstrap_samples", 0, "--max_new_tokens", 4]
        return evaluate.main([str(part) for part in (*where, *more, *flags)])

    assert run("plain") == 0
    assert run("lit", "--visual_prompt", "spotlight", "--boxes", str(file)) == 0
    said = capsys.readouterr().out
    assert "4 questions have no boxes; their clips are shown as they are" in said
    plain, shown = (
        [json.loads(line)["output"] for line in (tmp_path / run / "results.jsonl").read_text().splitlines()]
        for run in ("plain", "lit")
    )
    assert plain[:2] != shown[:2]
    assert run("plain", "--visual_prompt", "trails") == 2
    assert "visual_prompt: None there, 'trails' now" in capsys.readouterr().err
    assert run("none", "--visual_prompt", "spotlight", "--boxes", str(toy.train)) == 2
    assert "needs 'regions'" in capsys.readouterr().err
    file.write_text('{"video": "other.mp4", "regions": [{"box": [2, 2, 9, 9]}]}')
    assert run("none", "--visual_prompt", "motionsight", "--boxes", str(file)) == 2
    assert "--boxes must name questions or clips of this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--visual_prompt", "spotlight"], "need --boxes"),
        (["--boxes", __file__], "need --boxes"),
        (["--visual_prompt", "trails", "--boxes", __file__], "need --boxes"),
        (["--visual_prompt", "trails", "--lmms_eval", "x"], "does not go with --predictions and --lmms_eval"),
    ],
)
def test_flags(flags: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert why in capsys.readouterr().err
