"""Every field of a teacher's configuration files is understood, or the folder is refused by its name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from tiny_wan import edit, save_wan
from tiny_world import World
from train_support import flags

from motionenhancer import extract, train
from motionenhancer.priors.prior_settings import PriorSettings, check_settings
from motionenhancer.teachers import config, load_teacher
from motionenhancer.teachers.plan import plan_teacher

SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TRANSFORMER, VAE, TEXT = (f"{part}/config.json" for part in ("transformer", "vae", "text_encoder"))

#: Family, file, field, a value that is not supported, and what the message must say besides file and field.
REFUSED: list[tuple[str, str, str, Any, str]] = [
    ("cogvideox", TRANSFORMER, "ofs_embed_dim", 512, "supported is None"),
    *(
        ("cogvideox", TRANSFORMER, "num_attention_heads", value, "must be a whole number above 0")
        for value in (0, -2, None, "4", 2.5, True)
    ),
    ("cogvideox", SCHEDULER, "num_train_timesteps", 0, "must be a whole number above 0"),
    ("cogvideox", SCHEDULER, "num_train_timesteps", 10**9, "must be at most 100000"),
    *(
        ("cogvideox", VAE, "scaling_factor", value, "must be above 1e-30 and below 1e30")
        for value in (0, -1.0, float("nan"), float("inf"), 10**400, "2")
    ),
    ("cogvideox", TEXT, "num_heads", 0, "must be a whole number above 0"),
    ("cogvideox", INDEX, "vae", 7, "a class of diffusers"),
    ("cogvideox", TRANSFORMER, "in_channels", 16, "only text-to-video"),
    ("cogvideox", TRANSFORMER, "out_channels", 16, "only text-to-video"),
    ("cogvideox", TRANSFORMER, "text_embed_dim", 64, "d_model is 32"),
    ("cogvideox", TRANSFORMER, "guidance_embeds", True, "not understood"),
    ("cogvideox", TRANSFORMER, "quantization_config", {"quant_method": "torchao"}, "not understood"),
    ("cogvideox", VAE, "shift_factor", 0.1, "supported is None"),
    ("cogvideox", VAE, "latents_mean", [0.0] * 8, "supported is None"),
    ("cogvideox", VAE, "latents_std", [1.0] * 8, "supported is None"),
    ("cogvideox", VAE, "in_channels", 6, "supported is 3"),
    ("cogvideox", VAE, "latent_shift", 1, "not understood"),
    ("cogvideox", SCHEDULER, "prediction_type", "sample", "'v_prediction' or 'epsilon'"),
    ("cogvideox", SCHEDULER, "use_flow_sigmas", True, "not understood"),
    ("cogvideox", SCHEDULER, "use_karras_sigmas", True, "not understood"),
    ("cogvideox", TEXT, "is_decoder", True, "supported is False or None"),
    ("cogvideox", TEXT, "rope_parameters", {"rope_theta": 1.0}, "not understood"),
    ("cogvideox", TEXT, "quantization_config", {"load_in_8bit": True}, "not understood"),
    ("cogvideox", INDEX, "scheduler", ["diffusers", "DDIMScheduler"], "supported are CogVideoXDDIMScheduler"),
    (
        "cogvideox",
        INDEX,
        "text_encoder",
        ["transformers", "UMT5EncoderModel"],
        "supported are T5EncoderModel",
    ),
    ("cogvideox", INDEX, "vae", ["my_vae", "AutoencoderKLCogVideoX"], "a class of diffusers"),
    ("cogvideox", INDEX, "vae", [None, None], "names no vae"),
    ("cogvideox", INDEX, "vae", "somewhere", "a class of diffusers"),
    ("cogvideox", INDEX, "transformer", None, "names no transformer"),
    ("cogvideox", INDEX, "controlnet", ["diffusers", "CogVideoXControlNet"], "not understood"),
    ("wan", TRANSFORMER, "image_dim", 1280, "supported is None"),
    ("wan", TRANSFORMER, "added_kv_proj_dim", 5120, "supported is None"),
    ("wan", TRANSFORMER, "pos_embed_seq_len", 514, "supported is None"),
    ("wan", TRANSFORMER, "qk_norm", None, "supported is 'rms_norm_across_heads'"),
    ("wan", TRANSFORMER, "patch_size", [2, 2, 2], r"supported is \[1, height, width\]"),
    ("wan", TRANSFORMER, "in_channels", 36, "only text-to-video"),
    ("wan", TRANSFORMER, "text_dim", 16, "d_model is 32"),
    ("wan", TRANSFORMER, "vace_layers", [0, 1], "not understood"),
    ("wan", VAE, "latents_mean", None, "must be 16 numbers"),
    ("wan", VAE, "latents_std", [1.0] * 15, "must be 16 numbers"),
    ("wan", VAE, "latents_mean", [0.0] * 15 + [float("nan")], "must be above -1e.30 and below 1e30"),
    ("wan", VAE, "latents_std", [1.0] * 15 + [0], "must be above 1e-30 and below 1e30"),
    ("wan", VAE, "scaling_factor", 0.5, "not understood"),
    ("wan", SCHEDULER, "prediction_type", ..., "is 'epsilon'; supported is 'flow_prediction'"),
    ("wan", SCHEDULER, "use_flow_sigmas", False, "supported is True"),
    ("wan", SCHEDULER, "num_train_timesteps", 500, "supported is 1000"),
    ("wan", SCHEDULER, "use_karras_sigmas", True, "supported is False"),
    ("wan", SCHEDULER, "use_exponential_sigmas", True, "supported is False"),
    ("wan", SCHEDULER, "use_beta_sigmas", True, "supported is False"),
    ("wan", SCHEDULER, "use_dynamic_shifting", True, "supported is False"),
    ("wan", SCHEDULER, "shift_terminal", 0.1, "supported is None"),
    ("wan", SCHEDULER, "final_sigmas_type", "sigma_min", "supported is 'zero'"),
    ("wan", SCHEDULER, "thresholding", True, "supported is False"),
    ("wan", SCHEDULER, "sigma_max", 0.9, "supported is None"),
    ("wan", SCHEDULER, "flow_shift", 0, "must be a number above 0"),
    ("wan", SCHEDULER, "flow_shift", float("inf"), "must be a number above 0, and finite"),
    ("wan", SCHEDULER, "flow_shift", "3", "must be a number above 0"),
    ("wan", SCHEDULER, "flow_shift", True, "must be a number above 0"),
    ("wan", SCHEDULER, "snr_shift_scale", 2.0, "not understood"),
    ("wan", TEXT, "rope_theta", 2.0, "not understood"),
    ("wan", INDEX, "expand_timesteps", "no", "supported is True or False"),
    ("wan", INDEX, "image_encoder", ["transformers", "CLIPVisionModel"], "not understood"),
    ("wan", INDEX, "scheduler", ["diffusers", "EulerDiscreteScheduler"], "supported are UniPC"),
]


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "teacher")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, teacher_dir: Path, wan_dir: Path) -> Path:
    """A copy of a family's folder, to change."""
    source = {"cogvideox": teacher_dir, "wan": wan_dir}[request.param]
    return Path(shutil.copytree(source, tmp_path / "teacher"))


@pytest.mark.parametrize(("folder", "file", "field", "value", "says"), REFUSED, indirect=["folder"])
def test_what_is_not_understood_is_refused_by_name(
    folder: Path, file: str, field: str, value: Any, says: str
) -> None:
    edit(folder / file, **{field: value})
    match = f"{re.escape(str(folder / file))}: {says if says.startswith('names') else f'{field} .*{says}'}"
    for use in (
        lambda: check_settings(PriorSettings(), folder),
        lambda: plan_teacher(folder),
        lambda: load_teacher(folder, "cpu"),
    ):
        with pytest.raises(ValueError, match=match):
            use()


@pytest.mark.parametrize("folder", ["cogvideox"], indirect=True)
def test_a_run_stops_before_anything_is_made(
    folder: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / VAE, shift_factor=0.1)
    options = {"teacher": folder, "prior_dir": tmp_path / "priors"}
    for dry_run in (False, True):
        assert train.main(flags(world, tmp_path / "out", **options, dry_run=dry_run)) == 2
        assert "vae/config.json: shift_factor is 0.1; supported is None" in capsys.readouterr().err
    assert extract.main(world.flags(student=None, **options)) == 2
    assert "vae/config.json: shift_factor is 0.1; supported is None" in capsys.readouterr().err
    assert not (tmp_path / "priors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"snr_shift_scale": 2.5},
        {"rescale_betas_zero_snr": False},
        {"beta_schedule": "linear"},
        {"beta_start": 0.001, "beta_end": 0.02},
        {"trained_betas": np.linspace(1e-4, 0.01, 1000).tolist()},
        {"set_alpha_to_one": False, "rescale_betas_zero_snr": False},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "linspace"},
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
        {"num_train_timesteps": 500},
    ],
    ids=lambda change: "-".join(change),
)
@pytest.mark.parametrize("folder", ["cogvideox"], indirect=True)
def test_what_moves_the_noise_levels_is_honoured(folder: Path, change: dict[str, Any]) -> None:
    before = load_teacher(folder, "cpu").schedule(5)
    edit(folder / SCHEDULER, **change)
    own: Any = CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler")
    own.set_timesteps(5)
    steps = sorted(int(t) for t in own.timesteps)
    found: Any = load_teacher(folder, "cpu").schedule(5)
    assert list(found.timesteps) == steps
    levels = [float(own.final_alpha_cumprod), *(float(own.alphas_cumprod[t]) for t in steps)]
    assert list(found.levels) == pytest.approx(levels, rel=1e-6)
    assert found != before


@pytest.mark.parametrize("folder", ["cogvideox"], indirect=True)
def test_the_first_frame_of_image_to_video_is_no_part_of_a_prior(folder: Path, clip: np.ndarray) -> None:
    """CogVideoX-1.5's VAE says invert_scale_latents, which only the image-to-video pipeline reads."""
    before = load_teacher(folder, "cpu").encode_video(clip).latents
    edit(folder / VAE, invert_scale_latents=True)
    assert torch.equal(load_teacher(folder, "cpu").encode_video(clip).latents, before)
    edit(folder / VAE, scaling_factor=2.0)
    assert not torch.equal(load_teacher(folder, "cpu").encode_video(clip).latents, before)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 5.0}),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0},
        ),
    ],
)
@pytest.mark.parametrize("folder", ["wan"], indirect=True)
def test_other_schedulers_of_a_flow_give_their_shift(folder: Path, name: str, fields: dict[str, Any]) -> None:
    edit(folder / INDEX, scheduler=["diffusers", name])
    (folder / SCHEDULER).write_text("{}")
    edit(folder / SCHEDULER, _class_name=name, **fields)
    found: Any = load_teacher(folder, "cpu").schedule(2)
    assert found.levels == pytest.approx([0, 2.5 / 3, 1])


@pytest.mark.parametrize("folder", ["cogvideox", "wan"], indirect=True)
def test_what_says_nothing_is_let_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted are notes of the writer, a null field, and a new field at the installed class's default."""
    edit(folder / TRANSFORMER, _name_or_path="x", _diffusers_version="9.9", feature_of_tomorrow=None)
    edit(folder / TEXT, output_past=True, scalable_attention=True, torch_dtype="float32", n_positions=512)
    load_teacher(folder, "cpu")
    defaults = config._defaults
    monkeypatch.setattr(config, "_defaults", lambda name: {**defaults(name), "new_field": 1})
    edit(folder / TRANSFORMER, new_field=1)
    plan_teacher(folder)
    edit(folder / TRANSFORMER, new_field=2)
    with pytest.raises(ValueError, match="new_field is 2; this field is not understood"):
        plan_teacher(folder)


@pytest.mark.parametrize("folder", ["cogvideox", "wan"], indirect=True)
def test_files_that_are_missing_or_broken_are_named(folder: Path) -> None:
    for file in (SCHEDULER, VAE, TEXT, TRANSFORMER):
        whole = (folder / file).read_text()
        for text, says in (("{", "not valid JSON"), ("[1]", "not a JSON object")):
            (folder / file).write_text(text)
            with pytest.raises(ValueError, match=f"{re.escape(str(folder / file))}: {says}"):
                plan_teacher(folder)
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{re.escape(str(folder / file))}: no such file"):
            plan_teacher(folder)
        (folder / file).write_text(whole)
    plan_teacher(folder)
    next((folder / "transformer").glob("*.safetensors")).rename(folder / "transformer" / "model.bin")
    with pytest.raises(FileNotFoundError, match="transformer: no safetensors weights"):
        plan_teacher(folder)
