"""SIGINT and SIGTERM end a command in one line, at any moment; a run is safe to type again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World
from train_support import flags, report_of, shared_priors

from motionenhancer import eval as evaluation
from motionenhancer import interrupts, train
from motionenhancer.report.run_report import RunReport

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def start(*command: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**ENVIRONMENT, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[str], number: int, when: Callable[[], bool]) -> tuple[int, str]:
    """Signal a process and all that it started a short while after `when`; its exit code and what it said."""
    while not when():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.005)
    time.sleep(random.random() * 0.2)
    assert process.poll() is None, process.communicate()[1][-3000:]
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def check(code: int, errors: str, number: int, kept: str) -> None:
    assert code == CODES[signal.Signals(number)], errors[-3000:]
    assert "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("interrupted: ")]
    assert len(said) == 1
    assert errors.splitlines()[-1] == said[0]
    assert kept in said[0]
    assert "go on with: " in said[0]


@pytest.mark.parametrize("command", ["train", "extract", "eval"])
@pytest.mark.parametrize("number", list(CODES))
def test_while_it_loads(command: str, number: int) -> None:
    """A command begins with seconds of imports."""
    begun = time.monotonic() + 0.3
    process = start("-m", "motionenhancer", command)
    code, errors = stop(process, number, lambda: time.monotonic() > begun)
    check(code, errors, number, "nothing was begun")
    assert errors.strip().endswith(f"go on with: python -m motionenhancer {command}")


def checkpointed(out: Path) -> bool:
    return any(out.glob("checkpoint-*/trainer_state.json"))


def long_run(world: World, out: Path, **options: Any) -> list[str]:
    chosen = {"max_steps": 24, "save_strategy": "steps", "save_steps": 2, "prior_source": "store"}
    return flags(world, out, prior_dir=shared_priors(world), **{**chosen, **options})


@pytest.fixture(scope="module")
def stored(world: World) -> None:
    from motionenhancer import extract

    assert extract.main(world.flags(student=None, prior_dir=shared_priors(world), ddim_steps=1)) == 0


@pytest.mark.parametrize("number", list(CODES))
def test_train(world: World, stored: None, tmp_path: Path, number: int, capsys: Any) -> None:
    out = tmp_path / "out"
    argv = long_run(world, out)
    code, errors = stop(start("-m", "motionenhancer.train", *argv), number, lambda: checkpointed(out))
    check(code, errors, number, f"is kept in {out}")
    assert report_of(out)["status"] == "interrupted"
    newest = max(int(state.parent.name[11:]) for state in out.glob("checkpoint-*/trainer_state.json"))
    assert train.main(argv) == 0
    assert report_of(out)["resumed_from"].startswith("checkpoint-")
    said = capsys.readouterr().out
    assert f"continues from {out}/{report_of(out)['resumed_from']}" in said
    assert int(report_of(out)["resumed_from"][11:]) <= newest
    last = said.splitlines()[-1]
    assert last.startswith(f"since {report_of(out)['resumed_from']}: ")
    assert last.endswith("0 texts cut to the teacher's length")


def test_train_before_its_first_checkpoint(world: World, stored: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("-m", "motionenhancer.train", *long_run(world, out, save_strategy="no"))
    code, errors = stop(process, signal.SIGTERM, (out / "motion_report.json").is_file)
    check(code, errors, signal.SIGTERM, "no checkpoint was saved yet")


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_finished_run_typed_again_changes_nothing(
    world: World, stored: None, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    argv = long_run(world, out, max_steps=2, save_strategy="no")
    assert train.main(argv) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert train.main(argv) == 0
    assert "this run is finished; nothing is done" in capsys.readouterr().out
    assert files(tmp_path) == before


@pytest.mark.parametrize("number", list(CODES))
def test_train_in_two_processes(world: World, stored: None, tmp_path: Path, number: int) -> None:
    """The launcher says on its own that it was stopped; the processes say what is kept, once."""
    out = tmp_path / "out"
    process = start(*TORCHRUN, "-m", "motionenhancer.train", *long_run(world, out))
    code, errors = stop(process, number, lambda: checkpointed(out))
    assert code != 0
    assert errors.count("interrupted: checkpoint-") == 1
    assert "go on with: the same launch" in errors
    assert "motionenhancer/" not in errors.replace(str(tmp_path), "")
    assert report_of(out)["status"] == "interrupted"


@pytest.mark.parametrize("number", list(CODES))
def test_eval(world: World, tmp_path: Path, number: int) -> None:
    rows = [json.loads(line) for line in (world.data.parent / "test.jsonl").read_text().splitlines()]
    data, out = tmp_path / "many.jsonl", tmp_path / "out"
    data.write_text(
        "".join(json.dumps({**row, "id": f"{row['id']}-{i}"}) + "\n" for row in rows for i in range(30))
    )
    argv = ["--student", world.student, "--benchmark", "toy", "--data", data, "--video_root", world.videos]
    argv += ["--output_dir", out, "--batch_size", 1, "--bootstrap_samples", 0]
    process = start("-m", "motionenhancer.eval", *argv)
    code, errors = stop(process, number, lambda: any(p.stat().st_size for p in out.glob("answers*.jsonl")))
    check(code, errors, number, f"every written answer is kept in {out}")
    assert report_of(out)["status"] == "interrupted"
    answers = sum(len(path.read_text().splitlines()) for path in out.glob("answers*.jsonl"))
    assert 0 < answers < len(rows) * 30
    assert evaluation.main([*map(str, argv)]) == 0
    assert report_of(out)["status"] == "finished"


@pytest.mark.parametrize("command", ["extract", "eval"])
def test_the_others_in_two_processes(world: World, tmp_path: Path, command: str) -> None:
    """One of the processes says what is kept; what was finished is there."""
    rows = [json.loads(line) for line in (world.data.parent / "test.jsonl").read_text().splitlines()]
    data, out = tmp_path / "many.jsonl", tmp_path / "out"
    many = [{**row, "id": f"{row['id']}-{i}"} for i in range(60) for row in rows]
    for i, row in enumerate(many):
        asked, answer = row["conversations"]
        row["conversations"] = [asked, {**answer, "value": f"{answer['value']}{' red' * (i % 40)}"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in many))
    argv = ["--data", data, "--video_root", world.videos]
    if command == "extract":
        argv += ["--teacher", world.teacher, "--prior_dir", out]
        kept, report = "*/*.safetensors", "extraction.json"
    else:
        argv += ["--student", world.student, "--benchmark", "toy", "--output_dir", out, "--batch_size", 1]
        kept, report = "answers*.jsonl", "motion_report.json"
    process = start(*TORCHRUN, "-m", f"motionenhancer.{command}", *argv)
    code, errors = stop(process, signal.SIGINT, lambda: any(p.stat().st_size for p in out.glob(kept)))
    assert code != 0
    assert errors.count("interrupted: every ") == 1
    assert f"is kept in {out}" in errors
    assert "go on with: the same launch" in errors
    assert "motionenhancer/" not in errors.replace(str(tmp_path), "")
    assert json.loads((out / report).read_text())["status"] == "interrupted"


def test_signals_of_other_programs_are_left_alone() -> None:
    code = "import signal, motionenhancer; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


LAUNCHED = """
import importlib.util, sys
from pathlib import Path
found = importlib.util.spec_from_file_location("interrupts", sys.argv[1])
interrupts = importlib.util.module_from_spec(found)
found.loader.exec_module(interrupts)
interrupts.PATIENCE = float(sys.argv[2])
interrupts.watch_signals()
interrupts.on_interrupt(lambda: "a checkpoint is kept")
Path(sys.argv[3]).touch()
raise RuntimeError(sys.argv[4])
"""
LOST = "[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"


def launched(path: Path, error: str, patience: float) -> subprocess.Popen[str]:
    """One process of two, which stops with an error after it made the file `path`."""
    process = start("-c", LAUNCHED, interrupts.__file__, patience, path, error, WORLD_SIZE="2", RANK="0")
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    return process


def test_a_process_that_misses_another_waits_for_the_launcher(tmp_path: Path) -> None:
    """Its error came of the signal that ended the other process, and says nothing to a user."""
    process = launched(tmp_path / "a", LOST, 60)
    code, errors = stop(process, signal.SIGTERM, lambda: True)
    check(code, errors, signal.SIGTERM, "a checkpoint is kept")
    process = launched(tmp_path / "b", LOST, 0.1)
    assert "Connection reset by peer" in process.communicate(timeout=30)[1]
    assert process.returncode == 1
    process = launched(tmp_path / "c", "CUDA out of memory", 60)
    assert "CUDA out of memory" in process.communicate(timeout=30)[1]


def test_a_report_of_an_interrupted_run_names_no_error(tmp_path: Path) -> None:
    report = RunReport(tmp_path, {})
    report.write("running")
    report.fail(RuntimeError(LOST))
    assert report_of(tmp_path)["error"] == LOST
    report.write("interrupted")
    assert "error" not in report_of(tmp_path)
