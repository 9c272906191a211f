"""Makers that are closed, streams of requests, and values that must not change."""

from __future__ import annotations

import dataclasses
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from maker_support import NAME, SECONDS, SETTINGS, Fake, answer, files, kept, local
from test_store import make_prior
from tiny_world import World

from motionenhancer import threads
from motionenhancer.data import SkipLog, content_digest, read_samples
from motionenhancer.priors.maker import (
    PATIENCE,
    DeadTeacher,
    LocalMaker,
    Made,
    PriorMaker,
    Stored,
    make_all,
)
from motionenhancer.priors.prior import MotionPrior
from motionenhancer.priors.requests import PriorRequest, request_priors
from motionenhancer.priors.storage import PriorStore, prior_keys
from motionenhancer.teachers import load_teacher, teacher_id


@pytest.mark.parametrize("whole", [False, True], ids=["maker", "stored"])
def test_a_teacher_that_does_not_come_back_counts_as_dead(fake: Fake, store: PriorStore, whole: bool) -> None:
    go_on = fake.hold("slow")
    inner = LocalMaker(fake.load, SETTINGS, wait=0.3)
    maker: PriorMaker = Stored(store, inner, NAME) if whole else inner
    held = fake.request("slow")
    asked = [maker.submit(held), maker.submit(fake.request("good"))]
    found = [answer(future) for future in asked]
    assert {type(error) for error in found} == {DeadTeacher}
    assert str(found[0]) == f"the teacher gave no prior of {held.video} for 0.3 s (--prior_wait)"
    with pytest.raises(DeadTeacher, match="gave no prior"):
        inner.submit(fake.request("late"))
    maker.close()
    assert all(thread.is_alive() for thread in inner._thread._threads), "close waited for the thread"
    go_on()
    for pool in (inner._thread, inner._decoders):
        pool.join()
    assert answer(asked[0]) is found[0], "the first answer stays"


def test_a_thread_that_does_not_come_back_lets_its_process_end() -> None:
    code = (
        "import runpy, sys, threading\n"
        "threads = runpy.run_path(sys.argv[1])['Threads'](1, 'stuck')\n"
        "begun = threading.Event()\n"
        "threads.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, threads.__file__], timeout=120)
    assert ended.returncode == 0


@pytest.mark.parametrize("whole", [False, True], ids=["maker", "stored"])
def test_closing_waits_for_what_was_begun_and_gives_up_the_rest(
    fake: Fake, store: PriorStore, whole: bool
) -> None:
    go_on = fake.hold("slow")
    inner = LocalMaker(fake.load, SETTINGS)
    maker: PriorMaker = Stored(store, inner, NAME) if whole else inner
    # A store looks up several priors at once, so only a maker without a store keeps the order.
    asked = [maker.submit(fake.request("slow"))]
    assert fake.begun["slow"].wait(SECONDS)
    asked += [maker.submit(fake.request(f"good {i}")) for i in range(20)]
    closer = threading.Thread(target=maker.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive(), "the clip at hand is waited for"
    go_on()
    closer.join(SECONDS)
    assert not closer.is_alive()
    maker.close()
    assert isinstance(answer(asked[0]), Made)
    # A request that the store had taken, but not yet passed on, ends with the error of the closed maker.
    assert all(isinstance(answer(future), CancelledError | RuntimeError) for future in asked[1:])
    assert fake.read == ["slow"]
    with pytest.raises(RuntimeError):
        maker.submit(fake.request("good"))
    assert len(list(store)) == whole, "what was made is kept"
    assert list(store.refusals()) == []


def test_closing_while_somebody_asks_ends(fake: Fake, store: PriorStore) -> None:
    go_on, stored = fake.hold("slow"), Stored(store, LocalMaker(fake.load, SETTINGS), NAME)
    for says in ("slow", *(f"good {i}" for i in range(2 * stored.capacity))):
        stored.submit(fake.request(says))
    assert fake.begun["slow"].wait(SECONDS)
    asking, closing = threading.Event(), threading.Event()
    submit, shutdown = stored._pool.submit, stored._pool.shutdown

    def late(*args: object) -> Future[Made]:
        asking.set()
        if closing.wait(0.5):
            time.sleep(0.1)  # until the pool gives up what waits
        return submit(*args)  # type: ignore[arg-type]

    def shut(**options: bool) -> None:
        closing.set()
        shutdown(**options)

    stored._pool.submit, stored._pool.shutdown = late, shut  # type: ignore[assignment, method-assign]
    asked: list[Future[Made]] = []
    asker = threading.Thread(target=lambda: asked.append(stored.submit(fake.request("last"))), daemon=True)
    closer = threading.Thread(target=stored.close, daemon=True)
    asker.start()
    assert asking.wait(SECONDS)
    closer.start()
    asker.join(5)
    assert not asker.is_alive()
    go_on()
    closer.join(SECONDS)
    assert not closer.is_alive()
    assert isinstance(answer(asked[0]), CancelledError | RuntimeError)


def test_a_maker_that_was_never_used_is_closed_too(fake: Fake, store: PriorStore) -> None:
    for _ in range(2):
        with kept(fake, store):
            pass
    assert fake.loads == 0
    maker = LocalMaker(fake.load, SETTINGS)
    maker.ready()
    maker.close()
    maker.close()
    with pytest.raises(RuntimeError, match="closed"):
        maker.submit(fake.request("good"))


def test_a_request_that_was_given_up_is_not_read(fake: Fake) -> None:
    go_on = fake.hold("slow")
    with local(fake) as maker:
        slow = maker.submit(fake.request("slow"))
        gone = [maker.submit(fake.request(f"good {i}")) for i in range(5)]
        last = maker.submit(fake.request("good last"))
        assert fake.begun["slow"].wait(SECONDS)
        assert all(future.cancel() for future in gone)
        go_on()
        assert isinstance(answer(slow), Made)
        assert isinstance(answer(last), Made)
    assert fake.read == ["slow", "good last"]


@pytest.mark.parametrize("seed", range(6))
def test_no_answer_is_lost_whoever_asks_gives_up_or_closes(fake: Fake, store: PriorStore, seed: int) -> None:
    rng = random.Random(seed)
    said = [*(f"good {i}" for i in range(12)), *(f"broken {i}" for i in range(4)), "blank", "cuda", "full"]
    requests = [fake.request(s) for s in said]
    stored = Stored(store, LocalMaker(fake.load, SETTINGS, decode_workers=rng.choice([1, 3])), NAME)
    asked: list[Future[Made]] = []
    stop = threading.Event()

    def ask(rng: random.Random) -> None:
        for _ in range(60):
            try:
                asked.append(stored.submit(rng.choice(requests)))
            except RuntimeError:
                return
            if rng.random() < 0.1:
                rng.choice(asked).cancel()
            if stop.wait(0.001 * rng.random()):
                return

    askers = [threading.Thread(target=ask, args=(random.Random(rng.random()),)) for _ in range(4)]
    for asker in askers:
        asker.start()
    if seed % 2:
        stop.wait(0.02)
        closers = [threading.Thread(target=stored.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(SECONDS)
            assert not closer.is_alive()
    for asker in askers:
        asker.join(SECONDS)
        assert not asker.is_alive()
    found = Counter(type(answer(future)).__name__ for future in asked)
    stored.close()
    assert set(found) <= {
        "Made", "VideoError", "PriorError", "RefusedClip", "CancelledError", "RuntimeError", "DeadTeacher"
    }  # fmt: skip
    assert {store.read(key).prompt for key in store} <= {"it moves"}
    right = {
        request.key for request, s in zip(requests, said, strict=True) if s.startswith(("broken", "blank"))
    }
    assert {key for key, _ in store.refusals()} <= right
    assert list(store.folder.rglob("*.tmp")) == []
    assert stored._open == {}


def test_what_was_asked_for_comes_back_in_order_whatever_came_of_it(fake: Fake, store: PriorStore) -> None:
    said = ["good 0", "broken", "good 1", "good 0", "blank", "cuda", "good 2"]
    with kept(fake, store) as stored:
        assert isinstance(answer(stored.submit(fake.request("good 1"))), Made)
        found = list(make_all([(s, fake.request(s)) for s in said], stored))
    assert [item for item, _, _ in found] == said
    assert [request.video.stem for _, request, _ in found] == said
    assert [type(one).__name__ for _, _, one in found] == [
        "Made", "VideoError", "Made", "Made", "PriorError", "RuntimeError", "Made"
    ]  # fmt: skip
    assert [one.fresh for _, _, one in found if isinstance(one, Made)] == [True, False, False, True]


def test_a_stream_is_read_only_as_far_ahead_as_needed(fake: Fake) -> None:
    taken = []

    def stream() -> Iterator[tuple[int, PriorRequest]]:
        for i in range(200):
            taken.append(i)
            yield i, fake.request(f"good {i}")

    with local(fake, decode_workers=1) as maker:
        for i, (item, _, found) in enumerate(make_all(stream(), maker)):
            assert item == i
            assert isinstance(found, Made)
            assert len(taken) <= i + 1 + 2 * maker.capacity
            if i == 20:
                break
        else:
            raise AssertionError
    assert len(fake.read) < 30, "what was asked for and not begun is given up with the stream"


def test_a_dead_teacher_ends_a_stream(fake: Fake, store: PriorStore) -> None:
    requests = [(i, fake.request(f"cuda {i}")) for i in range(50)]
    found: list[tuple[int, PriorRequest, Made | Exception]] = []
    with kept(fake, store, strict=True) as stored, pytest.raises(DeadTeacher, match="CUDA error"):
        found.extend(make_all(requests, stored))
    assert [item for item, _, _ in found] == list(range(len(found)))
    assert all(isinstance(error, RuntimeError) for _, _, error in found)
    assert len(found) < PATIENCE + stored.capacity
    assert files(store) == {}


def test_an_error_of_the_stream_itself_ends_it(fake: Fake) -> None:
    def stream() -> Iterator[tuple[int, PriorRequest]]:
        yield 0, fake.request("good")
        raise ValueError("the data file ends in the middle")

    with local(fake) as maker, pytest.raises(ValueError, match="ends in the middle"):
        list(make_all(stream(), maker))


def test_what_is_made_survives_pickling() -> None:
    made = Made(make_prior(), True, 1.5, "damaged", "lost", {"whole_schedule": 0.5})
    back = pickle.loads(pickle.dumps(made))
    assert torch.equal(back.prior.attention, made.prior.attention)
    for name in (f.name for f in dataclasses.fields(MotionPrior) if f.name != "attention"):
        assert getattr(back.prior, name) == getattr(made.prior, name), name
    assert replace(back, prior=made.prior) == made
    request = PriorRequest(Path("a.mp4"), "text", "key", SETTINGS)
    assert pickle.loads(pickle.dumps(request)) == request


def test_neither_threads_nor_order_nor_random_numbers_change_a_prior(world: World, tmp_path: Path) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:4]
    name = prior_keys(teacher_id(world.teacher), SETTINGS)
    pairs = list(request_priors(samples, "both", SkipLog(), name=name, digest=content_digest))
    found = []
    state = torch.get_rng_state()
    for place, (workers, order) in enumerate([(1, [0, 1, 2, 3]), (3, [3, 1, 0, 2]), (2, [2, 2, 3, 0, 1])]):
        store = PriorStore(tmp_path / str(place))
        inner = LocalMaker(lambda: load_teacher(world.teacher, "cpu"), SETTINGS, decode_workers=workers)
        with closing(Stored(store, inner, name, strict=True)) as stored:
            priors = {i: made for i, _, made in make_all([(i, pairs[i][1]) for i in order], stored)}
        assert all(isinstance(made, Made) for made in priors.values())
        found.append(files(store))
        assert len(found[-1]) == 4
    assert found[0] == found[1] == found[2]
    assert torch.equal(torch.get_rng_state(), state), "a training beside it draws the same numbers"
