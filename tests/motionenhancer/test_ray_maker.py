"""Priors made on a Ray cluster: the store of one process, whatever dies on the way."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_store import make_prior
from tiny_world import World

from motionenhancer import extract
from motionenhancer.data import content_digest
from motionenhancer.data.video import VideoError
from motionenhancer.priors import engine as engine_module
from motionenhancer.priors import maker as maker_module
from motionenhancer.priors.maker import PATIENCE, DeadTeacher, Made, PriorMaker, RefusedClip, Stored, make_all
from motionenhancer.priors.prior import MotionPrior, PriorError, PriorSettings
from motionenhancer.priors.requests import PriorRequest
from motionenhancer.priors.storage import PriorStore, prior_keys

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install motionenhancer[ray]")

from motionenhancer.priors import ray_maker  # noqa: E402
from motionenhancer.priors.ray_maker import KillerClip, RayEngine, RayMaker, gpu_share, open_cluster  # noqa: E402

REPO = Path(__file__).parents[2]
SETTINGS = PriorSettings(steps=1)
NAME = prior_keys("t", SETTINGS)
SECONDS = 240
COMMAND = [sys.executable, "-m", "motionenhancer.extract"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "RAY_worker_niceness": "0"}


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def actors_under(parent: int) -> list[int]:
    """Processes of Ray actors that descend from a process."""
    parents, actors = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            title = (entry / "cmdline").read_bytes()
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if title.startswith(b"ray::_Actor"):
            actors.append(int(entry.name))

    def descends(pid: int) -> bool:
        while pid in parents and pid != parent:
            pid = parents[pid]
        return pid == parent

    return [pid for pid in actors if descends(pid)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayEngine]:
    """A cluster of two cores on this machine, started as the command starts one."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # On a busy machine workers at Ray's own niceness of 15 would hardly ever start.
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        init = ray.init
        patch.setattr(ray, "init", lambda **options: init(num_cpus=2, num_gpus=0, **options))
        for tries in range(3):
            try:
                engine = stack.enter_context(open_cluster("local", None, 1, 1))
                break
            except ValueError as error:
                # Ray gives a node 30 seconds to start, which is not always enough beside other work.
                if tries == 2 or "timed out during startup" not in str(error):
                    raise
        for module in (sys.modules[__name__], sys.modules[make_prior.__module__]):
            ray.cloudpickle.register_pickle_by_value(module)
            stack.callback(ray.cloudpickle.unregister_pickle_by_value, module)
        yield engine
    assert not ray.is_initialized()


@dataclass
class Load:
    """Loads, in an actor, a teacher that does what a clip's file says.

    Attributes:
        folder: a clip that says "once" kills the first actor that reads it.
        error: raised instead; a number ends the actor's process.
        id: of the teacher.
        unseen: name of a file that the actor's node does not see.
    """

    folder: Path
    error: BaseException | int | None = None
    id: str = "t"
    unseen: str = ""

    def __call__(self, device: torch.device) -> Any:
        if isinstance(self.error, int):
            os._exit(self.error)
        if self.error is not None:
            raise self.error
        maker_module.read_frames = self.read_frames  # type: ignore[assignment]
        maker_module.extract_prior = self.extract_prior  # type: ignore[assignment]
        exists, unseen = Path.exists, self.unseen
        Path.exists = lambda path: path.name != unseen and exists(path)  # type: ignore[assignment, method-assign]
        return SimpleNamespace(id=self.id, device=device, max_frames=17)

    def read_frames(self, path: Path, **options: int) -> SimpleNamespace:
        says = path.read_text()
        if says.startswith("kill"):
            os._exit(1)
        if says.startswith("once"):
            mark = self.folder / f"{says}.mark"
            if not mark.exists():
                mark.touch()
                os._exit(1)
        if says.startswith("broken"):
            raise VideoError(path, "is no video")
        if says.startswith("slow"):
            time.sleep(1)
        return SimpleNamespace(frames=np.frombuffer(says.encode(), np.uint8), timestamps=[0.0])

    def extract_prior(self, teacher: Any, frames: np.ndarray, text: str, **settings: Any) -> MotionPrior:
        assert settings.pop("times") == [0.0]
        says = frames.tobytes().decode()
        if says.startswith("blank"):
            raise PriorError("it has no word")
        if says.startswith("cuda"):
            raise RuntimeError("CUDA error: an illegal memory access")
        made = make_prior(sum(frames.tolist()))
        return replace(made, prompt=f"{says}: {text}", settings=PriorSettings(**settings))


def request(folder: Path, says: str, **options: Any) -> PriorRequest:
    clip = folder / f"{says}.mp4"
    clip.write_text(says)
    return PriorRequest(clip, "text", NAME(content_digest(clip), "text"), **options)


def ray_on(engine: RayEngine, folder: Path, teachers: int = 1, cpus: int = 1, **load: Any) -> RayMaker:
    return replace(engine, teachers=teachers, cpus=cpus).maker(Load(folder, **load), "t", SETTINGS)


def made_of(maker: PriorMaker, folder: Path, *says: str) -> list[Made | BaseException]:
    return [found for _, _, found in make_all([(s, request(folder, s)) for s in says], maker)]


def answer(future: Future[Made]) -> Made | BaseException:
    try:
        return future.result(SECONDS)
    except (Exception, CancelledError) as error:
        return error


# ---- deaths ----


def test_a_clip_that_kills_its_actor_is_tried_once_more_and_then_recorded(
    cluster: RayEngine, tmp_path: Path
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
    assert str(found[1]).endswith("kill.mp4: 2 actors died while they read it")
    refused = {refusal.reason: refusal for _, refusal in store.refusals()}
    assert set(refused) == {
        "no prior: its clip kills the worker", "unreadable video", "no prior: the teacher cannot read it"
    }  # fmt: skip
    assert refused["no prior: its clip kills the worker"].unreadable
    assert len(stored(store.folder)) == 3
    again = ray_on(cluster, tmp_path)
    with closing(Stored(store, again, NAME, strict=True)) as keeps:
        found = made_of(keeps, tmp_path, *said)
    assert [type(one) for one in found] == [Made, RefusedClip, Made, RefusedClip, RefusedClip, Made]
    assert again.deaths == 0


def test_deaths_in_a_row_end_the_run(
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_maker, "DEATHS", 3)
    with closing(ray_on(cluster, tmp_path)) as maker:
        found = made_of(maker, tmp_path, "kill 0", "good", "kill 1", "good 1")
        assert [type(one) for one in found] == [KillerClip, Made, KillerClip, Made]
        assert maker.deaths == 4


def test_no_clip_is_blamed_for_an_actor_that_dies_while_its_teacher_loads(
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_maker, "DEATHS", 3)
    store = PriorStore(tmp_path / "priors")
    maker = ray_on(cluster, tmp_path, error=1)
    with closing(Stored(store, maker, NAME)) as keeps, pytest.raises(DeadTeacher, match="3 actors died one"):
        made_of(keeps, tmp_path, "good 0", "good 1")
    assert maker.deaths == 3
    assert not store.folder.exists()


# ---- nodes ----


def test_a_node_that_does_not_see_a_clip_says_which(cluster: RayEngine, tmp_path: Path) -> None:
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
    cluster: RayEngine, tmp_path: Path, load: dict[str, Any], said: str
) -> None:
    with closing(ray_on(cluster, tmp_path, **load)) as maker:
        errors = [answer(maker.submit(request(tmp_path, f"good {i}"))) for i in range(2)]
        assert maker.deaths == 0
    assert all(isinstance(error, DeadTeacher) and said in str(error) for error in errors), errors
    assert "on node " in str(errors[0])
    assert "same path" in str(errors[0])
    assert "\n" not in str(errors[0])


def test_an_actor_without_a_gpu_it_needs_says_so(tmp_path: Path, cluster: RayEngine) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with closing(ray_on(replace(cluster, device=torch.device("cuda")), tmp_path)) as maker:
        error = answer(maker.submit(request(tmp_path, "good")))
    assert isinstance(error, DeadTeacher)
    assert "has no GPU that it can use" in str(error)


def test_a_loader_that_cannot_be_sent_ends_the_run(cluster: RayEngine) -> None:
    lock = threading.Lock()
    maker = cluster.maker(lambda device: lock, "t", SETTINGS)  # type: ignore[arg-type, return-value]
    with closing(maker):
        error = answer(maker.submit(PriorRequest(Path("a.mp4"), "text")))
    assert isinstance(error, DeadTeacher)
    assert "pickle" in str(error)


# ---- failures ----


def test_failures_in_a_row_end_the_run_and_are_never_on_record(cluster: RayEngine, tmp_path: Path) -> None:
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


# ---- places in the cluster ----


@pytest.mark.parametrize("death", [False, True])
def test_actors_that_find_no_place_hold_up_nothing(cluster: RayEngine, tmp_path: Path, death: bool) -> None:
    """Three actors where one fits: the others wait, and may take the place of one that dies."""
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
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def test_closing_waits_for_what_was_begun_and_gives_up_the_rest(cluster: RayEngine, tmp_path: Path) -> None:
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
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = request(tmp_path, "good")
    with closing(ray_on(cluster, tmp_path)) as maker:
        made = answer(maker.submit(replace(good, video=Path("good.mp4"))))
    assert isinstance(made, Made)


# ---- the command ----


def poor_data(world: World, folder: Path) -> Path:
    """24 samples, some of one prior, one of a clip that is none, and a line that is no sample."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    more = [json.loads(json.dumps({**row, "id": f"{row['id']}-{n}"})) for n in range(3) for row in rows]
    for i, row in enumerate(more):
        # Another text is another prior; some are wanted twice.
        row["conversations"][-1]["value"] += " Again." * (i // 10)
    (world.videos / "broken.mp4").write_bytes(b"no video")
    more[4]["video"] = "broken.mp4"
    data = folder / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in more) + "{not json\n")
    return data


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds Ray's processes in /proc")
def test_killed_actors_and_drivers_change_nothing(world: World, tmp_path: Path) -> None:
    data, store = poor_data(world, tmp_path), PriorStore(tmp_path / "ray")
    flags = {"student": None, "data": data, "ddim_steps": 1}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 1
    whole = stored(tmp_path / "one")

    # Some of the work is done before, and some of that is damaged.
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "ray", limit=5)) == 1
    hurt = min(stored(tmp_path / "ray"))
    store.path(hurt).write_bytes(b"damaged")
    before = len(stored(tmp_path / "ray"))
    command = [*COMMAND, "--prior_engine", "ray", "--ray_workers", "2"]
    command += world.flags(**flags, prior_dir=tmp_path / "ray")

    def start(until: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and len(list(store)) < until:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1][-3000:]
        return process

    interrupted = start(before + 1)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=SECONDS)
    assert interrupted.returncode == 130, errors[-3000:]
    assert errors.splitlines()[-1] == "interrupted: start the same command again to go on"

    killed = start(len(list(store)) + 1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert stored(tmp_path / "ray").items() <= whole.items()
    assert len(list(store.refusals())) == 1

    process = start(len(list(store)) + 1)
    os.kill(random.Random(0).choice(actors_under(process.pid)), signal.SIGKILL)
    out, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, errors[-3000:]
    assert stored(tmp_path / "ray") == whole
    one, other = (json.loads((tmp_path / name / extract.REPORT).read_text()) for name in ("one", "ray"))
    assert other["worker_deaths"] == 1
    counts = {"unreadable video": 1, "invalid json": 1}
    assert other["skipped"]["counts"] == one["skipped"]["counts"] == counts
    assert sorted(other["skipped"]["entries"], key=str) == sorted(one["skipped"]["entries"], key=str)
    assert other["samples"] == one["samples"] == other["stored"] + other["made"] == 23
    assert (other["engine"], other["processes"]) == ("ray", 2)
    assert "samples have their prior" in out
    assert len(list(store.folder.rglob("*.damaged"))) == 1
    assert [refusal.reason for _, refusal in store.refusals()] == ["unreadable video"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--prior_engine", "ray", "--ray_workers", "0"],
        ["--engine", "ray", "--ray_cpus", "0"],
        ["--ray_workers", "2"],
        ["--ray_address", "a:1"],
        ["--ray_cpus", "2"],
        ["--prior_engine", "slurm"],
    ],
)
def test_bad_flags_are_named(world: World, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        extract.main([*world.flags(student=None), *flags])
    assert stop.value.code == 2
    assert flags[-2] in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError(f"no cluster at {options['address']}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    flags = world.flags(
        student=None, prior_dir=tmp_path / "p", prior_engine="ray", ray_address="10.0.0.1:6379"
    )
    assert extract.main(flags) == 2
    assert "error: --prior_engine ray: --ray_address 10.0.0.1:6379 (no cluster" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("processes", "given", "environment", "joined"),
    [
        (1, None, None, None),
        (2, None, None, "auto"),
        (2, None, "ray://head:10001", "ray://head:10001"),
        (2, "10.0.0.1:6379", "ray://head:10001", "10.0.0.1:6379"),
    ],
)
def test_several_processes_start_no_cluster_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    given: str | None,
    environment: str | None,
    joined: str | None,
) -> None:
    @contextmanager
    def cluster(address: str | None, *_: object) -> Iterator[str | None]:
        yield address

    state = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    monkeypatch.setattr(engine_module, "PartialState", lambda: state)
    monkeypatch.setattr(ray_maker, "open_cluster", cluster)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with engine_module.open_engine("ray", address=given) as address:
        assert address == joined
