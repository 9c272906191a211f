"""The talk between ranks that train and ranks that hold the teacher, here between threads of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
import torch.distributed as dist
from tiny_world import World

from motionenhancer.arguments import PriorArguments
from motionenhancer.data import Clip, SkipLog, content_digest, read_samples
from motionenhancer.extraction.making import RefusedClip
from motionenhancer.extraction.planning import PriorRequest, plan_priors, request_priors
from motionenhancer.online import ranks as teacher_ranks
from motionenhancer.online import thread as teacher_thread
from motionenhancer.online.ranks import RemoteTeacher, RemoteTeacherError, TeacherRanks
from motionenhancer.online.thread import TeacherThread
from motionenhancer.prior import PriorSettings, extract_prior
from motionenhancer.store import PriorStore, prior_key
from motionenhancer.vdm import teacher_id

SETTINGS = PriorSettings(steps=1, step_weights=(1.0,))


@contextmanager
def launch(teachers: int = 1) -> Iterator[tuple[TeacherRanks, list[int]]]:
    """One training rank and some of the teacher; on leaving, all have ended, their codes in the list."""
    store = dist.TCPStore("127.0.0.1", 0, None, True)
    ranks = TeacherRanks(teachers, 1, None, store, torch.device("cpu"))
    codes: list[int] = []

    def serve(index: int) -> None:
        codes.append(teacher_ranks.serve_priors(replace(ranks, index=index)))

    threads = [Thread(target=serve, args=(index,), daemon=True) for index in range(teachers)]
    for thread in threads:
        thread.start()
    try:
        yield ranks, codes
    finally:
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a teacher's rank did not end"


@pytest.fixture
def requests(world: World) -> list[PriorRequest]:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:4]
    return request_priors(samples, SETTINGS, "both", SkipLog())


def test_a_segment_reaches_the_teachers_rank(world: World, requests: list[PriorRequest]) -> None:
    whole = requests[0]
    cut = replace(whole, video=Clip(Path(whole.video), 0.5, 1.0))
    prior = PriorArguments(teacher=str(world.teacher))
    thread = TeacherThread(prior.load("cpu"), SETTINGS)
    one, other = (thread.submit(request).result().prior.attention for request in (whole, cut))
    thread.close()
    assert not torch.equal(one, other)
    with launch() as (ranks, _), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, prior, SETTINGS)
        assert torch.equal(remote.submit(cut).result().prior.attention, other)
        assert torch.equal(remote.submit(whole).result().prior.attention, one)
        remote.close()


@pytest.mark.parametrize("teachers", [1, 2])
def test_what_arrives_is_what_was_read(world: World, requests: list[PriorRequest], teachers: int) -> None:
    prior = PriorArguments(teacher=str(world.teacher))
    thread = TeacherThread(prior.load("cpu"), SETTINGS)
    expected = [thread.submit(request).result().prior for request in requests]
    thread.close()
    with launch(teachers) as (ranks, codes), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, prior, SETTINGS)
        answers = [remote.submit(request) for request in requests]
        for answer, one in zip(answers, expected, strict=True):
            read = answer.result()
            assert torch.equal(read.prior.attention, one.attention)
            # Equal in all else that counts; tensors have no truth value of their own.
            assert replace(read.prior, attention=one.attention) == one
            assert read.prior.seconds.keys() == one.seconds.keys()
            assert read.fresh
            assert read.seconds > 0
        other = remote.submit(requests[0], replace(SETTINGS, mode="renoise")).result().prior
        assert (other.settings.mode, other.evaluations) == ("renoise", 1)
        remote.close()
    assert codes == [0] * teachers


def test_a_store_is_kept_by_the_rank_that_asks(world: World, tmp_path: Path) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    prior, store = PriorArguments(teacher=str(world.teacher)), PriorStore(tmp_path)
    requests = plan_priors(samples, prior.teacher_id("cpu"), SETTINGS, "both", SkipLog())
    with launch() as (ranks, _), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, prior, SETTINGS, store=store)
        first = [remote.submit(request).result() for request in requests]
        assert sorted(store) == sorted(request.key for request in requests)
        second = [remote.submit(request).result() for request in requests]
        path = store.path(requests[0].key)
        path.write_bytes(path.read_bytes()[:90])
        third = remote.submit(requests[0]).result()
        # What other settings give is not this run's and stays out of the store.
        remote.submit(requests[0], replace(SETTINGS, mode="renoise")).result()
        remote.close()
    assert [read.fresh for read in first + second] == [True, True, False, False]
    assert third.fresh
    assert "damaged" not in third.prior.prompt
    assert third.damaged
    assert torch.equal(store.read(requests[0].key).attention, first[0].prior.attention)
    assert store.read(requests[0].key).settings == SETTINGS


def test_one_clips_failure_is_its_own(world: World, requests: list[PriorRequest]) -> None:
    with launch() as (ranks, codes), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, PriorArguments(teacher=str(world.teacher)), SETTINGS)
        gone = remote.submit(replace(requests[0], video=Path("gone.mp4")))
        empty = remote.submit(replace(requests[0], text=" "))
        with pytest.raises(RemoteTeacherError, match=r"VideoError: .*gone\.mp4"):
            gone.result()
        with pytest.raises(RemoteTeacherError, match="PriorError: text is empty"):
            empty.result()
        assert remote.submit(requests[0]).result().fresh
        remote.close()
    assert codes == [0]


def test_a_teacher_that_cannot_be_loaded_is_said_at_once(world: World) -> None:
    for prior, settings, said in (
        (PriorArguments(teacher="missing"), SETTINGS, "missing: no such folder"),
        (PriorArguments(teacher=str(world.teacher)), PriorSettings(steps=3), "steps=3"),
    ):
        with launch() as (ranks, codes), pytest.raises(RemoteTeacherError, match=said):
            RemoteTeacher(ranks, prior, settings)
        assert codes == [2]


def test_a_teacher_that_fails_is_not_heard_of_after_one_that_still_loads(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank loads until the second's error has ended the training."""
    ended, ready = Event(), teacher_ranks.ready_teacher

    def slow(*args, index: int, **options):
        if index == 1:
            raise MemoryError("no room")
        assert ended.wait(60), "the ranks that train waited"
        return ready(*args, index=index, **options)

    monkeypatch.setattr(teacher_ranks, "ready_teacher", slow)
    prior = PriorArguments(teacher=str(world.teacher))
    with launch(2) as (ranks, codes):
        try:
            with (
                pytest.raises(RemoteTeacherError, match="MemoryError: no room"),
                teacher_ranks.letting_teachers_go(ranks),
            ):
                RemoteTeacher(ranks, prior, SETTINGS)
            assert not ended.is_set()
        finally:
            ended.set()
    assert sorted(codes) == [0, 2]
    assert "teacher rank 1: MemoryError" in capsys.readouterr().err


def test_a_rank_whose_launch_has_ended_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*args, **options):
        raise dist.DistNetworkError("connection refused")

    monkeypatch.setattr(teacher_ranks, "_serve", gone)
    store = dist.TCPStore("127.0.0.1", 0, None, True)
    ranks = TeacherRanks(1, 1, 0, store, torch.device("cpu"))
    ranks.client().set("setup", "{}")
    assert teacher_ranks.serve_priors(ranks) == 2
    assert "the launch has ended (connection refused)" in capsys.readouterr().err


def test_what_is_wrong_with_a_clip_or_the_teacher_arrives(
    world: World, requests: list[PriorRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PriorStore(tmp_path / "priors")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    key = prior_key(content_digest(broken), requests[0].text, teacher_id(world.teacher), SETTINGS)
    bad, good = replace(requests[0], video=broken, key=key), replace(requests[1], key="2" * 64)
    gone = replace(requests[0], video=tmp_path / "gone.mp4", key="3" * 64)
    with launch() as (ranks, _), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, PriorArguments(teacher=str(world.teacher)), SETTINGS, store=store)
        with pytest.raises(RemoteTeacherError, match=r"VideoError: .*broken"):
            remote.submit(bad).result()
        with pytest.raises(RemoteTeacherError, match=r"VideoError: .*gone"):
            remote.submit(gone).result()
        with pytest.raises(RefusedClip, match="on record, not tried again"):
            remote.submit(bad).result()
        assert [key for key, _ in store.refusals()] == [bad.key]
        # Its key is of another clip: what was read is used, and not kept.
        read = remote.submit(good).result()
        assert "not kept: the clip changed" in read.lost
        assert list(store) == []
        monkeypatch.setattr(teacher_thread, "extract_prior", None)
        kinds = [type(remote.submit(good).exception()).__name__ for _ in range(9)]
        remote.close()
    assert kinds == ["RemoteTeacherError"] * 7 + ["DeadTeacherError"] * 2
    assert len(list(store.refusals())) == 1


def test_teachers_that_nobody_asks_end_too() -> None:
    with launch(2) as (ranks, codes), teacher_ranks.letting_teachers_go(ranks):
        pass
    assert codes == [0, 0]


def test_closing_gives_up_what_is_not_begun(world: World, requests: list[PriorRequest]) -> None:
    with launch() as (ranks, _), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, PriorArguments(teacher=str(world.teacher)), SETTINGS)
        answers = [remote.submit(request) for request in requests * 10]
        answers[0].result()
        remote.close()
        assert all(answer.done() for answer in answers)
        assert any(answer.cancelled() for answer in answers)


def test_texts_are_encoded_before_the_encoder_goes(
    world: World, requests: list[PriorRequest], tmp_path: Path
) -> None:
    plain = PriorArguments(teacher=str(world.teacher))
    frames = _frames(requests[0])
    expected = extract_prior(plain.load("cpu"), frames, requests[0].text, steps=1)
    prior = replace(plain, text_cache=str(tmp_path / "texts"))
    with launch(2) as (ranks, _), teacher_ranks.letting_teachers_go(ranks):
        remote = RemoteTeacher(ranks, prior, SETTINGS, texts=[requests[0].text])
        assert torch.equal(remote.submit(requests[0]).result().prior.attention, expected.attention)
        unknown = remote.submit(replace(requests[0], text="never announced"))
        with pytest.raises(RemoteTeacherError, match="'never announced' is not in"):
            unknown.result()
        remote.close()
    assert len(list((tmp_path / "texts").glob("*/*.safetensors"))) == 2


def _frames(request: PriorRequest):
    from motionenhancer.data import read_frames

    return read_frames(request.video, num_frames=17, min_frames=2).frames


@pytest.mark.parametrize(("count", "said"), [(-1, "at least 0, got -1"), (1, "must leave a rank to train")])
def test_a_split_that_cannot_be(count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        teacher_ranks.split_ranks(count)
