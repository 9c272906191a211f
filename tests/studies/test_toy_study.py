"""The toy's study: what is run, what a killed study does again, and the figures that come of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionenhancer.alignment.weight import AlignmentSchedule
from motionenhancer.data import content_digest, prompt_text, read_frames
from motionenhancer.priors.prior import extract_prior, read_attention, select_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.storage import PriorStore, prior_key
from motionenhancer.teachers import VideoLatents, load_teacher
from motionenhancer.toy.accuracy import samples_of
from motionenhancer.toy.models import save_student, save_teacher
from motionenhancer.toy.render import FRAMES
from motionenhancer.toy.world import ToyFolder, draw_clip, write_world
from studies.toy import fine_tuning, study
from studies.toy.arms import ARMS, BOTH, LEVEL, PAIRS, SWEEPS, Regime
from studies.toy.fine_tuning import fine_tune, make_priors, models, teacher_name
from studies.toy.masks import grid_mask, mask_prior, word_class
from studies.toy.study import Run, main, planned, unfinished, wanted_priors
from studies.toy.study_report import interval, summarise, tables, write_report

TINY = Regime(clips=6, test_clips=6, steps=2, batch=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A study's folder with its world, a teacher and a student."""
    root = tmp_path_factory.mktemp("study")
    for name, seed in (("world", 0), ("validation", 2)):
        write_world(root / "study" / name, clips=6, test_clips=6, seed=seed, progress=False)
    teacher = save_teacher(
        root / "teacher", layers=1, heads=4, frames=FRAMES, height=32, width=32, temporal_compression=2
    )
    return root / "study", teacher, save_student(root / "student", layers=1)


def test_masks_lie_on_the_grid() -> None:
    mask = np.zeros((17, 32, 32), np.float32)
    mask[0, :8, :8] = 1
    mask[1:5, 8:16, 24:] = 1
    mask[5:7, 0:4, 0:8] = 1
    cells = grid_mask(mask, (5, 4, 4))
    assert cells[0, 0, 0] == cells[0].sum() == 1
    assert cells[1, 1, 3] == cells[1].sum() == 1
    assert cells[2, 0, 0] == cells[2].sum() == 0.25
    assert cells[3:].sum() == 0
    with pytest.raises(ValueError, match="does not divide"):
        grid_mask(mask, (4, 4, 4))
    prior = mask_prior("What does the red square do? The red square moves left.", mask, (5, 4, 4))
    assert prior.tokens == ["red", "square", "do", "red", "square", "moves", "left"]
    np.testing.assert_array_equal(
        prior.attention.numpy(), np.tile(cells.reshape(1, -1), (7, 1)).astype(np.float16)
    )
    with pytest.raises(ValueError, match="no word that speaks of an object"):
        mask_prior("How is the", mask, (5, 4, 4))


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("▁red", "colour"),
        ("Square", "shape"),
        ("left.", "direction"),
        ("top", "place"),
        ("?", "punctuation"),
        ("the", "function"),
    ],
)
def test_words_have_a_class(word: str, name: str) -> None:
    assert word_class(word) == name


def test_a_result_names_its_models(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, teacher, student = folders
    found = models(BOTH, teacher, student)
    assert found == models(BOTH, teacher, student)
    assert set(models(ARMS[0], teacher, student)) == {"student"}
    other = save_student(tmp_path / "other", layers=1, seed=1)
    assert found["student"] != models(BOTH, teacher, other)["student"]


def test_one_reading_serves_every_selection(folders: tuple[Path, Path, Path]) -> None:
    """A selection from one reading equals a whole extraction with the same settings."""
    _, folder, _ = folders
    teacher = load_teacher(folder, dtype=torch.float32)
    clip = draw_clip(0, "train", 0)[1].frames
    settings = PriorSettings(mode="renoise", sampled_rows="all")
    reading = read_attention(teacher, clip, "the red square moves left", settings)
    for heads in ("mhs", "off"):
        for words in ("mtti", "off"):
            options = {"head_selection": heads, "token_selection": words}
            whole = extract_prior(
                teacher, clip, "the red square moves left", mode="renoise", sampled_rows="all", **options
            )
            chosen = select_prior(reading, replace(settings, **options))
            assert chosen == replace(whole, attention=chosen.attention)
            assert torch.equal(chosen.attention, whole.attention)


def test_priors_are_made_once_a_clip_and_read_once_a_way(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder, _ = folders
    (tmp_path / "world").symlink_to(root / "world")
    teacher, reads, encoded = load_teacher(folder, dtype=torch.float32), [], []
    encode = teacher.encode_video

    def encode_video(frames: np.ndarray) -> VideoLatents:
        encoded.append(1)
        return encode(frames)

    def reading(*given: Any) -> Any:
        reads.append(given[-1].noise_level)
        return read_attention(*given)

    monkeypatch.setattr(teacher, "encode_video", encode_video)
    monkeypatch.setattr(fine_tuning, "_loaded", lambda _: teacher)
    monkeypatch.setattr(fine_tuning, "read_attention", reading)
    high = replace(LEVEL, noise_level=400).settings()
    ways = [LEVEL.settings(), replace(LEVEL, token_selection="off").settings(), high]
    assert make_priors(ways, tmp_path, folder, range(2, 4)) == 2
    assert len(encoded) == 2
    assert reads == [200, 400] * 2
    assert make_priors([*ways, replace(LEVEL, noise_level=20).settings()], tmp_path, folder, range(3)) == 3
    assert len(encoded) == 5  # those of the third clip again
    assert reads[4:] == [200, 400, 20] * 2 + [20]

    world, store = ToyFolder(root / "world"), PriorStore(tmp_path / "priors")
    sample = samples_of(world.train, world.videos)[2]
    frames, text = read_frames(sample.videos[0], num_frames=teacher.max_frames).frames, prompt_text(sample)[0]
    key = prior_key(content_digest(sample.videos[0]), text, teacher_name(folder), high)
    options = {"mode": "renoise", "noise_level": 400, "sampled_rows": "all"}
    assert torch.equal(store.read(key).attention, extract_prior(teacher, frames, text, **options).attention)


def test_arms_differ_in_one_thing() -> None:
    arms = {arm for sweep in (ARMS, *SWEEPS.values()) for arm in sweep}
    assert len({arm.name for arm in arms}) == len(arms)
    assert {name for pair in PAIRS for name in pair} <= {arm.name for arm in arms}
    for field, sweep, base in (
        ("steps", "steps", BOTH),
        ("noise_level", "noise level", LEVEL),
        ("ratio", "ratio", LEVEL),
        ("weight", "weight", LEVEL),
        ("schedule", "schedule", LEVEL),
        ("temperature", "temperature", LEVEL),
        ("aligner", "aligner", LEVEL),
    ):
        for arm in SWEEPS[sweep]:
            changed = {k for k, v in asdict(arm).items() if v != asdict(base)[k]}
            assert changed == {"name", field} or arm == base
    assert (BOTH.mode, BOTH.steps) == ("reconstruct", PriorSettings().steps)
    assert asdict(LEVEL) == asdict(replace(BOTH, name=LEVEL.name, mode="renoise"))
    for arm, inverted in zip(SWEEPS["selection at level 200"], ARMS[1:5], strict=True):
        assert asdict(arm) == asdict(replace(inverted, name=arm.name, mode="renoise"))
        assert arm == LEVEL or arm.name == f"{LEVEL.name}, {inverted.name}"


def test_runs_are_planned_seed_by_seed_and_never_repeated(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, teacher, student = folders
    runs = planned(TINY, 2, ["plain", "both selections"], ["steps"], 1)
    assert [run.name for run in runs] == [
        "plain-0",
        "both_selections-0",
        "plain-1",
        "both_selections-1",
        "2_steps-0",
        "10_steps-0",
    ]
    assert len(wanted_priors(runs)) == 3  # as the number of steps varies
    assert wanted_priors(planned(TINY, 1, ["plain", "true masks"], [], 1)) == []
    assert len(wanted_priors(planned(TINY, 1, [], ["noise level"], 1))) == 4 + 5
    swept = planned(TINY, 1, ["plain"], ["ratio", "weight"], 1)
    assert len(swept) == len(set(swept)) == 1 + 1 + 2 + 3  # what is varied is in either sweep
    (tmp_path / "runs").mkdir()
    for run in runs[:2]:
        done = {"arm": asdict(run.arm), "regime": asdict(TINY), "models": models(run.arm, teacher, student)}
        (tmp_path / "runs" / f"{run.name}.json").write_text(json.dumps(done))
    left = list(unfinished(runs, tmp_path, teacher, student))
    assert [run.name for run in left] == [run.name for run in runs[2:]]
    other = [Run(runs[0].arm, 0, replace(TINY, steps=3))]
    with pytest.raises(ValueError, match="of another study"):
        list(unfinished(other, tmp_path, teacher, student))
    another = save_teacher(tmp_path / "teacher", layers=1, heads=4, seed=1)
    assert list(unfinished(runs[:1], tmp_path, another, student)) == []
    with pytest.raises(ValueError, match="of another study"):
        list(unfinished(runs[1:2], tmp_path, another, student))


def test_a_fine_tuning_is_the_same_every_time(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, teacher, student = folders
    world = ToyFolder(root / "world")
    make_priors([replace(BOTH, ratio=0.25).settings(), BOTH.settings()], root, teacher, range(6))
    store, name = PriorStore(root / "priors"), teacher_name(teacher)
    few, half = (
        store.read(prior_key(content_digest(clip), prompt_text(sample)[0], name, way))
        for sample in samples_of(world.train, world.videos)[:1]
        for clip in sample.videos
        for way in (replace(BOTH, ratio=0.25).settings(), BOTH.settings())
    )
    assert few.all_tokens == half.all_tokens
    assert len(few.kept) < len(half.kept)
    first = fine_tune(BOTH, TINY, 0, root, teacher, student)
    assert first == fine_tune(BOTH, TINY, 0, root, teacher, student)
    assert first["words"]["aligned_samples"] == 6
    assert first["words"]["mapped_words"] == first["words"]["words"] > 0
    assert set(first["accuracy"]["tasks"]) == {"MR", "LM", "CM", "MO", "AO", "RC"}
    assert set(first["validation"]["tasks"]) == {"MR", "LM", "CM", "MO", "AO", "RC"}
    asked = []

    def noted(model: Any, processor: Any, family: Any, world: Path, *, shown: str) -> dict[str, Any]:
        asked.append((world.name, shown))
        return {}

    monkeypatch.setattr(fine_tuning, "accuracy", noted)
    masks = fine_tune(next(a for a in ARMS if a.prior == "masks"), TINY, 0, root, teacher, student)
    assert asked == [("world", "video"), ("validation", "video")]
    assert masks["words"]["aligned_samples"] == 5  # a moving camera has no object


def test_an_arm_says_how_it_is_aligned(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class Told(Exception):
        pass

    def told(**options: Any) -> None:
        given.update(options)
        raise Told

    monkeypatch.setattr("studies.toy.fine_tuning.MotionTrainer", told)
    masks = next(a for a in ARMS if a.prior == "masks")
    with pytest.raises(Told):
        fine_tune(replace(masks, weight=0.7, temperature=0.3), TINY, 0, *folders)
    assert given["alignment_weight"] == AlignmentSchedule(0.7, "linear")
    assert given["prior_temperature"] == 0.3
    assert isinstance(given["aligner"], torch.nn.Identity)


def test_the_command_writes_results_and_goes_on(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, teacher, student = folders
    monkeypatch.setattr(study, "_PART", 4)  # of six clips
    flags = [
        *("--output_dir", str(tmp_path), "--teacher", str(teacher), "--student", str(student)),
        *("--clips", "6", "--test_clips", "6", "--steps", "2", "--batch", "3", "--processes", "1"),
        *("--arms", "plain", "MTTI only", "--sweeps", "--seeds"),
    ]
    assert main([*flags, "1"]) == 0
    kept = (tmp_path / "runs" / "plain-0.json").stat().st_mtime_ns

    def refuse(constant: str) -> None:
        raise AssertionError(f"results.json holds {constant}, which is not json")

    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert written["arms"]["plain"]["overall"]["half"] is None
    assert set(written["arms"]["MTTI only"]["models"]) == {"teacher", "student"}
    assert written["arms"]["plain"]["validation"]["runs"] == 1
    questions = [(tmp_path / name / "test.jsonl").read_text() for name in ("world", "validation")]
    assert questions[0] != questions[1]
    assert main([*flags, "2"]) == 0
    assert (tmp_path / "runs" / "plain-0.json").stat().st_mtime_ns == kept
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert {name: row["seeds"] for name, row in arms.items()} == {"plain": [0, 1], "MTTI only": [0, 1]}
    assert "| MTTI only | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--arms", "magic"])


def test_intervals_and_gains(tmp_path: Path) -> None:
    assert interval([3.0]) == (3.0, float("inf"))
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * np.sqrt(2.5) / np.sqrt(5), rel=1e-3)
    (tmp_path / "runs").mkdir()
    for name, values in (("plain", (50.0, 60.0)), ("both selections", (54.0, 66.0))):
        arm = next(a for a in ARMS if a.name == name)
        for seed, value in enumerate(values):
            tasks = dict.fromkeys(("MR", "LM", "CM", "MO", "AO", "RC"), value)
            record = {
                "arm": asdict(arm),
                "seed": seed,
                "regime": asdict(TINY),
                "accuracy": {"overall": value, "average": value, "tasks": tasks},
            }
            (tmp_path / "runs" / f"{name}-{seed}.json").write_text(json.dumps(record))
    arm = SWEEPS["ratio"][1]
    record |= {"arm": asdict(arm), "seed": 0, "validation": {"overall": 61.0}}
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(record))
    found = summarise(tmp_path, TINY)
    gain = found["arms"]["both selections"]["overall_gain"]
    assert gain["mean"] == 5
    assert gain["half"] == pytest.approx(12.706, rel=1e-3)
    assert "| both selections | 2 | 60.0 ± 76.2 | +5.0 ± 12.7 |" in tables(found)
    assert found["arms"]["both selections"]["tasks_gain"]["AO"]["mean"] == 5
    assert "| both selections | +5.0 ± 12.7 | +5.0 ± 12.7 |" in tables(found)
    assert found["pairs"] == []
    assert "Seed by seed" not in tables(found)
    assert tables(found).count("###") == 3  # arms, the sweep of which one arm was run, gains by task
    assert f"| {arm.name} | 1 | 66.0 | +16.0 | 61.0 |" in tables(found)
    assert not summarise(tmp_path, replace(TINY, steps=9))["arms"]

    record["arm"] = asdict(next(a for a in ARMS if a.name == "MTTI only"))
    for seed, value in ((1, 67.0), (2, 20.0)):
        record |= {"seed": seed, "accuracy": {"overall": value, "average": value, "tasks": tasks}}
        (tmp_path / "runs" / f"mtti-{seed}.json").write_text(json.dumps(record))
    found = summarise(tmp_path, TINY)
    pair = {"arm": "both selections", "over": "MTTI only", "seeds": [1], "mean": -1.0, "half": np.inf}
    assert found["pairs"] == [pair]
    assert "| both selections | MTTI only | 1 | -1.0 |" in tables(found)


def test_a_sweep_is_shown_without_the_arm_that_it_varies_and_plotted(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert write_report(tmp_path, TINY) == ""  # nothing was run
    assert not (tmp_path / "plots.png").exists()
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == {}
    tasks = dict.fromkeys(("MR", "LM", "CM", "MO", "AO", "RC"), 50.0)
    record = {"arm": asdict(SWEEPS["schedule"][1]), "seed": 0, "regime": asdict(TINY)}
    record |= {"accuracy": {"overall": 50.0, "average": 50.0, "tasks": tasks}}
    (tmp_path / "runs" / "one.json").write_text(json.dumps(record))
    text = write_report(tmp_path, TINY)
    assert "### Sweep: schedule" in text
    assert "### Arms" not in text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "plots.png").stat().st_size > 1000
