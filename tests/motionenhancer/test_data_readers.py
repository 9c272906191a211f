"""Reading data files: both forms, streaming, and every bad line with its number, id and reason."""

import itertools
import json
import re
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motionenhancer.data import Sample, SkipLog, prompt_text, read_samples


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c d.mp4", "i.png"):
        (folder / name).write_bytes(b"x")
    return folder


def llava(id="s", video="a.mp4", asked="<video>\nWhat moves?", answer="The ball.", **more):
    row = {
        "id": id,
        "video": video,
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}],
        **more,
    }
    return {key: value for key, value in row.items() if value is not ...}


def chat(content="<video>What moves?", answer="The ball.", **more):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "videos": ["a.mp4"], **more}


def text(value):
    return {"type": "text", "text": value}


VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(tmp_path, root, rows, **options):
    log = SkipLog()
    samples = list(read_samples(write(tmp_path / "d.jsonl", rows), root, log, **options))
    return samples, log


def test_llava(tmp_path, root):
    samples, log = read(tmp_path, root, [llava("x", asked="<video>\n What moves? \n")])
    assert samples == [
        Sample(
            id="x",
            messages=[
                {"role": "user", "content": [VIDEO, text("What moves?")]},
                {"role": "assistant", "content": [text("The ball.")]},
            ],
            videos=(root / "a.mp4",),
            images=(),
            line=1,
        )
    ]
    assert log.total == 0
    assert not log.notes


def test_llava_many_videos_images_turns_and_system(tmp_path, root):
    row = {
        "id": 7,
        "video": ["a.mp4", "b.mp4"],
        "image": "i.png",
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "First <video> then <image>\nand <video>, what changed?"},
            {"from": "gpt", "value": "All."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    (sample,), log = read(tmp_path, root, [row])
    assert sample.id == "7"
    assert [message["role"] for message in sample.messages] == ["system", *["user", "assistant"] * 2]
    parts = [text("First"), VIDEO, text("then"), IMAGE, text("and"), VIDEO, text(", what changed?")]
    assert sample.messages[1]["content"] == parts
    assert sample.videos == (root / "a.mp4", root / "b.mp4")
    assert sample.images == (root / "i.png",)
    assert log.total == 0


@pytest.mark.parametrize(
    "row",
    [
        chat(),
        chat(videos="a.mp4"),
        chat([VIDEO, text("What moves?")]),
        chat([{"type": "video", "video": "a.mp4"}, text("What moves?")], videos=None),
        chat([{"type": "video", "video": None, "text": None}, text(" What moves?\n")]),
        chat(["<video>", "What moves?"]),
        chat(answer=[text("The ball.")]),
        chat(videos=[{"path": "a.mp4", "bytes": None}]),
        chat(image=None, conversations=None),
    ],
)
def test_messages(tmp_path, root, row):
    (sample,), log = read(tmp_path, root, [row])
    assert sample.id == "line-1"
    assert sample.messages == [
        {"role": "user", "content": [VIDEO, text("What moves?")]},
        {"role": "assistant", "content": [text("The ball.")]},
    ]
    assert sample.videos == (root / "a.mp4",)
    assert log.total == 0


def turns(*pairs, video="a.mp4"):
    return {"id": "s", "video": video, "conversations": [{"from": f, "value": v} for f, v in pairs]}


BAD = {
    "invalid json": [
        "{not json",
        '{"id": "s"',
        "[" * 5000,
        '{"id": ' + "1" * 5000 + "}",
    ],
    "missing fields": [
        "17",
        "[]",
        "null",
        llava(conversations=...),
        llava(conversations=[]),
        llava(conversations="hello"),
        llava(conversations=["hello"]),
        llava(conversations=[{"from": "human"}]),
        llava(conversations=[{"value": "<video>x"}]),
        llava(asked=None),
        llava(video=3),
        llava(video=[""]),
        llava(video=["a.mp4", None]),
        llava(videos=["a.mp4"]),
        llava(messages=[]),
        chat([{"type": "sound"}]),
        chat([{"type": "text"}]),
        chat([VIDEO, 4]),
        chat([{"type": "video", "video": 4}, text("x")], videos=None),
    ],
    "empty text": [llava(asked="<video>\n \t"), llava(answer=" \n"), llava(answer="")],
    "no <video> tag": [llava(asked="What moves?"), chat("What moves?")],
    "tag count differs": [
        llava(video=["a.mp4", "b.mp4"]),
        llava(asked="<video><video>x"),
        llava(video=...),
        llava(asked="<video><image>x"),
        llava(image="i.png"),
        chat([{"type": "video", "video": "a.mp4"}, text("x")]),
    ],
    "missing video file": [
        llava(video="none.mp4"),
        llava(video="."),
        llava(video="a\0.mp4"),
        llava(video="x" * 5000),
        llava(video="https://example.org/a.mp4"),
    ],
    "missing image file": [llava(asked="<video><image>x", image="none.png")],
    "wrong roles": [
        turns(("human", "<video>x"), ("robot", "y")),
        turns(("gpt", "<video>x"), ("human", "y")),
        turns(("human", "<video>x"), ("human", "y")),
        turns(("human", "<video>x")),
        turns(("human", "<video>x"), ("gpt", "y"), ("human", "z")),
        turns(("human", "<video>x"), ("system", "y"), ("gpt", "z")),
        turns((["human"], "<video>x"), ("gpt", "y")),
    ],
    "misplaced tag": [
        turns(("human", "x"), ("gpt", "<video>y")),
        turns(("system", "<video>z"), ("human", "x"), ("gpt", "y")),
    ],
    "no video": [llava(video=..., asked="What?"), llava(video=[], asked="What?")],
    "invalid text": [llava(asked="<video>\ud800")],
}


@pytest.mark.parametrize(("reason", "row"), [(why, row) for why, rows in BAD.items() for row in rows])
def test_bad_line_is_skipped_with_number_and_reason(tmp_path, root, reason, row):
    samples, log = read(tmp_path, root, [llava("first"), row, llava("last")])
    assert [sample.id for sample in samples] == ["first", "last"]
    assert [sample.line for sample in samples] == [1, 3]
    assert dict(log.counts) == {reason: 1}
    (entry,) = log.entries
    assert entry.line == 2
    assert entry.reason == reason
    given = row.get("id", "line-2") if isinstance(row, dict) else ""
    assert entry.id == given


def test_a_first_line_that_is_nested_too_deeply_loses_itself_only(tmp_path, root):
    samples, log = read(tmp_path, root, ["[" * 100_000 + "]" * 100_000, llava("a"), llava("b")])
    assert [sample.id for sample in samples] == ["a", "b"]
    assert [(entry.line, entry.detail) for entry in log.entries] == [(1, "nested too deeply")]


def test_broken_bytes(tmp_path, root):
    good = json.dumps(llava("g")).encode()
    (tmp_path / "d.jsonl").write_bytes(good + b"\n\xff\xfe{}\n\n   \n" + good + b"\r\n" + good)
    log = SkipLog()
    samples = list(read_samples(tmp_path / "d.jsonl", root, log))
    assert [sample.line for sample in samples] == [1, 5, 6]
    assert [(entry.line, entry.reason) for entry in log.entries] == [(2, "invalid json")]
    assert "utf-8" in log.entries[0].detail


def test_unknown_keys_are_counted_not_dropped(tmp_path, root, caplog):
    rows = [llava(str(i), data_source="web", weight=1) for i in range(4)]
    rows[2]["conversations"][0]["loss"] = 0
    with caplog.at_level("WARNING"):
        samples, log = read(tmp_path, root, rows)
    assert len(samples) == 4
    assert log.total == 0
    assert dict(log.notes) == {
        "unknown key 'data_source' ignored": 4,
        "unknown key 'weight' ignored": 4,
        "unknown key 'conversations.loss' ignored": 1,
    }
    assert sum("data_source" in record.getMessage() for record in caplog.records) == 1


def test_samples_without_video_on_request(tmp_path, root):
    rows = [
        llava("t", video=..., asked="Hello?"),
        llava("i", video=..., image="i.png", asked="<image>\nWhat?"),
    ]
    samples, log = read(tmp_path, root, rows, require_video=False)
    assert [(sample.videos, len(sample.images)) for sample in samples] == [((), 0), ((), 1)]
    assert log.total == 0


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n\n"])
def test_array(tmp_path, root, indent, mark):
    rows = [llava("a"), llava("b", video="none.mp4"), llava("c")]
    data = mark + json.dumps(rows, indent=indent).encode()
    (tmp_path / "d.json").write_bytes(data)
    log = SkipLog()
    samples = list(read_samples(tmp_path / "d.json", root, log))
    assert [sample.id for sample in samples] == ["a", "c"]
    starts = [
        i + 1 for i, line in enumerate(data.decode("utf-8-sig").split("\n")) if re.match(r"  \{|\[\{", line)
    ]
    lines = starts if indent else starts * 3
    assert [samples[0].line, log.entries[0].line, samples[1].line] == lines


@pytest.mark.parametrize(
    ("tail", "line", "detail"),
    [
        (',\n{"id": oops}, {}]', 2, "rest of the array is lost"),
        (",\n{}", 2, "not closed"),
        ('\n{"id": 1}]', 2, "no comma"),
        ("] [1]", 1, "text after the end"),
        ("\n]\n[1]", 2, "text after the end"),
        ("", 1, "not closed"),
        (",\n" + "[" * 5000, 2, "rest of the array is lost"),
        (",\n" + "1" * 5000, 2, "rest of the array is lost"),
    ],
)
def test_broken_array_keeps_what_came_before(tmp_path, root, tail, line, detail):
    (tmp_path / "d.json").write_text("[" + json.dumps(llava("a")) + tail)
    log = SkipLog()
    assert [sample.id for sample in read_samples(tmp_path / "d.json", root, log)] == ["a"]
    assert log.counts["invalid json"] == 1
    entry = next(entry for entry in log.entries if entry.reason == "invalid json")
    assert (entry.line, detail in entry.detail) == (line, True)


def test_paths(tmp_path, root):
    rows = [llava("rel", video="c d.mp4"), llava("abs", video=str(root / "b.mp4"))]
    samples, _ = read(tmp_path, root, rows)
    assert [sample.videos[0] for sample in samples] == [root / "c d.mp4", root / "b.mp4"]
    beside = write(root / "d.jsonl", [llava("x")])
    assert next(read_samples(beside)).videos == (root / "a.mp4",)


def test_files_that_are_not_there(tmp_path, root):
    good = write(tmp_path / "d.jsonl", [llava()])
    with pytest.raises(ValueError, match=r"path must be .*none\.jsonl does not exist"):
        read_samples(tmp_path / "none.jsonl", root)
    with pytest.raises(ValueError, match=r"path must be .* is a folder"):
        read_samples(tmp_path, root)
    with pytest.raises(ValueError, match=r"video_root must be a folder, .* does not exist"):
        read_samples(good, tmp_path / "none")
    with pytest.raises(ValueError, match=r"video_root must be a folder, .* is a file"):
        read_samples(good, good)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_no_sample_at_all(tmp_path, root, content):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"no usable sample in .*d\.jsonl(.|\n)*holds no sample"):
        list(read_samples(tmp_path / "d.jsonl", root))


def test_no_usable_sample_lists_the_first_reasons(tmp_path, root):
    rows = [llava("p", video="none.mp4"), "{", *[llava(f"q{i}", answer="") for i in range(9)]]
    with pytest.raises(ValueError, match="no usable sample") as caught:
        read(tmp_path, root, rows)
    message = str(caught.value)
    assert "11 skipped: 9 empty text, 1 missing video file, 1 invalid json" in message
    assert "line 1, id p: missing video file: " in message
    assert "line 2: invalid json" in message
    assert message.count("\n") == 5


def test_lines_are_streamed(tmp_path, root):
    row = json.dumps(llava("s", answer="word " * 400)) + "\n"
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for _ in range(4000):
            file.write(row)
    tracemalloc.start()
    count = sum(1 for _ in read_samples(path, root))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert path.stat().st_size > 8_000_000
    assert peak < 1_000_000


def test_first_sample_comes_before_the_file_is_read(tmp_path, root):
    path = write(tmp_path / "d.jsonl", [llava(str(i)) for i in range(5)] + ["{"])
    log = SkipLog()
    assert [s.id for s in itertools.islice(read_samples(path, root, log), 3)] == ["0", "1", "2"]
    assert log.total == 0


WORDS = st.sampled_from(
    ["", "x", "<video>", "<video>x", "<image>", "human", "gpt", "user", "assistant", "a.mp4"]
)
KEYS = st.sampled_from(
    [
        "id",
        "video",
        "videos",
        "image",
        "conversations",
        "messages",
        "from",
        "value",
        "role",
        "content",
        "type",
        "text",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(KEYS, VALUES, max_size=5) | VALUES)
def test_any_json_is_a_sample_or_a_counted_skip(root, row):
    path = root / "fuzz.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(llava("good")) + "\n")
    log = SkipLog(shout=0)
    samples = list(read_samples(path, root, log))
    assert len(samples) + log.total == 2
    assert samples[-1].id == "good"
    for sample in samples:
        prompt, segments = prompt_text(sample)
        assert " ".join(prompt[a:b] for a, b, _ in segments) == prompt


@pytest.mark.parametrize("source", ["both", "question", "answer"])
def test_prompt_text(tmp_path, root, source):
    row = {
        "id": "m",
        "video": ["a.mp4", "b.mp4"],
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "See <video>\n and <video>, what\nchanged?  "},
            {"from": "gpt", "value": " Das Ü. "},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    (sample,), _ = read(tmp_path, root, [row])
    prompt, segments = prompt_text(sample, source)
    assert (
        prompt
        == {
            "both": "See and , what\nchanged? Das Ü. Sure? Yes.",
            "question": "See and , what\nchanged? Sure?",
            "answer": "Das Ü. Yes.",
        }[source]
    )
    assert " ".join(prompt[a:b] for a, b, _ in segments) == prompt
    for start, end, index in segments:
        assert prompt[start:end] in [part.get("text") for part in sample.messages[index]["content"]]
        assert sample.messages[index]["role"] != "system"


def test_prompt_text_without_text_or_with_a_wrong_source():
    sample = Sample("s", [{"role": "user", "content": [text("x")]}])
    with pytest.raises(ValueError, match="source must be"):
        prompt_text(sample, "all")
    with pytest.raises(ValueError, match="'s' has no answer text"):
        prompt_text(sample, "answer")
