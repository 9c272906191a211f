"""LTX-Video as a teacher: tiny configurations of diffusers' own classes, against maps written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from tiny_ltx import save_ltx
from tiny_wan import refused
from whole_maps import agrees, flow, written_out

from mekernels import VideoTokens
from motionenhancer.priors.prior import extract_prior
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher

TEXT = "the red square moves left"
SMALL: dict[str, Any] = {"size": (16, 16), "frames": 17}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ltx(tmp_path_factory.mktemp("ltx") / "teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    return load_teacher(folder, "cpu", **SMALL)


def levels(folder: Path, steps: int, **clip: int) -> list[float]:
    """σ of levels 0 to K, as the pipeline itself visits them."""
    pipeline: Any = LTXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"output_type": "latent", "guidance_scale": 1.0, "prompt": TEXT}
    pipeline(**clip, num_inference_steps=steps, **options)
    return sorted(float(sigma) for sigma in pipeline.scheduler.sigmas)


def test_geometry(folder: Path, teacher: Any, clip: np.ndarray) -> None:
    video = teacher.encode_video(clip)
    assert video.tokens == VideoTokens(5, 4, 4)
    assert (teacher.heads, teacher.layers, teacher.max_frames) == (3, 2, 17)
    pixels = torch.nn.functional.interpolate(
        torch.from_numpy(clip).permute(0, 3, 1, 2).float(), size=(16, 16), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        encoded = teacher.pipeline.vae.encode(pixels.transpose(0, 1)[None] / 127.5 - 1).latent_dist.mode()
    mean, deviation = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    expected = (encoded - mean.view(1, 8, 1, 1, 1)) / deviation.view(1, 8, 1, 1, 1)
    torch.testing.assert_close(video.latents, expected, rtol=1e-3, atol=1e-3)
    plan = plan_teacher(folder, **SMALL)
    assert (plan.grid, plan.frames) == (video.tokens.grid, 17)
    for part, count in plan.weights.items():
        module = getattr(teacher.pipeline, part)
        assert count == sum(p.numel() for p in (*module.parameters(), *module.buffers())), part
    assert (plan_teacher(folder).size, plan_teacher(folder).frames) == ((512, 704), 161)


@pytest.mark.parametrize("text", ["", TEXT, "the red square " * 60])
def test_texts_are_those_of_the_pipeline(teacher: Any, text: str) -> None:
    encoding = teacher.encode_text(text)
    embeds, mask = teacher.pipeline._get_t5_prompt_embeds(text, max_sequence_length=128, device="cpu")
    torch.testing.assert_close(encoding.embeds[0][mask[0]], embeds[0][mask[0]])
    assert encoding.embeds.any(-1).equal(mask)


@pytest.mark.parametrize(
    "scheduler",
    [{}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.2}],
    ids=["dynamic", "fixed", "stretched"],
)
def test_levels_are_those_of_the_pipeline(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    """For a clip of the teacher's length, and for a shorter clip."""
    path = save_ltx(tmp_path / "teacher", **scheduler)
    # The pipeline takes multiples of 32 pixels only.
    loaded = load_teacher(path, "cpu", size=(32, 32), frames=17)
    for frames, vision in ((17, None), (17, 5 * 64), (9, 3 * 64)):
        found = loaded.schedule(4, vision)
        expected = levels(path, 4, height=32, width=32, num_frames=frames)
        assert list(found.levels) == pytest.approx(expected, abs=1e-6)
        assert list(found.timesteps) == pytest.approx([1000 * s for s in expected[1:]], abs=1e-3)
    # diffusers divides by zero in a single step that is stretched.
    assert loaded.schedule(1).levels == (0.0, 1.0)


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "alone"])
def test_priors_are_those_of_maps_written_out(
    folder: Path, teacher: Any, clip: np.ndarray, memory: bool
) -> None:
    options = {"guidance_scale": 3.0, "memory": memory, "sampled_rows": "all"}
    # A shorter clip than the teacher's has other levels.
    prior = extract_prior(teacher, clip[:9], TEXT, steps=2, **options)
    assert prior.grid == (3, 4, 4)
    model: Any = LTXVideoTransformer3DModel.from_pretrained(folder / "transformer").eval()

    def evaluate(latents: torch.Tensor, timestep: float, text: Any, guidance: float) -> torch.Tensor:
        count = len(latents)
        output = model(
            LTXPipeline._pack_latents(latents),
            torch.cat([text[0]] * count),
            torch.full((count,), timestep),
            torch.cat([text[1]] * count),
            num_frames=3,
            height=4,
            width=4,
            rope_interpolation_scale=(4 / 25, 4, 4),
            return_dict=False,
        )[0]
        return LTXPipeline._unpack_latents(output, 3, 4, 4)

    texts = tuple(
        teacher.pipeline._get_t5_prompt_embeds(text, max_sequence_length=128, device="cpu")
        for text in ("", TEXT)
    )
    mu = 0.95 + (2.05 - 0.95) * (48 - 32) / (128 - 32)
    shifted = np.exp(mu) / (np.exp(mu) + 1 / np.array([0.5, 1.0]) - 1)
    stretched = 1 - (1 - shifted) * 0.9 / (1 - shifted[0])
    assert stretched[0] == pytest.approx(0.1)
    whole = written_out(
        evaluate,
        teacher.encode_video(clip[:9]).latents,
        flow([0.0, *stretched.tolist()]),
        (texts[0], texts[1]),
        guidance=3.0,
        memory=memory,
    )
    assert len(whole.maps) == len(whole.words) == 2 * 2
    agrees(prior, whole, teacher.encode_text(TEXT), 48)


def test_reading_changes_nothing(teacher: Any, clip: np.ndarray) -> None:
    latents = torch.cat([teacher.encode_video(clip).latents] * 2)
    embeds = torch.cat([teacher.encode_text(text).embeds for text in ("", TEXT)])
    plain = teacher.predict(latents, embeds, 500.0)
    with teacher.reading(None, memory=False, row=0):
        torch.testing.assert_close(teacher.predict(latents, embeds, 500.0), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "field", "value", "says"),
    [
        ("transformer/config.json", "in_channels", 16, "only text-to-video"),
        ("transformer/config.json", "caption_channels", 64, "d_model is 32"),
        ("transformer/config.json", "patch_size", 2, "supported is 1"),
        ("transformer/config.json", "qk_norm", "rms_norm", "supported is 'rms_norm_across_heads'"),
        ("transformer/config.json", "gated_attn", True, "not understood"),
        ("vae/config.json", "shift_factor", 0.1, "not understood"),
        ("scheduler/scheduler_config.json", "time_shift_type", "linear", "supported is 'exponential'"),
        ("scheduler/scheduler_config.json", "shift_terminal", 1.0, "must be a number from 0 to below 1"),
        ("scheduler/scheduler_config.json", "base_shift", None, "must be a number"),
        ("scheduler/scheduler_config.json", "invert_sigmas", True, "supported is False"),
        ("model_index.json", "image_encoder", ["transformers", "CLIPVisionModel"], "not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    folder: Path, tmp_path: Path, file: str, field: str, value: Any, says: str
) -> None:
    refused(folder, tmp_path / "teacher", file, field, value, says)
