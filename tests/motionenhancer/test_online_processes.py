"""Priors made while training in several processes, as torchrun starts them: each its own teacher, or ranks of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_world import World
from train_support import flags, report_of, weights_of

from motionenhancer import train

OPTIONS = {"max_steps": 2, "limit": 4, "prior_source": "online", "per_device_train_batch_size": 1}


def torchrun(count: int, *command: str, **environment: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )


def run(count: int, world: World, out: Path, **options: object) -> dict:
    done = torchrun(count, "-m", "motionenhancer.train", *flags(world, out, **{**OPTIONS, **options}))
    assert done.returncode == 0, done.stderr[-3000:]
    return report_of(out)


def same_weights(one: Path, other: Path) -> None:
    expected = weights_of(one)
    for name, value in weights_of(other).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_two_trainers_with_a_teacher_each_end_as_with_stored_priors(world: World, tmp_path: Path) -> None:
    report = run(2, world, tmp_path / "online")
    online = report["teacher"]["online"]
    assert (online["made"], online["failed"], len(online["memory"])) == (4, 0, 2)
    assert len(report["samples"]) == 4, "the report tells of both processes' clips"
    run(2, world, tmp_path / "hybrid", prior_source="hybrid")
    run(2, world, tmp_path / "stored", prior_source="store")
    same_weights(tmp_path / "stored", tmp_path / "online")
    same_weights(tmp_path / "stored", tmp_path / "hybrid")


def test_one_trainer_and_one_teacher_are_one_process_with_both(world: World, tmp_path: Path) -> None:
    assert train.main(flags(world, tmp_path / "one", **OPTIONS)) == 0
    report = run(2, world, tmp_path / "two", teacher_ranks=1)
    same_weights(tmp_path / "one", tmp_path / "two")
    online = report["teacher"]["online"]
    assert (online["made"], online["stored"], online["failed"]) == (2, 0, 0)
    assert online["busy_seconds"] > 0
    assert [sample["seconds"]["reconstruct"] > 0 for sample in report["samples"]] == [True, True]
    assert not (tmp_path / "priors").exists()


def test_two_trainers_share_a_teacher(world: World, tmp_path: Path) -> None:
    run(2, world, tmp_path / "each")
    report = run(3, world, tmp_path / "shared", teacher_ranks=1, prior_source="hybrid")
    same_weights(tmp_path / "each", tmp_path / "shared")
    assert report["teacher"]["online"]["made"] == 4
    again = run(3, world, tmp_path / "again", teacher_ranks=1, prior_source="hybrid")
    assert "online" not in again["teacher"], "nothing was missing"
    same_weights(tmp_path / "each", tmp_path / "again")


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (1, {"teacher_ranks": 1}, "--teacher_ranks 1 must leave a rank to train, but the launch has 1"),
        (2, {"teacher_ranks": 1, "ddim_steps": 3}, "steps=3"),
        (2, {"teacher_ranks": 1, "prior_source": "store"}, "--teacher_ranks 1 with --prior_source store"),
    ],
)
def test_one_clear_error(world: World, tmp_path: Path, count: int, options: dict, said: str) -> None:
    command = flags(world, tmp_path / "out", **{**OPTIONS, **options})
    done = torchrun(count, "-m", "motionenhancer.train", *command)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
