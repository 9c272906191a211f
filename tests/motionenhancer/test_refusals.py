"""Clips that can give no prior: recorded in the store, reported every time, retried only on request."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_store import KEY, make_prior
from tiny_world import World
from train_support import flags, report_of

from motionenhancer import extract, train
from motionenhancer import store as cli
from motionenhancer.alignment.dataset import PendingAlignment, Wanted
from motionenhancer.alignment.online import OnlinePriors
from motionenhancer.data import Sample, SkipLog, content_digest, read_samples
from motionenhancer.data.encode import encode_video
from motionenhancer.data.video import VideoError
from motionenhancer.priors import reader
from motionenhancer.priors.maker import LocalMaker, Made, RefusedClip, Stored, make_all
from motionenhancer.priors.prior import PriorError
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import PriorRequest, request_priors
from motionenhancer.priors.storage import PriorStore, Refusal, prior_key, prior_keys
from motionenhancer.teachers import Teacher, load_teacher, teacher_id

SETTINGS = PriorSettings(steps=1)


def test_a_refusal_is_plain_json_beside_the_priors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, refusal = PriorStore(tmp_path), Refusal("unreadable video", "a\udcff.mp4: empty — ✓", True)
    assert store.refusal(KEY) is None
    assert not store.settled(KEY)
    path = store.refuse(KEY, refusal)
    assert path.parent == store.path(KEY).parent
    assert json.loads(path.read_text()) == {
        "reason": refusal.reason,
        "detail": refusal.detail,
        "unreadable": True,
    }
    assert store.refusal(KEY) == refusal
    assert store.settled(KEY)
    assert KEY not in store
    assert list(store) == []
    assert cli.main(["list", "--prior_dir", str(tmp_path)]) == 0
    assert f"{KEY[:16]}" in (listed := capsys.readouterr().out)
    assert "1 clips without a prior" in listed
    assert cli.main(["prune", "--prior_dir", str(tmp_path)]) == 0
    assert store.settled(KEY)
    for damaged in (b"", b"{", b"[]", b'{"reason": 1}', b"\xff"):
        path.write_bytes(damaged)
        assert store.refusal(KEY) is None
        assert not store.settled(KEY)
    store.refuse(KEY, refusal)
    store.write(KEY, make_prior())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{KEY}.safetensors"]


def request_of(sample: Sample, world: World) -> PriorRequest:
    name = prior_keys(teacher_id(world.teacher), SETTINGS)
    ((_, request),) = request_priors([sample], "both", SkipLog(), name=name, digest=content_digest)
    return request


def requests_of(world: World, folder: Path) -> list[PriorRequest]:
    """Requests with a good clip, a broken clip, and a text without words."""
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:3]
    broken = folder / "broken.mp4"
    broken.write_bytes(b"no video")
    good, second, third = (
        request_of(sample, world)
        for sample in (samples[0], replace(samples[1], videos=(broken,)), samples[2])
    )
    blank = prior_key(content_digest(third.video), " ", teacher_id(world.teacher), SETTINGS)
    return [good, second, replace(third, text=" ", key=blank)]


def keeping(
    world: World, store: PriorStore, load: Callable[[], Teacher] | None = None, *, strict: bool = True
) -> closing[Stored]:
    """A maker with a store, `strict` as in an extraction; training is not strict."""
    inner = LocalMaker(load or (lambda: load_teacher(world.teacher, "cpu")), SETTINGS)
    return closing(Stored(store, inner, prior_keys(teacher_id(world.teacher), SETTINGS), strict=strict))


def make(
    world: World,
    store: PriorStore,
    requests: Sequence[PriorRequest],
    load: Callable[[], Teacher] | None = None,
) -> list[Made | Exception]:
    with keeping(world, store, load) as stored:
        return [found for _, _, found in make_all([(None, request) for request in requests], stored)]


def test_what_is_on_record_is_not_tried_again_but_said(world: World, tmp_path: Path) -> None:
    requests, store = requests_of(world, tmp_path), PriorStore(tmp_path / "priors")
    loads: list[int] = []

    def load() -> Teacher:
        loads.append(1)
        return load_teacher(world.teacher, "cpu")

    first = make(world, store, requests, load)
    again = make(world, store, requests, load)
    assert [type(one) for one in first] == [Made, VideoError, PriorError]
    assert [type(one) for one in again] == [Made, RefusedClip, RefusedClip]
    assert len(loads) == 1, "the second time there is nothing that a teacher could do"
    for old, new in zip(first[1:], again[1:], strict=True):
        assert "on record, not tried again" in str(new)
        assert str(old) in str(new)
    assert {key for key, _ in store.refusals()} == {requests[1].key, requests[2].key}
    # Another clip at the same path has another key, so the clip is read.
    shutil.copy(requests[0].video, requests[1].video)
    sample = next(iter(read_samples(world.data, world.videos, SkipLog())))
    changed = replace(request_of(replace(sample, videos=(requests[1].video,)), world), text="another")
    changed = replace(
        changed, key=prior_key(content_digest(changed.video), "another", teacher_id(world.teacher), SETTINGS)
    )
    (made,) = make(world, store, [changed], load)
    assert isinstance(made, Made)
    assert made.fresh


def test_a_file_that_is_out_of_reach_is_not_held_against_its_content(world: World, tmp_path: Path) -> None:
    requests, store = requests_of(world, tmp_path)[:2], PriorStore(tmp_path / "priors")
    requests[1].video.unlink()
    made, error = make(world, store, requests)
    assert isinstance(made, Made)
    assert isinstance(error, VideoError)
    assert list(store.refusals()) == []


def test_a_clip_that_changes_after_planning_gives_no_prior_and_no_record(
    world: World, tmp_path: Path
) -> None:
    """A prior or refusal of the new clip under the key of the old clip would be found forever."""
    requests, store = requests_of(world, tmp_path)[:2], PriorStore(tmp_path / "priors")
    moved = tmp_path / "moved.mp4"
    shutil.copy(requests[0].video, moved)
    changed, broken = replace(requests[0], video=moved), replace(requests[0], video=requests[1].video)
    encode_video(moved, np.zeros((17, 64, 64, 3), np.uint8), fps=8)
    (error,) = make(world, store, [changed])
    assert isinstance(error, VideoError)
    assert "changed during the run" in str(error)
    (error,) = make(world, store, [broken])
    assert isinstance(error, VideoError)
    # A training step uses the prior, but the store does not keep it.
    with keeping(world, store, strict=False) as stored:
        read = stored.submit(changed).result()
        assert stored.submit(broken).exception() is not None
    assert read.fresh
    assert "not kept: the clip changed" in read.lost
    assert list(store) == list(store.refusals()) == []


def test_a_full_disk_costs_the_store_and_not_the_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, store = requests_of(world, tmp_path), PriorStore(tmp_path / "priors")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PriorStore, "write", full)
    monkeypatch.setattr(PendingAlignment, "complete", lambda pending, priors: priors)
    pending = PendingAlignment([Wanted(Sample("a", []), requests[0])], [None], "both")
    with keeping(world, store, strict=False) as stored:
        online = OnlinePriors(stored)
        (prior,) = online.complete(pending)
    assert prior is not None
    assert (online.counts.made, online.counts.failed) == (1, 0)
    assert [note for note in online.skips.notes if "No space left" in note]


@pytest.mark.parametrize("fault", ["open", "stat", "codec"])
def test_what_is_the_machines_fault_is_not_held_against_a_clip(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """An unreachable clip is only left out; it is not recorded."""
    request, store = requests_of(world, tmp_path)[0], PriorStore(tmp_path / "priors")
    teacher, stat = load_teacher(world.teacher, "cpu"), Path.stat

    def out_of_reach(path: Path, **options):
        if path == request.video:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **options)

    def too_many(path: str, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        if fault == "stat":
            patch.setattr(Path, "stat", out_of_reach)
        elif fault == "open":
            patch.setattr("av.open", too_many)
        else:
            patch.setattr("motionenhancer.data.decode.av", None)
        (error,) = make(world, store, [request], lambda: teacher)
    assert isinstance(error, VideoError)
    assert error.passing
    assert list(store.refusals()) == []
    (made,) = make(world, store, [request], lambda: teacher)
    assert isinstance(made, Made)


def test_other_settings_put_nothing_on_record(world: World, tmp_path: Path) -> None:
    requests, store = requests_of(world, tmp_path), PriorStore(tmp_path / "priors")
    with keeping(world, store, strict=False) as stored:
        # A failure with other settings does not count for the run's settings.
        with pytest.raises(ValueError, match="broken"):
            stored.submit(replace(requests[1], settings=replace(SETTINGS, seed=3))).result()
        assert list(store.refusals()) == []
        errors = [stored.submit(request).exception() for request in requests]
        assert errors[0] is None
        assert isinstance(errors[2], PriorError)
        assert {key for key, _ in store.refusals()} == {requests[1].key, requests[2].key}
        again = [stored.submit(request).exception() for request in requests]
    assert again[0] is None
    assert all("on record, not tried again" in str(error) for error in again[1:])


@pytest.fixture
def poor(world: World, tmp_path: Path) -> dict[str, object]:
    """Flags for three clips, of which the teacher can read one: one is a still, one is no video."""
    videos = tmp_path / "videos"
    videos.mkdir()
    lines = [json.loads(line) for line in world.data.read_text().splitlines()[:3]]
    shutil.copy(world.videos / lines[0]["video"], videos / lines[0]["video"])
    encode_video(videos / "still.mp4", np.full((1, 64, 64, 3), 90, np.uint8), fps=8)
    (videos / "broken.mp4").write_bytes(b"no video")
    lines[1]["video"], lines[2]["video"] = "still.mp4", "broken.mp4"
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return {"data": data, "video_root": videos, "prior_dir": tmp_path / "priors", "ddim_steps": 1}


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("motionenhancer.priors.arguments.load_teacher", refuse)


def test_training_from_a_store_goes_without_what_extraction_could_not_read(
    world: World,
    tmp_path: Path,
    poor: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert extract.main(world.flags(student=None, **poor)) == 1
    refuse_to_load(monkeypatch)
    capsys.readouterr()
    for source in ("store", "hybrid"):
        out = tmp_path / source
        assert train.main(flags(world, out, **poor, prior_source=source, max_steps=1)) == 0
        assert "1 priors stored, 0 to make, 2 on record as without a prior" in capsys.readouterr().out
        skipped = report_of(out)["skipped"]
        assert skipped["counts"]["unreadable video"] == 2
        said = [e["detail"] for e in skipped["entries"] if e["reason"] == "unreadable video"]
        assert all("on record, not tried again" in detail for detail in said)
    assert train.main(flags(world, tmp_path / "dry", **poor, prior_source="store", dry_run=True)) == 0
    assert "1 stored, 0 missing" in capsys.readouterr().out
    # Other settings need other priors, which were never tried.
    assert (
        train.main(flags(world, tmp_path / "other", **{**poor, "prior_seed": 1}, prior_source="store")) == 2
    )
    assert "3 of 3 priors are missing" in capsys.readouterr().err


def test_extraction_tries_again_what_is_on_record(
    world: World, tmp_path: Path, poor: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is for a new decoder, which may read an unchanged clip."""

    def read_frames(path: Path, **options: int) -> None:
        raise VideoError(path, "no decoder for it")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_frames", read_frames)
        assert extract.main(world.flags(student=None, **poor)) == 1
    store = PriorStore(Path(str(poor["prior_dir"])))
    assert (len(list(store)), len(list(store.refusals()))) == (0, 3)
    assert extract.main(world.flags(student=None, **poor)) == 1
    assert (len(list(store)), len(list(store.refusals()))) == (1, 2)


def test_hybrid_loads_no_teacher_a_second_time_for_what_it_cannot_read(
    world: World, tmp_path: Path, poor: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**poor, "prior_source": "hybrid", "max_steps": 3, "per_device_train_batch_size": 1}
    assert train.main(flags(world, tmp_path / "first", **options)) == 0
    store = PriorStore(tmp_path / "priors")
    assert (len(list(store)), len(list(store.refusals()))) == (1, 1)
    assert not [1 for _, refusal in store.refusals() if "still" not in refusal.detail]
    # The student cannot read the third clip either, so the teacher was never asked for it.
    line = Path(poor["data"]).read_text().splitlines()[:2]
    Path(poor["data"]).write_text("\n".join(line) + "\n")
    refuse_to_load(monkeypatch)
    assert train.main(flags(world, tmp_path / "second", **options)) == 0
    assert "still.mp4" in str(report_of(tmp_path / "second")["skipped"]["entries"])
