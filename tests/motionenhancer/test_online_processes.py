"""Priors made while training in several processes, as torchrun starts them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from online_worker import digest
from test_train_distributed import environment
from tiny_world import World
from train_support import flags, report_of, weights_of

from motionenhancer.priors.storage import PriorStore
from motionenhancer.teachers import load_teacher

OPTIONS = {"max_steps": 2, "limit": 4, "per_device_train_batch_size": 1, "prior_source": "online"}
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def torchrun(count: int, *command: object) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), str(here)])
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def same_weights(one: Path, other: Path) -> None:
    expected = weights_of(one)
    for name, value in weights_of(other).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in report_of(out)["training"]["log"] if "loss" in entry]


@pytest.fixture(scope="module")
def pair(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, a teacher each, under every engine in one launch: starting takes longest."""
    folder = tmp_path_factory.mktemp("pair")
    engines = ["ddp", "fsdp2", *(["zero3"] if DEEPSPEED else [])]
    runs = [
        {
            "environment": environment(engine),
            "flags": flags(world, folder / engine, **OPTIONS),
            "teacher": str(world.teacher),
        }
        for engine in engines
    ]
    hybrid = {**OPTIONS, "prior_source": "hybrid", "prior_dir": folder / "priors"}
    for name in ("hybrid", "stored"):
        source = "store" if name == "stored" else "hybrid"
        chosen = flags(world, folder / name, **{**hybrid, "prior_source": source})
        runs.append({"environment": {}, "flags": chosen})
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(2, Path(__file__).with_name("online_worker.py"), folder / "runs.json")
    return folder


def test_each_process_has_a_teacher_and_ends_as_with_stored_priors(pair: Path) -> None:
    report = report_of(pair / "ddp")
    online = report["teacher"]["online"]
    assert (online["made"], online["failed"], len(online["memory"])) == (4, 0, 2)
    assert len(report["samples"]) == 4, "the report tells of both processes' clips"
    assert len(list(PriorStore(pair / "priors"))) == 4
    same_weights(pair / "stored", pair / "ddp")
    same_weights(pair / "stored", pair / "hybrid")


def test_no_engine_touches_the_teacher(pair: Path, world: World) -> None:
    whole = digest(load_teacher(world.teacher, "cpu"))
    students = ["DistributedDataParallel", "FSDPQwen2_5_VLForConditionalGeneration"]
    students += ["DeepSpeedEngine"] * DEEPSPEED + ["DistributedDataParallel"]
    for rank in range(2):
        *runs, ram_efficient = json.loads((pair / f"teacher-{rank}.json").read_text())
        assert [run["student"] for run in runs] == students
        for run in runs:
            assert run["digest"] == whole
            assert run["kinds"] == ["AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel", "T5EncoderModel"]
            assert (run["shared"], run["wants gradients"], run["has gradients"]) == (0, 0, 0)
        assert ram_efficient["digest"] == whole


def test_every_engine_learns_from_the_same_priors(pair: Path) -> None:
    expected = losses(pair / "ddp")
    assert len(expected) == 2
    for engine in ("fsdp2", "zero3") if DEEPSPEED else ("fsdp2",):
        assert losses(pair / engine) == pytest.approx(expected, rel=1e-4), engine
        named = {
            name for name in weights_of(pair / engine) if "teacher" in name or "transformer_blocks" in name
        }
        assert not named
        assert set(weights_of(pair / engine)) == set(weights_of(pair / "ddp"))
