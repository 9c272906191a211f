"""Priors made on a Ray cluster: deaths of actors, nodes that see other files, and failures."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_support import NAME, SETTINGS, answer, made_of, ray, ray_on, request

from motionenhancer.data.video import VideoError
from motionenhancer.priors import ray_maker
from motionenhancer.priors.maker import PATIENCE, DeadTeacher, Made, RefusedClip, Stored
from motionenhancer.priors.prior import PriorError
from motionenhancer.priors.ray_maker import Cluster, KillerClip, RayMaker
from motionenhancer.priors.requests import PriorRequest
from motionenhancer.priors.storage import PriorStore

# ---- deaths ----


def test_a_clip_that_kills_its_actor_is_tried_once_more_and_then_recorded(
    cluster: Cluster, tmp_path: Path
) -> None:
    store, said = PriorStore(tmp_path / "priors"), ["good 0", "kill", "once", "broken", "blank", "good 1"]
    maker = ray_on(cluster, tmp_path)
    with closing(Stored(store, maker, NAME, strict=True)) as keeps:
        found = made_of(keeps, tmp_path, *said)
    assert [type(one) for one in found] == [Made, KillerClip, Made, VideoError, PriorError, Made]
    assert [one.prior.prompt for one in found if isinstance(one, Made)] == [
        "good 0: text", "once: text", "good 1: text"
    ]  # fmt: skip
    assert maker.deaths == 3
    assert str(found[1]).endswith("kill.mp4: 2 actors died while they read this clip")
    refused = {refusal.reason: refusal for _, refusal in store.refusals()}
    assert set(refused) == {
        "no prior: its clip kills the worker", "unreadable video", "no prior: the teacher cannot read it"
    }  # fmt: skip
    assert refused["no prior: its clip kills the worker"].unreadable
    assert len(list(store)) == 3
    again = ray_on(cluster, tmp_path)
    with closing(Stored(store, again, NAME, strict=True)) as keeps:
        found = made_of(keeps, tmp_path, *said)
    assert [type(one) for one in found] == [Made, RefusedClip, Made, RefusedClip, RefusedClip, Made]
    assert again.deaths == 0


def test_a_machine_without_memory_is_never_on_record_against_a_clip(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, said = PriorStore(tmp_path / "priors"), "Task was killed due to the node running low on memory."
    real = ray.get

    def get(reference: Any, timeout: float | None = None) -> Any:
        if timeout is not None:
            raise ray.exceptions.OutOfMemoryError(said)
        return real(reference)

    monkeypatch.setattr(ray, "get", get)
    with closing(Stored(store, ray_on(cluster, tmp_path), NAME, strict=True)) as keeps:
        found = made_of(keeps, tmp_path, "good")
    assert [type(one) for one in found] == [KillerClip]
    assert not list(store.refusals())


def test_deaths_in_a_row_end_the_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_maker, "DEATHS", 3)
    with closing(ray_on(cluster, tmp_path)) as maker:
        asked = [maker.submit(request(tmp_path, f"kill {i}")) for i in range(4)]
        errors = [answer(future) for future in asked]
        assert [type(error) for error in errors] == [KillerClip, *[DeadTeacher] * 3]
        assert str(errors[1]).startswith("3 actors died one after another, the last of: ")
        assert "\n" not in str(errors[1])
        assert maker.deaths == 3, "no further actor is hired"


def test_a_prior_between_deaths_starts_their_count_anew(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_maker, "DEATHS", 3)
    with closing(ray_on(cluster, tmp_path)) as maker:
        found = made_of(maker, tmp_path, "kill 0", "good", "kill 1", "good 1")
        assert [type(one) for one in found] == [KillerClip, Made, KillerClip, Made]
        assert maker.deaths == 4


def test_no_clip_is_blamed_for_an_actor_that_dies_while_its_teacher_loads(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_maker, "DEATHS", 3)
    store = PriorStore(tmp_path / "priors")
    maker = ray_on(cluster, tmp_path, error=1)
    with closing(Stored(store, maker, NAME)) as keeps, pytest.raises(DeadTeacher, match="3 actors died one"):
        made_of(keeps, tmp_path, "good 0", "good 1")
    assert maker.deaths == 3
    assert not store.folder.exists()


# ---- nodes ----


def test_a_node_that_does_not_see_a_clip_says_which(cluster: Cluster, tmp_path: Path) -> None:
    store = PriorStore(tmp_path / "priors")
    keeps = Stored(store, ray_on(cluster, tmp_path, unseen="hidden.mp4"), NAME, strict=True)
    gone = request(tmp_path, "gone")
    gone.video.unlink()
    with closing(keeps):
        found = answer(keeps.submit(gone))
        assert isinstance(found, VideoError), "it is gone everywhere"
        assert isinstance(answer(keeps.submit(request(tmp_path, "good"))), Made)
        error = answer(keeps.submit(request(tmp_path, "hidden")))
        assert isinstance(error, DeadTeacher)
        node = ray.util.get_node_ip_address()
        assert str(error) == (
            f"node {node} does not see {tmp_path / 'hidden.mp4'}, which is there on this node; with Ray all "
            "nodes need the same files at the same paths"
        )
        assert isinstance(answer(keeps.submit(request(tmp_path, "good too"))), DeadTeacher)
    assert list(store.refusals()) == []


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (
            {"error": ValueError("--teacher /gone: no such folder")},
            "load the teacher: --teacher /gone: no such",
        ),
        ({"error": KeyError("vae")}, "cannot load the teacher: KeyError: 'vae'"),
        ({"error": RuntimeError("size\n\tmismatch")}, "cannot load the teacher: RuntimeError: size mismatch"),
        ({"id": "other"}, "sees another teacher at the same path"),
    ],
)
def test_a_node_without_the_teacher_ends_the_run(
    cluster: Cluster, tmp_path: Path, load: dict[str, Any], said: str
) -> None:
    with closing(ray_on(cluster, tmp_path, **load)) as maker:
        errors = [answer(maker.submit(request(tmp_path, f"good {i}"))) for i in range(2)]
        assert maker.deaths == 0
    assert all(isinstance(error, DeadTeacher) and said in str(error) for error in errors), errors
    assert "on node " in str(errors[0])
    assert "same path" in str(errors[0])
    assert "\n" not in str(errors[0])


def test_an_actor_without_a_gpu_it_needs_says_so(tmp_path: Path, cluster: Cluster) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with closing(ray_on(replace(cluster, device=torch.device("cuda")), tmp_path)) as maker:
        error = answer(maker.submit(request(tmp_path, "good")))
    assert isinstance(error, DeadTeacher)
    assert "has no GPU that it can use" in str(error)


def test_a_loader_that_cannot_be_sent_ends_the_run(cluster: Cluster) -> None:
    lock = threading.Lock()
    maker = RayMaker(cluster, lambda device: lock, "t", SETTINGS)  # type: ignore[arg-type, return-value]
    with closing(maker):
        error = answer(maker.submit(PriorRequest(Path("a.mp4"), "text")))
    assert isinstance(error, DeadTeacher)
    assert "pickle" in str(error)


# ---- failures ----


def test_failures_in_a_row_end_the_run_and_are_never_on_record(cluster: Cluster, tmp_path: Path) -> None:
    store = PriorStore(tmp_path / "priors")
    with closing(Stored(store, ray_on(cluster, tmp_path), NAME)) as keeps:
        for says in ("broken", *(f"cuda {i}" for i in range(PATIENCE - 1)), "good"):
            found = answer(keeps.submit(request(tmp_path, says)))
            if says.startswith("cuda"):
                assert type(found) is RuntimeError
                assert "CUDA error" in str(found)
        errors = [answer(keeps.submit(request(tmp_path, f"cuda {i}"))) for i in range(PATIENCE + 1)]
    assert [isinstance(error, DeadTeacher) for error in errors] == [*[False] * (PATIENCE - 1), True, True]
    assert "the teacher failed on 8 clips in a row, the last time with RuntimeError: CUDA" in str(errors[-1])
    assert [refusal.reason for _, refusal in store.refusals()] == ["unreadable video"]
