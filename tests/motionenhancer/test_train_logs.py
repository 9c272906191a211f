"""What a run logs, read back from what TensorBoard and wandb keep of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import World
from train_support import flags, report_of, shared_priors, without_priors_of
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback

from motionenhancer import train
from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.logs import StepLog, Stopwatch
from motionenhancer.report.picture import contact_sheet
from motionenhancer.report.views import load_views
from motionenhancer.report.watch import log_pictures
from motionenhancer.training.arguments import TrainArguments

NAMES = (
    "loss_ar",
    "loss_align",
    "loss_align_raw",
    "lambda",
    "words_mapped",
    "confidence",
    "alignment_seconds",
)


def test_tensorboard_receives_every_number(world: World, tmp_path: Path, monkeypatch) -> None:
    readers = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    options = {"alignment_weight": 3.0, "alignment_schedule": "linear", "max_steps": 3}
    options |= {"report_to": "tensorboard", "prior_dir": shared_priors(world), "report_samples": 5}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    events = readers.EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    events.Reload()
    # Our own flags beside transformers'.
    (text,) = events.Tensors("args/text_summary")
    args = json.loads(text.tensor_proto.string_val[0])
    known = {"teacher": str(world.teacher), "data": str(world.data), "learning_rate": 1e-3, "aligner": "mlp"}
    known |= {"alignment_weight": 3.0, "prior_dir": str(shared_priors(world)), "ddim_steps": 1}
    assert {name: args[name] for name in known} == known
    # Contact sheets of the first four clips of the page, after the last step.
    views = load_views(tmp_path / "out")
    assert sorted(events.Tags()["images"]) == sorted(f"maps/{view.id}" for view in views[:4])
    (drawn,) = events.Images(f"maps/{views[0].id}")
    assert drawn.step == 3
    picture, kept = Image.open(BytesIO(drawn.encoded_image_string)), contact_sheet(views[0])
    # The kept maps are in half precision: one level of a colour is their rounding.
    assert np.abs(np.asarray(picture, int) - np.asarray(kept, int)).max() <= 1
    logged = [entry for entry in report_of(tmp_path / "out")["training"]["log"] if "loss" in entry]
    assert len(logged) == 3
    for name in NAMES:
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [1, 2, 3], name
        assert [s.value for s in scalars] == pytest.approx([entry[name] for entry in logged]), name
    assert [entry["lambda"] for entry in logged] == pytest.approx([3.0, 2.0, 1.0])
    for entry in logged:
        total = entry["loss_ar"] + entry["lambda"] * entry["loss_align"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert entry["alignment_seconds"] > 0
        assert entry["words_mapped"] == 1.0


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_every_number_offline(world: World, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    options = {"report_to": "wandb", "prior_dir": shared_priors(world), "max_steps": 1}
    try:
        assert train.main(flags(world, tmp_path / "out", **options)) == 0
    finally:
        wandb.teardown()
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    body = kept.read_bytes()
    assert all(f"train/{name}".encode() in body for name in (*NAMES, "global_step"))
    assert b"alignment_weight" in body
    assert len(list(kept.parent.rglob("media/images/**/*.png"))) == 4


def test_other_trackers_receive_pictures_as_their_modules_take_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins of the modules; a tracker that fails does not keep the pictures from the next."""
    found: list[Any] = []

    def fail(*_: Any) -> None:
        raise RuntimeError("no\nspace")

    def module(name: str) -> SimpleNamespace:
        return SimpleNamespace(Image=lambda picture: (name, picture), log=found.append)

    mlflow = SimpleNamespace(log_image=lambda picture, file: found.append((picture, file)))
    broken = SimpleNamespace(Image=fail)
    for wandb in (broken, module("wandb")):
        for name, stand_in in {"wandb": wandb, "trackio": module("trackio"), "mlflow": mlflow}.items():
            monkeypatch.setitem(sys.modules, name, stand_in)
        found.clear()
        kinds = (WandbCallback, TrackioCallback, MLflowCallback)
        log_pictures([object(), *(kind.__new__(kind) for kind in kinds)], [("a/b", "picture")], 7)
        expected = [
            {"maps/a_b": ("wandb", "picture"), "train/global_step": 7},
            {"maps/a_b": ("trackio", "picture"), "train/global_step": 7},
            ("picture", "maps/a_b.png"),
        ]
        assert found == expected[wandb is broken :]
    assert capsys.readouterr().out == "wandb: got no pictures (no space)\n"
    log_pictures([object()], (fail() for _ in range(1)), 7)  # without a tracker, nothing is drawn


def test_steps_without_a_prior_log_no_alignment(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everyone = [json.loads(line)["id"] for line in world.data.read_text().splitlines()]
    with without_priors_of(everyone):
        assert train.main(flags(world, tmp_path / "out", prior_dir=shared_priors(world), max_steps=1)) == 1
    assert "no word of a prior was found in any of the 2 samples" in capsys.readouterr().err
    (entry,) = [e for e in report_of(tmp_path / "out")["training"]["log"] if "loss" in e]
    assert entry["loss"] == pytest.approx(entry["loss_ar"], rel=1e-5)
    assert not set(entry) & {"loss_align", "loss_align_raw", "lambda", "confidence", "words_mapped"}


def test_numbers_are_means_over_steps_processes_and_priors() -> None:
    log = StepLog(torch.device("cpu"))
    assert log.entries(lambda t: t, 1) == {}
    priors = [SimpleNamespace(confidence={"confidence": c}) for c in (0.2, 0.6)]
    for step in range(2):
        log.add_losses(torch.tensor(4.0), torch.tensor([1.0, 3.0]) if step else None)
        log.add_batch(SimpleNamespace(priors=[*priors, None], words=4, mapped=3))
        with log.stopwatch:
            sum(range(1000))
        log.steps += 1
    # Another process like this one.
    found = log.entries(lambda t: 2 * t, 2)
    seconds = found.pop("alignment_seconds")
    assert found == pytest.approx(
        {
            "loss_ar": 4.0,
            "loss_align": 0.5,
            "loss_align_raw": 1.5,
            "words_mapped": 0.75,
            "confidence": 0.4,
        }
    )
    assert 0 < seconds < 1
    assert log.entries(lambda t: t, 1) == {}


def test_the_stopwatch_starts_anew_when_it_is_read() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch:
        sum(range(100_000))
    assert watch.seconds() > 0
    assert watch.seconds() == 0


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("prior_temperature", 0.5, "temperature"),
        ("normalize_rows", False, "normalize"),
        ("alignment_loss", "squared", "loss"),
    ],
)
def test_how_maps_are_compared_reaches_the_alignment(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, option: str
) -> None:
    given: dict[str, set[object]] = {}

    def seen_by(module: str) -> Callable[..., object]:
        def seen(*args: object, **options: object) -> object:
            given.setdefault(module, set()).add(options[option])
            return align(*args, **options)

        return seen

    modules = ("alignment.trainer", "report.watch")
    for module in modules:
        monkeypatch.setattr(f"motionenhancer.{module}.align", seen_by(module))
    options = {"prior_dir": shared_priors(world), "max_steps": 1, "report_samples": 1, name: value}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    assert given == {module: {value} for module in modules}


@pytest.mark.parametrize(
    ("steps", "given", "expected"), [(3, None, 1), (15, None, 1), (25, None, 2), (4000, None, 10), (15, 5, 5)]
)
def test_a_run_logs_ten_times_unless_it_is_told_how_often(
    tmp_path: Path, steps: int, given: int | None, expected: int
) -> None:
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True, logging_steps=given)
    training.log_ten_times(steps)
    assert training.logging_steps == expected


@pytest.mark.parametrize("aligner", ["mlp", "identity"])
def test_the_raw_distance_is_the_one_without_the_aligner(world: World, tmp_path: Path, aligner: str) -> None:
    """At the first step both distances are equal; later they differ if an aligner is trained."""
    options = {"prior_dir": shared_priors(world), "max_steps": 4, "aligner": aligner, "warmup_steps": 0}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    log = [e for e in report_of(tmp_path / "out")["training"]["log"] if "loss_align" in e]
    assert log[0]["loss_align_raw"] == pytest.approx(log[0]["loss_align"], rel=1e-6)
    apart = [entry["loss_align_raw"] != pytest.approx(entry["loss_align"], rel=1e-4) for entry in log[1:]]
    assert apart == [aligner == "mlp"] * 3
