"""Which questions are asked together: clips of about the same length, also after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from students_support import sharp_student

from motionenhancer.data.clip import Clip
from motionenhancer.data.decode import FRAMES as CLIP_FRAMES
from motionenhancer.data.encode import encode_video
from motionenhancer.data.question import Question
from motionenhancer.data.sampling import Frames
from motionenhancer.data.video import outline
from motionenhancer.evaluation.answers import append_answers, mark_clip, read_answers
from motionenhancer.evaluation.generate import Asked, Engine, answer_questions, transformers_engine
from motionenhancer.students import student_family

FRAMES = Frames(fps=4.0, max_frames=12)
LENGTH = partial(student_family("qwen2_5_vl").length, max_pixels=64 * 64)
COUNTS = (3, 12, 2, 9, 5, 14, 4, 7)
LONGEST_FIRST = [["1", "5", "3"], ["7", "4", "6"], ["0", "2"]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    """A question about each of eight clips of 2 to 14 frames, four a second."""
    folder = tmp_path_factory.mktemp("lengths")
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    for n, count in enumerate(COUNTS):
        encode_video(folder / f"{n}.mp4", noise[n % 3 : n % 3 + count], fps=4)
    return [
        Asked(Question(str(n), f"{n}.mp4", "?", "A", ("MR",)), f"What moves? {n}", folder / f"{n}.mp4")
        for n in range(len(COUNTS))
    ]


class Student:
    """A stand-in that answers with the question's id, and records which questions were asked together."""

    def __init__(self, stop: int = 99) -> None:
        self.batches: list[list[str]] = []
        self.engine = Engine(lambda id, *_, **__: id, self.answer)
        self.stop = stop

    def answer(self, requests: Sequence[str]) -> list[str]:
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        self.batches.append(list(requests))
        return [f"answer {id}" for id in requests]


def ask(asked: Sequence[Asked], folder: Path, length: Any = LENGTH, stop: int = 99) -> list[list[str]]:
    """Ask three questions at once; return which were asked together."""
    student = Student(stop)
    try:
        answer_questions(lambda: student.engine, asked, folder, FRAMES, length=length, batch_size=3)
    except KeyboardInterrupt:
        return student.batches
    assert {id: row["output"] for id, row in read_answers(folder).items()} == {
        item.question.id: f"answer {item.question.id}" for item in asked if item.video is not None
    }
    return student.batches


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_kill_changes_no_batch(stop: int, asked: list[Asked], tmp_path: Path) -> None:
    before = ask(asked, tmp_path, stop=stop)
    assert before + ask(asked, tmp_path) == LONGEST_FIRST
    assert ask(asked, tmp_path) == []


def test_a_half_written_batch_changes_no_other(asked: list[Asked], tmp_path: Path) -> None:
    ask(asked, tmp_path, stop=1)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert ask(asked, tmp_path) == [*LONGEST_FIRST[1:], ["3"]]


def test_answers_of_batches_in_another_order_are_kept(asked: list[Asked], tmp_path: Path) -> None:
    """The first answers are in the order of the file, as of an older run; the rest is asked by length."""
    ask(asked, tmp_path, None, stop=1)
    before = read_answers(tmp_path)
    assert [*before] == ["0", "1", "2"]
    assert ask(asked, tmp_path) == [["7", "4", "6"], ["5", "3"]]
    assert {id: read_answers(tmp_path)[id] for id in before} == before


def test_a_skipped_question_comes_last(asked: list[Asked], tmp_path: Path) -> None:
    append_answers(tmp_path / "answers-00000.jsonl", [{"id": "5", "skipped": "unreadable"}])
    for id in "13":
        row = {"id": id, "output": f"answer {id}", "clip": mark_clip(asked[int(id)].video or "")}
        append_answers(tmp_path / "answers-00000.jsonl", [row])
    assert ask(asked, tmp_path) == [*LONGEST_FIRST[1:], ["5"]]


def test_clips_that_are_missing_broken_or_of_one_length(asked: list[Asked], tmp_path: Path) -> None:
    """Questions of one clip stay together; what cannot be opened has no length."""
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    some = [
        replace(asked[0], video=None),
        replace(asked[1], video=tmp_path / "broken.mp4"),
        replace(asked[2], video=asked[7].video),
        *asked[3:5],
        replace(asked[7], video=Clip(Path(str(asked[1].video)), end=0.3)),
        replace(asked[5], video=asked[7].video),
    ]
    student = Student()
    answer_questions(lambda: student.engine, some, tmp_path, FRAMES, length=LENGTH, batch_size=2)
    assert student.batches == [["3", "2"], ["5", "4"], ["7"]]
    assert "cannot be opened" in read_answers(tmp_path)["1"]["skipped"]


def test_batches_by_length_pad_less_and_change_no_answer(asked: list[Asked], tmp_path: Path) -> None:
    """A real model in float32: both orders of the questions, and a run that was begun in the other order."""
    model, processor = sharp_student(layers=1)
    family = student_family("qwen2_5_vl")
    plain = transformers_engine(model, processor, family, max_pixels=64 * 64, max_new_tokens=6)
    padded: list[int] = []

    def counting(requests: Sequence[Any]) -> list[str]:
        sizes = [len(request.input_ids) for request in requests]
        padded.append(max(sizes) * len(sizes) - sum(sizes))
        return plain.answer(requests)

    found, padding = [], []
    for name, orders in (("file", (None,)), ("length", (LENGTH,)), ("begun", (None, LENGTH))):
        folder = tmp_path / name
        folder.mkdir()
        padded.clear()
        for part, length in zip((asked[:3], asked) if len(orders) > 1 else (asked,), orders, strict=True):
            engine = plain._replace(answer=counting)
            answer_questions(lambda e=engine: e, part, folder, FRAMES, length=length, batch_size=3)
        found.append({id: row["output"] for id, row in read_answers(folder).items()})
        padding.append(sum(padded))
    assert found[0] == found[1] == found[2]
    assert len({*found[0].values()}) > 4, "answers depend on the clip"
    assert padding[1] < padding[0] / 2


@pytest.mark.parametrize(
    "frames",
    [FRAMES, Frames(num_frames=5), Frames(fps=2.0, min_frames=6), Frames(fps=1.0, max_frames=2)],
)
def test_an_outline_has_the_frames_that_are_read(frames: Frames, asked: list[Asked]) -> None:
    clips = [item.video for item in asked if item.video is not None]
    parts = [Clip(Path(str(clips[5])), start, end) for start, end in ((0.5, None), (0.6, 2.2), (9, 10))]
    for clip in (*clips, *parts[:2]):
        read, header = frames.of(clip), frames.of(clip, read=outline)
        assert header.frames.shape == read.frames.shape
        assert header.timestamps == pytest.approx(read.timestamps)
        assert (header.source_frames, header.fps) == (read.source_frames, pytest.approx(read.fps))
        assert header.duration == pytest.approx(read.duration)
    assert not len(frames.of(parts[2], read=outline).frames)


def test_an_outline_of_a_file_that_does_not_count_its_frames(
    asked: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matroska says how long a clip lasts, a picture says nothing."""
    with av.open(str(asked[5].video)) as clip, av.open(str(tmp_path / "clip.mkv"), "w") as film:
        stream = film.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux(video=0):
            if packet.size:
                packet.stream = stream
                film.mux(packet)
    assert outline(tmp_path / "clip.mkv").source_frames == 14
    monkeypatch.setenv(CLIP_FRAMES, "5")
    assert outline(tmp_path / "clip.mkv").source_frames == 5, "however long the file says that it is"
    monkeypatch.delenv(CLIP_FRAMES)
    assert outline(tmp_path / "clip.mkv", fps=2.0).frames.shape == (7, 64, 64, 3)
    Image.new("RGB", (32, 16)).save(tmp_path / "picture.png")
    assert outline(tmp_path / "picture.png").frames.shape == (1, 16, 32, 3)


def test_length_is_that_of_tokens() -> None:
    """Frames of a family with a fixed size count alike; others by their pixels, up to the cap."""
    small, large = (outline_of(4, side) for side in (32, 64))
    assert [LENGTH(small), LENGTH(large), LENGTH(outline_of(4, 640))] == [4 * 1024, 4 * 4096, 4 * 4096]
    fixed = student_family("internvl").length
    assert fixed(small, 99) == fixed(large, None) == 4


def outline_of(count: int, side: int) -> Any:
    class Shown:
        frames = np.empty((count, side, side, 3), np.uint8)

    return Shown
