"""Two gloo processes on the same global batch as one process: its loss, its weights, its files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from tiny_students import SAVE
from tiny_world import World
from train_support import flags, report_of, shared_priors, weights_of, without_priors_of

from motionenhancer import train
from motionenhancer.alignment.aligner import load_aligner
from motionenhancer.report.views import load_views

HERE = Path(__file__).parent
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
OPTIONS = {
    "max_steps": 4,
    "alignment_weight": 10.0,
    "alignment_schedule": "cosine",
    "lr_scheduler_type": "cosine",
    # Steps of AdamW follow the sign of a gradient; without this they would follow its rounding too.
    "adam_epsilon": 1e-4,
    "save_strategy": "steps",
    "save_steps": 2,
}


#: The processes align unequal numbers of samples.
WITHOUT = ["train-00001-LM", "train-00003-MO", "train-00006-MR"]


def run_flags(world: World, out: Path, **options: Any) -> list[str]:
    aligner = out.parent / f"{out.name}.safetensors"
    return flags(world, out, prior_dir=shared_priors(world), save_aligner=aligner, **(OPTIONS | options))


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    with without_priors_of(WITHOUT):
        assert train.main(run_flags(world, out, per_device_train_batch_size=4)) == 0
    assert {s["id"] for s in report_of(out)["samples"]} >= set(WITHOUT)
    return out


def launch(folder: Path, runs: list[dict[str, Any]]) -> None:
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "train_worker.py"), str(folder / "runs.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def equals(out: Path, alone: Path, student: Path) -> None:
    """The run in `out` is the one in `alone`: losses, weights, aligner and files."""
    start, expected, found = weights_of(student), weights_of(alone), weights_of(out)
    assert set(found) == set(expected) == set(start)
    moved = max(float((expected[k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=f"{out.name} {name}")
    log, reference = (report_of(folder)["training"]["log"] for folder in (out, alone))
    for mine, theirs in zip(log[:4], reference[:4], strict=True):
        for name in ("loss", "loss_ar", "loss_align", "grad_norm", "lambda", "words_mapped", "confidence"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (out.name, name)
    aligners = [load_aligner(folder.parent / f"{folder.name}.safetensors") for folder in (out, alone)]
    for mine, theirs in zip(*(a.state_dict().values() for a in aligners), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert any(float(p.abs().max()) > 0 for p in aligners[0].body[-1].parameters())
    listed = [{p.name for p in folder.iterdir()} for folder in (out, alone)]
    assert listed[0] == listed[1]
    assert (out / "config.json").read_text() == (alone / "config.json").read_text()


def environment(engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<engine>.yaml` hands to its processes."""
    if engine == "ddp":
        return {}
    file = str(HERE.parents[1] / "configs" / "accelerate" / f"{engine}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "-m", "motionenhancer.train"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 8
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, found = prepare_deepspeed_cmd_env(arguments)
    else:
        found = prepare_multi_gpu_env(arguments)
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"
    # Half precision is left out: the comparison is to see nothing but the engine.
    named = {k: v for k, v in found.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    return {**named, "ACCELERATE_MIXED_PRECISION": "no"}


def broken_clips(world: World, folder: Path) -> dict[str, Any]:
    """Four clips and four files that are none, of equal size: each process is to make priors of two."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()][:4]
    folder.mkdir()
    for row in list(rows):
        (folder / row["video"]).write_bytes((world.videos / row["video"]).read_bytes())
    for index in range(4):
        (folder / f"{index}.mp4").write_bytes(bytes([index]) * 4000)
        rows.append({**rows[0], "id": f"broken-{index}", "video": f"{index}.mp4"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"data": folder / "data.jsonl", "video_root": folder, "max_steps": 1}


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        (
            "zero3",
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
        ),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    ],
)
def test_the_launchers_configurations_are_read(engine: str, said: dict[str, str]) -> None:
    assert said.items() <= environment(engine).items()


def run(engine: str, flags: list[str], **more: Any) -> dict[str, Any]:
    return {"environment": environment(engine), "flags": flags, "without": WITHOUT, **more}


def killed_and_resumed(engine: str, flags: list[str]) -> list[dict[str, Any]]:
    """A run that dies after step 3, and its continuation from the checkpoint of step 2."""
    return [run(engine, flags, die_after=3), run(engine, flags)]


def test_ddp_and_fsdp2_are_one_process(world: World, alone: Path, tmp_path: Path) -> None:
    outs = {name: tmp_path / name for name in ("ddp", "fsdp2", "accumulated", "moved")}
    # A family whose loss the Trainer does not divide, so that its shares are computed differently.
    other = World(world.data, world.videos, world.teacher, SAVE["internvl"](tmp_path / "internvl"))
    whole, shared = tmp_path / "internvl-alone", tmp_path / "internvl-ddp"
    with without_priors_of(WITHOUT):
        assert train.main(run_flags(other, whole, video_fps=None, per_device_train_batch_size=4)) == 0
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    launch(
        tmp_path,
        [
            run("ddp", run_flags(world, outs["ddp"])),
            *killed_and_resumed("fsdp2", run_flags(world, outs["fsdp2"])),
            run("ddp", run_flags(world, outs["accumulated"], **options)),
            run("ddp", run_flags(other, shared, video_fps=None)),
            run("ddp", run_flags(world, tmp_path / "spoiled"), spoil_rank=1, code=2),
            run("ddp", run_flags(world, outs["moved"]), die_after=3),
            run("ddp", flags(world, tmp_path / "broken", **broken_clips(world, tmp_path / "data"))),
        ],
    )
    # One process continues a run of two processes, with the same samples in each step.
    with without_priors_of(WITHOUT):
        assert train.main(run_flags(world, outs["moved"], per_device_train_batch_size=4)) == 0
    for out in outs.values():
        equals(out, alone, world.student)
    equals(shared, whole, other.student)
    sharded = outs["fsdp2"] / "checkpoint-4"
    assert (sharded / "pytorch_model_fsdp_0").is_dir()
    assert not list(sharded.glob("*.safetensors")), "shards only: nothing whole is gathered between"
    # Clips that a process could not read are in the report, whichever it was.
    skipped = report_of(tmp_path / "broken")["skipped"]
    named = {e["id"] for e in skipped["entries"] if e["reason"] == "unreadable video"}
    assert named == {f"broken-{index}" for index in range(4)}
    assert skipped["counts"]["unreadable video"] == 4
    # A NaN in one process stops both: the other is not left waiting, and the report names the sample.
    report = report_of(tmp_path / "spoiled")
    assert report["status"] == "failed"
    assert "loss is nan at step 0" in report["error"]
    assert report["error"].count("train-0000") == 2, "the samples of one process"


def same_maps(sharded: Path, whole: Path) -> None:
    """The pages of two runs show the same maps and scores, before and after."""
    views, expected = load_views(sharded), load_views(whole)
    assert [view.id for view in views] == [view.id for view in expected]
    for mine, theirs in zip(views, expected, strict=True):
        assert set(mine.maps) == set(theirs.maps) == {"before", "after"}
        assert not torch.equal(mine.maps["before"], mine.maps["after"])
        for when, maps in theirs.maps.items():
            torch.testing.assert_close(mine.maps[when], maps, rtol=2e-3, atol=1e-5)
            said = [view.scores[when].pop("said") for view in (mine, theirs)]
            assert said[0] == said[1]
            assert mine.scores[when] == pytest.approx(theirs.scores[when], rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_sharded_weights_are_read_for_the_page(engine: str, world: World, tmp_path: Path) -> None:
    options = {"max_steps": 2, "report_samples": 3}
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    assert train.main(run_flags(world, alone, per_device_train_batch_size=4, **options)) == 0
    launch(tmp_path, [run(engine, run_flags(world, sharded, **options)) | {"without": []}])
    same_maps(sharded, alone)


@NEEDS_DEEPSPEED
def test_zero_is_one_process(world: World, alone: Path, tmp_path: Path) -> None:
    engines = ("zero2", "zero3")
    runs = [killed_and_resumed(engine, run_flags(world, tmp_path / engine)) for engine in engines]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    runs.append([run("zero2", run_flags(world, tmp_path / "accumulated", **options))])
    launch(tmp_path, [one for several in runs for one in several])
    for name in (*engines, "accumulated"):
        equals(tmp_path / name, alone, world.student)
