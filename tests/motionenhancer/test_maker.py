"""The makers of priors: order, bounds, faults of clips against faults of the machine, and being closed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pickle
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from test_store import make_prior
from tiny_world import World

from motionenhancer.data import SkipLog, content_digest, read_samples
from motionenhancer.data.video import VideoError
from motionenhancer.priors import maker as maker_module
from motionenhancer.priors.maker import (
    PATIENCE,
    DeadTeacher,
    LocalMaker,
    Made,
    PriorMaker,
    RefusedClip,
    Stored,
    make_all,
)
from motionenhancer.priors.prior import MotionPrior, PriorError, PriorSettings
from motionenhancer.priors.requests import PriorRequest, request_priors
from motionenhancer.priors.storage import PriorStore, prior_keys
from motionenhancer.teachers import load_teacher, teacher_id

SETTINGS = PriorSettings(steps=1)
NAME = prior_keys("t", SETTINGS)
SECONDS = 20

MACHINE_FAULTS = {
    "memory": MemoryError("cannot allocate"),
    "cuda": RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"
    ),
    "stale": OSError(errno.ESTALE, "Stale file handle"),
    "full": VideoError("clip", "cannot be read (Too many open files)", passing=True),
}


@dataclass
class Fake:
    """A teacher that reads files of text: what such a clip says is what comes of it.

    Attributes:
        folder: of the clips.
        read: clips that the teacher was given, by what they say.
        decoded: clips that were decoded.
        gates: a clip of this content waits for its event.
        alive: decoded clips that are still in memory; `most` is the most there were.
    """

    folder: Path
    read: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    begun: dict[str, threading.Event] = field(default_factory=dict)
    loads: int = 0
    alive: int = 0
    most: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_frames: int = 17
    id: str = "t"
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> Fake:
        self.loads += 1
        return self

    def request(self, says: str, text: str = "it moves", name: str = "", **options: object) -> PriorRequest:
        clip = self.folder / f"{name or says}.mp4"
        clip.write_text(says)
        return PriorRequest(clip, text, NAME(content_digest(clip), text), **options)  # type: ignore[arg-type]

    def requests(self, *says: str) -> list[PriorRequest]:
        return [self.request(one) for one in says]

    def read_frames(self, path: Path, *, num_frames: int, min_frames: int) -> SimpleNamespace:
        assert (num_frames, min_frames) == (self.max_frames, 2)
        says = path.read_text()
        if says.startswith("broken"):
            raise VideoError(path, "is no video")
        if says.startswith("full"):
            raise MACHINE_FAULTS["full"]
        frames = np.frombuffer(says.encode(), np.uint8).copy()
        weakref.finalize(frames, self._gone)
        with self._lock:
            self.decoded.append(says)
            self.alive += 1
            self.most = max(self.most, self.alive)
        return SimpleNamespace(frames=frames, timestamps=[0.0])

    def _gone(self) -> None:
        with self._lock:
            self.alive -= 1

    def extract_prior(
        self, teacher: Fake, frames: np.ndarray, text: str, *, times: list[float], **settings: object
    ) -> MotionPrior:
        assert teacher is self
        assert times == [0.0]
        says = frames.tobytes().decode()
        self.read.append(says)
        if says in self.gates:
            self.begun[says].set()
            assert self.gates[says].wait(SECONDS)
        if says.startswith("blank"):
            raise PriorError("it has no word")
        fault = MACHINE_FAULTS.get(says.partition(" ")[0])
        if fault is not None:
            raise fault
        made = make_prior(seed=sum(frames.tolist()))
        return replace(made, prompt=text, settings=PriorSettings(**settings))  # type: ignore[arg-type]

    def hold(self, says: str) -> Callable[[], None]:
        """Let a clip wait; returns what lets it go on."""
        self.gates[says], self.begun[says] = threading.Event(), threading.Event()
        return self.gates[says].set


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    (tmp_path / "clips").mkdir()
    found = Fake(tmp_path / "clips")
    monkeypatch.setattr(maker_module, "read_frames", found.read_frames)
    monkeypatch.setattr(maker_module, "extract_prior", found.extract_prior)
    before = set(threading.enumerate())
    yield found
    left = [
        t.name
        for t in threading.enumerate()
        if t not in before and t.name.startswith(("teacher", "dec", "st"))
    ]
    assert left == [], "a maker was left open"


@pytest.fixture
def store(tmp_path: Path) -> PriorStore:
    return PriorStore(tmp_path / "priors")


def local(fake: Fake, **options: object) -> closing[LocalMaker]:
    return closing(LocalMaker(fake.load, SETTINGS, **options))  # type: ignore[arg-type]


def kept(fake: Fake, store: PriorStore, **options: object) -> closing[Stored]:
    return closing(Stored(store, LocalMaker(fake.load, SETTINGS), NAME, **options))  # type: ignore[arg-type]


def answer(future: Future[Made]) -> Made | BaseException:
    try:
        return future.result(SECONDS)
    except (Exception, CancelledError) as error:
        return error


def files(store: PriorStore) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.folder.rglob("*")) if p.is_file()}


# ---- a teacher in a thread ----


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
        for future in [maker.submit(fake.request(f"good {i}")) for i in range(30)]:
            assert isinstance(answer(future), Made)
        assert 1 < fake.most <= workers + 1
        # A clip that was read is not kept until the next one comes.
        ends = time.monotonic() + SECONDS
        while fake.alive and time.monotonic() < ends:
            time.sleep(0.01)
        assert fake.alive == 0


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
    @contextlib.contextmanager
    def no_stream(device: torch.device) -> Iterator[None]:
        raise RuntimeError("CUDA error: device-side assert")
        yield

    monkeypatch.setattr(maker_module, "_own_stream", no_stream)
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
    assert seen == [(3, "teacher")]


def test_the_inversion_error_is_measured_of_one_clip(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def errors(teacher: Fake, frames: np.ndarray, text: str, steps: int) -> dict[str, float]:
        measured.append((frames.tobytes().decode(), text, steps))
        return {"whole_schedule": 0.5}

    monkeypatch.setattr(maker_module, "inversion_errors", errors)
    with local(fake, roundtrip=True) as maker:
        found = [answer(maker.submit(r)) for r in fake.requests("broken", "good 1", "good 2")]
    assert measured == [("good 1", "it moves", 1)]
    assert [getattr(one, "roundtrip", None) for one in found] == [None, {"whole_schedule": 0.5}, None]


# ---- who is to blame ----


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
        dead = answer(maker.submit(fake.request("cuda")))
        assert isinstance(dead, DeadTeacher)
        assert "\n" not in str(dead)


def test_what_a_clip_or_text_is_to_blame_for_is_put_on_record_and_not_tried_again(
    fake: Fake, store: PriorStore
) -> None:
    requests = fake.requests("broken", "blank", "good")
    with kept(fake, store) as stored:
        first = [answer(stored.submit(request)) for request in requests]
    assert [type(one) for one in first] == [VideoError, PriorError, Made]
    assert {key for key, _ in store.refusals()} == {requests[0].key, requests[1].key}
    unreadable, unsaid = (store.refusal(request.key) for request in requests[:2])
    assert unreadable is not None
    assert unsaid is not None
    assert (unreadable.reason, unreadable.unreadable) == ("unreadable video", True)
    assert (unsaid.reason, unsaid.unreadable) == ("no prior: the teacher cannot read it", False)
    fake.decoded.clear()
    before = files(store)
    with kept(fake, store) as stored:
        again = [answer(stored.submit(request)) for request in requests]
    assert [type(one) for one in again] == [RefusedClip, RefusedClip, Made]
    for old, new, request in zip(first, again, requests[:2], strict=False):
        assert str(new) == f"{old} (on record, not tried again: {store.refusal_path(request.key)})"
        assert new.refusal.detail == str(new)  # type: ignore[union-attr]
    assert fake.decoded == []
    assert fake.loads == 1
    assert files(store) == before


def test_what_is_on_record_is_tried_again_once_where_that_is_asked_for(
    fake: Fake, store: PriorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the installation of another decoder: the clip is the same, what reads it is not."""
    broken, blank = fake.requests("broken", "blank")
    with kept(fake, store) as stored:
        for request in (broken, blank):
            assert isinstance(answer(stored.submit(request)), ValueError)
    for request in (broken, blank):
        os.utime(store.refusal_path(request.key), (0, 0))
    reads = fake.read_frames

    def newer(path: Path, **options: int) -> SimpleNamespace:
        if path == broken.video:
            return SimpleNamespace(frames=np.zeros(3, np.uint8), timestamps=[0.0])
        return reads(path, **options)

    monkeypatch.setattr(maker_module, "read_frames", newer)
    with kept(fake, store, retry=True) as stored:
        assert answer(stored.submit(broken)).fresh  # type: ignore[union-attr]
        assert isinstance(answer(stored.submit(blank)), PriorError)
        assert isinstance(answer(stored.submit(blank)), RefusedClip), "once a run"
    assert broken.key in store
    assert [key for key, _ in store.refusals()] == [blank.key]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fault", MACHINE_FAULTS)
def test_what_the_machine_is_to_blame_for_is_never_put_on_record(
    fake: Fake, store: PriorStore, fault: str, strict: bool
) -> None:
    with kept(fake, store, strict=strict) as stored:
        assert answer(stored.submit(fake.request(fault))) is MACHINE_FAULTS[fault]
        for i in range(2 * PATIENCE):
            error = answer(stored.submit(fake.request(f"{fault} {i}")))
            assert isinstance(error, DeadTeacher) == (fault != "full" and i + 2 >= PATIENCE)
    assert files(store) == {}


def test_a_clip_that_is_gone_or_another_one_is_not_put_on_record(fake: Fake, store: PriorStore) -> None:
    """Under the key of what it was, a refusal of what it is now would be found for good."""
    for harm in ("gone", "changed"):
        request = fake.request("good", name=harm)
        if harm == "gone":
            request.video.unlink()
        else:
            request.video.write_text("broken")
        with kept(fake, store) as stored, pytest.raises((VideoError, FileNotFoundError)):
            stored.submit(request).result(SECONDS)
        assert files(store) == {}


@pytest.mark.parametrize("strict", [False, True])
def test_a_clip_that_changes_after_its_key_was_made_gives_no_stored_prior(
    fake: Fake, store: PriorStore, strict: bool
) -> None:
    request = fake.request("good")
    request.video.write_text("good too")
    with kept(fake, store, strict=strict) as stored:
        found = answer(stored.submit(request))
    if strict:
        assert isinstance(found, VideoError)
        assert "changed while the run was going on" in str(found)
    else:
        assert isinstance(found, Made)
        assert found.fresh
        assert "not kept: the clip changed" in found.lost
    assert files(store) == {}


@pytest.mark.parametrize("strict", [False, True])
def test_a_store_that_cannot_be_written(
    fake: Fake, store: PriorStore, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PriorStore, "write", full)
    monkeypatch.setattr(PriorStore, "refuse", full)
    with kept(fake, store, strict=strict) as stored:
        found, broken = (answer(stored.submit(request)) for request in fake.requests("good", "broken"))
    assert isinstance(broken, VideoError), "without a record it is tried again, no more"
    if strict:
        assert isinstance(found, DeadTeacher)
        assert str(found) == f"the store {store.folder} cannot be written (No space left on device)"
    else:
        assert isinstance(found, Made)
        assert (
            found.lost == "priors used, but not kept: the store cannot be written (No space left on device)"
        )
        assert found.prior.prompt == "it moves"


def test_a_stored_prior_that_cannot_be_read_just_now_is_left_as_it_is(
    fake: Fake, store: PriorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = fake.request("good")
    with kept(fake, store) as stored:
        stored.submit(request).result(SECONDS)
    before = files(store)

    def refuse(store: PriorStore, key: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, kept(fake, store, strict=True) as stored:
        patch.setattr(PriorStore, "read", refuse)
        assert getattr(answer(stored.submit(request)), "errno", None) == errno.EMFILE
    assert files(store) == before


# ---- a store ----


@pytest.mark.parametrize("harm", [b"", b"damaged", None])
def test_a_damaged_file_is_set_aside_and_its_prior_made_anew(
    fake: Fake, store: PriorStore, harm: bytes | None
) -> None:
    request = fake.request("good")
    with kept(fake, store) as stored:
        assert stored.submit(request).result(SECONDS).fresh
    path, whole = store.path(request.key), files(store)
    body = path.read_bytes()
    path.write_bytes(body[:-3] + bytes([body[-3] ^ 1]) + body[-2:] if harm is None else harm)
    hurt = path.read_bytes()
    with kept(fake, store) as stored:
        made = stored.submit(request).result(SECONDS)
        again = stored.submit(request).result(SECONDS)
    assert made.fresh
    assert str(path) in made.damaged
    assert (again.fresh, again.damaged) == (False, "")
    assert path.with_name(path.name + ".damaged").read_bytes() == hurt
    assert path.read_bytes() == whole[path.name]


def test_requests_of_one_key_that_are_open_at_once_are_one_attempt(fake: Fake, store: PriorStore) -> None:
    go_on = fake.hold("good")
    request = fake.request("good")
    store.path(request.key).parent.mkdir(parents=True)
    store.path(request.key).write_bytes(b"damaged")
    with kept(fake, store) as stored:
        first = stored.submit(request)
        # A copy of the clip under another name is the same prior.
        others = [
            stored.submit(replace(request, video=fake.request("good", name=f"{i}").video)) for i in range(3)
        ]
        assert others[0].cancel(), "to give one up"
        assert fake.begun["good"].wait(SECONDS)
        go_on()
        made = first.result(SECONDS)
        shared = [future.result(SECONDS) for future in others[1:]]
        later = stored.submit(request).result(SECONDS)
    assert fake.read == ["good"]
    assert made.fresh
    assert made.damaged
    assert made.seconds > 0
    for one in shared:
        assert one.prior is made.prior
        assert (one.fresh, one.seconds, one.damaged) == (False, 0.0, ""), "counted once"
    assert not later.fresh


def test_requests_that_share_an_attempt_share_its_failure(fake: Fake, store: PriorStore) -> None:
    go_on, request = fake.hold("blank"), fake.request("blank")
    with kept(fake, store) as stored:
        asked = [stored.submit(request) for _ in range(3)]
        go_on()
        errors = [answer(future) for future in asked]
    assert all(isinstance(error, PriorError) for error in errors)
    assert fake.read == ["blank"]


def test_a_prior_of_other_settings_or_without_a_key_is_never_stored(fake: Fake, store: PriorStore) -> None:
    other = replace(SETTINGS, seed=3)
    requests = [
        fake.request("good", settings=other),
        fake.request("broken", settings=other),
        replace(fake.request("good"), key=""),
    ]
    with kept(fake, store) as stored:
        found = [answer(stored.submit(request)) for request in requests]
    assert isinstance(found[1], VideoError)
    assert [one.prior.settings for one in (found[0], found[2])] == [other, SETTINGS]  # type: ignore[union-attr]
    assert files(store) == {}
    # Nor is one that is stored under the key of the usual settings given out for them.
    with kept(fake, store) as stored:
        stored.submit(fake.request("good")).result(SECONDS)
        made = stored.submit(requests[0]).result(SECONDS)
    assert made.fresh
    assert made.prior.settings == other


def test_stored_priors_come_while_the_teacher_is_busy(fake: Fake, store: PriorStore) -> None:
    with kept(fake, store) as stored:
        stored.submit(fake.request("good")).result(SECONDS)
    go_on = fake.hold("slow")
    with kept(fake, store) as stored:
        slow = stored.submit(fake.request("slow"))
        assert fake.begun["slow"].wait(SECONDS)
        assert not stored.submit(fake.request("good")).result(SECONDS).fresh
        assert not slow.done()
        go_on()
        assert slow.result(SECONDS).fresh


# ---- being closed ----


@pytest.mark.parametrize("whole", [False, True], ids=["maker", "stored"])
def test_closing_waits_for_what_was_begun_and_gives_up_the_rest(
    fake: Fake, store: PriorStore, whole: bool
) -> None:
    go_on = fake.hold("slow")
    inner = LocalMaker(fake.load, SETTINGS)
    maker: PriorMaker = Stored(store, inner, NAME) if whole else inner
    asked = [
        maker.submit(fake.request("slow")),
        *(maker.submit(fake.request(f"good {i}")) for i in range(20)),
    ]
    assert fake.begun["slow"].wait(SECONDS)
    closer = threading.Thread(target=maker.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive(), "the clip at hand is waited for"
    go_on()
    closer.join(SECONDS)
    assert not closer.is_alive()
    maker.close()
    assert isinstance(answer(asked[0]), Made)
    # Those that a thread of the store had taken, but not yet given to the teacher, end with its error.
    assert all(isinstance(answer(future), CancelledError | RuntimeError) for future in asked[1:])
    assert fake.read == ["slow"]
    with pytest.raises(RuntimeError):
        maker.submit(fake.request("good"))
    assert len(list(store)) == whole, "what was made is kept"
    assert list(store.refusals()) == []


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


# ---- requests from a stream ----


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


# ---- values ----


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
