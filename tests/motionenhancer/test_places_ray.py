"""Places of actors in a Ray cluster, and makers that are closed while their actors work."""

from __future__ import annotations

import logging
import random
import threading
import time
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray_support import NAME, SECONDS, answer, ray, ray_on, request

from motionenhancer.priors import ray_maker
from motionenhancer.priors.maker import DeadTeacher, Made, Stored
from motionenhancer.priors.ray_maker import Cluster, gpu_share, open_cluster
from motionenhancer.priors.storage import PriorStore

# ---- places in the cluster ----


@pytest.mark.parametrize("death", [False, True])
def test_actors_that_find_no_place_hold_up_nothing(cluster: Cluster, tmp_path: Path, death: bool) -> None:
    """Three actors with room for one: the others wait, and one may replace an actor that dies."""
    said = [*(f"good {i}" for i in range(12)), *(["once a", "once b"] if death else [])]
    random.Random(0).shuffle(said)
    maker = ray_on(cluster, tmp_path, teachers=3, cpus=2)
    began = time.monotonic()
    with closing(maker):
        found = [answer(future) for future in [maker.submit(request(tmp_path, s)) for s in said]]
    assert [one.prior.prompt for one in found] == [f"{s}: text" for s in said]  # type: ignore[union-attr]
    assert maker.deaths == 2 * death
    assert time.monotonic() - began < SECONDS


def test_without_any_place_it_says_so_and_can_be_closed(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_maker, "SLOW", 2)
    keeps = Stored(PriorStore(tmp_path / "priors"), ray_on(cluster, tmp_path, teachers=2, cpus=100), NAME)
    asked = [keeps.submit(request(tmp_path, f"good {i}")) for i in range(9)]
    with caplog.at_level(logging.WARNING, "motionenhancer"):
        while len(caplog.records) < 2:
            time.sleep(0.05)
    assert "it needs 100 cores and 0.0 GPUs of {'CPU': 2.0, 'GPU': 0}" in caplog.records[0].getMessage()
    keeps.close()
    assert all(isinstance(answer(future), CancelledError | RuntimeError) for future in asked)


@pytest.mark.parametrize("died", [False, True])
def test_a_wait_for_a_place_ends(
    cluster: Cluster, tmp_path: Path, died: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No node can make a prior, as after the death of the only node with a GPU."""
    maker = ray_on(cluster, tmp_path)
    with closing(maker):
        if died:
            assert isinstance(answer(maker.submit(request(tmp_path, "good"))), Made)
        maker._wait = 3.0
        monkeypatch.setitem(maker._options, "num_cpus", 100)
        found = [answer(maker.submit(request(tmp_path, one))) for one in ("kill", "good")]
    assert [type(one) for one in found] == [DeadTeacher, DeadTeacher]
    assert "no Ray actor has a teacher after 3 s (--prior_wait): it needs 100 cores" in str(found[0])


def test_a_wait_for_one_prior_ends(cluster: Cluster, tmp_path: Path) -> None:
    store = PriorStore(tmp_path / "priors")
    maker = ray_on(cluster, tmp_path)
    with closing(Stored(store, maker, NAME, strict=True)) as keeps:
        assert isinstance(answer(keeps.submit(request(tmp_path, "good"))), Made)
        maker._wait = 2.0
        found = answer(keeps.submit(request(tmp_path, "asleep")))
    assert isinstance(found, DeadTeacher)
    assert "asleep.mp4 for 2 s (--prior_wait)" in str(found)
    assert not list(store.refusals()), "the clip is not to blame"


@pytest.mark.parametrize(
    ("gpus", "actors", "share"),
    [
        (0, 1, 0.0),
        (0, 7, 0.0),
        (8, 8, 1.0),
        (8, 3, 1.0),
        (1, 2, 1 / 2),
        (2, 3, 1 / 2),
        (4, 9, 1 / 3),
        (3, 3, 1.0),
    ],
)
def test_all_actors_find_a_place_on_the_gpus(gpus: int, actors: int, share: float) -> None:
    assert gpu_share(gpus, actors) == share
    assert gpus == 0 or gpus * int(1 / share + 1e-9) >= actors


@pytest.mark.parametrize(
    ("gpus", "processes", "asked", "each", "share"),
    [
        (8, 1, None, 8, 1.0),
        (8, 2, None, 4, 1.0),
        (8, 3, None, 2, 1.0),
        (1, 2, None, 1, 1 / 2),
        (2, 4, None, 1, 1 / 2),
        (4, 2, 3, 3, 1 / 2),
        (0, 2, None, 1, 0.0),
        (0, 2, 3, 3, 0.0),
    ],
)
def test_processes_share_the_gpus_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, asked: int | None, each: int, share: float
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": 16.0, **({"GPU": float(gpus)} if gpus else {})}
    )
    with open_cluster("auto", asked, 1, processes) as engine:
        assert (engine.teachers, engine.share) == (each, share)
        assert engine.device.type == ("cuda" if gpus else "cpu")


# ---- being closed ----


def test_closing_waits_for_what_was_begun_and_gives_up_the_rest(cluster: Cluster, tmp_path: Path) -> None:
    maker = ray_on(cluster, tmp_path)
    assert isinstance(answer(maker.submit(request(tmp_path, "good"))), Made)
    slow = maker.submit(request(tmp_path, "slow"))
    rest = [maker.submit(request(tmp_path, f"good {i}")) for i in range(5)]
    while not slow.running():
        time.sleep(0.001)
    maker.close()
    maker.close()
    assert isinstance(answer(slow), Made)
    assert all(future.cancelled() for future in rest)
    with pytest.raises(RuntimeError, match="closed"):
        maker.submit(request(tmp_path, "good"))


def test_a_request_whose_actor_died_as_the_maker_was_closed_is_answered(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ray_on(cluster, tmp_path)
    count = maker._count_death

    def closing_now(error: Any) -> None:
        maker._closing = True
        count(error)

    monkeypatch.setattr(maker, "_count_death", closing_now)
    asked = maker.submit(request(tmp_path, "once"))
    assert isinstance(answer(asked), CancelledError)
    maker.close()


def test_what_waits_is_given_up_before_what_was_begun_is_waited_for(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's second Ctrl-C ends the waiting; the command must end then too."""
    maker = ray_on(cluster, tmp_path)
    slow = maker.submit(request(tmp_path, "slow"))
    while not slow.running():
        time.sleep(0.001)
    rest = [maker.submit(request(tmp_path, f"good {i}")) for i in range(3)]

    def interrupt(hand: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            maker.close()
    assert all(future.cancelled() for future in rest)
    maker.close()
    assert isinstance(answer(slow), Made)


def test_clips_of_relative_paths_are_found(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = request(tmp_path, "good")
    with closing(ray_on(cluster, tmp_path)) as maker:
        made = answer(maker.submit(replace(good, video=Path("good.mp4"))))
    assert isinstance(made, Made)
