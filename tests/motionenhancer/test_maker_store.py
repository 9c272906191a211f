"""A maker with a store: faults of clips against faults of the machine, damage, and shared attempts."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from maker_support import MACHINE_FAULTS, SECONDS, SETTINGS, Fake, answer, files, kept

from motionenhancer import store as cli
from motionenhancer.data.video import VideoError
from motionenhancer.priors import reader as reader_module
from motionenhancer.priors.maker import (
    PATIENCE,
    DeadTeacher,
    Made,
    RefusedClip,
)
from motionenhancer.priors.prior import PriorError
from motionenhancer.priors.storage import PriorStore


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
    """This is for a new decoder, which may read an unchanged clip."""
    broken, blank = fake.requests("broken", "blank")
    with kept(fake, store) as stored:
        for request in (broken, blank):
            assert isinstance(answer(stored.submit(request)), ValueError)
    for request in (broken, blank):
        os.utime(store.refusal_path(request.key), (0, 0))
    reads = fake.read_frames

    def newer(path: Path, **options: int) -> SimpleNamespace:
        return (
            SimpleNamespace(frames=np.zeros(3, np.uint8), timestamps=[0.0])
            if path == broken.video
            else reads(path, **options)
        )

    monkeypatch.setattr(reader_module, "read_frames", newer)
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
    """A refusal of the new clip under the key of the old clip would be found forever."""
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
        assert "changed during the run" in str(found)
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


@pytest.mark.parametrize("strict", [False, True])
def test_a_damaged_file_in_a_store_that_is_only_read(
    fake: Fake,
    store: PriorStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    strict: bool,
) -> None:
    request = fake.request("good")
    with kept(fake, store) as stored:
        path = store.path(stored.submit(request).result(SECONDS) and request.key)
    path.write_bytes(b"damaged")

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with kept(fake, store, strict=strict) as stored:
        found = answer(stored.submit(request))
    said = f"{store.folder} cannot be written (Read-only file system)"
    if strict:
        assert isinstance(found, DeadTeacher)
        assert said in str(found)
    else:
        assert isinstance(found, Made)
        assert str(path) in found.damaged
        assert "cannot be written" in found.lost
    assert cli.main(["verify", "--prior_dir", str(store.folder)]) == 1
    assert "damaged, cannot be set aside (Read-only file system)" in capsys.readouterr().out
    assert path.read_bytes() == b"damaged"


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
    # A prior that is stored under the key of the usual settings is not returned for other settings.
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
