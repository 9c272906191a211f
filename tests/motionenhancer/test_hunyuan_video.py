"""HunyuanVideo as a teacher: tiny configurations of diffusers' own classes, against maps written out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from tiny_hunyuan import save_hunyuan
from tiny_wan import edit, refused
from whole_maps import agrees, flow, written_out

from mekernels import VideoTokens
from motionenhancer.costs import teacher_cost
from motionenhancer.priors.prior import extract_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher
from motionenhancer.teachers.text_cache import TextCache, encoder_id

TEXT = "the red square moves left"
SMALL: dict[str, Any] = {"size": (64, 64), "frames": 17}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hunyuan(tmp_path_factory.mktemp("hunyuan") / "teacher")


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without guidance distillation: guidance also evaluates an empty prompt."""
    return save_hunyuan(tmp_path_factory.mktemp("hunyuan") / "plain", guidance_embeds=False)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    return load_teacher(folder, "cpu", **SMALL)


def inputs(teacher: Any, text: str) -> dict[str, torch.Tensor]:
    """The pipeline's own encoding of a text."""
    embeds, pooled, mask = teacher.pipeline.encode_prompt(text, device=torch.device("cpu"))
    return {
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "encoder_attention_mask": mask.float(),
    }


def test_geometry(folder: Path, teacher: Any, clip: np.ndarray) -> None:
    video = teacher.encode_video(clip)
    assert video.tokens == VideoTokens(5, 4, 4, text=256, text_first=False)
    assert (teacher.heads, teacher.layers, teacher.max_frames) == (3, 3, 17)
    pixels = torch.from_numpy(clip / np.float32(127.5) - 1.0).permute(3, 0, 1, 2)[None]
    expected = teacher.pipeline.vae.encode(pixels).latent_dist.mode() * 0.476986
    torch.testing.assert_close(video.latents, expected, rtol=1e-4, atol=1e-5)
    plan = plan_teacher(folder, **SMALL)
    assert (plan.grid, plan.frames, plan.layers) == (video.tokens.grid, 17, 3)
    for part, count in plan.weights.items():
        assert count == sum(p.numel() for p in getattr(teacher.pipeline, part).parameters()), part
    assert set(plan.weights) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert plan_teacher(folder).grid == (33, 45, 80)
    with pytest.raises(ValueError, match="multiples of 16"):
        load_teacher(folder, "cpu", size=(24, 64))


@pytest.mark.parametrize(
    "text", ["", TEXT, '  "quoted", {braces} 动', "<|eot_id|> moves", "the red square " * 120]
)
def test_texts_are_those_of_the_pipeline(teacher: Any, text: str) -> None:
    encoding, expected = teacher.encode_text(text), inputs(teacher, text)
    mask = expected["encoder_attention_mask"].bool()[0]
    assert encoding.attended == int(mask.sum())
    states = encoding.embeds[0, 1:]
    torch.testing.assert_close(states[mask], expected["encoder_hidden_states"][0][mask])
    assert not states[~mask].any()
    assert states.any(-1).equal(mask)
    torch.testing.assert_close(encoding.embeds[0, 0, :24], expected["pooled_projections"][0])
    ids = teacher.pipeline.tokenizer(teacher_prompt(text), max_length=351, truncation=True)["input_ids"]
    for token, row, span in zip(encoding.tokens, encoding.rows, encoding.spans, strict=True):
        assert teacher.pipeline.tokenizer.convert_ids_to_tokens(ids[95 + row]) == token
        assert 0 <= span[0] < span[1] <= len(text)
    for word in encoding.words:
        a, b = encoding.spans[word]
        assert encoding.tokens[word].replace("Ġ", "").strip() in text[a:b] or not text[a:b].isascii()
        assert "<|" not in encoding.tokens[word]
    whole = teacher.pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoding.truncated == max(0, len(whole) - 256)


def teacher_prompt(text: str) -> str:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE["template"].format(text)


def test_evaluations_are_those_of_the_model(folder: Path, teacher: Any, clip: np.ndarray) -> None:
    """diffusers' own attention with its mask, on a batch of texts of different lengths."""
    latents = teacher.encode_video(clip).latents
    embeds = torch.cat([teacher.encode_text(text).embeds for text in ("", TEXT)])
    plain: Any = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer").eval()
    both = [inputs(teacher, text) for text in ("", TEXT)]
    with torch.no_grad():
        expected = plain(
            torch.cat([latents] * 2),
            torch.tensor([500.0] * 2),
            guidance=torch.tensor([1000.0] * 2),
            **{name: torch.cat([one[name] for one in both]) for name in both[0]},
            return_dict=False,
        )[0]
    found = teacher.predict(torch.cat([latents] * 2), embeds, 500.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before = [block.attn.processor for block in teacher.pipeline.transformer.transformer_blocks]
    with teacher.reading(None, memory=False, row=0):
        torch.testing.assert_close(teacher.predict(torch.cat([latents] * 2), embeds, 500.0), found)
    assert [b.attn.processor for b in teacher.pipeline.transformer.transformer_blocks] == before


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "alone"])
@pytest.mark.parametrize("embedded", [True, False], ids=["distilled", "plain"])
def test_priors_are_those_of_maps_written_out(
    folder: Path, plain_folder: Path, clip: np.ndarray, embedded: bool, memory: bool
) -> None:
    path = folder if embedded else plain_folder
    teacher: Any = load_teacher(path, "cpu", **SMALL)
    prior = extract_prior(teacher, clip, TEXT, steps=2, guidance_scale=4.0, memory=memory, sampled_rows="all")
    model: Any = HunyuanVideoTransformer3DModel.from_pretrained(path / "transformer").eval()

    def evaluate(latents: torch.Tensor, timestep: float, text: Any, guidance: float) -> torch.Tensor:
        count = len(latents)
        return model(
            latents,
            torch.full((count,), timestep),
            guidance=torch.full((count,), 1000 * guidance) if embedded else None,
            **{name: torch.cat([value] * count) for name, value in text.items()},
            return_dict=False,
        )[0]

    texts = (inputs(teacher, ""), inputs(teacher, TEXT))
    whole = written_out(
        evaluate,
        teacher.encode_video(clip).latents,
        flow([7 * s / (1 + 6 * s) for s in (0, 0.5, 1)]),
        texts,
        guidance=4.0,
        memory=memory,
        embedded=embedded,
    )
    assert len(whole.maps) == 2 * 3
    encoding = teacher.encode_text(TEXT)
    assert encoding.rows == (0, 1, 2, 3, 4, 5)
    agrees(prior, whole, encoding, 80)
    streams = 2 if memory else 1
    assert prior.evaluations == 2 + 2 * streams * (1 if embedded else 2)


def test_guidance_of_a_distilled_model_is_its_input(teacher: Any, clip: np.ndarray) -> None:
    priors = [
        extract_prior(teacher, clip, TEXT, steps=2, guidance_scale=scale, token_ratio=1.0)
        for scale in (1.0, 6.0, 6.0)
    ]
    assert not torch.equal(priors[0].attention, priors[1].attention)
    assert torch.equal(priors[1].attention, priors[2].attention)
    assert teacher.guidance == 1.0


def test_text_encoders_are_let_go_and_their_texts_kept(
    folder: Path, teacher: Any, clip: np.ndarray, tmp_path: Path
) -> None:
    cache = TextCache(tmp_path, encoder_id(folder, torch.float32))
    kept: Any = load_teacher(folder, "cpu", texts=cache, **SMALL)
    kept.drop_encoder([TEXT, ""])
    assert kept.pipeline.text_encoder is kept.pipeline.text_encoder_2 is None
    bare: Any = load_teacher(folder, "cpu", texts=cache, text_encoder=False, **SMALL)
    assert bare.pipeline.text_encoder is bare.pipeline.text_encoder_2 is None
    found, expected = bare.encode_text(TEXT), teacher.encode_text(TEXT)
    assert torch.equal(found.embeds, expected.embeds)
    assert (found.rows, found.attended, found.words) == (expected.rows, expected.attended, expected.words)
    one, two = (extract_prior(t, clip, TEXT, steps=1) for t in (bare, teacher))
    assert torch.equal(one.attention, two.attention)
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    edit(changed / "text_encoder_2" / "config.json", layer_norm_eps=1e-3)
    assert encoder_id(changed, torch.float32) != encoder_id(folder, torch.float32)
    costs = [
        teacher_cost(folder, PriorSettings(), dtype=torch.float32, text_encoder=where, **SMALL)
        for where in ("device", "host", "none")
    ]
    both = costs[0].weights["text_encoder"] + costs[0].weights["text_encoder_2"]
    assert costs[1].host == both
    assert sum(costs[2].weights.values()) == sum(costs[0].weights.values()) - both


def test_a_tokenizer_that_the_model_was_not_made_for(folder: Path, tmp_path: Path) -> None:
    """The tokenizer's template has fewer tokens than the model skips, so the model would cut the prompt."""
    path = Path(shutil.copytree(folder, tmp_path / "teacher"))
    file = path / "tokenizer" / "tokenizer.json"
    edit(file, post_processor=None)
    with pytest.raises(ValueError, match=re.escape("makes 94 tokens of the template before a prompt")):
        load_teacher(path, "cpu", **SMALL).encode_text(TEXT)


@pytest.mark.parametrize(
    ("file", "field", "value", "says"),
    [
        ("transformer/config.json", "image_condition_type", "token_replace", "supported is None"),
        ("transformer/config.json", "in_channels", 9, "only text-to-video"),
        ("transformer/config.json", "text_embed_dim", 64, "hidden_size is 32"),
        ("transformer/config.json", "pooled_projection_dim", 32, "text_encoder_2's hidden_size is 24"),
        ("transformer/config.json", "qk_norm", "layer_norm", "supported is 'rms_norm'"),
        ("transformer/config.json", "has_image_proj", True, "not understood"),
        ("vae/config.json", "shift_factor", 0.1, "not understood"),
        ("text_encoder/config.json", "quantization_config", {"load_in_8bit": True}, "not understood"),
        ("text_encoder_2/config.json", "quantization_config", {"load_in_8bit": True}, "not understood"),
        ("scheduler/scheduler_config.json", "shift", 0, "must be a number above 0"),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", True, "supported is False"),
        ("model_index.json", "transformer", [None, None], "names no transformer"),
        ("model_index.json", "text_encoder_2", [None, None], "names no text_encoder_2"),
        ("model_index.json", "image_processor", ["transformers", "X"], "not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    folder: Path, tmp_path: Path, file: str, field: str, value: Any, says: str
) -> None:
    refused(folder, tmp_path / "teacher", file, field, value, says)
