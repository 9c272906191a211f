"""The table of an extraction's work: complete, small, dealt over what is missing, read from its places."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from motionenhancer.data import Sample, SkipLog, read_samples
from motionenhancer.extraction import planning
from motionenhancer.extraction.planning import (
    PriorRequest,
    deal,
    plan_priors,
    share_requests,
    stream_requests,
)
from motionenhancer.extraction.workload import ITEM, Workload, key_of, read_requests, tabulate
from motionenhancer.prior import FORMAT, PriorSettings
from motionenhancer.store import PriorStore, prior_key

SETTINGS = PriorSettings()


def row(id: str, video: str, answer: str = "It moves.") -> dict[str, object]:
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
    rows[7]["conversations"][0]["value"] = "<video><video>\nWhich?"  # type: ignore[index]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    return tmp_path


def planned(
    folder: Path, name: str = "d.jsonl", part: int = 0, parts: int = 1
) -> tuple[list[PriorRequest], SkipLog]:
    skips = SkipLog(shout=0)
    samples = read_samples(folder / name, None, SkipLog(shout=0))
    found = stream_requests(samples, "t", SETTINGS, "both", skips, workers=2, part=part, parts=parts)
    return list(found), skips


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_every_sample_is_in_the_table_and_comes_back_from_the_file(folder: Path, name: str) -> None:
    requests, _ = planned(folder, name)
    items = tabulate(iter(requests), PriorStore(folder / "store"))
    work = Workload.of([items])
    assert items.dtype == ITEM
    assert items.nbytes == 53 * len(requests) == 53 * 23
    back = list(read_requests(work.items, folder / name, None, "both"))
    places = {(r.key, r.video, r.text, r.sample) for r in map(hashable, requests)}
    assert {(r.key, r.video, r.text, r.sample) for r in map(hashable, back)} == places
    assert len(work.starts) - 1 == len({r.key for r in requests}) < len(requests)
    for number in range(len(work.starts) - 1):
        assert {key_of(item) for item in work.samples(number)} == {key_of(work.firsts[number])}
    first = {r.key: r.sample.offset for r in reversed(requests)}
    assert {key_of(item): int(item["offset"]) for item in work.firsts} == first
    key = {r.sample.id: r.key for r in requests}
    assert key["s2"] == key["s19"] == key["s12"]


def hashable(request: PriorRequest) -> PriorRequest:
    """With its sample as a text, so that requests can be put into a set."""
    return PriorRequest(repr(request.sample), request.video, request.text, request.key)  # type: ignore[arg-type]


def test_a_stream_names_what_a_list_names(folder: Path) -> None:
    listed = plan_priors(
        list(read_samples(folder / "d.jsonl", None, SkipLog(shout=0))), "t", SETTINGS, "both", SkipLog()
    )
    streamed, skips = planned(folder)
    assert streamed == listed
    assert [request.size for request in streamed] == [r.video.stat().st_size for r in streamed]
    digests = planning.digest_videos([r.video for r in streamed])
    assert [r.key for r in streamed] == [prior_key(digests[r.video], r.text, "t", SETTINGS) for r in streamed]
    assert skips.counts == {"no prior: alignment needs one video": 1}


def test_keys_are_the_digest_of_all_parts_in_order() -> None:
    parts = {"format": FORMAT, "video": "v", "text": 'a "ü"', "teacher": "t", "settings": asdict(SETTINGS)}
    expected = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert prior_key("v", 'a "ü"', "t", SETTINGS) == expected


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_hold_each_sample_once_and_a_clip_in_one_part(folder: Path, parts: int) -> None:
    whole, skips = planned(folder)
    each = [planned(folder, part=part, parts=parts) for part in range(parts)]
    assert sorted(r.sample.id for found, _ in each for r in found) == sorted(r.sample.id for r in whole)
    assert sum((log.counts for _, log in each), start=SkipLog().counts) == skips.counts
    owners: dict[Path, set[int]] = {}
    for part, (found, _) in enumerate(each):
        for request in found:
            owners.setdefault(request.video, set()).add(part)
    assert all(len(found) == 1 for found in owners.values())
    assert sum(bool(found) for found, _ in each) > 1
    joined = Workload.of([tabulate(found, PriorStore(folder / "store")) for found, _ in each])
    assert (joined.items == Workload.of([tabulate(whole, PriorStore(folder / "store"))]).items).all()


def test_a_clip_is_read_once_however_many_samples_name_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], planning.content_digest
    monkeypatch.setattr(planning, "content_digest", lambda path: (read.append(path), real(path))[1])
    for part in range(3):
        planned(folder, part=part, parts=3)
    assert len(read) == len(set(read)) == 10


def test_a_clip_that_cannot_be_read_costs_each_of_its_samples(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = planning.content_digest

    def digest(path: Path) -> str:
        if path.name == "4.mp4":
            raise planning.VideoError(path, "cannot be read")
        return real(path)

    monkeypatch.setattr(planning, "content_digest", digest)
    requests, skips = planned(folder)
    assert [entry.id for entry in skips.entries if entry.reason == planning.NO_INPUT] == ["s4", "s14"]
    assert not any(request.video.name == "4.mp4" for request in requests)


def synthetic(count: int) -> Iterator[PriorRequest]:
    """Requests of long texts, made as they are asked for."""
    for i in range(count):
        text = f"{i} " + "x" * 2000
        sample = Sample(
            f"s{i}", [{"role": "user", "content": [{"type": "text", "text": text}]}], (), (), i, 3000 * i
        )
        yield PriorRequest(
            sample, Path(f"{i % 7}.mp4"), text, hashlib.sha256(text.encode()).hexdigest(), 10**6 * i
        )


def test_memory_is_that_of_the_table(tmp_path: Path) -> None:
    store, count = PriorStore(tmp_path), 20_000
    tabulate(synthetic(10), store)
    tracemalloc.start()
    items = tabulate(synthetic(count), store)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(items) == count
    assert kept < 60 * count
    assert peak < 250 * count
    assert int(items["size"].max()) == -(-(10**6) * (count - 1) // 1024)


def test_only_what_is_missing_is_dealt(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = np.zeros(400, ITEM)
    items["key"] = rng.integers(0, 2**63, (400, 4))
    items["offset"] = np.arange(400)
    items["size"] = 1000 * rng.pareto(1.5, 400)
    # What was there lies in front, as it does after a run that was killed.
    items["stored"] = np.arange(400) < 300
    work = Workload.of([items])
    shares = work.deal(work.missing(), 4)
    assert sorted(int(item["offset"]) for share in shares for item in share.items) == list(range(300, 400))
    mean = items["size"][300:].mean()
    loads = [(share.items["size"] + mean).sum() for share in shares]
    assert max(loads) < 1.05 * min(loads)
    for share in shares:
        assert (np.diff(share.items["offset"]) > 0).all()
        assert list(share.keys()) == [key_of(work.firsts[number]) for number in share.indices]
    lost = work.stored()[[3, 70]]
    work.lost(int(number) for number in lost)
    assert set(lost) <= set(work.missing())
    assert len(work.missing()) == 102
    assert len(work.stored()) == 298


def test_shares_of_a_list_are_balanced_over_what_is_missing() -> None:
    requests = list(synthetic(40))
    missing = {request.key for request in requests[30:]}
    dealt = share_requests(requests, 2, missing=missing)
    assert [len([r for r in part if r.key in missing]) for part in dealt] == [5, 5]
    assert sorted(r.sample.id for part in dealt for r in part) == sorted(r.sample.id for r in requests)
    assert [len(part) for part in dealt] == [20, 20]


def test_nothing_is_dealt_to_any_number_of_shares() -> None:
    work = Workload.of([])
    assert [len(share) for share in work.deal(work.missing(), 3)] == [0, 0, 0]
    assert deal([], 2).tolist() == []
    assert deal([5, 5, 5], 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("change", ["text", "clip", "cut", "moved"])
def test_a_data_file_that_changes_under_a_run_is_named(folder: Path, change: str) -> None:
    requests, _ = planned(folder)
    items = Workload.of([tabulate(requests, PriorStore(folder / "store"))]).items
    path = folder / "d.jsonl"
    body = path.read_bytes()
    changed = {
        "text": body.replace(b"Number 3.", b"Number 4."),
        "clip": body.replace(b"3.mp4", b"4.mp4"),
        "cut": body[: len(body) // 2],
        "moved": b'"' + body,
    }[change]
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"--data .*d\.jsonl: line \d+ changed while the file was in use"):
        list(read_requests(items, path, None, "both"))


def test_stored_priors_are_marked(folder: Path) -> None:
    requests, _ = planned(folder)
    store = PriorStore(folder / "store")
    kept = {requests[3].key, requests[8].key}
    for key in kept:
        store.path(key).parent.mkdir(parents=True, exist_ok=True)
        store.path(key).write_bytes(b"")
    work = Workload.of([tabulate(requests, store)])
    assert {key_of(item) for item in work.firsts[work.stored()]} == kept
    offsets = work.firsts["offset"][work.missing()]
    assert (np.diff(offsets) > 0).all()
    assert len(offsets) == len({r.key for r in requests}) - 2
