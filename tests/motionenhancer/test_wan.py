"""Wan 2.1 as a teacher: a tiny configuration of diffusers' own classes, loaded from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_wan import save_wan

from mekernels import VideoTokens
from motionenhancer.priors.prior import extract_prior
from motionenhancer.teachers import load_teacher, roundtrip_error
from motionenhancer.teachers.plan import plan_teacher

TEXT = "the red square moves left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path):
    return load_teacher(folder, device="cpu", size=(64, 64), frames=17)


class Reader:
    def __init__(self) -> None:
        self.vision: list[torch.Tensor] = []
        self.words: list[torch.Tensor] = []

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
        scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
        self.vision.append(scores.softmax(-1)[0].unflatten(-1, (fold, -1)).sum(-2))

    def cross_attention(self, text: torch.Tensor, vision: torch.Tensor) -> None:
        scores = text.double() @ vision.double().transpose(-1, -2) * vision.shape[-1] ** -0.5
        self.words.append(scores.softmax(-1)[0].mean(0))


def test_geometry(teacher, clip: np.ndarray) -> None:
    video = teacher.encode_video(clip)
    assert video.tokens == VideoTokens(5, 4, 4)
    assert video.latents.shape == (1, 16, 5, 8, 8)
    assert (teacher.heads, teacher.layers, teacher.max_frames) == (3, 2, 17)
    mode = teacher.pipeline.vae.encode(
        torch.from_numpy(clip / np.float32(127.5) - 1.0).permute(3, 0, 1, 2)[None]
    ).latent_dist.mode()
    config = teacher.pipeline.vae.config
    for channel in (0, 7):
        expected = (mode[:, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(video.latents[:, channel], expected, rtol=1e-4, atol=1e-4)


def test_text_is_encoded_as_the_pipeline_does(teacher) -> None:
    encoding = teacher.encode_text(TEXT)
    expected = teacher.pipeline._get_t5_prompt_embeds(TEXT, max_sequence_length=512, device="cpu")
    torch.testing.assert_close(encoding.embeds, expected)
    assert len(encoding.tokens) == len(encoding.spans)
    assert not encoding.embeds[0, len(encoding.tokens) + 1 :].any()
    assert teacher.encode_text("") is teacher.encode_text("")


def test_reading_changes_nothing(teacher, clip: np.ndarray) -> None:
    latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text(TEXT).embeds
    plain = teacher.predict(latents, embeds, 500.0)
    before = [(b.attn1.processor, b.attn2.processor) for b in teacher.pipeline.transformer.blocks]
    reader = Reader()
    with teacher.reading(reader, memory=False, row=0):
        torch.testing.assert_close(teacher.predict(latents, embeds, 500.0), plain, rtol=1e-4, atol=1e-5)
    assert [(b.attn1.processor, b.attn2.processor) for b in teacher.pipeline.transformer.blocks] == before
    assert len(reader.vision) == len(reader.words) == 2
    assert reader.vision[0].shape == (3, 80, 80)
    assert reader.words[0].shape == (512, 80)


def test_identical_streams_fold_to_plain_attention(teacher, clip: np.ndarray) -> None:
    latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text(TEXT).embeds
    alone, both = Reader(), Reader()
    with teacher.reading(alone, memory=False, row=0):
        teacher.predict(latents, embeds, 500.0)
    with teacher.reading(both, memory=True, row=0):
        teacher.predict(torch.cat([latents] * 2), torch.cat([embeds] * 2), 500.0)
    for one, two in zip(alone.vision, both.vision, strict=True):
        assert float((one - two).abs().max()) < 1e-6


def test_levels_are_the_shifted_flow(teacher) -> None:
    schedule = teacher.schedule(4)
    assert schedule.levels == pytest.approx([0.0, 0.5, 0.75, 0.9, 1.0])
    assert list(schedule.timesteps) == pytest.approx([500.0, 750.0, 900.0, 1000.0])
    clean, noise = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = schedule.noised(clean, noise, 2)
    torch.testing.assert_close(schedule.step(at, noise - clean, 2, 0), clean)
    torch.testing.assert_close(schedule.step(at, noise - clean, 2, 4), noise)
    with pytest.raises(ValueError, match="steps=3"):
        teacher.schedule(3)


def test_the_round_trip_closes_as_steps_grow(teacher, clip: np.ndarray) -> None:
    latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text(TEXT).embeds
    errors = [roundtrip_error(teacher, latents, teacher.schedule(k), embeds) for k in (10, 50)]
    assert errors[1] < 0.35 * errors[0]


@pytest.mark.parametrize("options", [{}, {"mode": "renoise", "noise_level": 300}], ids=["full", "renoise"])
def test_the_prior_is_the_words_softmax_over_vision(
    teacher, clip: np.ndarray, options: dict[str, object]
) -> None:
    from motionenhancer.teachers import invert, reconstruct, renoise

    prior = extract_prior(teacher, clip, TEXT, steps=2, sampled_rows="all", **options)
    reader, latents = Reader(), teacher.encode_video(clip).latents
    text, empty = teacher.encode_text(TEXT), teacher.encode_text("").embeds
    if options:
        renoise(teacher, latents, teacher.level(300), text.embeds, reader)
        assert prior.evaluations == 1
    else:
        schedule = teacher.schedule(2)
        trajectory = invert(teacher, latents, schedule, empty)
        reconstruct(teacher, trajectory, schedule, text.embeds, empty, readers=lambda level: reader)
        assert prior.evaluations == 2 + 8
    words = torch.stack(reader.words).mean(0)[: len(text.tokens)]
    torch.testing.assert_close(words.sum(-1), torch.ones(len(words), dtype=torch.float64))
    torch.testing.assert_close(prior.attention.double(), words[prior.kept], rtol=2e-3, atol=1e-6)
    assert prior.grid == (5, 4, 4)
    assert len(prior.head_scores["dfc"]) == 3
    vision = torch.stack(reader.vision).mean(0).numpy().reshape(3, 5, 16, 5, 16)
    diagonal = np.einsum("hfpgp->hfgp", vision)
    share = (diagonal >= vision.mean(axis=(1, 2, 3, 4))[:, None, None, None]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(prior.head_scores["dsr"], share, atol=5e-3)


def test_only_text_to_video_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size"):
        load_teacher(folder, device="cpu", size=(60, 64))
    assert load_teacher(folder, device="cpu").size == (480, 832)
    assert load_teacher(folder, device="cpu").max_frames == 81


@pytest.mark.parametrize(("size", "frames"), [((64, 64), 17), ((96, 64), 10)])
def test_the_plan_is_what_the_teacher_becomes(folder: Path, size: tuple[int, int], frames: int) -> None:
    plan, loaded = (
        plan_teacher(folder, size=size, frames=frames),
        load_teacher(folder, "cpu", size=size, frames=frames),
    )
    encoded = loaded.encode_video(np.zeros((plan.frames, 32, 32, 3), np.uint8))
    assert plan.grid == encoded.tokens.grid
    assert (plan.frames, plan.size, plan.joint) == (loaded.max_frames, loaded.size, False)
    assert (plan.heads, plan.width) == (loaded.heads, 48)
    assert plan.text_length == loaded.encode_text(TEXT).embeds.shape[1]
    pipeline = loaded.pipeline  # type: ignore[attr-defined]
    for part, count in plan.weights.items():
        assert count == sum(p.numel() for p in getattr(pipeline, part).parameters()), part
    # The default is the size and length in the training of the published models.
    assert plan_teacher(folder).grid == (21, 30, 52)
