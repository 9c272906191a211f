"""HunyuanVideo 1.5 as a teacher: three streams of text whose valid tokens come first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from tiny_hunyuan import save_hunyuan15
from tiny_wan import refused
from whole_maps import agrees, flow, written_out

from mekernels import VideoTokens
from motionenhancer.priors.prior import extract_prior
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher
from motionenhancer.teachers.text_cache import TextCache, encoder_id

TEXT = "the red square moves left"
QUOTED = 'a sign says "stop" and “go”, then moves left'
SMALL: dict[str, Any] = {"size": (64, 64), "frames": 17}
NAMES = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hunyuan15(tmp_path_factory.mktemp("hunyuan") / "teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    return load_teacher(folder, "cpu", **SMALL)


def inputs(teacher: Any, text: str) -> dict[str, torch.Tensor]:
    """The pipeline's own encoding of a text, with a picture of zeros, which means no picture."""
    made = teacher.pipeline.encode_prompt(text, device=torch.device("cpu"), dtype=torch.float32)
    return {**dict(zip(NAMES, made, strict=True)), "image_embeds": torch.zeros(1, 729, 16)}


def evaluations(model: Any) -> Any:
    """The model as its pipeline calls it, of a batch of one text."""

    @torch.no_grad()
    def evaluate(latents: torch.Tensor, timestep: float, text: Any, guidance: float) -> torch.Tensor:
        count = len(latents)
        without = torch.zeros(count, 5, *latents.shape[2:])
        return model(
            torch.cat([latents, without], dim=1),
            torch.full((count,), timestep),
            **{name: torch.cat([value] * count) for name, value in text.items()},
            return_dict=False,
        )[0]

    return evaluate


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return HunyuanVideo15Transformer3DModel.from_pretrained(folder / "transformer").eval()


def test_geometry(folder: Path, teacher: Any, clip: np.ndarray) -> None:
    video = teacher.encode_video(clip)
    assert video.tokens == VideoTokens(5, 4, 4, text=1000, text_first=False)
    assert (teacher.heads, teacher.layers, teacher.max_frames) == (3, 2, 17)
    pixels = torch.from_numpy(clip / np.float32(127.5) - 1.0).permute(3, 0, 1, 2)[None]
    expected = teacher.pipeline.vae.encode(pixels).latent_dist.mode() * 1.03682
    torch.testing.assert_close(video.latents, expected, rtol=1e-4, atol=1e-5)
    plan = plan_teacher(folder, **SMALL)
    assert (plan.grid, plan.frames, plan.layers) == (video.tokens.grid, 17, 2)
    for part, count in plan.weights.items():
        assert count == sum(p.numel() for p in getattr(teacher.pipeline, part).parameters()), part
    # As the pipeline chooses it for 16:9.
    assert plan_teacher(folder).size == (480, 848)
    assert plan_teacher(folder).grid == (31, 30, 53)


@pytest.mark.parametrize("text", ["", TEXT, QUOTED, "<|im_end|> moves", "the red square " * 500])
def test_texts_are_those_of_the_pipeline(teacher: Any, text: str) -> None:
    encoding, expected = teacher.encode_text(text), inputs(teacher, text)
    assert encoding.text == text
    parts = (encoding.embeds[0, 256:, :32], encoding.embeds[0, :256, :24])
    for suffix, found in zip(("", "_2"), parts, strict=True):
        mask = expected[f"encoder_attention_mask{suffix}"].bool()[0]
        torch.testing.assert_close(found[mask], expected[f"encoder_hidden_states{suffix}"][0][mask])
        assert found.any(-1).equal(mask)
    first, second = (int(expected[f"encoder_attention_mask{s}"].sum()) for s in ("_2", ""))
    assert encoding.attended == first + second
    assert bool(first) == (text == QUOTED)
    ids = teacher.pipeline.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": teacher.pipeline.system_message},
            {"role": "user", "content": text or " "},
        ],
        add_generation_prompt=True,
        truncation=True,
        max_length=1108,
    )["input_ids"]
    for token, row, span in zip(encoding.tokens, encoding.rows, encoding.spans, strict=True):
        assert teacher.pipeline.tokenizer.convert_ids_to_tokens(ids[108 + row - first]) == token
        assert 0 <= span[0] < span[1] <= len(text)
    assert bool(encoding.tokens) == bool(text)
    assert not any("<|" in encoding.tokens[word] for word in encoding.words)


def test_evaluations_are_those_of_the_model(teacher: Any, plain: Any, clip: np.ndarray) -> None:
    """diffusers' own attention with its mask, on texts of three lengths."""
    latents, texts = teacher.encode_video(clip).latents, ("", TEXT, QUOTED)
    embeds = torch.cat([teacher.encode_text(text).embeds for text in texts])
    found = teacher.predict(torch.cat([latents] * 3), embeds, 500.0)
    for i, text in enumerate(texts):
        expected = evaluations(plain)(latents, 500.0, inputs(teacher, text), 1.0)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "alone"])
@pytest.mark.parametrize("text", [TEXT, QUOTED], ids=["plain", "quoted"])
def test_priors_are_those_of_maps_written_out(
    teacher: Any, plain: Any, clip: np.ndarray, text: str, memory: bool
) -> None:
    options = {"guidance_scale": 4.0, "memory": memory, "sampled_rows": "all"}
    prior = extract_prior(teacher, clip, text, steps=2, **options)
    whole = written_out(
        evaluations(plain),
        teacher.encode_video(clip).latents,
        flow([5 * s / (1 + 4 * s) for s in (0, 0.5, 1)]),
        (inputs(teacher, ""), inputs(teacher, text)),
        guidance=4.0,
        memory=memory,
    )
    assert len(whole.maps) == 2 * 2
    encoding = teacher.encode_text(text)
    # The tokens of quoted letters stand before the text.
    assert (encoding.rows[0] > 0) == (text == QUOTED)
    agrees(prior, whole, encoding, 80)
    assert prior.evaluations == 2 + 2 * 2 * (2 if memory else 1)


def test_texts_are_kept(folder: Path, teacher: Any, tmp_path: Path) -> None:
    cache = TextCache(tmp_path, encoder_id(folder, torch.float32))
    load_teacher(folder, "cpu", texts=cache, **SMALL).drop_encoder([QUOTED, ""])
    bare = load_teacher(folder, "cpu", texts=cache, text_encoder=False, **SMALL)
    found, expected = bare.encode_text(QUOTED), teacher.encode_text(QUOTED)
    assert torch.equal(found.embeds, expected.embeds)
    assert (found.rows, found.attended, found.words) == (expected.rows, expected.attended, expected.words)


def test_a_template_that_changes_a_text(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "teacher"))
    file = path / "tokenizer" / "chat_template.jinja"
    file.write_text(file.read_text().replace("message['content'] -", "message['content'] | upper -"))
    with pytest.raises(ValueError, match=r"chat template .* changes the text"):
        load_teacher(path, "cpu", **SMALL).encode_text(TEXT)


@pytest.mark.parametrize(
    ("file", "field", "value", "says"),
    [
        ("transformer/config.json", "use_meanflow", True, "supported is False"),
        ("transformer/config.json", "in_channels", 4, "only text-to-video"),
        ("transformer/config.json", "out_channels", 9, "only text-to-video"),
        ("transformer/config.json", "text_embed_dim", 64, "hidden_size is 32"),
        ("transformer/config.json", "text_embed_2_dim", 32, "text_encoder_2's d_model is 24"),
        ("transformer/config.json", "guidance_embeds", True, "not understood"),
        ("vae/config.json", "shift_factor", 0.1, "not understood"),
        ("text_encoder/config.json", "quantization_config", {"load_in_8bit": True}, "not understood"),
        ("scheduler/scheduler_config.json", "shift", "5", "must be a number above 0"),
        ("guider/guider_config.json", "adaptive", True, "not understood"),
        ("model_index.json", "guider", ["diffusers", "SkipLayerGuidance"], "supported are ClassifierFree"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    folder: Path, tmp_path: Path, file: str, field: str, value: Any, says: str
) -> None:
    refused(folder, tmp_path / "teacher", file, field, value, says)
