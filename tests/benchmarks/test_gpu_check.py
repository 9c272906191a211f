"""scripts/gpu_check.sh without a GPU: its plan, its arguments, and what it does when a stage fails."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    """An interpreter that only notes what it is asked for, and a compute-sanitizer that runs it."""

    def make(gpu=0, build="exit 0", tests="exit 0", benchmarks="exit 0", sanitizer=True):
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        calls = tmp_path / "calls"
        python = tools / "python-stub"
        python.write_text(
            PYTHON.format(
                calls=shlex.quote(str(calls)),
                python=shlex.quote(sys.executable),
                gpu=gpu,
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
    (path,) = folder.glob("*-check.json")
    content = json.loads(path.read_text())
    assert content["device"]
    assert content["versions"]["torch"]
    return {entry["stage"]: entry for entry in content["stages"]}


def test_dry_run_prints_every_stage_and_changes_nothing(tmp_path):
    before = set((ROOT / "benchmarks" / "results").glob("*"))
    done = run("--dry-run", "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    for stage in ("build", "tests", "benchmarks", "sanitizer"):
        assert f"[{stage}] at most" in done.stdout
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
    assert {path.name for path in out.glob("*.log")} <= {f"{s}.log" for s in record(out)}
    asked = calls.read_text()
    for expected in ("-m mekernels.build", "-m pytest -m gpu", "--benchmark-only", "report.py"):
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
    done = run("--results", str(tmp_path / "results"), "--stages", "build", "--budget", "6", env=environment)
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
