"""The extraction command: shares, what is left out, what is planned, and being killed anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_world import World
from train_support import flags

from motionenhancer import extract, train
from motionenhancer.arguments import DataArguments, PriorArguments
from motionenhancer.data import Clip, Sample, SkipLog, read_frames, read_samples
from motionenhancer.extraction.estimate import estimate, evaluations_a_prior, readable
from motionenhancer.extraction.making import PARTLY_UNKNOWN, ahead, make_priors
from motionenhancer.extraction.planning import (
    PriorRequest,
    digest_videos,
    plan_priors,
    share_requests,
    stream_requests,
)
from motionenhancer.extraction.workload import read_requests, tabulate
from motionenhancer.prior import PriorSettings, extract_prior
from motionenhancer.store import PriorStore
from motionenhancer.toy.models import save_teacher
from motionenhancer.toy.world import write_world
from motionenhancer.vdm import load_teacher, teacher_id
from motionenhancer.vdm.plan import plan_teacher, size_multiple


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def requests_of_sizes(folder: Path, sizes: list[int], seed: int = 0) -> list[PriorRequest]:
    """One request a size, some of them twice, shuffled."""
    found = []
    for i, size in enumerate(sizes):
        video = folder / f"{i}.mp4"
        video.write_bytes(b"x" * size)
        for again in range(1 + (i % 3 == 0)):
            sample = Sample(f"{i}-{again}", [], (video,))
            found.append(PriorRequest(sample, video, "text", f"{i * 7919 % 10007:064x}"))
    random.Random(seed).shuffle(found)
    return found


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_shares_hold_everything_once_and_keep_keys_together(tmp_path: Path, shares: int) -> None:
    rng = random.Random(shares)
    requests = requests_of_sizes(tmp_path, [rng.randrange(1, 5000) for _ in range(60)])
    dealt = share_requests(requests, shares)
    assert len(dealt) == shares
    assert sorted(r.sample.id for part in dealt for r in part) == sorted(r.sample.id for r in requests)
    owners: dict[str, set[int]] = {}
    for i, part in enumerate(dealt):
        assert part == [r for r in requests if r in part]
        for request in part:
            owners.setdefault(request.key, set()).add(i)
    assert all(len(found) == 1 for found in owners.values())
    assert share_requests(requests, shares) == dealt


def test_shares_are_balanced_in_number_and_in_bytes(tmp_path: Path) -> None:
    rng = random.Random(5)
    requests = requests_of_sizes(tmp_path, [int(1000 * rng.paretovariate(1.5)) for _ in range(200)])
    parts = [{r.key: r.video.stat().st_size for r in part} for part in share_requests(requests, 4)]
    mean = sum(sum(part.values()) for part in parts) / 200
    works = [sum(size + mean for size in part.values()) for part in parts]
    assert max(works) < 1.02 * min(works)
    alike = requests_of_sizes(tmp_path, [100] * 40)
    assert [len({r.key for r in part}) for part in share_requests(alike, 4)] == [10] * 4


def test_more_shares_than_requests_and_empty_files(tmp_path: Path) -> None:
    dealt = share_requests(requests_of_sizes(tmp_path, [0, 0]), 5)
    assert sorted(len({r.key for r in part}) for part in dealt) == [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="shares must be at least 1, got 0"):
        share_requests([], 0)


def test_work_ahead_is_bounded_and_in_order() -> None:
    lock, state = threading.Lock(), {"begun": 0, "used": 0, "most": 0}

    def work(i: int) -> int:
        with lock:
            state["begun"] += 1
            state["most"] = max(state["most"], state["begun"] - state["used"])
        time.sleep(0.001 * (i % 3))
        return i * i

    with ThreadPoolExecutor(3) as pool:
        for i, (item, future) in enumerate(ahead(pool, work, range(40), 3)):
            assert (item, future.result()) == (i, i * i)
            time.sleep(0.001)
            with lock:
                state["used"] += 1
    assert state["begun"] == 40
    assert 2 <= state["most"] <= 4


def test_work_ahead_stops_with_its_reader() -> None:
    begun = []
    with ThreadPoolExecutor(1) as pool:
        for item, _ in ahead(pool, lambda i: (begun.append(i), time.sleep(0.02)), range(50), 5):
            if item == 2:
                break
    assert len(begun) < 12


def test_the_number_of_decoding_threads_changes_nothing(world: World, tmp_path: Path) -> None:
    for workers in (1, 3):
        flags = world.flags(student=None, prior_dir=tmp_path / str(workers), ddim_steps=1, limit=4)
        assert extract.main([*flags, "--decode_workers", str(workers)]) == 0
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
    report = json.loads((priors / extract.REPORT).read_text())
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
    store, log = PriorStore(tmp_path / "priors"), SkipLog(shout=0)
    assert len(list(store)) == 3
    name, settings = PriorArguments(teacher=str(world.teacher)).teacher_id("cpu"), PriorSettings(steps=1)
    samples = list(read_samples(data, world.videos, log))
    requests = plan_priors(samples, name, settings, "answer", log)
    make_priors(requests, store, settings, lambda: pytest.fail("nothing is to be made"), log)
    assert log.notes == {PARTLY_UNKNOWN: 2}


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
    requests = plan_priors(samples, name, settings, "both", SkipLog())
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
    train_data = DataArguments(str(data), str(world.videos))
    made = make_priors(
        plan_priors(extract.load_samples(train_data, SkipLog()), name, settings, "both", SkipLog()),
        PriorStore(priors),
        settings,
        lambda: pytest.fail("every prior is there"),
        SkipLog(),
    )
    assert made.stored == 4


def test_a_segment_that_changes_in_the_data_file_is_noticed(world: World, tmp_path: Path) -> None:
    row = json.loads(world.data.read_text().splitlines()[0])
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({**row, "video_end": 0.5}))
    samples = read_samples(data, world.videos, SkipLog())
    work = tabulate(stream_requests(samples, "t", PriorSettings(), "both", SkipLog()), PriorStore(tmp_path))
    (request,) = read_requests(work, data, world.videos, "both")
    assert request.video == Clip(world.videos / row["video"], None, 0.5)
    data.write_text(json.dumps({**row, "video_end": 0.6}))
    with pytest.raises(ValueError, match="line 1 changed while the file was in use"):
        list(read_requests(work, data, world.videos, "both"))


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
    report = json.loads((tmp_path / "p" / extract.REPORT).read_text())
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
        samples = extract.load_samples(DataArguments(str(data), str(world.videos)), skips)
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
    report = json.loads((tmp_path / extract.REPORT).read_text())
    assert (report["stored"], report["made"]) == (2, 1)
    assert report["skipped"]["notes"] == {"damaged priors made anew": 1}


def test_clips_shared_by_several_samples_are_made_and_refused_once(world: World, tmp_path: Path) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    twins = [*samples, *(replace(s, id=f"{s.id}-again") for s in samples)]
    settings, skips = PriorSettings(steps=1), SkipLog(shout=0)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    twins += [replace(samples[0], id=f"broken-{i}", videos=(broken,)) for i in range(2)]
    requests = plan_priors(twins, teacher_id(world.teacher), settings, "both", skips)
    store = PriorStore(tmp_path / "priors")
    made = make_priors(requests, store, settings, lambda: load_teacher(world.teacher, "cpu"), skips)
    assert made.made == len(list(store)) == 2
    assert len(made.keys) == len(made.described) == 4
    assert made.unusable == {"broken-0", "broken-1"}
    assert skips.counts == {"unreadable video": 2}


def test_a_file_that_cannot_be_digested_costs_its_samples_only(world: World, tmp_path: Path) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    gone = replace(samples[1], videos=(tmp_path / "gone.mp4",))
    digests = digest_videos([samples[0].videos[0], gone.videos[0]], 2)
    skips = SkipLog(shout=0)
    planned = plan_priors([samples[0], gone], "t", PriorSettings(), "both", skips, digests=digests)
    assert [request.sample for request in planned] == [samples[0]]
    assert skips.counts == {"no prior: no text or no video file": 1}


@pytest.mark.parametrize(
    "options",
    [{}, {"memory": False}, {"guidance_scale": 1.0}, {"steps": 2}, {"mode": "renoise", "noise_level": 300}],
)
def test_the_dry_runs_numbers_are_those_of_the_run(
    world: World, tmp_path: Path, options: dict[str, object]
) -> None:
    settings = PriorSettings(**{"steps": 1, **options})  # type: ignore[arg-type]
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    store, skips = PriorStore(tmp_path), SkipLog()
    requests = plan_priors(samples, teacher_id(world.teacher), settings, "both", skips)
    texts = [request.text for request in requests]
    expected = estimate(texts, 0, settings, world.teacher, dtype=torch.float32)
    assert (expected.stored, expected.missing) == (0, 2)
    teacher = load_teacher(world.teacher, "cpu")
    made = make_priors(requests, store, settings, lambda: teacher, skips)
    priors = [store.read(key) for key in made.keys.values()]
    assert expected.evaluations == sum(prior.evaluations for prior in priors)
    assert {evaluations_a_prior(settings)} == {prior.evaluations for prior in priors}
    assert expected.prior_bytes == sum(2 * prior.attention.numel() for prior in priors)
    assert {expected.plan.grid} == {prior.grid for prior in priors}
    assert expected.plan.frames == teacher.max_frames
    pipeline = teacher.pipeline  # type: ignore[attr-defined]
    for part, size in expected.weight_bytes.items():
        assert size == sum(4 * p.numel() for p in getattr(pipeline, part).parameters()), part
    after = estimate([], 2, settings, world.teacher, dtype=torch.float32)
    assert (after.stored, after.missing, after.evaluations, after.prior_bytes) == (2, 0, 0, 0)


def test_a_dry_run_loads_nothing_and_writes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("motionenhancer.arguments.load_teacher", refuse)
    flags = world.flags(student=None, prior_dir=tmp_path / "priors", ddim_steps=5, limit=3)
    assert extract.main([*flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "0 stored, 3 to make" in printed
    assert "evaluations of the transformer: 75" in printed
    assert "memory a process" in printed
    assert "what the VAE takes to encode a clip" in printed, "what the estimate leaves out is said"
    assert not (tmp_path / "priors").exists()


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

    for name in ("motionenhancer.arguments.load_teacher", "motionenhancer.extract.plan"):
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
    for part, config in (("vae", {}), ("transformer", {"patch_size": [1, 2, 2]})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert size_multiple(tmp_path) == 16
    (tmp_path / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no sizes"):
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

    command = [sys.executable, "-m", "motionenhancer.extract"]
    command += world.flags(**chosen, prior_dir=tmp_path / "killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    rng = random.Random(0)
    store = PriorStore(tmp_path / "killed")
    for kill in range(kills):
        # Killed once it has made a few more, at any moment of making the next.
        until = len(list(store)) + rng.randrange(1, max(2, 2 * clips // (3 * kills)))
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert stored(tmp_path / "killed") == whole


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
