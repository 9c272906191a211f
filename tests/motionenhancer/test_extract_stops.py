"""Extraction that is killed, interrupted, or can make no more priors."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from extract_support import COMMAND, ENVIRONMENT, damaged_world, report_in, stored
from tiny_world import World

from motionenhancer import extract
from motionenhancer.priors import maker, reader
from motionenhancer.priors.storage import PriorStore


def test_killed_at_random_it_ends_with_the_store_of_an_undisturbed_run(world: World, tmp_path: Path) -> None:
    kills, clips = int(os.environ.get("KILLS", "3")), int(os.environ.get("KILLED_CLIPS", "12"))
    data, videos = damaged_world(world, tmp_path / "world", clips, max(2, clips // 20))
    chosen = {"student": None, "data": data, "video_root": videos, "ddim_steps": 1}
    assert extract.main(world.flags(**chosen, prior_dir=tmp_path / "whole")) == 1
    whole = stored(tmp_path / "whole")
    assert len(whole) == clips - max(2, clips // 20)

    command = [*COMMAND, *world.flags(**chosen, prior_dir=tmp_path / "killed")]
    rng = random.Random(0)
    store = PriorStore(tmp_path / "killed")
    for kill in range(kills):
        # The process is killed when it has made a few more priors and works on the next.
        until = len(list(store)) + rng.randrange(1, max(2, 2 * clips // (3 * kills)))
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while len(list(store)) < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        ended = process.poll()
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert ended is None, (kill, errors.decode()[-2000:])
        if kill % 2 and len(list(store)):
            # As a disk that was full, or a machine that lost power, would leave it.
            hurt = store.path(rng.choice(sorted(store)))
            hurt.write_bytes(hurt.read_bytes()[: rng.randrange(200)])
    assert 0 < len(stored(tmp_path / "killed")) < len(whole)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert stored(tmp_path / "killed") == whole


def test_interrupted_it_ends_and_says_so_and_goes_on(world: World, tmp_path: Path) -> None:
    data, videos = damaged_world(world, tmp_path / "world", 10, 1)
    chosen = {"student": None, "data": data, "video_root": videos, "ddim_steps": 1}
    command = [*COMMAND, *world.flags(**chosen, prior_dir=tmp_path / "stopped")]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    store = PriorStore(tmp_path / "stopped")
    while len(list(store)) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-2000:]
    assert errors.splitlines()[-1].startswith("interrupted: every finished prior is kept in ")
    assert "Traceback" not in errors
    assert len(list(store)) < 9
    assert list(store.folder.rglob("*.tmp")) == []
    assert extract.main(world.flags(**chosen, prior_dir=tmp_path / "stopped")) == 1
    assert extract.main(world.flags(**chosen, prior_dir=tmp_path / "whole")) == 1
    assert stored(tmp_path / "stopped") == stored(tmp_path / "whole")


def test_a_teacher_that_cannot_be_loaded_ends_the_run_in_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = []

    def refuse(*args: object, **options: object) -> None:
        loads.append(1)
        raise RuntimeError("size mismatch\n\tfor transformer.proj_out.weight")

    monkeypatch.setattr("motionenhancer.priors.arguments.load_teacher", refuse)
    flags = world.flags(student=None, prior_dir=tmp_path, ddim_steps=1)
    assert extract.main(flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said == ["error: RuntimeError: size mismatch for transformer.proj_out.weight"]
    assert len(loads) == 1
    report = report_in(tmp_path)
    assert (report["status"], report["error"]) == ("failed", said[0].removeprefix("error: "))
    assert stored(tmp_path) == {}


def test_a_teacher_that_fails_on_everything_ends_the_run_and_one_failure_does_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = reader.extract_prior, []

    def fail(times: int):
        calls.clear()

        def extract_prior(*args: object, **options: object):
            calls.append(1)
            if len(calls) <= times:
                raise RuntimeError("CUDA error: out of memory")
            return real(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(reader, "extract_prior", extract_prior)

    flags = world.flags(student=None, prior_dir=tmp_path, ddim_steps=1)
    fail(100)
    assert extract.main(flags) == 2
    assert len(calls) == maker.PATIENCE == 8
    printed = capsys.readouterr()
    assert (
        "error: the teacher failed on 8 clips in a row, the last time with RuntimeError: CUDA" in printed.err
    )
    fail(1)
    assert extract.main(flags) == 1
    printed = capsys.readouterr()
    assert "7 samples have their prior" in printed.out
    assert "1 no prior: the teacher failed on it (line 1" in printed.out
    assert "RuntimeError: CUDA error: out of memory" in printed.out
    assert list(PriorStore(tmp_path).refusals()) == []
    fail(0)
    assert extract.main(flags) == 0
    assert len(calls) == 1
    assert len(stored(tmp_path)) == 8


def test_a_store_that_cannot_be_written_ends_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PriorStore, "write", full)
    assert extract.main(world.flags(student=None, prior_dir=tmp_path, ddim_steps=1)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said == [f"error: the store {tmp_path} cannot be written (No space left on device)"]
    (tmp_path / "file").touch()
    assert extract.main(world.flags(student=None, prior_dir=tmp_path / "file", ddim_steps=1)) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
