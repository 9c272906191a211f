"""LTX-2 as a teacher: text whose padding became registers, and a video stream apart from its sound."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from tiny_ltx import save_ltx2
from tiny_wan import edit, refused
from whole_maps import agrees, flow, written_out

from mekernels import VideoTokens
from motionenhancer.priors.prior import extract_prior
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher
from motionenhancer.teachers.text_cache import TextCache, encoder_id

TEXT = "the red square moves left"
SMALL: dict[str, Any] = {"size": (16, 16), "frames": 9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("ltx2")
    return {newer: save_ltx2(root / str(newer), newer=newer) for newer in (False, True)}


def connected(teacher: Any, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The text inputs of the pipeline's transformer: embeddings for video and for sound, and a mask."""
    pipeline = teacher.pipeline
    embeds, mask, _, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, device=torch.device("cpu")
    )
    with torch.no_grad():
        return pipeline.connectors(embeds, mask, padding_side=pipeline.tokenizer.padding_side)


@pytest.mark.parametrize("newer", [False, True], ids=["2.0", "2.3"])
def test_geometry_and_texts(folders: dict[bool, Path], clip: np.ndarray, newer: bool) -> None:
    teacher: Any = load_teacher(folders[newer], "cpu", **SMALL)
    video = teacher.encode_video(clip)
    assert video.tokens == VideoTokens(5, 4, 4)
    plan = plan_teacher(folders[newer], **SMALL)
    assert set(plan.weights) == {"transformer", "text_encoder", "connectors", "vae"}
    assert plan.grid == video.tokens.grid
    assert (plan_teacher(folders[newer]).size, plan_teacher(folders[newer]).frames) == ((512, 768), 121)
    for text in ("", TEXT, "  the  red\n"):
        encoding, (embeds, _, mask) = teacher.encode_text(text), connected(teacher, text)
        torch.testing.assert_close(encoding.embeds, embeds)
        # Registers stand where padding was, and are attended to.
        assert mask.all()
        assert encoding.embeds.any(-1).all()
        assert encoding.text == text
        ids = teacher.pipeline.tokenizer(text.strip())["input_ids"]
        for token, row, span in zip(encoding.tokens, encoding.rows, encoding.spans, strict=True):
            assert teacher.pipeline.tokenizer.convert_ids_to_tokens(ids[row]) == token
            assert text[slice(*span)].strip() == token.replace("Ġ", " ").strip()


def test_a_words_row_is_where_its_token_went(folders: dict[bool, Path]) -> None:
    """Another last token of a text changes the token's row most, and no row after it."""
    teacher: Any = load_teacher(folders[False], "cpu", **SMALL)
    encoding = teacher.encode_text(TEXT)
    assert encoding.rows == (1, 2, 3, 4, 5, 6)
    before: list[torch.Tensor] = []
    hook = teacher.pipeline.connectors.video_connector.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args: before.append(args[0][0])
    )
    for text in (TEXT, "the red square moves right"):
        teacher.pipeline.connectors(*teacher.pipeline._get_gemma_prompt_embeds(text))
    hook.remove()
    changed = (before[0] - before[1]).abs().amax(-1)
    assert changed.argmax() == encoding.rows[-1]
    assert not changed[encoding.rows[-1] + 1 :].any()


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "alone"])
@pytest.mark.parametrize("newer", [False, True], ids=["2.0", "2.3"])
def test_priors_are_those_of_maps_written_out(
    folders: dict[bool, Path], clip: np.ndarray, newer: bool, memory: bool
) -> None:
    """diffusers' plain model with a sound of noise, which an isolated video does not hear."""
    teacher: Any = load_teacher(folders[newer], "cpu", **SMALL)
    options = {"guidance_scale": 3.0, "memory": memory, "sampled_rows": "all"}
    prior = extract_prior(teacher, clip, TEXT, steps=2, **options)
    model: Any = LTX2VideoTransformer3DModel.from_pretrained(folders[newer] / "transformer").eval()
    sound = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))

    def evaluate(latents: torch.Tensor, timestep: float, text: Any, guidance: float) -> torch.Tensor:
        count = len(latents)
        time = torch.full((count,), timestep)
        output = model(
            hidden_states=latents.flatten(2).transpose(1, 2),
            audio_hidden_states=torch.cat([sound] * count),
            encoder_hidden_states=torch.cat([text[0]] * count),
            audio_encoder_hidden_states=torch.cat([text[1]] * count),
            timestep=time,
            sigma=time,
            encoder_attention_mask=torch.cat([text[2]] * count),
            audio_encoder_attention_mask=torch.cat([text[2]] * count),
            num_frames=5,
            height=4,
            width=4,
            fps=24.0,
            audio_num_frames=6,
            isolate_modalities=True,
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (5, 4, 4))

    mu = 0.95 + (2.05 - 0.95) * (80 - 32) / (128 - 32)
    shifted = np.exp(mu) / (np.exp(mu) + 1 / np.array([0.5, 1.0]) - 1)
    stretched = 1 - (1 - shifted) * 0.9 / (1 - shifted[0])
    whole = written_out(
        evaluate,
        teacher.encode_video(clip).latents,
        flow([0.0, *stretched.tolist()]),
        (connected(teacher, ""), connected(teacher, TEXT)),
        guidance=3.0,
        memory=memory,
        tokens=80,
    )
    assert len(whole.maps) == len(whole.words) == 2 * 2
    agrees(prior, whole, teacher.encode_text(TEXT), 80)


def test_reading_changes_nothing(folders: dict[bool, Path], clip: np.ndarray) -> None:
    for path in folders.values():
        teacher: Any = load_teacher(path, "cpu", **SMALL)
        latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text(TEXT).embeds
        plain = teacher.predict(latents, embeds, 500.0)
        with teacher.reading(None, memory=False, row=0):
            torch.testing.assert_close(teacher.predict(latents, embeds, 500.0), plain, rtol=1e-4, atol=1e-5)


def test_sound_is_never_loaded(folders: dict[bool, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders[False], tmp_path / "teacher"))
    parts = {
        "audio_vae": ["diffusers", "AutoencoderKLLTX2Audio"],
        "vocoder": ["ltx2", "LTX2Vocoder"],
        "duration_head": ["ltx2", "LTX2DurationHead"],
    }
    edit(path / "model_index.json", **parts)
    teacher: Any = load_teacher(path, "cpu", **SMALL)
    assert all(getattr(teacher.pipeline, part) is None for part in parts)


def test_what_makes_a_text_is_let_go(folders: dict[bool, Path], clip: np.ndarray, tmp_path: Path) -> None:
    path = folders[False]
    cache = TextCache(tmp_path, encoder_id(path, torch.float32))
    kept: Any = load_teacher(path, "cpu", texts=cache, **SMALL)
    expected = kept.encode_text(TEXT)
    kept.drop_encoder([TEXT, ""])
    assert kept.pipeline.connectors is None
    bare: Any = load_teacher(path, "cpu", texts=cache, text_encoder=False, **SMALL)
    assert bare.pipeline.text_encoder is bare.pipeline.connectors is None
    found = bare.encode_text(TEXT)
    assert torch.equal(found.embeds, expected.embeds)
    assert found.rows == expected.rows
    extract_prior(bare, clip, TEXT, steps=1)
    changed = Path(shutil.copytree(path, tmp_path / "changed"))
    edit(changed / "connectors" / "config.json", rope_theta=5000.0)
    assert encoder_id(changed, torch.float32) != encoder_id(path, torch.float32)


@pytest.mark.parametrize(
    ("file", "field", "value", "says"),
    [
        ("transformer/config.json", "in_channels", 16, "only text-to-video"),
        ("transformer/config.json", "patch_size_t", 2, "supported is 1"),
        ("transformer/config.json", "rope_type", "other", "supported is 'interleaved' or 'split'"),
        ("transformer/config.json", "use_keyframes_abs_pos_embedding", True, "supported is False"),
        ("transformer/config.json", "image_cond", True, "not understood"),
        ("connectors/config.json", "video_connector_num_learnable_registers", None, "must divide the 1024"),
        ("connectors/config.json", "video_connector_num_learnable_registers", 100, "must divide the 1024"),
        ("connectors/config.json", "pooling", "mean", "not understood"),
        ("text_encoder/config.json", "quantization_config", {"load_in_8bit": True}, "not understood"),
        ("scheduler/scheduler_config.json", "time_shift_type", "linear", "supported is 'exponential'"),
        ("model_index.json", "controlnet", ["diffusers", "X"], "not understood"),
        ("model_index.json", "connectors", ["diffusers", "LTX2TextConnectors"], "a class of ltx2"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    folders: dict[bool, Path], tmp_path: Path, file: str, field: str, value: Any, says: str
) -> None:
    refused(folders[False], tmp_path / "teacher", file, field, value, says)
