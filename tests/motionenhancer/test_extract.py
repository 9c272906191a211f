"""The extraction command: what is left out, what is planned, and being stopped anywhere."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny_world import World
from train_support import flags

from motionenhancer import extract, train
from motionenhancer.costs import extraction_cost, readable
from motionenhancer.data import Clip, SkipLog, content_digest, read_frames, read_samples
from motionenhancer.data.loading import load_samples
from motionenhancer.flags import parse_arguments
from motionenhancer.priors import maker
from motionenhancer.priors.prior import PARTLY_UNKNOWN, PriorSettings, extract_prior
from motionenhancer.priors.requests import request_priors
from motionenhancer.priors.storage import PriorStore, prior_keys
from motionenhancer.settings import MakerArguments, PriorArguments
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher, size_multiple
from motionenhancer.toy.models import save_teacher
from motionenhancer.toy.world import write_world

REPO = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "motionenhancer.extract"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def report_in(folder: Path) -> dict:
    return json.loads((folder / extract.REPORT).read_text())


def test_the_number_of_decoding_threads_changes_nothing(world: World, tmp_path: Path) -> None:
    for workers in (1, 3):
        flags = world.flags(student=None, prior_dir=tmp_path / str(workers), ddim_steps=1, limit=4)
        assert extract.main([*flags, "--prior_workers", str(workers)]) == 0
    assert len(stored(tmp_path / "1")) == 4
    assert stored(tmp_path / "1") == stored(tmp_path / "3")


def damaged_world(world: World, folder: Path, clips: int, bad: int) -> tuple[Path, Path]:
    """A data file of `clips` clips, the last `bad` of them cut short, and its video folder."""
    toy = write_world(folder, clips=clips, test_clips=1, progress=False)
    rows = [json.loads(line) for line in toy.train.read_text().splitlines()]
    for i, row in enumerate(rows[-bad:]):
        path = toy.videos / row["video"]
        body = path.read_bytes()
        path.write_bytes([body[: len(body) // 2], b"", b"not a video" * 50][i % 3])
    return toy.train, toy.videos


def test_what_is_left_out_is_listed_in_a_file_and_in_the_exit_code(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, videos = damaged_world(world, tmp_path / "world", 5, 2)
    with data.open("a") as file:
        file.write("{not json\n")
    priors = tmp_path / "priors"
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=priors, ddim_steps=1)
    assert extract.main(flags) == 1
    printed = capsys.readouterr().out
    assert "3 samples have their prior" in printed
    assert "2 unreadable video" in printed
    report = report_in(priors)
    assert report["status"] == "finished"
    assert (report["samples"], report["stored"], report["made"]) == (3, 0, 3)
    assert report["skipped"]["counts"] == {"unreadable video": 2, "invalid json": 1}
    ids = [json.loads(line)["id"] for line in data.read_text().splitlines()[:5]]
    assert {entry["id"] for entry in report["skipped"]["entries"]} == {*ids[-2:], ""}
    assert sorted(entry["line"] for entry in report["skipped"]["entries"]) == [4, 5, 6]
    assert extract.main(flags) == 1
    assert "(0 made now)" in capsys.readouterr().out
    assert not [path for path in priors.iterdir() if path.name.endswith(".tmp")]


def test_texts_that_the_teacher_knows_in_part_are_counted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:4]]
    for row, answer in zip(
        rows, ("红色", "The red 方块 moves.", "The ring 🏃 moves.", "It moves."), strict=True
    ):
        row["conversations"][1]["value"] = answer
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = world.flags(student=None, data=data, prior_dir=tmp_path / "priors", ddim_steps=1)
    for _ in range(2):  # whether priors are made or found
        assert extract.main([*flags, "--prompt_source", "answer"]) == 1
        printed = capsys.readouterr().out.splitlines()
        said = [line for line in printed if line.startswith(f"2 {PARTLY_UNKNOWN}")]
        assert len(said) == 1
        skipped = json.loads((tmp_path / "priors" / extract.REPORT).read_text())["skipped"]
        assert skipped["notes"] == {PARTLY_UNKNOWN: 2}
        (entry,) = skipped["entries"]
        assert entry["id"] == rows[0]["id"]
        assert "'红色' holds no word that the teacher's tokenizer has pieces for" in entry["detail"]
    assert len(list(PriorStore(tmp_path / "priors"))) == 3


def test_segments_of_one_clip_have_priors_of_their_own(world: World, tmp_path: Path) -> None:
    row = json.loads(world.data.read_text().splitlines()[0])
    segments = [
        {},
        {"video_end": 0.5},
        {"video_start": 0.5},
        {"video_start": 0.5, "fps": 2},
        {"video_end": 9},
    ]
    data = tmp_path / "data.jsonl"
    asked, answer = (turn["value"] for turn in row["conversations"])
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    videos = [[{"path": row["video"], **said}] for said in segments]
    data.write_text("\n".join(json.dumps({"messages": turns, "videos": v}) for v in videos))
    priors = tmp_path / "priors"
    flags = world.flags(student=None, data=data, prior_dir=priors, ddim_steps=1)
    assert extract.main(flags) == 0
    report = json.loads((priors / extract.REPORT).read_text())
    assert (report["samples"], report["made"]) == (5, 4), (
        "how a student samples a segment is not the teacher's"
    )
    samples = list(read_samples(data, world.videos, SkipLog()))
    name = PriorArguments(teacher=str(world.teacher)).teacher_id("cpu")
    settings = PriorSettings(steps=1)
    keys = prior_keys(name, settings)
    pairs = request_priors(samples, "both", SkipLog(), name=keys, digest=content_digest)
    requests = [request for _, request in pairs]
    assert [request.key in PriorStore(priors) for request in requests] == [True] * 5
    assert len({request.key for request in requests}) == 4
    assert requests[2].video == requests[3].video == Clip(world.videos / row["video"], 0.5)
    teacher = load_teacher(world.teacher, "cpu")
    for request in requests:
        frames = read_frames(request.video, num_frames=teacher.max_frames).frames
        kept = PriorStore(priors).read(request.key)
        assert torch.equal(kept.attention, extract_prior(teacher, frames, request.text, steps=1).attention)
    assert extract.main(flags) == 0
    assert json.loads((priors / extract.REPORT).read_text())["made"] == 0


def test_names_that_are_no_text_do_not_spoil_the_report(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    videos = tmp_path / "videos"
    videos.mkdir()
    name = os.fsdecode(b"caf\xe9.mp4")
    (videos / rows[0]["video"]).write_bytes((world.videos / rows[0]["video"]).read_bytes())
    (videos / name).write_bytes(b"no video")
    rows[1] |= {"video": name, "id": "half \ud83d"}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main(flags) == 1
    assert "caf\\udce9.mp4" in capsys.readouterr().out
    report = report_in(tmp_path / "p")
    assert (report["status"], report["made"]) == ("finished", 1)
    (entry,) = report["skipped"]["entries"]
    assert entry["id"] == "half \ud83d"
    assert name in entry["detail"]
    assert not list((tmp_path / "p").glob(".*.tmp"))


def test_no_two_samples_are_given_one_id(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for given, expected in (
        (["a", "a", "a"], ["a", "a#2", "a#3"]),
        (["a", "a", "a#2"], ["a", "a#2", "a#2#2"]),
        (["a#2", "a", "a", "a"], ["a#2", "a", "a#3", "a#4"]),
    ):
        data = tmp_path / "data.jsonl"
        named = [{**row, "id": name} for row, name in zip(rows, given, strict=False)]
        data.write_text("\n".join(map(json.dumps, named)) + "\n")
        skips = SkipLog(shout=0)
        samples = load_samples(data, world.videos, None, skips)
        assert [sample.id for sample in samples] == expected
        assert skips.notes == {
            "repeated id, numbered": sum(a != b for a, b in zip(given, expected, strict=True))
        }


def test_a_stored_prior_that_is_damaged_is_made_anew(world: World, tmp_path: Path) -> None:
    flags = world.flags(student=None, prior_dir=tmp_path, ddim_steps=1, limit=3)
    assert extract.main(flags) == 0
    before = stored(tmp_path)
    key = min(before)
    PriorStore(tmp_path).path(key).write_bytes(before[key][:-9])
    assert extract.main(flags) == 0
    assert stored(tmp_path) == before
    report = report_in(tmp_path)
    assert (report["stored"], report["made"]) == (2, 1)
    assert report["skipped"]["notes"] == {"damaged priors made anew": 1}


def test_clips_shared_by_several_samples_are_made_and_refused_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    (world.videos / "shared-broken.mp4").write_bytes(b"no video")
    rows += [{**rows[0], "id": f"broken-{i}", "video": "shared-broken.mp4"} for i in range(3)]
    # Near each other and far from each other.
    rows = [*rows, *({**row, "id": f"{row['id']}-again"} for row in rows), rows[0] | {"id": "last"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    decoded, decode = [], maker.read_frames
    monkeypatch.setattr(
        maker, "read_frames", lambda path, **options: (decoded.append(path.name), decode(path, **options))[1]
    )
    flags = world.flags(student=None, data=data, prior_dir=tmp_path / "priors", ddim_steps=1)
    assert extract.main(flags) == 1
    assert len(decoded) == len(set(decoded)) == 3
    report = report_in(tmp_path / "priors")
    assert (report["samples"], report["made"], report["stored"]) == (5, 2, 3)
    assert report["skipped"]["counts"] == {"unreadable video": 6}
    assert len(stored(tmp_path / "priors")) == 2


def test_a_file_that_cannot_be_digested_costs_its_samples_only(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / rows[0]["video"]).write_bytes((world.videos / rows[0]["video"]).read_bytes())
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    assert samples[1].videos[0].name == rows[1]["video"]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main(flags) == 1
    report = report_in(tmp_path / "p")
    assert report["made"] == 1
    assert report["skipped"]["total"] == 1
    assert report["skipped"]["entries"][0]["id"] == rows[1]["id"]
    assert list(PriorStore(tmp_path / "p").refusals()) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"memory": False}, {"guidance_scale": 1.0}, {"steps": 2}, {"mode": "renoise", "noise_level": 300}],
)
def test_the_dry_runs_numbers_are_those_of_the_run(
    world: World, tmp_path: Path, options: dict[str, object]
) -> None:
    settings = PriorSettings(**{"steps": 1, **options})  # type: ignore[arg-type]
    teacher = load_teacher(world.teacher, "cpu")
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    pairs = list(request_priors(samples, "both", SkipLog()))
    expected = extraction_cost((r.text for _, r in pairs), settings, world.teacher, dtype=torch.float32)
    assert (expected.stored, expected.missing) == (0, 2)
    with closing(maker.LocalMaker(lambda: teacher, settings)) as made:
        priors = [made.submit(request).result().prior for _, request in pairs]
    assert expected.evaluations == sum(prior.evaluations for prior in priors)
    assert {settings.evaluations} == {prior.evaluations for prior in priors}
    assert expected.prior_bytes == sum(2 * prior.attention.numel() for prior in priors)
    assert {expected.teacher.plan.grid} == {prior.grid for prior in priors}
    assert expected.teacher.plan.frames == teacher.max_frames
    pipeline = teacher.pipeline  # type: ignore[attr-defined]
    for part, size in expected.teacher.weights.items():
        assert size == sum(4 * p.numel() for p in getattr(pipeline, part).parameters()), part
    after = extraction_cost([], settings, world.teacher, dtype=torch.float32)
    assert (after.missing, after.evaluations, after.prior_bytes) == (0, 0, 0)


def test_a_dry_run_loads_nothing_and_writes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("motionenhancer.settings.load_teacher", refuse)
    flags = world.flags(student=None, prior_dir=tmp_path / "priors", ddim_steps=5, limit=3)
    assert extract.main([*flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "0 stored, 3 to make" in printed
    assert "evaluations of the transformer: 75" in printed
    assert "memory a process" in printed
    assert "only a run measures" in printed, "what the estimate leaves out is said"
    assert not (tmp_path / "priors").exists()


def test_a_dry_run_counts_what_is_stored_and_what_the_run_would_try(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, videos = damaged_world(world, tmp_path / "world", 4, 1)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with data.open("a") as file:
        file.writelines(json.dumps({**row, "id": f"{row['id']}-again"}) + "\n" for row in rows)
        file.write("{not json\n")
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main([*flags, "--limit", "2"]) == 0
    before = sorted((tmp_path / "p").rglob("*"))
    capsys.readouterr()
    assert extract.main([*flags, "--dry_run"]) == 1, "a line is no sample"
    printed = capsys.readouterr().out
    assert "2 stored, 2 to make" in printed
    assert "1 invalid json (line 9" in printed
    assert sorted((tmp_path / "p").rglob("*")) == before
    assert extract.main(flags) == 1
    capsys.readouterr()
    assert extract.main([*flags, "--dry_run"]) == 1
    assert "3 stored, 1 to make" in capsys.readouterr().out, "extraction tries again what is on record"


@pytest.mark.parametrize(("size", "frames"), [(None, None), ((64, 128), None), (None, 9), ((96, 64), 33)])
def test_a_teachers_plan_is_what_it_becomes(
    world: World, size: tuple[int, int] | None, frames: int | None
) -> None:
    plan, teacher = plan_teacher(world.teacher, size=size, frames=frames), None
    teacher = load_teacher(world.teacher, "cpu", size=size, frames=frames)
    clip = torch.zeros(plan.frames, 32, 32, 3, dtype=torch.uint8).numpy()
    assert plan.grid == teacher.encode_video(clip).tokens.grid
    assert plan.frames == teacher.max_frames
    assert plan.heads == teacher.heads
    assert plan.size == teacher.size  # type: ignore[attr-defined]
    assert plan.text_length == teacher.encode_video(clip).tokens.text


@pytest.mark.parametrize("size", ["64x60", "0x64", "4x8"])
def test_a_size_the_teacher_does_not_take_is_refused_before_any_clip_is_read(
    world: World,
    tmp_path: Path,
    size: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("work was done")

    for name in ("motionenhancer.settings.load_teacher", "motionenhancer.extract.request_priors"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("motionenhancer.train._student", refuse)
    chosen = {"prior_dir": tmp_path / "priors", "teacher_size": size}
    assert extract.main(world.flags(student=None, **chosen)) == 2
    assert train.main(flags(world, tmp_path / "out", prior_source="online", teacher_size=size)) == 2
    errors = capsys.readouterr().err.splitlines()
    said = [line for line in errors if line.startswith("error: --teacher_size")]
    assert len(said) == 2
    assert all("multiples of 8 pixels" in line and repr(size) in line for line in said)
    assert not (tmp_path / "priors").exists()


def test_sizes_come_in_the_multiples_that_loading_takes(world: World, tmp_path: Path) -> None:
    multiple = size_multiple(world.teacher)
    load_teacher(world.teacher, "cpu", size=(multiple, 3 * multiple))
    with pytest.raises(ValueError, match=f"multiples of {multiple} pixels"):
        load_teacher(world.teacher, "cpu", size=(multiple, 3 * multiple + multiple // 2))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="names no vae"):
        size_multiple(tmp_path)
    # What cannot be told is left to those who use the folder.
    PriorArguments(teacher=str(tmp_path), teacher_size="64x60").identity("cpu")


def test_readable_sizes() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, 2 << 40)] == [
        "0 B", "1023 B", "1.5 KB", "3.0 MB", "5.0 GB", "2.0 TB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flag",
    [
        ["--prior_workers", "0"],
        ["--decode_workers", "0"],
        ["--ddim_steps", "0"],
        ["--ddim_steps", "7"],
        ["--noise_level", "1000", "--prior_mode", "renoise"],
        ["--limit", "0"],
        ["--data", "missing.jsonl"],
        ["--data", "."],
        ["--video_root", "missing"],
        ["--head_ratio", "2"],
    ],
)
def test_bad_flags_are_named(
    world: World, tmp_path: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = world.flags(student=None, prior_dir=tmp_path / "priors")
    try:
        code = extract.main([*flags, *flag])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert flag[0] in capsys.readouterr().err
    assert not (tmp_path / "priors").exists()


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
        # Killed once it has made a few more, at any moment of making the next.
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
    assert errors.splitlines()[-1] == "interrupted: start the same command again to go on"
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

    monkeypatch.setattr("motionenhancer.settings.load_teacher", refuse)
    flags = world.flags(student=None, prior_dir=tmp_path, ddim_steps=1)
    assert extract.main(flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said == ["error: RuntimeError: size mismatch for transformer.proj_out.weight"]
    assert len(loads) == 1
    assert report_in(tmp_path)["status"] == "running"
    assert stored(tmp_path) == {}


def test_a_teacher_that_fails_on_everything_ends_the_run_and_one_failure_does_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = maker.extract_prior, []

    def fail(times: int):
        calls.clear()

        def extract_prior(*args: object, **options: object):
            calls.append(1)
            if len(calls) <= times:
                raise RuntimeError("CUDA error: out of memory")
            return real(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(maker, "extract_prior", extract_prior)

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


def test_a_bar_shows_how_much_of_the_data_file_is_done_and_what_was_left_out(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, videos = damaged_world(world, tmp_path / "world", 4, 1)
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main([*flags, "--limit", "2"]) == 0
    capsys.readouterr()
    assert extract.main(flags) == 1
    last = capsys.readouterr().err.rstrip().splitlines()[-1].split("\r")[-1]
    assert last.startswith("priors: 100%")
    size = data.stat().st_size
    assert f"{size}/{size}" in last
    assert "stored=2" in last
    assert "made=1" in last
    assert "left out=1" in last


def test_the_older_names_of_options_are_known_as_flags_and_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(*argv: str) -> MakerArguments:
        return parse_arguments((MakerArguments,), argv, prog="test")[0]

    assert parse("--engine", "ray", "--decode_workers", "5") == MakerArguments("ray", 5)
    assert parse("--decode-workers", "5") == MakerArguments("local", 5)
    config = tmp_path / "config.yaml"
    config.write_text("engine: ray\ndecode_workers: 5\nray_workers: 2\n")
    assert parse("--config", str(config)) == MakerArguments("ray", 5, ray_workers=2)
    assert parse("--config", str(config), "--decode_workers", "3") == MakerArguments("ray", 3, ray_workers=2)
    assert parse("--config", str(config), "--prior_workers", "3") == MakerArguments("ray", 3, ray_workers=2)
    for body, said in (
        ("engine: cluster\n", "prior_engine must be one of local, ray, got 'cluster'"),
        ("engine: ray\nprior_engine: local\n", "engine and prior_engine are two names of one option"),
        ("decode_worker: 3\n", "unknown field 'decode_worker' (did you mean 'decode_workers'?)"),
    ):
        config.write_text(body)
        with pytest.raises(SystemExit):
            parse("--config", str(config))
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("frames", "grid"), [(13, (2, 8, 8)), (17, (3, 8, 8))])
def test_the_plan_of_a_teacher_with_temporal_patches(
    tmp_path: Path, frames: int, grid: tuple[int, int, int]
) -> None:
    folder = save_teacher(tmp_path, layers=1, patch_size_t=2, frames=frames)
    teacher, plan = load_teacher(folder, "cpu"), plan_teacher(folder)
    assert plan.grid == grid
    clip = torch.zeros(plan.frames, 32, 32, 3, dtype=torch.uint8).numpy()
    assert teacher.encode_video(clip).tokens.grid == grid


def test_a_folder_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        plan_teacher(tmp_path / "missing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ValueError, match="'OtherPipeline' is not supported"):
        plan_teacher(tmp_path)
