"""The command with Ray: the store of one process, whatever dies on the way, and a cluster with a token."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from extract_support import COMMAND, stored
from extract_support import ENVIRONMENT as EXTRACT_ENVIRONMENT
from ray_support import SECONDS, ray
from test_processes import launch_two
from tiny_world import World

from motionenhancer import extract
from motionenhancer.priors import engine as engine_module
from motionenhancer.priors import ray_maker
from motionenhancer.priors.ray_maker import Cluster
from motionenhancer.priors.storage import PriorStore

ENVIRONMENT = {**EXTRACT_ENVIRONMENT, "RAY_worker_niceness": "0"}


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


def poor_data(world: World, folder: Path) -> Path:
    """24 samples, of which some share a prior and one has a broken clip, and a line that is no sample."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    more = [json.loads(json.dumps({**row, "id": f"{row['id']}-{n}"})) for n in range(3) for row in rows]
    for i, row in enumerate(more):
        # Another text needs another prior; some priors are needed twice.
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

    # Five samples are extracted before, and one of their priors is damaged.
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
    assert errors.splitlines()[-1].startswith("interrupted: every finished prior is kept in ")

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
    one, other = (json.loads((tmp_path / name / extract.EXTRACTION).read_text()) for name in ("one", "ray"))
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
    addresses: list[str | None] = []

    @contextmanager
    def cluster(address: str | None, *_: object) -> Iterator[Cluster]:
        addresses.append(address)
        yield Cluster(torch.device("cpu"), 1, 1, 0.0)

    state = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    monkeypatch.setattr(engine_module, "PartialState", lambda: state)
    monkeypatch.setattr(ray_maker, "open_cluster", cluster)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with engine_module.MakerArguments("ray", ray_address=given).open() as engine:
        assert engine.teachers == 1
    assert addresses == [joined]


# ---- one cluster of several processes ----


@pytest.fixture(scope="module")
def guarded() -> Iterator[dict[str, str]]:
    """A cluster of `ray start` that asks for a token; yields the environment of a process with the token."""
    folder = tempfile.mkdtemp(prefix="ray-")  # Paths of Ray's sockets must be short.
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    known = {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)),
        *("--num-cpus", "2", "--num-gpus", "0", "--temp-dir", folder, "--include-dashboard", "false"),
        "--disable-usage-stats",
    ]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "RAY_ADDRESS"}
    started = {k: v for k, v in known.items() if k != "RAY_ADDRESS"}
    head = subprocess.Popen(
        command, env={**environment, **started}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert head.stdout is not None
        said = []
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError("".join(said))
        yield known
    finally:
        head.terminate()
        head.communicate(timeout=SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def test_two_processes_on_one_cluster_make_the_store_of_one(
    world: World, tmp_path: Path, guarded: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"student": None, "ddim_steps": 1}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 0
    for name, value in guarded.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = world.flags(**flags, prior_dir=tmp_path / "two", prior_engine="ray")
    done = launch_two(["-m", "motionenhancer.extract", *given])
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "two" / extract.EXTRACTION).read_text())
    assert (report["engine"], report["processes"], report["made"]) == ("ray", 2, 8)
    assert len(report["made_each"]) == 2
    assert min(report["made_each"]) > 0
    assert stored(tmp_path / "two") == stored(tmp_path / "one")


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_whose_token_is_missing_says_what_to_do(
    world: World, tmp_path: Path, guarded: dict[str, str], mode: str
) -> None:
    address = guarded["RAY_ADDRESS"]
    flags = world.flags(
        student=None, prior_dir=tmp_path / "p", prior_engine="ray", ray_address=address, ddim_steps=1
    )
    # A home without a token.
    environment = {**ENVIRONMENT, "HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
    done = subprocess.run([*COMMAND, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: --prior_engine ray: --ray_address {address} asks for a token")
    for part in ("~/.ray/auth_token", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE=token"):
        assert part in said
    assert not (tmp_path / "p").exists()
