"""A benchmark gives no figure for a kernel with wrong results, even slightly wrong ones."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import (
    alignment,
    device,
    scores,
    student_entries,
    student_layer,
    student_readings,
    student_rows,
    teacher_layer,
)
from measure.dispatch import chosen, others
from measure.sampler import verify
from report import main as report

from mekernels import backends
from mekernels.attention_rows import composite

ROOT = Path(__file__).resolve().parents[2]


def statistics_plans(size):
    return student_readings.plans(size)[-1:]


BREAKS = [
    (teacher_layer.layer_plans, "motion_statistics_update", "mutates"),
    (teacher_layer.layer_plans, "flash_attention", 0),
    (teacher_layer.layer_plans, "flash_attention", 1),
    (teacher_layer.diagonal_plans, "diagonal_attention", None),
    (student_rows.plans, "attention_rows", 0),
    (student_rows.plans, "attention_rows_backward", 0),
    (student_rows.plans, "attention_rows_backward", 1),
    (student_entries.column_plans, "attention_columns", None),
    (student_entries.sum_plans, "attention_sums", None),
    (student_entries.sum_plans, "attention_entries_backward", 1),
    (statistics_plans, "attention_row_statistics", 0),
    (statistics_plans, "attention_row_statistics", 1),
    (scores.head_plans, "motion_scores", 0),
    (scores.head_plans, "motion_scores", 1),
    (scores.token_plans, "token_motion_scores", None),
    (alignment.plans, "align_rows", 0),
    (alignment.plans, "align_rows", 1),
    (alignment.plans, "resample_rows", 0),
    (alignment.plans, "resample_rows_backward", None),
    (alignment.plans, "row_l2_loss", 0),
    (alignment.plans, "row_l2_loss_backward", None),
]

PLUGIN = """
import dataclasses
from mekernels import backends, motion_scores

for name, backend in list(backends.table("motion_scores").items()):
    def broken(*args, run=backend.run):
        dfc, tcs, dsr = run(*args)
        return dfc, tcs * 1.001, dsr
    backends._table["motion_scores"][name] = dataclasses.replace(backend, run=broken)
"""


def break_op(monkeypatch, op, which):
    """Make one entry of the result of every backend of an op too large by a thousandth."""

    def worse(tensor):
        place = torch.unravel_index(tensor.abs().argmax(), tensor.shape)
        tensor[place] *= 1.001
        return tensor

    def broken(run):
        def call(*args):
            result = run(*args)
            if which == "mutates":
                worse(args[0])
                return result
            if which is None:
                return worse(result)
            return tuple(worse(part) if i == which else part for i, part in enumerate(result))

        return call

    for name, backend in backends.table(op).items():
        monkeypatch.setitem(backends._table[op], name, dataclasses.replace(backend, run=broken(backend.run)))


@pytest.mark.parametrize(("plans", "op", "which"), BREAKS)
def test_a_broken_kernel_is_refused(monkeypatch, plans, op, which):
    plan = plans("tiny")[0]
    apart = op.startswith(("resample_rows", "row_l2_loss"))
    role = alignment.TWO_OPS if apart else "ours"
    assert verify(plan.build(), role) == ""
    with monkeypatch.context() as patch:
        break_op(patch, op, which)
        assert verify(plan.build(), role) != ""


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_broken_capture_is_refused(monkeypatch, which):
    """A capture reads in a different way on a CPU than on a GPU."""
    plan = student_layer.plans("tiny")[0]
    assert verify(plan.build(), "ours") == ""
    with monkeypatch.context() as patch:
        if device.on_gpu():
            break_op(patch, "attention_rows" if which == "forward" else "attention_rows_backward", 0)
        elif which == "forward":
            right = composite.layer_attention_rows
            broken = lambda *args, **options: right(*args, **options) * 1.001  # noqa: E731
            patch.setattr("motionenhancer.students.entries.layer_attention_rows", broken)
        else:
            right = composite._Layers.gradients
            broken = lambda *args: right(*args) * 1.001  # noqa: E731
            patch.setattr(composite._Layers, "gradients", broken)
        assert verify(plan.build(), "ours") != ""


@pytest.mark.parametrize(
    "plans", [teacher_layer.layer_plans, student_rows.plans, scores.head_plans, alignment.plans]
)
def test_unwritten_elements_are_refused(monkeypatch, plans):
    """Elements that a kernel does not write are NaN during a check."""
    plan = plans("tiny")[0]
    work = plan.build()
    right = work.roles["ours"]

    def unwritten(*inputs):
        result = right(*inputs)
        first = result[0] if isinstance(result, tuple) else result
        lost = torch.empty_like(first)
        changed = (lost, *result[1:])
        return type(result)(*changed) if hasattr(result, "_fields") else changed

    work.roles["ours"] = unwritten
    assert verify(work, "ours") != ""


def test_an_exception_is_a_refusal(monkeypatch):
    work = scores.token_plans("tiny")[0].build()

    def stop(*inputs):
        raise RuntimeError("no such kernel image")

    work.roles["ours"] = stop
    assert "no such kernel image" in verify(work, "ours")


def test_backends_appear_by_themselves(monkeypatch):
    found = backends.table("token_motion_scores")["torch"]
    slow = dataclasses.replace(found, run=lambda *args: found.run(*args))
    monkeypatch.setitem(backends._table["token_motion_scores"], "triton", slow)
    probe = scores._probe_tokens
    automatic = chosen(probe)["token_motion_scores"]
    assert automatic not in others("token_motion_scores", probe)
    assert "triton" in others("token_motion_scores", probe)
    refusing = dataclasses.replace(found, reasons=lambda *args: ["not today"])
    monkeypatch.setitem(backends._table["token_motion_scores"], "triton", refusing)
    assert "triton" not in others("token_motion_scores", probe)


def test_a_whole_run_with_a_broken_kernel(tmp_path, capsys):
    (tmp_path / "break_motion_scores.py").write_text(PLUGIN)
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks" / "test_bench_scores.py")]
    command += ["--benchmark-only", "-q", "--size", "tiny", "--seconds", "0.02", "--rootdir", str(ROOT)]
    command += [f"--benchmark-json={path}", "-p", "break_motion_scores", "-p", "no:cacheprovider"]
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # pytest-benchmark measures nothing in a process of `pytest -n N`, and this test's own may be one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**own, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "refused, its correctness check failed" in done.stdout
    content = json.loads(path.read_text())
    figures = [entry["extra_info"] for entry in content["benchmarks"]]
    assert {entry["role"] for entry in figures if entry["work"] == "token_motion_scores"} >= {
        "ours",
        "plain torch",
    }
    left = [entry for entry in figures if entry["work"] == "motion_scores"]
    assert [entry["role"] for entry in left] == ["plain torch"]
    assert left[0]["over_ours"] is None
    refused = [entry["role"] for entry in content["refused"]]
    assert "ours" in refused
    assert report([str(path)]) == 1
    assert "REFUSED, the correctness check failed:" in capsys.readouterr().out
    for entry in figures:
        for name in ("shapes", "dtype", "peak_bytes", "device", "versions", "seconds", "length"):
            assert entry[name], name
