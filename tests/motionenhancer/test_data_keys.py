"""Keys of published formats that change what is learnt: honoured, or the row refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from row_support import LLAVA, make_clips, part, read, turns
from students_support import clip

from motionenhancer.data import Clip, Sample, prompt_text
from motionenhancer.students import student_family
from motionenhancer.toy.models import make_student


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("keys") / "videos")


def chat(*texts: str, **answer: Any) -> dict[str, Any]:
    """Messages and a video; `answer` is added to the turn of the first answer."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[1] |= answer
    return {"messages": messages, "videos": ["a.mp4"]}


TALK = ("<video>What moves?", "BAD", "Again?", "GOOD")


# ---- answers that are left out of the loss ----


@pytest.mark.parametrize(
    "said",
    [{"loss": False}, {"loss": 0}, {"train": False}, {"training": False}, {"weight": 0}, {"loss_mask": 0}],
)
def test_an_answer_left_out_of_the_loss_is_context_only(root: Path, said: dict[str, Any]) -> None:
    (sample,), log = read(root, chat(*TALK, **said))
    assert not log.notes
    _, processor = make_student(layers=1)
    encoded = student_family("qwen2_5_vl").encode(processor, sample, [clip(2, 32, 32)])
    tokens = processor.tokenizer
    assert tokens.decode(encoded.labels[encoded.labels != -100]).replace("<|im_end|>", "") == "GOOD"
    assert "BAD" in tokens.decode(encoded.input_ids)
    assert prompt_text(sample)[0] == "What moves? Again? GOOD"
    assert prompt_text(sample, "answer")[0] == "GOOD"


@pytest.mark.parametrize(
    "said", [{"loss": True}, {"loss": None}, {"weight": 1.0}, {"train": True, "weight": 1}]
)
def test_an_answer_that_is_learnt_may_say_so(root: Path, said: dict[str, Any]) -> None:
    (sample,), log = read(root, chat(*TALK, **said))
    assert not log.notes
    assert all("loss" not in message for message in sample.messages)


def test_a_sample_without_a_learnt_answer_is_refused_by_the_student_too() -> None:
    _, processor = make_student(layers=1)
    asked = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "y"}], "loss": False}
    with pytest.raises(ValueError, match="'s' leaves every answer out of the loss"):
        student_family("qwen2_5_vl").encode(processor, Sample("s", [asked, reply]), [])


# ---- rows that are refused ----


def with_turn(index: int, **keys: Any) -> dict[str, Any]:
    row = chat(*TALK)
    row["messages"][index] |= keys
    return row


REFUSED = [
    ({**LLAVA, "weight": 2}, "'weight': every sample has the same weight"),
    ({**LLAVA, "weight": 0}, "'weight'"),
    ({**LLAVA, "weight": "1"}, "'weight'"),
    ({**LLAVA, "loss_scale": 0.5}, "'loss_scale'"),
    ({**LLAVA, "loss": False}, "'loss'"),
    ({**LLAVA, "tools": [{"name": "f"}]}, "'tools': tools are not shown"),
    ({**LLAVA, "audios": ["a.wav"]}, "'audios': sound is not shown"),
    ({**LLAVA, "audio": "a.wav"}, "'audio'"),
    ({**LLAVA, "label": False}, "'label': marks an unwanted answer"),
    ({**LLAVA, "kto_tag": False}, "'kto_tag'"),
    (
        {**LLAVA, "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}},
        "'objects': boxes are not put into texts",
    ),
    ({**LLAVA, "history": [["q", "a"]]}, "'history'"),
    ({**LLAVA, "start": 1.0, "end": 2.0}, "'start': give video_start and video_end, in seconds"),
    ({**LLAVA, "total_pixels": 10**6}, "'total_pixels': give min_pixels and max_pixels"),
    ({**LLAVA, "video_start": 1, "video": ["a.mp4", "a.mp4"]}, "tag(s) for 2 video(s)"),
    (
        {**LLAVA, "video_start": 1, "video": ["a.mp4"] * 2, "conversations": turns("<video><video>x", "y")},
        "'video_start' is given for a row with 2 videos",
    ),
    ({**LLAVA, "system": 3}, "system must be a text"),
    (with_turn(1, tool_calls=[{"name": "f"}]), "messages[1].'tool_calls': tools are not shown"),
    (with_turn(1, loss=0.5), "messages[1]: 'loss' must be true or false"),
    (with_turn(1, weight=2), "messages[1]: 'weight' must be true or false"),
    (with_turn(1, loss=True, weight=0), "'loss' and 'weight' contradict"),
    (with_turn(0, loss=True), "messages[0]: only turns of the assistant are trained on, got the user's"),
    (with_turn(1, reasoning_content="Hm."), "'reasoning_content'"),
    (with_turn(0, images=["i.png"]), "'images': put a turn's files beside"),
    (with_turn(1, role="tool"), "messages[1] has the unknown role 'tool'"),
    (with_turn(2, role="tool_response"), "messages[2] has the unknown role 'tool_response'"),
    (chat("<video>x", "y", loss=False), "every answer is left out of the loss"),
    (chat("<video><audio>x", "y"), "<audio>: only images and videos are shown"),
    (chat("<video>x", "at <bbox>"), "<bbox>: only images and videos are shown"),
    (part(resized_height=280, resized_width=280), "'resized_height': give min_pixels"),
    (part(start=1), "content.'start': give video_start"),
    (part(video_start="1"), "'video_start' must be a number of seconds, got '1'"),
    (part(video_start=True), "'video_start' must be a number of seconds, got True"),
    (part(video_start=float("nan")), "'video_start' must be a number of seconds"),
    (part(video_start=10**400), "'video_start' must be a number of seconds"),
    (part(video_start=-1), "'video_start' must be at least 0, got -1"),
    (part(video_end=0), "'video_end' must be above 0, got 0"),
    (part(video_start=1, video_end=1), "'video_end' must be after 'video_start', got 1 and 1"),
    (part(fps=0), "'fps' must be above 0"),
    (part(nframes=2.5), "'nframes' must be a whole number, got 2.5"),
    (part(nframes=4, fps=1), "'nframes' and 'fps' exclude each other"),
    (part(nframes=4, max_frames=2), "'nframes' and 'max_frames' exclude each other"),
    (part(min_pixels=4000, max_pixels=3000), "'min_pixels' must be at most 'max_pixels', got 4000 and 3000"),
    (part(min_frames=9, max_frames=3), "'min_frames' must be at most 'max_frames'"),
    ({**part(video_end=1), "video_end": 2}, "'video_end' of the row differs from that of its video"),
    (
        chat([{"type": "video", "fps": 2}, {"type": "text", "text": "x"}], "y"),  # type: ignore[arg-type]
        "'fps' is in a part that names no video",
    ),
]


@pytest.mark.parametrize(("row", "said"), REFUSED)
def test_what_cannot_be_honoured_is_refused_with_its_reason(
    root: Path, row: dict[str, Any], said: str
) -> None:
    samples, log = read(root, row)
    assert samples == []
    (entry,) = log.entries
    assert entry.line == 1
    assert said in f"{entry.reason}: {entry.detail}"


def test_limits_of_pixels_are_one_for_all_videos_of_a_row(root: Path) -> None:
    videos = [{"path": "a.mp4", "max_pixels": 4096}, "a.mp4"]
    row = {"videos": videos, "messages": chat("<video><video>x", "y")["messages"]}
    samples, log = read(root, row)
    assert samples == []
    assert "must have the same min_pixels and max_pixels" in log.entries[0].detail
    (sample,), _ = read(root, {**row, "videos": [videos[0], videos[0]]})
    assert [video.max_pixels for video in sample.videos] == [4096, 4096]  # type: ignore[union-attr]


NEUTRAL = {
    "weight": 1.0,
    "tools": [],
    "audio": True,
    "audios": None,
    "label": "walking",
    "objects": ["dog"],
    "channel": "web",
    "video_start": None,
    "rejected_response": None,
    "system": " ",
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_values_that_change_nothing_refuse_nothing(root: Path, key: str) -> None:
    (sample,), log = read(root, {**LLAVA, key: NEUTRAL[key]})
    assert log.total == 0
    assert sample.videos == (root / "a.mp4",)
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]


def test_the_rejected_answer_of_a_preference_is_left_out_and_counted(root: Path) -> None:
    (sample,), log = read(root, {**LLAVA, "rejected_response": "z"})
    assert prompt_text(sample)[0] == "x y"
    assert dict(log.notes) == {"rejected answer of a preference pair, not read": 1}


@pytest.mark.parametrize("key", ["task", "task_type", "question_type", "category"])
def test_a_rows_task_is_read_and_no_unknown_key(root: Path, key: str) -> None:
    (sample,), log = read(root, {**LLAVA, key: "MR"})
    assert sample.task == "MR"
    assert not log.notes


def test_a_rows_own_frame_rate_says_nothing_of_the_sampling(root: Path) -> None:
    (sample,), log = read(root, {**LLAVA, "fps": 30})
    assert sample.videos == (root / "a.mp4",)
    assert dict(log.notes) == {"unknown key 'fps' ignored": 1}


# ---- system ----


def test_a_rows_system_text_is_the_first_message(root: Path) -> None:
    (sample,), log = read(root, {**LLAVA, "system": "Answer in one word."})
    assert sample.messages[0] == {
        "role": "system",
        "content": [{"type": "text", "text": "Answer in one word."}],
    }
    assert (log.total, dict(log.notes)) == (0, {})
    _, processor = make_student(layers=1)
    encoded = student_family("qwen2_5_vl").encode(processor, sample, [clip(2, 32, 32)])
    assert "Answer in one word." in processor.tokenizer.decode(encoded.input_ids)
    assert prompt_text(sample)[0] == "x y"
    conversation = [{"from": "system", "value": "b"}, *turns("<video>x", "y")]
    samples, log = read(root, {**LLAVA, "system": "a", "conversations": conversation})
    assert samples == []
    assert log.counts == {"wrong roles": 1}


# ---- published formats ----


@pytest.mark.parametrize("extra", [{}, {"data_source": "0_30_s_youtube_v0_1"}])
def test_image_tags_beside_a_video_stand_for_it(root: Path, extra: dict[str, str]) -> None:
    row = {"video": "a.mp4", "conversations": turns("<image>\nWhat moves?", "The ball."), **extra}
    (sample,), log = read(root, row)
    assert sample.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    assert (sample.videos, sample.images) == ((root / "a.mp4",), ())
    assert log.total == 0
    (inline,), _ = read(root, {"videos": ["a.mp4"], "messages": chat("<image>What?", "x")["messages"]})
    assert inline.messages[0]["content"][0] == {"type": "video"}


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "conversations": turns("<image><image>x", "y")},
        {"video": "a.mp4", "conversations": turns("<video><image>x", "y")},
        {"video": "a.mp4", "image": "i.png", "conversations": turns("<image>x", "y")},
        {"video": "a.mp4", "conversations": turns("x", "<image>y")},
    ],
)
def test_image_tags_that_do_not_stand_for_the_video(root: Path, row: dict[str, Any]) -> None:
    samples, log = read(root, row)
    assert samples == []
    assert log.total == 1


def texts_of(sample: Sample) -> list[tuple[str, str]]:
    return [
        (m["role"], " ".join(p.get("text", f"<{p['type']}>") for p in m["content"])) for m in sample.messages
    ]


def test_question_lists_of_videochat2(root: Path) -> None:
    row = {
        "video": "a.mp4",
        "QA": [
            {"i": "Watch and answer.", "q": "Who?", "a": "A man."},
            {"i": "Watch and answer.", "q": "Where?", "a": "Outside."},
        ],
    }
    caption = {"video": "a.mp4", "QA": [{"i": "Describe the clip.", "q": "", "a": "A man turns."}]}
    samples, log = read(root, row, caption, {**row, "start": 0.5, "end": 1.5})
    assert texts_of(samples[0]) == [
        ("system", "Watch and answer."),
        ("user", "<video> Who?"),
        ("assistant", "A man."),
        ("user", "Where?"),
        ("assistant", "Outside."),
    ]
    assert texts_of(samples[1]) == [("user", "<video> Describe the clip."), ("assistant", "A man turns.")]
    assert samples[2].videos == (Clip(root / "a.mp4", 0.5, 1.5),)
    assert (log.total, dict(log.notes)) == (0, {})


@pytest.mark.parametrize(
    ("qa", "reason"),
    [
        ([], "missing fields"),
        ("x", "missing fields"),
        ([3], "missing fields"),
        ([{"q": "x"}], "missing fields"),
        ([{"q": "x", "a": ""}], "empty text"),
        ([{"q": "", "a": "y"}], "empty text"),
        ([{"q": "x", "a": "y"}, {"q": "", "a": "z"}], "empty text"),
    ],
)
def test_broken_question_lists(root: Path, qa: Any, reason: str) -> None:
    samples, log = read(root, {"video": "a.mp4", "QA": qa})
    assert samples == []
    assert log.counts == {reason: 1}


@pytest.mark.parametrize("form", ["row", "list", "part"])
@pytest.mark.parametrize("scheme", ["file://", "file://localhost", "file:", "FILE://"])
def test_file_addresses_are_paths(root: Path, form: str, scheme: str) -> None:
    name = scheme + str(root / "b c%.mp4").replace(" ", "%20").replace("%.", "%25.")
    rows = {
        "row": {**LLAVA, "video": name},
        "list": {**chat("<video>x", "y"), "videos": [name]},
        "part": part(video=name),
    }
    (sample,), _ = read(root, rows[form])
    assert sample.videos == (root / "b c%.mp4",)


@pytest.mark.parametrize("name", ["file://a.mp4", "file://b%20c%.mp4"])
def test_file_addresses_may_be_relative(root: Path, name: str) -> None:
    (sample,), _ = read(root, {**LLAVA, "video": name})
    assert sample.videos[0].parent == root  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    ["file://host/a.mp4", "file:///none.mp4", "file:///%00", "file://\ud800", "s3://a.mp4", "b%20c%25.mp4"],
)
def test_addresses_of_no_file_here_are_missing(root: Path, name: str) -> None:
    samples, log = read(root, {**LLAVA, "video": name})
    assert samples == []
    assert log.counts == {"missing video file": 1}
