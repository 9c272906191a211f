"""Priors made while training: the same run as from the store, whatever is prefetched, killed or fails."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tiny_world import World
from train_support import flags, report_of, weights_of

from motionenhancer import extract, train
from motionenhancer import store as store_command
from motionenhancer.alignment.dataset import Wanted
from motionenhancer.alignment.online import NoPriorError, OnlinePriors
from motionenhancer.data import SkipLog, prompt_text, read_frames, read_samples
from motionenhancer.data.encode import encode_video
from motionenhancer.integrations.lookup import PriorLookup
from motionenhancer.priors import reader as priors_reader
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.maker import DeadTeacher, LocalMaker
from motionenhancer.priors.prior import PARTLY_UNKNOWN, extract_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import PriorRequest, request_priors
from motionenhancer.priors.storage import PriorStore
from motionenhancer.training.run_identity import aligned_before

#: Two epochs of the eight clips, so that every prior is asked for twice.
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2, "limit": 4}


def same_weights(one: Path, other: Path) -> None:
    expected, found = weights_of(one), weights_of(other)
    assert set(expected) == set(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def stored(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with priors that were extracted before, in the folder beside it."""
    folder = tmp_path_factory.mktemp("stored")
    chosen = world.flags(student=None, prior_dir=folder / "priors", ddim_steps=1, limit=4)
    assert extract.main(chosen) == 0
    assert train.main(flags(world, folder / "out", prior_source="store", **EPOCHS)) == 0
    return folder / "out"


@pytest.mark.parametrize("prefetch", [0, 3])
def test_online_ends_with_the_weights_of_stored_priors(
    world: World, tmp_path: Path, stored: Path, prefetch: int
) -> None:
    options = {**EPOCHS, "prior_source": "online", "prior_prefetch": prefetch, "measure_roundtrip": True}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    same_weights(stored, tmp_path / "out")
    assert not (tmp_path / "priors").exists(), "online keeps nothing"
    report, before = report_of(tmp_path / "out"), report_of(stored)
    online = report["teacher"]["online"]
    assert (online["made"], online["stored"], online["failed"]) == (8, 0, 0)
    assert online["busy_seconds"] > 0
    assert 0 <= online["hidden_share"] <= 1
    assert online["prefetch"] == prefetch
    assert 0 < report["teacher"]["roundtrip"]["whole_schedule"] < 10
    assert online["memory"][0]["peak_bytes"] > 0
    assert report["alignment"] == before["alignment"]
    timed = ("seconds", "key", "made_now")
    for one, other in zip(report["samples"], before["samples"], strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_hybrid_makes_each_prior_once(
    world: World, tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One of four priors is stored: the first epoch makes three, the second epoch and another run none.

    The folder then says of each prior what it was made of, and a plug-in finds it.
    """
    kept = PriorStore(stored.parent / "priors")
    key = sorted(kept)[0]
    mine = PriorStore(tmp_path / "priors")
    mine.path(key).parent.mkdir(parents=True)
    shutil.copy(kept.path(key), mine.path(key))
    assert train.main(flags(world, tmp_path / "out", prior_source="hybrid", **EPOCHS)) == 0
    same_weights(stored, tmp_path / "out")
    online = report_of(tmp_path / "out")["teacher"]["online"]
    assert (online["made"], online["stored"], online["failed"]) == (3, 5, 0)
    assert {k: mine.path(k).read_bytes() for k in mine} == {k: kept.path(k).read_bytes() for k in kept}
    capsys.readouterr()
    assert store_command.main(["list", "--prior_dir", str(mine.folder)]) == 0
    listed, lookup = capsys.readouterr().out, PriorLookup(mine.folder)
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:4]
    for sample in samples:
        assert f"{sample.videos[0].name} by {world.teacher.name}  MotionPrior" in listed
        assert lookup.of(sample) is not None
    written = (mine.folder / "extraction.json").read_bytes()

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("motionenhancer.priors.arguments.load_teacher", refuse)
    assert train.main(flags(world, tmp_path / "again", prior_source="hybrid", **EPOCHS)) == 0
    same_weights(stored, tmp_path / "again")
    assert (mine.folder / "extraction.json").read_bytes() == written


def test_priors_first_makes_them_all_before_training(
    world: World, tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the teacher stayed")

    monkeypatch.setattr(OnlinePriors, "__init__", refuse)
    options = {**EPOCHS, "prior_source": "hybrid", "priors_first": True}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    same_weights(stored, tmp_path / "out")
    assert len(list(PriorStore(tmp_path / "priors"))) == 4


def test_workers_that_load_the_data_change_nothing(world: World, tmp_path: Path, stored: Path) -> None:
    options = {**EPOCHS, "prior_source": "online", "dataloader_num_workers": 2}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    same_weights(stored, tmp_path / "out")
    assert report_of(tmp_path / "out")["teacher"]["online"]["made"] == 8


def test_a_damaged_prior_is_made_anew_while_training(world: World, tmp_path: Path, stored: Path) -> None:
    shutil.copytree(stored.parent / "priors", tmp_path / "priors")
    store = PriorStore(tmp_path / "priors")
    first, second, *_ = sorted(store)
    whole = store.path(first).read_bytes()
    store.path(first).write_bytes(whole[:100])
    store.path(second).unlink()
    assert train.main(flags(world, tmp_path / "out", prior_source="hybrid", **EPOCHS)) == 0
    same_weights(stored, tmp_path / "out")
    assert store.path(first).read_bytes() == whole
    report = report_of(tmp_path / "out")
    assert report["skipped"]["notes"] == {"damaged priors made anew": 1}
    assert report["teacher"]["online"]["made"] == 2


def test_killed_and_resumed_it_ends_with_the_same_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulation = 2
    options = {
        **EPOCHS,
        "prior_source": "online",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 1,
        "prior_prefetch": 2,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(flags(world, whole, **options)) == 0
    shutil.copytree(whole, cut)
    steps = 8 // accumulation
    for step in range(steps // 2 + 1, steps + 1):
        shutil.rmtree(cut / f"checkpoint-{step}")
    (cut / "model.safetensors").unlink()
    settled, feed = [], OnlinePriors.feed

    def remembered(self: OnlinePriors, *given: Any) -> Any:
        settled.append(self.settled)
        return feed(self, *given)

    monkeypatch.setattr(OnlinePriors, "feed", remembered)
    assert train.main(flags(world, cut, **options)) == 0
    same_weights(whole, cut)
    assert settled[0], "the log says that priors were followed before"
    made = report_of(cut)["teacher"]["online"]["made"]
    assert made == 4, "what was trained on before the kill is not read again"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_teacher_draws_is_its_own_and_knows_no_order(world: World, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: the teacher has no stream of its own")
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:3]
    settings = PriorSettings(steps=1, start="random")
    requests = [request for _, request in request_priors(samples, "both", SkipLog())]
    teacher = PriorArguments(teacher=str(world.teacher)).load(device)
    expected = []
    for request in requests:
        frames = read_frames(request.video, num_frames=17, size=teacher.size).frames
        expected.append(extract_prior(teacher, frames, request.text, steps=1, start="random"))
    before = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state())  # noqa: NPY002
    for turned in (False, True):
        maker = LocalMaker(lambda: teacher, settings)
        asked = [maker.submit(request) for request in (requests[::-1] if turned else requests)]
        for _ in range(20 if device == "cuda" else 0):
            torch.randn(2048, 2048, device=device, generator=torch.Generator(device)) @ torch.ones(
                2048, 2048, device=device
            )
        found = [answer.result().prior for answer in asked]
        maker.close()
        for one, other in zip(found[::-1] if turned else found, expected, strict=True):
            assert torch.equal(one.attention, other.attention)
    assert random.getstate() == before[0]
    assert repr(np.random.get_state()) == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_closing_gives_up_what_is_not_begun(world: World) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    requests = [request for _, request in request_priors(samples, "both", SkipLog())]
    maker = LocalMaker(lambda: PriorArguments(teacher=str(world.teacher)).load("cpu"), PriorSettings())
    asked = [maker.submit(request) for request in requests * 10]
    asked[0].result()
    maker.close()
    assert all(answer.done() for answer in asked)
    assert asked[-1].cancelled()
    with pytest.raises(RuntimeError, match="is closed"):
        maker.submit(requests[0])


def test_samples_of_one_clip_and_text_share_a_prior(world: World, tmp_path: Path) -> None:
    line = json.loads(world.data.read_text().splitlines()[0])
    data = write_rows(tmp_path / "data.jsonl", [line, {**line, "id": "again"}])
    options = {"data": data, "prior_source": "online", "max_steps": 1}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    report = report_of(tmp_path / "out")
    assert report["teacher"]["online"]["made"] == 1
    assert report["alignment"]["aligned_samples"] == 2
    assert [sample["id"] for sample in report["samples"]] == [line["id"], "again"]


# ---- what fails ----


def rows(world: World) -> list[dict]:
    return [json.loads(line) for line in world.data.read_text().splitlines()]


def write_rows(path: Path, lines: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def fail_on(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool]) -> None:
    make = priors_reader.extract_prior

    def extract_prior(teacher, frames, text, **options):
        if fails(text):
            raise RuntimeError("the teacher stumbled")
        return make(teacher, frames, text, **options)

    monkeypatch.setattr(priors_reader, "extract_prior", extract_prior)


def test_a_text_that_the_teacher_knows_in_part_is_counted(world: World) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    (one, known), (other, partly) = request_priors(samples, "both", SkipLog())
    partly = replace(partly, text="The red 方块 moves")
    load = PriorArguments(teacher=str(world.teacher)).load
    online = OnlinePriors(LocalMaker(lambda: load("cpu"), PriorSettings(steps=1)))
    for wanted in (Wanted(one, known), Wanted(other, partly)):
        assert online._await(wanted, online.maker.submit(wanted.request), first=True) is not None
    online.close()
    assert online.skips.notes == {PARTLY_UNKNOWN: 1}


def test_a_clip_that_fails_costs_its_alignment_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:4]
    text, _ = prompt_text(samples[1], "both")
    assert sum(prompt_text(s, "both")[0] == text for s in samples) == 1
    fail_on(monkeypatch, lambda given: given == text)
    assert train.main(flags(world, tmp_path / "out", prior_source="online", **EPOCHS)) == 0
    report = report_of(tmp_path / "out")
    assert (report["teacher"]["online"]["made"], report["teacher"]["online"]["failed"]) == (6, 2)
    assert report["alignment"]["samples"] == 8, "the clip is trained on all the same"
    assert report["alignment"]["aligned_samples"] == 6
    (entry,) = report["skipped"]["entries"]
    assert entry["id"] == samples[1].id
    assert "the teacher stumbled" in entry["detail"]
    assert "the teacher stumbled" in caplog.text, "said when it happens"


def test_a_teacher_that_fails_on_all_stops_the_run_early(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_on(monkeypatch, lambda text: True)
    options = {**EPOCHS, "num_train_epochs": 50, "limit": None, "prior_source": "online"}
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err
    assert "failed on all 8 clips" in error
    assert "the teacher stumbled" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert report_of(tmp_path / "out")["status"] == "failed"


def test_a_teacher_that_dies_on_the_way_stops_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run stops although the teacher made a prior before, and although others are stored."""
    texts: list[str] = []

    def fails(text: str) -> bool:
        texts.append(text)
        return len(texts) > 2

    fail_on(monkeypatch, fails)
    options = {**EPOCHS, "num_train_epochs": 50, "limit": None, "prior_source": "hybrid"}
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err
    assert (
        "the teacher failed on 8 clips in a row, the last time with RuntimeError: the teacher stumbled"
        in error
    )
    assert "newest checkpoint" in error
    assert len(list(PriorStore(tmp_path / "priors"))) == 2
    assert list(PriorStore(tmp_path / "priors").refusals()) == [], "no clip is to blame"
    assert len(texts) < 25
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_teacher_that_recovers_or_meets_bad_clips_is_not_dead(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:1]
    ((_, good),) = request_priors(samples, "both", SkipLog())
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    fail_on(monkeypatch, lambda text: text == "fail")
    maker = LocalMaker(
        lambda: PriorArguments(teacher=str(world.teacher)).load("cpu"), PriorSettings(steps=1, mode="renoise")
    )
    stumble, bad, empty = (
        replace(good, text="fail"),
        replace(good, video=broken),
        replace(good, text=" "),
    )

    def kinds(*requests: PriorRequest) -> list[str]:
        answers = [maker.submit(request) for request in requests]
        return [type(answer.exception()).__name__ for answer in answers]

    assert kinds(*[bad, empty] * 5) == ["VideoError", "PriorError"] * 5
    assert (
        kinds(*[stumble] * 7, good, *[stumble] * 7)
        == ["RuntimeError"] * 7 + ["NoneType"] + ["RuntimeError"] * 7
    )
    assert kinds(bad, stumble) == ["VideoError", "DeadTeacher"]
    with pytest.raises(DeadTeacher):
        maker.submit(good)
    maker.close()


def test_a_run_that_goes_on_is_not_stopped_for_the_clips_it_has_left(tmp_path: Path) -> None:
    for settled in (False, True):
        online = OnlinePriors(MagicMock(), settled=settled)
        online.counts.failed = 1
        with nullcontext() if settled else pytest.raises(NoPriorError):
            online.judge(lambda counts: counts, final=True)
    state = tmp_path / "trainer_state.json"
    plain, aligned = {"step": 1, "loss": 1.0}, {"step": 2, "loss_align": 0.5}
    for log, found in (([plain], False), ([plain, aligned], True)):
        state.write_text(json.dumps({"global_step": len(log), "log_history": log}))
        assert aligned_before(tmp_path) is found
    state.unlink()
    assert not aligned_before(tmp_path)


def test_a_short_run_without_any_prior_is_an_error_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_on(monkeypatch, lambda text: True)
    assert train.main(flags(world, tmp_path / "out", prior_source="online", limit=2)) == 2
    assert "failed on all 4 clips" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_clip_only_the_teacher_cannot_read(world: World, tmp_path: Path) -> None:
    """A clip of one frame is enough for the student, but the teacher needs two."""
    videos = tmp_path / "videos"
    shutil.copytree(world.videos, videos)
    lines = rows(world)[:2]
    encode_video(videos / "still.mp4", np.full((1, 64, 64, 3), 90, np.uint8), fps=8)
    data = write_rows(tmp_path / "data.jsonl", [*lines, {**lines[0], "id": "still", "video": "still.mp4"}])
    options = {"data": data, "video_root": videos, "prior_source": "online", "max_steps": 2}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    report = report_of(tmp_path / "out")
    assert "still" in {entry["id"] for entry in report["skipped"]["entries"]}
    assert report["alignment"]["aligned_samples"] == report["teacher"]["online"]["made"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prior_source": "online", "ddim_steps": 3}, "steps=3"),
        ({"prior_source": "online", "prior_mode": "renoise", "noise_level": 4000}, "4000"),
        ({"prior_source": "online", "priors_first": True}, "--priors_first needs --prior_source hybrid"),
        ({"prior_source": "online", "teacher": "missing"}, "missing"),
        ({"prior_source": "online", "ray_workers": 2}, "--ray_workers needs --prior_engine ray"),
        ({"prior_source": "online", "prior_prefetch": -1}, "--prior_prefetch must be at least 0, got -1"),
        ({"prior_source": "online", "agreement_clips": -1}, "--agreement_clips"),
        ({"prior_source": "online", "prior_workers": 0}, "--prior_workers"),
    ],
)
def test_one_clear_error_before_any_training(
    world: World, tmp_path: Path, options: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = train.main(flags(world, tmp_path / "out", **options))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---- single-pass priors ----


def test_single_pass_priors_say_how_far_they_agree(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**EPOCHS, "prior_source": "online", "prior_mode": "renoise", "agreement_clips": 2}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    said = [
        line for line in capsys.readouterr().out.splitlines() if "single-pass priors at level 200" in line
    ]
    assert len(said) == 1
    assert "1 instead of 5 evaluations" in said[0]
    found = report_of(tmp_path / "out")["teacher"]["agreement"]
    assert found["clips"] == 2
    assert 0 < found["cosine"] < 1
    # Without --agreement_clips the run prints nothing about agreement, and trains the same weights.
    assert train.main(flags(world, tmp_path / "silent", **{**options, "agreement_clips": 0})) == 0
    assert "single-pass" not in capsys.readouterr().out
    assert report_of(tmp_path / "silent")["teacher"]["agreement"] is None
    same_weights(tmp_path / "out", tmp_path / "silent")
