"""An evaluation that is stopped, killed, finished or changed, and started again in the same folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from eval_support import FAVOR, files_of, main, predict, results_of, scores_of, student_flags

from motionenhancer import eval as evaluate
from motionenhancer import interrupts
from motionenhancer.evaluation import generate
from motionenhancer.toy.world import ToyFolder, write_world


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyFolder:
    """Six clips with a question each."""
    return write_world(tmp_path_factory.mktemp("eval_world"), clips=1, test_clips=6, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, student_dir: Path, toy: ToyFolder) -> Path:
    """An undisturbed run over FAVOR's sample file."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(out, **student_flags(student_dir, toy)) == 0
    return out


def test_a_students_run(whole: Path) -> None:
    scores, results = scores_of(whole), results_of(whole)
    assert scores["count"] == len(results) == 7
    assert (scores["skipped"], scores["unanswered"]) == (0, 0)
    assert all(isinstance(r["output"], str) for r in results.values())
    report = json.loads((whole / "motion_report.json").read_text())
    assert report["status"] == "finished"
    assert report["identity"]["frames"]["fps"] == 4


def test_a_finished_run_is_scored_again_without_its_model(
    whole: Path, student_dir: Path, toy: ToyFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(evaluate, "load_student", lambda *args, **kwargs: pytest.fail("loaded"))
    assert main(out, **student_flags(student_dir, toy), bootstrap_samples=0) == 0
    assert files_of(out)["results.jsonl"] == files_of(whole)["results.jsonl"]
    assert "intervals" not in scores_of(out)


@pytest.mark.parametrize("who", ["student", "predictions"])
def test_a_finished_run_typed_again_changes_nothing(
    who: str, whole: Path, student_dir: Path, toy: ToyFolder, tmp_path: Path, capsys: Any
) -> None:
    out, flags, code = tmp_path / "out", student_flags(student_dir, toy), 0
    if who == "student":
        shutil.copytree(whole, out)
    else:
        flags = {"benchmark": "favor", "data": FAVOR, "predictions": predict(tmp_path, {})}
        code = 1  # no question is answered
        assert main(out, **flags) == code
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    capsys.readouterr()
    assert main(out, **flags) == code
    assert capsys.readouterr().out == f"{out}: this evaluation is finished; nothing is done\n"
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    if who == "predictions":
        flags["predictions"].write_text("{}\n")
        assert main(out, **flags) == 2
        assert "already holds a different run (predictions: " in capsys.readouterr().err
        after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
        assert after == before, "scores of other answers are kept"


def test_a_clip_that_was_replaced_is_asked_about_again(
    whole: Path, student_dir: Path, toy: ToyFolder, tmp_path: Path, monkeypatch: Any
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(toy.videos, videos)
    flags = {**student_flags(student_dir, toy), "video_root": videos}
    assert main(out, **flags) == 0
    before = (out / "answers-00000.jsonl").read_text().splitlines()
    for path in videos.iterdir():
        os.utime(path)  # copied anew, and the same
    monkeypatch.setattr(evaluate, "load_student", lambda *_, **__: pytest.fail("nothing to ask"))
    assert main(out, **flags) == 0
    monkeypatch.undo()
    shutil.copy(videos / "test-00001.mp4", videos / "test-00000.mp4")
    assert main(out, **flags) == 0
    after = (out / "answers-00000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in after]
    changed = {json.loads(line)["id"].split("#")[0] for line in {*before} - {*after}}
    assert changed == {"test-00000"}
    assert len({row["id"] for row in rows}) == len({json.loads(line)["id"] for line in before})
    fresh = tmp_path / "fresh"
    assert main(fresh, **flags) == 0
    assert files_of(fresh)["results.jsonl"] == files_of(out)["results.jsonl"]


@pytest.mark.parametrize("where", ["load_student", "write_scores"])
def test_stopped_outside_of_asking_it_says_so(
    where: str, whole: Path, student_dir: Path, toy: ToyFolder, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    said = []

    def stop(*args: Any, **options: Any) -> None:
        said.append(interrupts._kept())
        raise KeyboardInterrupt

    if where == "write_scores":
        shutil.copytree(whole, out)
        (out / "scores.json").unlink()
    monkeypatch.setattr(evaluate, where, stop)
    with pytest.raises(KeyboardInterrupt):
        main(out, **student_flags(student_dir, toy))
    assert said == [f"every written answer is kept in {out}"]
    assert json.loads((out / "motion_report.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("where", ["load_student", "write_scores"])
def test_an_evaluation_that_fails_says_why_and_goes_on(
    where: str, whole: Path, student_dir: Path, toy: ToyFolder, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    if where == "write_scores":
        shutil.copytree(whole, out)
        (out / "scores.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, where, lambda *_, **options: (_ for _ in ()).throw(OSError("disk is gone")))
        assert main(out, **student_flags(student_dir, toy)) == 2
    report = json.loads((out / "motion_report.json").read_text())
    assert (report["status"], report["error"]) == ("failed", "disk is gone")
    if where == "write_scores":
        assert main(out, **student_flags(student_dir, toy), dtype="float16") == 2
        assert json.loads((out / "motion_report.json").read_text()) == report, "another run says nothing"
    assert main(out, **student_flags(student_dir, toy)) == 0
    report = json.loads((out / "motion_report.json").read_text())
    assert (report["status"], report.get("error")) == ("finished", None)
    assert files_of(out)["results.jsonl"] == files_of(whole)["results.jsonl"]


def test_other_settings_are_refused_in_the_same_folder(
    whole: Path, student_dir: Path, toy: ToyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(whole)
    flags = student_flags(student_dir, toy)
    for change in ({"batch_size": 3}, {"video_fps": 2}, {"prompt": "{question}"}, {"limit": 3}):
        assert main(whole, **{**flags, **change}) == 2
        assert "already holds a different run" in capsys.readouterr().err
    given = predict(whole.parent, {})
    assert main(whole, benchmark="favor", data=FAVOR, predictions=given) == 2
    assert files_of(whole) == before


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_stopping_anywhere_changes_nothing(
    batches: int, whole: Path, student_dir: Path, toy: ToyFolder, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped after some batches, and in the middle of writing the next."""
    out = tmp_path / "out"
    real, calls = generate.append_answers, []

    def stop(path: Path, rows: Any) -> None:
        if len(calls) == batches:
            line = json.dumps(rows[0])
            path.open("a").write(line + "\n" + line[: len(line) // 2])
            raise KeyboardInterrupt
        calls.append(len(rows))
        real(path, rows)

    monkeypatch.setattr(generate, "append_answers", stop)
    with pytest.raises(KeyboardInterrupt):
        main(out, **student_flags(student_dir, toy))
    assert not (out / "scores.json").exists()
    monkeypatch.setattr(generate, "append_answers", real)
    assert main(out, **student_flags(student_dir, toy)) == 0
    assert files_of(out) == files_of(whole)


def launch(out: Path, flags: dict[str, Any], **environment: str) -> subprocess.Popen[bytes]:
    parts = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, "-m", "motionenhancer.eval", *parts, "--output_dir", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment},
        cwd=Path(evaluate.__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_two_processes_killed_and_started_again(
    whole: Path, student_dir: Path, toy: ToyFolder, tmp_path: Path
) -> None:
    """Two processes share the batches; killed on the way, one process finishes what they began."""
    out, flags = tmp_path / "out", student_flags(student_dir, toy)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [launch(out, flags, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    try:
        end = time.monotonic() + 600
        while not all((out / f"answers-0000{r}.jsonl").exists() for r in range(2)):
            stopped = [p for p in both if p.poll() not in (None, 0)]
            assert not stopped, stopped[0].stderr.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < end, "no answers"
            time.sleep(0.02)
    finally:
        for process in both:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()
    assert main(out, **flags) == 0
    assert files_of(out) == files_of(whole)
