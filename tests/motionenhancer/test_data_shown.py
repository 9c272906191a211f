"""What a row's keys show of its clip: a segment, frames, pixels."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from row_support import LLAVA, make_clips, part, read, turns
from students_support import clip
from tiny_students import tiny_student

from motionenhancer.alignment.dataset import MotionDataset
from motionenhancer.data import Clip, SkipLog, VideoError, read_frames
from motionenhancer.data.sampling import Frames
from motionenhancer.evaluation.benchmarks import BENCHMARKS, load_questions
from motionenhancer.evaluation.generate import Asked, encode_batch, encode_request
from motionenhancer.evaluation.videos import VideoFolder
from motionenhancer.priors.storage import PriorStore
from motionenhancer.students import student_family
from motionenhancer.toy.models import make_student


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("keys") / "videos")


def grey(video: Any) -> list[int]:
    return [round((float(frame.mean()) - 10) / 15) for frame in video.frames]


@pytest.mark.parametrize(
    ("keys", "first", "last"),
    [
        ({"video_start": 0.5, "video_end": 0.8}, 4, 6),
        ({"video_start": 0.5, "video_end": 0.75}, 4, 6),
        ({"video_start": 0.51}, 5, 15),
        ({"video_end": 0.3}, 0, 2),
        ({"video_start": 0, "video_end": 99}, 0, 15),
    ],
)
def test_a_segment_is_all_that_is_shown(root: Path, keys: dict[str, float], first: int, last: int) -> None:
    (sample,), log = read(root, part(**keys))
    (video,) = sample.videos
    assert log.total == 0
    assert grey(read_frames(video)) == list(range(first, last + 1))
    assert grey(read_frames(video, num_frames=2)) == [first, last]
    assert grey(Frames(num_frames=2).of(video)) == [first, last]
    assert read_frames(video).timestamps.tolist() == [i / 8 for i in range(first, last + 1)]
    (row,), _ = read(root, {**LLAVA, **keys})
    assert row.videos == sample.videos


def test_a_segment_behind_the_clip_is_unreadable(root: Path) -> None:
    (sample,), _ = read(root, part(video_start=5))
    with pytest.raises(VideoError, match=r"a\.mp4.*no frame"):
        read_frames(sample.videos[0])


@pytest.mark.parametrize(
    ("keys", "run", "shown"),
    [
        ({"fps": 4}, {"fps": 1.0, "max_frames": 64}, list(range(0, 16, 2))),
        ({"fps": 4}, {"num_frames": 2, "fps": 1.0, "max_frames": 64}, list(range(0, 16, 2))),
        ({"fps": 8}, {"fps": 1.0, "max_frames": 3}, [0, 7, 15]),
        ({"nframes": 2}, {"fps": 8.0, "max_frames": 64}, [0, 15]),
        ({"nframes": 2.0}, {"num_frames": 5}, [0, 15]),
        ({"max_frames": 2}, {"fps": 8.0, "max_frames": 64}, [0, 15]),
        ({"max_frames": 2}, {"num_frames": 5}, [0, 15]),
        ({"min_frames": 4}, {"fps": 1.0, "max_frames": 64}, [0, 5, 10, 15]),
        ({"nframes": 40}, {"fps": 1.0}, list(range(16))),
        ({"nframes": 40}, {"num_frames": 2}, list(range(16))),
        ({"min_frames": 40, "max_frames": 50}, {"num_frames": 2}, list(range(16))),
        ({"video_start": 1, "fps": 4}, {"fps": 1.0}, [8, 10, 12, 14]),
        ({}, {"num_frames": 2}, [0, 15]),
    ],
)
def test_a_rows_frames_come_before_the_runs(
    root: Path, keys: dict[str, Any], run: dict[str, Any], shown: list[int]
) -> None:
    (sample,), _ = read(root, part(**keys))
    assert grey(Frames(**run).of(sample.videos[0])) == shown


def test_training_and_evaluation_show_what_the_row_says(root: Path) -> None:
    (sample,), _ = read(root, {**part(video_start=0.5, video_end=1.0, nframes=4), "id": "s"})
    _, processor = make_student(layers=1)
    family, store = student_family("qwen2_5_vl"), PriorStore(root / "none")
    item = MotionDataset([sample], family, processor, keys={}, store=store, num_frames=16)[0]
    assert item.encoded.layout.videos[0].grid[0] == 2, "two token frames of four frames"
    shown = {"video": "a.mp4", "video_start": 0.5, "video_end": 1.0}
    row = {"id": "q-x", **shown, "conversations": turns("q", "a")}
    file = root.parent / "toy.jsonl"
    file.write_text(json.dumps(row))
    (question,) = load_questions(BENCHMARKS["toy"], file, SkipLog())
    found = VideoFolder(root).find(question.video)
    assert found == Clip(root / "a.mp4", 0.5, 1.0)
    assert grey(Frames(fps=8.0).of(found)) == [4, 5, 6, 7, 8]
    assert (question.text, question.answer) == ("q", "a")
    small = Clip(root / "a.mp4", 0.5, 1.0, max_pixels=16 * 16)
    batch = [Asked(question, "What?", shown) for shown in (found, small)]
    rows, asked = encode_batch(
        batch, partial(encode_request, family, processor), Frames(fps=4.0, min_frames=4)
    )
    assert [row["id"] for row in rows] == ["q-x"] * 2
    assert [request.layout.videos[0].grid for request in asked] == [(2, 8, 8), (2, 2, 2)]
    file.write_text(json.dumps({**row, "video_start": None, "video_end": None}))
    assert load_questions(BENCHMARKS["toy"], file, SkipLog())[0].video == "a.mp4"
    file.write_text(json.dumps({key: value for key, value in row.items() if key != "id"}))
    assert load_questions(BENCHMARKS["toy"], file, SkipLog())[0].id == "line-1"
    file.write_text(json.dumps({**row, "weight": 3}) + "\n" + json.dumps({**row, "system": "s"}) + "\n")
    log = SkipLog(shout=0)
    with pytest.raises(ValueError, match="holds no question"):
        load_questions(BENCHMARKS["toy"], file, log)
    assert log.counts == {"unsupported key": 2}


def test_a_family_that_needs_equal_frames_leaves_out_a_row_with_others(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In a batch, clips of different lengths would end the run."""
    _, processor, family = tiny_student("llava_onevision", tmp_path_factory.mktemp("students") / "llava")
    (one,), _ = read(root, {**part(nframes=2), "id": "own"})
    (other,), _ = read(root, {**LLAVA, "id": "run"})
    dataset = MotionDataset([one, other], family, processor, keys={}, store=PriorStore(root), num_frames=4)
    item = dataset[0]
    assert item.id == "run"
    assert item.skipped["own"].startswith(
        "its row asks for 2 frames, but llava_onevision needs the same number"
    )


# ---- pixels ----


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A processor whose tokens are 8 x 8 pixels, and its family."""
    if request.param == "qwen2_5_vl":
        return make_student(layers=1)[1], student_family(request.param)
    _, processor, family = tiny_student(request.param, tmp_path_factory.mktemp("students") / request.param)
    return processor, family


@pytest.mark.parametrize(
    ("keys", "run", "side"),
    [
        ({}, None, 8),
        ({"max_pixels": 32 * 32}, None, 4),
        ({"max_pixels": 32 * 32}, 16 * 16, 2),
        ({"max_pixels": 32 * 32}, 48 * 48, 4),
        ({"min_pixels": 128 * 128}, None, 16),
        ({"min_pixels": 128 * 128}, 32 * 32, 4),
        ({"min_pixels": 96 * 96, "max_pixels": 96 * 96}, None, 12),
    ],
)
def test_a_rows_pixels_come_before_the_processors(
    root: Path, student: tuple[Any, Any], keys: dict[str, int], run: int | None, side: int
) -> None:
    processor, family = student
    (sample,), _ = read(root, part(**keys))
    frames = clip(4, 64, 64)
    encoded = family.encode(processor, sample, [frames], max_pixels=run)
    assert encoded.layout.videos[0].grid == (2, side, side)
    asked = encode_request(family, processor, "q", "What?", frames, clip=sample.videos[0], max_pixels=run)
    assert asked.layout.videos[0].grid == (2, side, side)


def test_a_rows_pixels_below_one_token_are_refused(root: Path, student: tuple[Any, Any]) -> None:
    processor, family = student
    (sample,), _ = read(root, part(max_pixels=63))
    with pytest.raises(ValueError, match=r"max_pixels must be at least 64 \(one token\), got 63"):
        family.encode(processor, sample, [clip(4, 64, 64)])
