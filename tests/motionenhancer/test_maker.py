"""A teacher in a thread: order, bounds, and when it is taken for dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from maker_support import MACHINE_FAULTS, NAME, SECONDS, SETTINGS, Fake, answer, files, kept, local
from safetensors import SafetensorError

from motionenhancer.data.video import VideoError
from motionenhancer.priors import maker as maker_module
from motionenhancer.priors import reader as reader_module
from motionenhancer.priors.maker import (
    PATIENCE,
    DeadTeacher,
    LocalMaker,
    Made,
    Stored,
)
from motionenhancer.priors.prior import PriorError
from motionenhancer.priors.storage import PriorStore


@pytest.mark.parametrize("workers", [1, 3])
def test_requests_are_answered_in_order_each_with_its_own_prior(fake: Fake, workers: int) -> None:
    said = [f"good {i}" for i in range(20)]
    with local(fake, decode_workers=workers) as maker:
        assert maker.capacity == workers + 1
        made = [answer(future) for future in [maker.submit(fake.request(s, f"text of {s}")) for s in said]]
    assert fake.read == said
    assert [one.prior.prompt for one in made] == [f"text of {s}" for s in said]  # type: ignore[union-attr]
    assert all(isinstance(one, Made) and one.fresh and one.seconds > 0 for one in made)
    assert all((one.damaged, one.lost, one.roundtrip) == ("", "", None) for one in made)  # type: ignore[union-attr]
    assert fake.loads == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_decoded_clips_are_bounded(fake: Fake, workers: int) -> None:
    with local(fake, decode_workers=workers) as maker:
        release = fake.hold("good 0")
        waiting = [maker.submit(fake.request(f"good {i}")) for i in range(30)]
        wait_until(lambda: fake.alive == workers + 1)
        release()
        assert all(isinstance(answer(future), Made) for future in waiting)
        assert fake.most == workers + 1
        # A clip that was read is not kept until the next one comes.
        wait_until(lambda: fake.alive == 0)


def wait_until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_teacher_is_loaded_when_it_is_first_needed(fake: Fake, store: PriorStore) -> None:
    with local(fake) as maker:
        assert fake.loads == 0
        assert maker.ready() is fake
        assert maker.ready() is fake
        maker.submit(fake.request("good")).result(SECONDS)
    assert fake.loads == 1
    with kept(fake, store) as stored:
        stored.submit(fake.request("good")).result(SECONDS)
    assert fake.loads == 2
    with kept(fake, store) as stored:
        assert not stored.submit(fake.request("good")).result(SECONDS).fresh
    assert fake.loads == 2, "what is stored needs no teacher"


def test_at_least_one_thread_decodes(fake: Fake) -> None:
    with pytest.raises(ValueError, match="decode_workers must be at least 1, got 0"):
        LocalMaker(fake.load, SETTINGS, decode_workers=0)


LOADING = {
    "ours": (ValueError("--teacher x: no such folder"), "--teacher x: no such folder"),
    "lines": (RuntimeError("size mismatch\n\tfor a\n\tfor b"), "RuntimeError: size mismatch for a for b"),
    "file": (SafetensorError("header too large"), "SafetensorError: header too large"),
    "key": (KeyError("text_encoder"), "KeyError: 'text_encoder'"),
    "memory": (MemoryError(), "MemoryError: "),
}


@pytest.mark.parametrize("error", LOADING)
def test_a_teacher_that_cannot_be_loaded_is_dead_and_not_loaded_again(
    fake: Fake, store: PriorStore, error: str
) -> None:
    raised, said = LOADING[error]

    def load() -> Fake:
        fake.loads += 1
        raise raised

    with closing(LocalMaker(load, SETTINGS)) as maker:
        for _ in range(2):
            with pytest.raises(DeadTeacher) as dead:
                maker.submit(fake.request("good"))
            assert str(dead.value) == said
            assert dead.value.__cause__ is raised
        with pytest.raises(DeadTeacher):
            maker.ready()
    assert fake.loads == 1
    with closing(Stored(store, LocalMaker(load, SETTINGS), NAME)) as stored:
        errors = [answer(stored.submit(request)) for request in fake.requests("good", "broken")]
    assert [str(one) for one in errors] == [said] * 2
    assert files(store) == {}
    assert fake.loads == 2


def test_a_thread_that_fails_answers_all_that_wait(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_stream(device: torch.device) -> None:
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(maker_module, "_use_own_stream", no_stream)
    with local(fake) as maker:
        errors = []
        for i in range(4):
            try:
                errors.append(answer(maker.submit(fake.request(f"good {i}"))))
            except DeadTeacher as error:
                errors.append(error)
    assert all(isinstance(error, DeadTeacher) and "device-side assert" in str(error) for error in errors)
    assert len(errors) == 4


def test_the_teachers_thread_computes_with_as_many_threads_as_its_caller(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append((n, threading.current_thread().name)))
    with local(fake) as maker:
        maker.submit(fake.request("good")).result(SECONDS)
    assert seen == [(3, "teacher_0")]


def test_the_inversion_error_is_measured_of_one_clip(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def errors(teacher: Fake, frames: np.ndarray, text: str, steps: int) -> dict[str, float]:
        measured.append((frames.tobytes().decode(), text, steps))
        return {"whole_schedule": 0.5}

    monkeypatch.setattr(reader_module, "inversion_errors", errors)
    with local(fake, roundtrip=True) as maker:
        found = [answer(maker.submit(r)) for r in fake.requests("broken", "good 1", "good 2")]
    assert measured == [("good 1", "it moves", 1)]
    assert [getattr(one, "roundtrip", None) for one in found] == [None, {"whole_schedule": 0.5}, None]


def test_a_teacher_is_dead_after_so_many_failures_in_a_row_and_not_before(fake: Fake) -> None:
    said = [f"cuda {i}" for i in range(PATIENCE - 1)]
    with local(fake) as maker:
        found = [answer(maker.submit(fake.request(s))) for s in said]
        assert {type(error) for error in found} == {RuntimeError}
        assert isinstance(answer(maker.submit(fake.request("good"))), Made), "a prior starts the count anew"
        found = [answer(maker.submit(fake.request(s))) for s in said]
        assert {type(error) for error in found} == {RuntimeError}
        for says, kind in (("broken", VideoError), ("blank", PriorError), ("full", VideoError)):
            assert isinstance(answer(maker.submit(fake.request(says))), kind), (
                "a clip's own fault counts for nothing"
            )
        dead = answer(maker.submit(fake.request("memory")))
        assert isinstance(dead, DeadTeacher)
        assert dead.__cause__ is MACHINE_FAULTS["memory"]
        often = f"the teacher failed on {PATIENCE} clips in a row"
        assert str(dead) == f"{often}, the last time with MemoryError: cannot allocate"
        with pytest.raises(DeadTeacher) as again:
            maker.submit(fake.request("good"))
        assert again.value is dead
    with local(fake) as maker:
        for _ in range(PATIENCE):
            dead = answer(maker.submit(fake.request("cuda")))
        assert isinstance(dead, DeadTeacher)
        assert "\n" not in str(dead)


def test_requests_that_wait_for_a_dead_teacher_get_its_reason(fake: Fake) -> None:
    with local(fake) as maker:
        release = fake.hold("held")
        waiting = [maker.submit(fake.request("held"))]
        waiting += [maker.submit(fake.request(f"cuda {i}")) for i in range(PATIENCE)]
        waiting += [maker.submit(fake.request("good")), maker.submit(fake.request("memory"))]
        release()
        found = [answer(one) for one in waiting]
    assert isinstance(found[0], Made)
    assert {type(error) for error in found[1:PATIENCE]} == {RuntimeError}
    assert isinstance(found[PATIENCE], DeadTeacher)
    assert found[PATIENCE + 1 :] == [found[PATIENCE]] * 2
