"""The benchmark of priors made while training: it checks before it measures, and keeps its bound on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "online_cost.py"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=540)


def test_every_way_of_training_gets_its_row() -> None:
    done = run("--size", "tiny", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {line[:22].strip(): line[22:].split() for line in done.stdout.splitlines()}
    for role in ("plain step", "stored priors", "online, single-pass", "online, full"):
        assert float(rows[role][0]) > 0, role
    assert rows["stored priors"][2] == "1.00"
    hidden = [rows[role][-1] for role in ("online, single-pass", "online, full")]
    assert all(share.endswith("%") and 0 <= int(share[:-1]) <= 100 for share in hidden)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the bound is of a GPU, and there is none")
def test_a_single_pass_step_keeps_its_bound() -> None:
    for package in ("av", "diffusers"):
        pytest.importorskip(package)
    done = run("--size", "real")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
