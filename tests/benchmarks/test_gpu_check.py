"""scripts/gpu_check.sh without a GPU: its plan, its arguments, and what it does when a stage fails."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from measure.records import append, read, summary
from test_benchmark_measuring import WITHOUT

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash and timeout"
)

PYTHON = """#!/usr/bin/env bash
echo "$*" >> {calls}
case "$*" in
    *is_available*) exit {gpu} ;;
    *find_spec*) exit 1 ;;
    *record_check*) exec {python} "$@" ;;
    *goals.py*) {goals} ;;
    *mekernels.build*) {build} ;;
    *"pytest -m gpu"*) {tests} ;;
    *--benchmark-json*) {benchmarks} ;;
esac
"""


def run(*arguments, env=None):
    environment = {**os.environ, "PYTHON": sys.executable, **(env or {})}
    environment.pop("OUT", None) if not env or "OUT" not in env else None
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], text=True, capture_output=True, env=environment, timeout=120
    )


@pytest.fixture
def stub(tmp_path):
    """An interpreter that only records its arguments, and a compute-sanitizer that runs it."""

    def make(
        gpu=0,
        goals="exit 0",
        build="exit 0",
        tests="echo 3 passed, 2 skipped",
        benchmarks="exit 0",
        sanitizer=True,
    ):
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        calls = tmp_path / "calls"
        python = tools / "python-stub"
        python.write_text(
            PYTHON.format(
                calls=shlex.quote(str(calls)),
                python=shlex.quote(sys.executable),
                gpu=gpu,
                goals=goals,
                build=build,
                tests=tests,
                benchmarks=benchmarks,
            )
        )
        python.chmod(0o755)
        if sanitizer:
            tool = tools / "compute-sanitizer"
            tool.write_text(f'#!/usr/bin/env bash\necho sanitizer "$*" >> {shlex.quote(str(calls))}\n')
            tool.chmod(0o755)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        return {"PYTHON": str(python), "PATH": path}, calls

    return make


def record(folder):
    (path,) = folder.glob("*.jsonl")
    machine, *entries = map(json.loads, path.read_text().splitlines())
    assert machine["kind"] == "machine"
    assert machine["device"]
    assert machine["versions"]["torch"]
    return {entry["stage"]: entry for entry in entries if entry["kind"] == "stage"}


def test_dry_run_prints_every_stage_and_changes_nothing(tmp_path):
    before = set((ROOT / "benchmarks" / "results").glob("*"))
    done = run("--dry-run", "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^\[(\w+)\] at most", done.stdout, re.MULTILINE)
    assert stages == ["goals", "build", "tests", "benchmarks", "sanitizer"]
    assert "-m pytest -m gpu" in done.stdout
    assert "--tool memcheck" in done.stdout
    assert not (tmp_path / "results").exists()
    assert set((ROOT / "benchmarks" / "results").glob("*")) == before


def test_dry_run_commands_exist(stub):
    """Every file and module that the plan names is there."""
    done = run("--dry-run", env=stub(gpu=1)[0])
    named = set(re.findall(r"(?:tests|benchmarks)/[\w/.]+\.py", done.stdout))
    assert len(named) >= 3
    assert all((ROOT / name).is_file() for name in named)
    assert (ROOT / "mekernels" / "build.py").is_file()
    assert (ROOT / "tests" / "mekernels").is_dir()


def test_stages_and_budget_shape_the_plan(stub):
    done = run("--dry-run", "--stages", "tests,sanitizer", "--budget", "200", env=stub()[0])
    assert done.returncode == 0
    limits = dict(re.findall(r"\[(\w+)\] at most (\d+) s", done.stdout))
    assert set(limits) == {"tests", "sanitizer"}
    assert int(limits["tests"]) < int(limits["sanitizer"]) <= 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "build,test"], "unknown stage 'test'"),
        (["--stages", ""], "--stages is empty"),
        (["--budget", "ten"], "--budget must be a whole number of seconds, got 'ten'"),
        (["--budget", "0"], "--budget must be"),
        (["--budget"], "--budget needs a value"),
        (["--fast"], "unknown argument --fast"),
    ],
)
def test_bad_arguments(arguments, message):
    done = run("--dry-run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_no_gpu_is_said(stub, tmp_path):
    environment, _ = stub(gpu=1)
    done = run("--results", str(tmp_path / "results"), env=environment)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "results").exists()


def test_all_stages_pass(stub, tmp_path):
    environment, calls = stub()
    out = tmp_path / "out"
    out.mkdir()
    done = run("--results", str(tmp_path / "results"), env={**environment, "OUT": str(out)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert {entry["outcome"] for entry in record(tmp_path / "results").values()} == {"passed"}
    assert record(out)["build"]["outcome"] == "passed"
    (log,) = out.glob("*.log")
    assert "3 passed" in log.read_text()
    assert list(record(out)) == ["goals", "build", "tests", "benchmarks", "sanitizer"]
    asked = calls.read_text()
    for expected in ("goals.py", "-m mekernels.build", "-m pytest -m gpu", "--benchmark-only", "report.py"):
        assert expected in asked
    assert asked.count("sanitizer --tool") == 2


def test_a_failing_stage_does_not_stop_the_others(stub, tmp_path):
    environment, calls = stub(build="echo broken; exit 3", sanitizer=False)
    done = run("--results", str(tmp_path / "results"), "--stages", "build,tests", env=environment)
    assert done.returncode == 1
    outcomes = record(tmp_path / "results")
    assert outcomes["build"]["outcome"] == "failed"
    assert "status 3" in outcomes["build"]["why"]
    assert outcomes["tests"]["outcome"] == "passed"
    assert "[benchmarks] not chosen" in done.stdout
    assert "-m pytest -m gpu" in calls.read_text()


def test_a_stage_that_hangs_is_stopped_and_named(stub, tmp_path):
    environment, _ = stub(build="exec sleep 60")
    done = run("--results", str(tmp_path / "results"), "--stages", "build", "--budget", "15", env=environment)
    assert done.returncode == 1
    why = record(tmp_path / "results")["build"]["why"]
    assert "stopped at its limit" in why


def test_what_does_not_fit_is_said(stub, tmp_path):
    environment, calls = stub()
    done = run(
        "--results", str(tmp_path / "results"), "--stages", "benchmarks", "--budget", "30", env=environment
    )
    assert done.returncode == 1
    assert record(tmp_path / "results")["benchmarks"]["outcome"] == "did not fit"
    assert "did not fit" in done.stdout
    assert "--benchmark-only" not in calls.read_text()


def test_a_missing_sanitizer_fails_its_stage(stub, tmp_path):
    if shutil.which("compute-sanitizer") or Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("compute-sanitizer is installed here")
    environment, _ = stub(sanitizer=False)
    done = run("--results", str(tmp_path / "results"), "--stages", "sanitizer", env=environment)
    assert done.returncode == 1
    assert "not installed" in record(tmp_path / "results")["sanitizer"]["why"]


def test_results_go_straight_to_out(stub, tmp_path):
    """A killed run keeps its results: each line is written before the next stage begins."""
    out = tmp_path / "out"
    out.mkdir()
    seen = f"cat {shlex.quote(str(out))}/*.jsonl > {shlex.quote(str(tmp_path / 'seen'))}"
    environment, _ = stub(goals="exit 1", build=seen)
    done = run("--stages", "goals,build", env={**environment, "OUT": str(out)})
    assert done.returncode == 1
    kinds = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [entry["kind"] for entry in kinds] == ["machine", "stage"]
    assert kinds[1]["outcome"] == "failed"


def test_a_long_log_is_read_to_its_end(stub, tmp_path):
    environment, _ = stub(tests="echo 1 passed; yes PASSED | head -n 300000; echo 9 passed")
    done = run("--results", str(tmp_path / "results"), "--stages", "tests", env=environment)
    assert done.returncode == 0, done.stdout[-500:]


def test_tests_that_all_skip_are_no_success(stub, tmp_path):
    environment, _ = stub(tests="echo 300 skipped")
    done = run("--results", str(tmp_path / "results"), "--stages", "tests", env=environment)
    assert done.returncode == 1
    assert "no test passed" in record(tmp_path / "results")["tests"]["why"]


def test_products_on_a_gpu_are_reproducible(stub, tmp_path):
    environment, _ = stub(build="echo workspace=$CUBLAS_WORKSPACE_CONFIG interpreter=$TRITON_INTERPRET")
    # transformers' full_determinism, which other tests try, leaves a workspace of its own in the process.
    environment |= {"TRITON_INTERPRET": "", "CUBLAS_WORKSPACE_CONFIG": ""}
    done = run("--results", str(tmp_path / "results"), "--stages", "build", env=environment)
    assert "workspace=:4096:8 interpreter=\n" in done.stdout


def test_a_rehearsal_needs_no_gpu(stub, tmp_path):
    environment, calls = stub(gpu=1, build="echo interpreter=$TRITON_INTERPRET")
    done = run("--rehearse", "--results", str(tmp_path / "results"), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(record(tmp_path / "results")) == ["goals", "build", "tests", "benchmarks"]
    assert "interpreter=1" in done.stdout
    assert calls.read_text().count("--size tiny") == 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_test_of_a_kernel_is_selected_without_the_other_packages(tmp_path):
    """The GPU stage selects them on a machine without av and diffusers too, also from the parent folder."""
    (tmp_path / "without_some.py").write_text(WITHOUT)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-p", "without_some", "tests"],
        text=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "tests" / "mekernels").glob("test_triton_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            assert f"{path.name}::{name}" in done.stdout
    assert "tests/benchmarks/test_benchmark_checks.py::" in done.stdout
    assert (
        "not collected: tests/examples, tests/motionenhancer, tests/studies; not installed: av" in done.stdout
    )
    assert "tests/motionenhancer/" not in done.stdout


def test_goals_are_written_as_they_come(tmp_path, monkeypatch):
    """There is one line for each: a goal that fails, is missed, has no bound, or lacks a package."""
    import goals

    def broken():
        raise AssertionError("ours is wrong: 3 % of the entries")

    def lacking():
        raise goals.Skipped("transformers is not installed")

    seen = []

    def after():
        seen.append(len(read(path)))
        return {"value": 2.0, "host_seconds": 1e-3}

    path = tmp_path / "r.jsonl"
    planned = [
        goals.Goal("a", "x", broken, most=1),
        goals.Goal("b", "x", after, most=1.5),
        goals.Goal("c", "ms", after, least=2),
        goals.Goal("d", "", after),
        goals.Goal("e", "", lacking, most=1),
    ]
    monkeypatch.setattr(goals, "goals", lambda size: iter(planned))
    monkeypatch.setattr(goals.device, "on_gpu", lambda: True)
    monkeypatch.setattr(goals.torch.cuda, "empty_cache", lambda: None)
    assert goals.main([str(path)]) == 1
    assert seen == [1, 2, 3]
    outcomes = {entry["goal"]: entry["outcome"] for entry in read(path)}
    assert outcomes == {"a": "failed", "b": "missed", "c": "reached", "d": "recorded", "e": "skipped"}
    assert read(path)[0]["why"].startswith("AssertionError: ours is wrong")
    assert read(path)[1]["host_seconds"] == 1e-3
    assert summary(read(path)).splitlines()[1] == "goal   missed     b: 2 x (wanted at most 1.5)"
    late = tmp_path / "late.jsonl"
    assert goals.main([str(late), "--deadline", "-1"]) == 1
    assert {entry["outcome"] for entry in read(late)} == {"no time"}


def test_goals_run_here():
    """At the smallest size the goals run without judging figures, and none fails."""
    import goals

    entries = [goals.take(goal, judged=False) for goal in goals.goals("tiny")]
    assert {entry["outcome"] for entry in entries} <= {"rehearsed", "skipped"}, entries
    assert sum(entry["outcome"] == "rehearsed" for entry in entries) >= 3
    assert all(entry["why"] for entry in entries if entry["outcome"] == "skipped")


def test_a_cut_off_line_is_left_out(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, kind="goal", goal="a", unit="", wanted="", outcome="recorded", value=1)
    path.write_text(path.read_text() + '{"kind": "go')
    assert [entry["goal"] for entry in read(path)] == ["a"]
