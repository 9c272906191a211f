"""What extraction says before it begins: a dry run, sizes of a teacher and of its clips."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from extract_support import damaged_world
from tiny_world import World
from train_support import flags

from motionenhancer import extract, train
from motionenhancer.costs import extraction_cost
from motionenhancer.data import SkipLog, read_samples
from motionenhancer.files import readable
from motionenhancer.priors import maker
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import request_priors
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher, size_multiple
from motionenhancer.toy.models import save_teacher


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

    monkeypatch.setattr("motionenhancer.priors.arguments.load_teacher", refuse)
    flags = world.flags(student=None, prior_dir=tmp_path / "priors", ddim_steps=5, limit=3)
    assert extract.main([*flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "0 stored, 3 to make" in printed
    assert "evaluations of the transformer: 75" in printed
    assert "memory per process" in printed
    assert "Only a run shows how much" in printed, "what the estimate leaves out is said"
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

    for name in ("load_teacher", "request_priors"):
        monkeypatch.setattr(f"motionenhancer.priors.arguments.{name}", refuse)
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
    # If the multiple is unknown, the size is not checked here.
    PriorArguments(teacher=str(tmp_path), teacher_size="64x60").identity("cpu")


def test_readable_sizes() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, 2 << 40)] == [
        "0 B", "1023 B", "1.5 KB", "3.0 MB", "5.0 GB", "2.0 TB"
    ]  # fmt: skip


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
