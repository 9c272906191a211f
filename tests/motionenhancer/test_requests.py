"""Which prior each sample needs: in order, each clip read once, whatever the length of the data file."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from motionenhancer.data import Sample, SkipLog, content_digest, read_samples
from motionenhancer.data.video import VideoError
from motionenhancer.priors import requests as requests_module
from motionenhancer.priors.prior import FORMAT
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import NO_INPUT, PriorRequest, request_priors
from motionenhancer.priors.storage import prior_key, prior_keys

SETTINGS = PriorSettings()
NAME = prior_keys("t", SETTINGS)


def row(id: str, video: str, answer: str = "It moves.") -> dict:
    turns = [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": answer}]
    return {"id": id, "video": video, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten clips of which two are equal, named by 25 samples: clips again, texts again, two in one sample."""
    rng = random.Random(3)
    for i in range(9):
        (tmp_path / f"{i}.mp4").write_bytes(rng.randbytes(100 + 3000 * i))
    shutil.copy(tmp_path / "2.mp4", tmp_path / "9.mp4")
    rows = [row(f"s{i}", f"{i % 10}.mp4", f"Number {2 if i == 19 else i % 5}.") for i in range(24)]
    rows[7] = {**row("two", "1.mp4"), "video": ["1.mp4", "2.mp4"]}
    rows[7]["conversations"][0]["value"] = "<video><video>\nWhich?"
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    return tmp_path


def requested(
    folder: Path, name: str = "d.jsonl", digest=content_digest, **options: object
) -> tuple[list[tuple[Sample, PriorRequest]], SkipLog]:
    skips = SkipLog(shout=0)
    samples = read_samples(folder / name, None, SkipLog(shout=0))
    found = request_priors(samples, "both", skips, name=NAME, digest=digest, **options)  # type: ignore[arg-type]
    return list(found), skips


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_every_usable_sample_comes_once_in_the_files_order(folder: Path, name: str, workers: int) -> None:
    found, skips = requested(folder, name, workers=workers)
    assert [sample.id for sample, _ in found] == [f"s{i}" for i in range(24) if i != 7]
    for sample, request in found:
        assert request.video == sample.videos[0]
        assert request.text.startswith("What moves? Number")
        assert request.key == prior_key(content_digest(request.video), request.text, "t", SETTINGS)
        assert request.settings is None
    key = {sample.id: request.key for sample, request in found}
    assert key["s2"] == key["s19"] == key["s12"], "one content and one text are one prior, under any name"
    assert skips.counts == {"no prior: alignment needs one video": 1}
    assert [(e.id, e.detail) for e in skips.entries] == [("two", "has 2 videos")]


def test_keys_are_the_digest_of_all_parts_in_order() -> None:
    parts = {"format": FORMAT, "video": "v", "text": 'a "ü"', "teacher": "t", "settings": asdict(SETTINGS)}
    expected = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert prior_key("v", 'a "ü"', "t", SETTINGS) == expected


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_hold_each_sample_once_and_a_clip_in_one_part(folder: Path, parts: int) -> None:
    whole, skips = requested(folder)
    each = [requested(folder, part=part, parts=parts) for part in range(parts)]
    assert sorted(s.id for found, _ in each for s, _ in found) == sorted(s.id for s, _ in whole)
    assert sum((log.counts for _, log in each), start=Counter()) == skips.counts
    owners: dict[Path, set[int]] = {}
    for part, (found, _) in enumerate(each):
        assert found == [pair for pair in whole if pair in found]
        for _, request in found:
            owners.setdefault(request.video, set()).add(part)
    assert all(len(found) == 1 for found in owners.values())
    assert sum(bool(found) for found, _ in each) > 1


def test_parts_agree_in_every_process_and_are_about_equal() -> None:
    """The parts do not use Python's hash, which differs between processes."""
    one = Sample("a", [], (Path("clips/0001.mp4"),))
    assert requests_module._owner(one, 1000) == 604
    samples = [Sample("a", [], (Path(f"clips/{i:06}.mp4"),)) for i in range(4000)]
    owned = Counter(requests_module._owner(sample, 4) for sample in samples)
    assert min(owned.values()) > 900
    # Also for few clips whose names differ in one digit.
    few = [Sample("a", [], (Path(f"videos/train_{i:05}.mp4"),)) for i in range(16)]
    assert all(len({requests_module._owner(one, parts) for one in few}) == parts for parts in (2, 4))
    odd = [Path(os.fsdecode(b"caf\xe9.mp4")), Path("half\ud83d.mp4")]
    assert all(requests_module._owner(Sample("a", [], (path,)), 4) in range(4) for path in odd)
    assert requests_module._owner(Sample("a", []), 4) == 0, "counted by one process"


def test_a_clip_is_read_once_however_many_samples_name_it(folder: Path) -> None:
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return content_digest(path)

    for part in range(3):
        requested(folder, digest=digest, part=part, parts=3)
    assert len(read) == len(set(read)) == 10


def test_a_clip_that_cannot_be_read_costs_each_of_its_samples(folder: Path) -> None:
    def digest(path: Path) -> str:
        if path.name == "4.mp4":
            raise VideoError(path, "cannot be read")
        return content_digest(path)

    found, skips = requested(folder, digest=digest)
    assert [(e.id, e.line) for e in skips.entries if e.reason == NO_INPUT] == [("s4", 5), ("s14", 15)]
    assert all("4.mp4: cannot be read" in e.detail for e in skips.entries if e.reason == NO_INPUT)
    assert not any(request.video.name == "4.mp4" for _, request in found)
    assert len(found) == 21


def test_without_a_name_no_clip_is_read_but_must_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = list(read_samples(folder / "d.jsonl", None, SkipLog(shout=0)))
    (folder / "3.mp4").unlink()
    is_file = Path.is_file

    def out_of_reach(path: Path) -> bool:
        if path.name == "5.mp4":
            raise OSError(116, "Stale file handle")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", out_of_reach)
    monkeypatch.setattr("builtins.open", None)
    skips = SkipLog(shout=0)
    found = list(request_priors(samples, "answer", skips))
    assert {request.key for _, request in found} == {""}
    assert found[0][1].text == "Number 0."
    said = {e.id: e.detail for e in skips.entries if e.reason == NO_INPUT}
    assert set(said) == {"s3", "s13", "s23", "s5", "s15"}
    assert "no such file" in said["s3"]
    assert "Stale file handle" in said["s15"]


def test_a_sample_without_text_is_counted(folder: Path) -> None:
    silent = Sample("silent", [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}], (folder,))
    skips = SkipLog(shout=0)
    assert list(request_priors([silent], "answer", skips)) == []
    assert skips.counts == {NO_INPUT: 1}
    assert "has no answer text" in skips.entries[0].detail


def spoken(i: int) -> Sample:
    words = [{"type": "video"}, {"type": "text", "text": f"clip {i}"}]
    return Sample(f"s{i}", [{"role": "user", "content": words}], (Path(f"{i}.mp4"),), (), i)


def test_clips_are_read_a_bounded_number_ahead() -> None:
    taken: list[int] = []
    read: list[Path] = []

    def samples() -> Iterator[Sample]:
        for i in range(1000):
            taken.append(i)
            yield spoken(i)

    def digest(path: Path) -> str:
        read.append(path)
        return path.name

    stream = request_priors(samples(), "both", SkipLog(), name=NAME, digest=digest, workers=2)
    for given in range(1, 20):
        next(stream)
        assert given < len(taken) <= given + 16
    stream.close()
    assert len(read) <= len(taken)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor") and t.is_alive()]


def test_an_error_of_the_data_file_comes_after_the_samples_before_it() -> None:
    def samples() -> Iterator[Sample]:
        yield spoken(0)
        raise ValueError("the file ends in the middle")

    stream = request_priors(samples(), "both", SkipLog(), name=NAME, digest=lambda path: path.name)
    with pytest.raises(ValueError, match="ends in the middle"):
        list(stream)


def test_the_order_is_kept_where_clips_take_unequal_time() -> None:
    def digest(path: Path) -> str:
        time.sleep(0.01 if int(path.stem) % 7 == 0 else 0)
        return path.name

    stream = request_priors(map(spoken, range(60)), "both", SkipLog(), name=NAME, digest=digest, workers=4)
    assert [sample.id for sample, _ in stream] == [f"s{i}" for i in range(60)]


def test_memory_does_not_grow_with_the_number_of_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times as many lines, each of a clip of its own, half of which cannot be read."""
    monkeypatch.setattr(requests_module, "_REMEMBERED", 200)

    def digest(path: Path) -> str:
        if int(path.stem) % 2:
            raise VideoError(path, "cannot be read")
        return path.name

    def peak(lines: int) -> int:
        def samples() -> Iterator[Sample]:
            for i in range(lines):
                words = [{"type": "text", "text": f"clip {i} " + "x" * 200}]
                yield Sample(f"s{i}", [{"role": "user", "content": words}], (tmp_path / f"{i}.mp4",), (), i)

        skips = SkipLog(keep=100, shout=0)
        gc.collect()
        tracemalloc.start()
        stream = request_priors(samples(), "both", skips, name=NAME, digest=digest, workers=2)
        assert sum(1 for _ in stream) == lines // 2
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert skips.total == lines // 2
        return most

    peak(100)
    small, large = peak(1_500), peak(12_000)
    assert large < 1.1 * small


def test_a_data_file_is_never_held(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"a clip")

    def peak(lines: int) -> int:
        data = tmp_path / f"{lines}.jsonl"
        with data.open("w") as file:
            file.writelines(json.dumps(row(f"s{i}", "clip.mp4", f"Answer {i}.")) + "\n" for i in range(lines))
        skips = SkipLog(shout=0)
        tracemalloc.start()
        samples = read_samples(data, None, skips)
        stream = request_priors(samples, "both", skips, name=NAME, digest=lambda path: path.name)
        assert sum(1 for _ in stream) == lines
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)
    small, large = peak(1_000), peak(8_000)
    assert large < 1.1 * small
