"""CogVideoX image-to-video as a teacher, started from the clip's first frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from tiny_wan import refused
from whole_maps import agrees, written_out

from motionenhancer.priors.prior import extract_prior
from motionenhancer.priors.reader import inversion_errors
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher
from motionenhancer.toy.models import make_teacher

TEXT = "the red square moves left"


def save_image_teacher(path: Path, *, newer: bool) -> Path:
    """5B's kind with learnt positions, or 1.5's with an offset and a temporal patch."""
    options: dict[str, Any] = {"patch_size_t": 2, "frames": 21} if newer else {"positions": "learned"}
    pipeline: Any = make_teacher(layers=2, height=32, width=32, text_length=16, **options)
    config = dict(pipeline.transformer.config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer: Any = CogVideoXTransformer3DModel.from_config(
            {**config, "in_channels": 16, "ofs_embed_dim": 64 if newer else None}
        )
    pipeline.vae.register_to_config(invert_scale_latents=newer)
    CogVideoXImageToVideoPipeline(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        transformer=transformer.eval(),
        scheduler=pipeline.scheduler,
    ).save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("image")
    return {newer: save_image_teacher(root / str(newer), newer=newer) for newer in (False, True)}


def beside(teacher: Any, clip: np.ndarray, frames: int) -> torch.Tensor:
    """The pipeline's own latents of a picture, drawn at the mode."""
    pipeline = teacher.pipeline
    first = torch.nn.functional.interpolate(
        torch.from_numpy(clip[:1]).permute(0, 3, 1, 2).float(), size=(32, 32), mode="bilinear", antialias=True
    )
    encode = pipeline.vae.encode

    class AtMode:
        config = pipeline.vae.config

        @staticmethod
        def encode(image: torch.Tensor) -> Any:
            latent = encode(image).latent_dist
            latent.sample = lambda generator=None: latent.mode()
            return type("Output", (), {"latent_dist": latent})

    class Stand:
        vae = AtMode
        transformer, scheduler = pipeline.transformer, pipeline.scheduler
        vae_scale_factor_temporal, vae_scale_factor_spatial = 4, 4
        vae_scaling_factor_image = pipeline.vae_scaling_factor_image

    with torch.no_grad():
        return CogVideoXImageToVideoPipeline.prepare_latents(
            Stand(), first / 127.5 - 1, 1, 8, frames, 32, 32, torch.float32, torch.device("cpu")
        )[1]


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "alone"])
@pytest.mark.parametrize("newer", [False, True], ids=["1.0", "1.5"])
def test_priors_are_those_of_maps_written_out(
    folders: dict[bool, Path], clip: np.ndarray, newer: bool, memory: bool
) -> None:
    teacher: Any = load_teacher(folders[newer], "cpu")
    frames, grid = (21, (3, 4, 4)) if newer else (17, (5, 4, 4))
    options = {"guidance_scale": 4.0, "memory": memory, "sampled_rows": "all"}
    prior = extract_prior(teacher, clip, TEXT, steps=2, **options)
    assert prior.grid == grid
    assert prior.frames_used == frames
    model: Any = CogVideoXTransformer3DModel.from_pretrained(folders[newer] / "transformer").eval()
    picture = beside(teacher, clip, frames)
    video = teacher.encode_video(clip)
    torch.testing.assert_close(video.picture, picture, rtol=1e-4, atol=1e-4)
    rotary = teacher.pipeline._prepare_rotary_positional_embeddings(
        32, 32, video.latents.shape[1], torch.device("cpu")
    )

    def evaluate(latents: torch.Tensor, timestep: float, text: torch.Tensor, guidance: float) -> torch.Tensor:
        count = len(latents)
        return model(
            torch.cat([latents, torch.cat([picture] * count)], dim=2),
            torch.cat([text] * count),
            torch.full((count,), int(timestep)),
            ofs=torch.full((1,), 2.0) if newer else None,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]

    scheduler = teacher.pipeline.scheduler
    alphas = [1.0, float(scheduler.alphas_cumprod[499]), float(scheduler.alphas_cumprod[999])]

    def step(latents: torch.Tensor, output: torch.Tensor, source: int, target: int) -> torch.Tensor:
        a, b = alphas[source], alphas[target]
        clean = a**0.5 * latents - (1 - a) ** 0.5 * output
        noise = a**0.5 * output + (1 - a) ** 0.5 * latents
        return b**0.5 * clean + (1 - b) ** 0.5 * noise

    texts = [
        teacher.pipeline.encode_prompt(text, max_sequence_length=16, do_classifier_free_guidance=False)[0]
        for text in ("", TEXT)
    ]
    with torch.no_grad():
        whole = written_out(
            evaluate,
            video.latents,
            ([499, 999], step),
            (texts[0], texts[1]),
            guidance=4.0,
            memory=memory,
            sdpa=True,
        )
    assert len(whole.maps) == 2 * 2
    vision = grid[0] * grid[1] * grid[2]
    agrees(prior, whole, teacher.encode_text(TEXT), vision, text_first=16)


def test_the_first_frame_counts(folders: dict[bool, Path], clip: np.ndarray) -> None:
    teacher: Any = load_teacher(folders[False], "cpu")
    video, other = (teacher.encode_video(c) for c in (clip, clip[::-1].copy()))
    assert not video.picture[:, 1:].any()
    embeds = teacher.encode_text(TEXT).embeds
    with pytest.raises(ValueError, match=r"within `teacher.showing\(video\)`"):
        teacher.predict(video.latents, embeds, 500)
    outputs = []
    for shown in (video, other):
        with teacher.showing(shown):
            outputs.append(teacher.predict(video.latents, embeds, 500))
    assert not torch.equal(*outputs)
    assert teacher.picture is None
    assert inversion_errors(teacher, clip, TEXT, 2)["whole_schedule"] > 0


def test_learnt_positions_are_of_one_size_and_length(folders: dict[bool, Path], clip: np.ndarray) -> None:
    """diffusers would silently give a shorter clip other positions."""
    teacher: Any = load_teacher(folders[False], "cpu")
    assert teacher.encode_video(clip[:6]).frames_used == 17
    assert load_teacher(folders[False], "cpu", size=(32, 32), frames=17).max_frames == 17
    for options in ({"size": (64, 64)}, {"frames": 9}):
        for use in (load_teacher, plan_teacher):
            with pytest.raises(ValueError, match=r"size and frames must be .* learnt positions"):
                use(folders[False], **options)
    assert load_teacher(folders[True], "cpu", size=(64, 64), frames=13).max_frames == 13


@pytest.mark.parametrize(
    ("file", "field", "value", "says"),
    [
        ("transformer/config.json", "in_channels", 8, "only text-to-video"),
        ("transformer/config.json", "out_channels", 16, "only text-to-video"),
        ("transformer/config.json", "guidance_embeds", True, "not understood"),
        ("vae/config.json", "shift_factor", 0.1, "supported is None"),
        ("model_index.json", "image_encoder", ["transformers", "CLIPVisionModel"], "not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    folders: dict[bool, Path], tmp_path: Path, file: str, field: str, value: Any, says: str
) -> None:
    refused(folders[True], tmp_path / "teacher", file, field, value, says)
