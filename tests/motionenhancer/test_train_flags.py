"""Flags without effect are refused, each with a correct alternative."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_world import World
from train_support import flags, shared_priors

from motionenhancer import train
from motionenhancer.alignment.trainer import refuse_deepspeed_sections
from motionenhancer.evaluation.arguments import EvalArguments
from motionenhancer.settings import StudentArguments
from motionenhancer.students import student_family


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before the refusal."""
    monkeypatch.setattr("motionenhancer.train.load_samples", lambda *_: pytest.fail("went on to the data"))


@pytest.mark.parametrize(
    ("options", "flag", "right"),
    [
        ({"prior_source": "store", "prior_prefetch": 3}, "--prior_prefetch 3", "online or hybrid"),
        (
            {"priors_first": True, "prior_prefetch": 3},
            "--prior_prefetch 3 with --priors_first",
            "leave it out",
        ),
        ({"prior_source": "store", "agreement_clips": 9}, "--agreement_clips 9", "leave it out"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_flag_that_would_do_nothing(
    world: World,
    tmp_path: Path,
    options: dict[str, object],
    flag: str,
    right: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag}")
    assert right in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        *(
            (flag, value, "finite and")
            for flag in ("confidence_gate", "video_fps")
            for value in ("nan", "inf")
        ),
        ("confidence_gate", -0.1, "at least 0"),
        ("alignment_weight", "nan", "finite and at least 0"),
        ("alignment_weight", -1, "at least 0"),
        ("alignment_warmup", -1, "at least 0"),
        ("vision_learning_rate", "inf", "finite and at least 0"),
        ("prior_temperature", 0, "above 0"),
        ("lora_r", -1, "at least 0"),
        ("lora_alpha", 0, "at least 1"),
        ("lora_dropout", 1, "at least 0 and below 1"),
        ("video_fps", 0, "above 0"),
        ("num_frames", 0, "at least 1"),
        ("max_frames", 0, "at least 1"),
        ("max_pixels", 0, "at least 1"),
        ("limit", 0, "at least 1"),
        ("limit", -1, "at least 1"),
        ("teacher_frames", 0, "at least 1 and at most 1000"),
        ("teacher_frames", 10**6, "at least 1 and at most 1000"),
        ("ray_workers", 0, "at least 1"),
        ("prior_prefetch", -1, "at least 0"),
        ("agreement_clips", -1, "at least 0"),
        ("prior_seed", 2**32, "at least 0 and at most 4294967295"),
        ("learning_rate", "nan", "finite and at least 0"),
        ("weight_decay", -1, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("num_train_epochs", 0, "above 0"),
        ("num_train_epochs", -1, "above 0"),
        ("num_train_epochs", "nan", "finite and above 0"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("gradient_accumulation_steps", -2, "at least 1"),
        ("max_steps", 0, "at least 1, or -1"),
        ("logging_steps", 0, "above 0"),
        ("save_steps", 0, "above 0"),
        ("adam_beta1", 1, "at least 0 and below 1"),
        ("adam_beta2", "nan", "finite and at least 0 and below 1"),
        ("max_grad_norm", -1, "at least 0"),
        ("seed", 2**32, "at least 0 and at most 4294967295"),
        ("seed", -1, "at least 0"),
        ("data_seed", -1, "at least 0"),
        ("dataloader_num_workers", -1, "at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused_before_any_work(
    world: World, tmp_path: Path, flag: str, value: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(flags(world, tmp_path / "out", **{flag: value}))
    assert stop.value.code == 2
    assert f"error: --{flag} must be {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "family", "found"),
    [
        ({}, "qwen2_5_vl", {"fps": 1.0, "max_frames": 64}),
        ({}, "internvl", {"num_frames": 8}),
        ({"max_frames": 9}, "qwen2_5_vl", {"fps": 1.0, "max_frames": 9}),
        ({"max_frames": 9, "video_fps": 2.0}, "internvl", {"fps": 2.0, "max_frames": 9}),
        (
            {"num_frames": 4, "max_frames": 9},
            "qwen2_5_vl",
            "--max_frames 9 has no effect: the student gets 4 frames",
        ),
        ({"max_frames": 9}, "internvl", r"--max_frames 9 has no effect: .* 8 frames .*internvl by default"),
    ],
)
def test_how_many_frames_are_shown(options: dict, family: str, found: dict | str) -> None:
    student = StudentArguments(**options)
    if isinstance(found, dict):
        assert student.frames(student_family(family)) == {"max_pixels": None, **found}
    else:
        with pytest.raises(ValueError, match=f"^{found}"):
            student.frames(student_family(family))


def test_a_cap_on_pixels_that_changes_no_frame_is_refused() -> None:
    student = StudentArguments(max_pixels=9000)
    for sized in ("qwen2_5_vl", "gemma4", "minicpmv4_6"):
        assert student.frames(student_family(sized))["max_pixels"] == 9000
        assert EvalArguments(max_pixels=9000).frames(student_family(sized)).max_pixels == 9000
    for fixed in ("internvl", "llava_onevision", "smolvlm"):
        for said in (student.frames, EvalArguments(max_pixels=9000).frames):
            with pytest.raises(ValueError, match=f"^--max_pixels 9000 does nothing with {fixed}"):
                said(student_family(fixed))
    # Families without a size limit ignore the default; only a given --max_pixels is refused.
    assert EvalArguments().frames(student_family("internvl")).max_pixels == 360 * 420
    assert EvalArguments().frames(student_family("gemma4")).max_pixels is None
    assert EvalArguments(max_pixels=0).frames(student_family("internvl")).max_pixels is None


def test_max_pixels_is_refused_before_the_weights_are_read(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "internvl"}')
    assert train.main(flags(world, tmp_path / "out", student=folder, max_pixels=9000)) == 2
    assert "error: --max_pixels 9000 does nothing with internvl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("alignment_layers", "1"), ("alignment_heads", "0"), ("alignment_reduce", "none")]
)
def test_what_is_read_of_no_attention_is_refused(
    world: World, tmp_path: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(world, tmp_path / "out", alignment_weight=0, **{flag: value})) == 2
    assert f"error: --{flag} does nothing with --alignment_weight 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_frames_and_rate_exclude_each_other(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(flags(world, tmp_path / "out", num_frames=8, video_fps=2))
    assert "--num_frames and --video_fps exclude each other" in capsys.readouterr().err


def test_label_smoothing_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(flags(world, tmp_path / "out", label_smoothing_factor=0.1))
    assert "--label_smoothing_factor must stay 0" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_deepspeed_makes_no_optimizer_of_its_own(section: str) -> None:
    refuse_deepspeed_sections({"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=f'no "{section}" section'):
        refuse_deepspeed_sections({section: {"type": "AdamW"}})


@pytest.mark.parametrize(
    "options",
    [
        {"prior_source": "online", "prior_prefetch": 3, "measure_roundtrip": True, "ddp_timeout": 7200},
        {"prior_source": "store", "agreement_clips": 0},
        {"priors_first": True, "alignment_weight": 0},
    ],
    ids=str,
)
def test_flags_that_do_something_pass(world: World, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="went on to the data"):
        train.main(flags(world, tmp_path / "out", **options))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ddim_steps": 3}, "steps=3 (--ddim_steps) must divide the teacher's 1000"),
        ({"prior_mode": "renoise", "noise_level": 1000}, "--noise_level=1000 must be"),
    ],
    ids=["steps", "level"],
)
def test_levels_that_the_teacher_has_not(
    world: World,
    tmp_path: Path,
    dry_run: bool,
    options: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The refusal needs only the configuration of the teacher's scheduler."""
    assert train.main(flags(world, tmp_path / "out", dry_run=dry_run, **options)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_priors_first_decodes_in_as_many_threads_as_it_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()

    def maker(*args: object, decode_workers: int, **options: object) -> None:
        raise ValueError(f"{decode_workers} threads")

    monkeypatch.setattr("motionenhancer.priors.engine.LocalMaker", maker)
    options = {"prior_dir": shared_priors(world), "prior_workers": 5, "ddim_steps": 2}
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    assert "5 threads" in capsys.readouterr().err
