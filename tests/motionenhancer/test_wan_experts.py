"""Wan 2.2: two experts that share the noise levels, and a time step for each token."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from safetensors.torch import load_file, save_file
from tiny_wan import edit, save_wan

from motionenhancer.costs import teacher_cost
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.prior import MotionPrior, extract_prior
from motionenhancer.priors.prior_settings import PriorSettings, check_settings
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.plan import plan_teacher, size_multiple

TEXT = "the red square moves left"
SMALL: dict[str, Any] = {"size": (64, 64), "frames": 17}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts with different weights."""
    return save_wan(tmp_path_factory.mktemp("wan") / "a14b", experts=(1, 2), boundary_ratio=0.875)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    return load_teacher(folder, "cpu", **SMALL)


def read(teacher: Any, clip: np.ndarray, **options: Any) -> MotionPrior:
    """All words and heads, so that nothing depends on a selection."""
    return extract_prior(
        teacher, clip, TEXT, **{"head_ratio": 1.0, "token_ratio": 1.0, "sampled_rows": "all", **options}
    )


def served(teacher: Any, run: Callable[[], Any]) -> list[tuple[float, str]]:
    """The timestep and the expert of each evaluation that `run` makes."""
    seen: list[tuple[float, str]] = []
    hooks = []
    for name in ("transformer", "transformer_2"):
        model = getattr(teacher.pipeline, name)

        def note(module: Any, args: Any, options: dict[str, Any], name: str = name) -> None:
            seen.append((float(options["timestep"].flatten()[0]), name))

        hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_each_level_goes_to_the_expert_of_the_pipeline(teacher: Any, clip: np.ndarray) -> None:
    """With a shift of 3, the seventh of ten levels is 875 up to rounding, and belongs to the first expert."""
    seen = served(teacher, lambda: read(teacher, clip, steps=10))
    up = [1000 * 3 * s / (1 + 2 * s) for s in (i / 10 for i in range(1, 11))]
    assert [t for t, _ in seen] == pytest.approx(up + up[::-1], rel=1e-6)
    names = ["transformer_2"] * 6 + ["transformer"] * 4
    assert [name for _, name in seen] == names + names[::-1]
    for level, name in ((874, "transformer_2"), (875, "transformer"), (0, "transformer_2")):
        one = served(teacher, lambda level=level: read(teacher, clip, mode="renoise", noise_level=level))
        assert one == [(level, name)]


def test_the_pipeline_itself_shares_them_out_so(folder: Path) -> None:
    """diffusers' own call, with its own levels, against the same rule."""
    pipeline: Any = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    class Loaded:
        pass

    loaded: Any = Loaded()
    loaded.pipeline = pipeline
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8, "output_type": "latent"}
    seen = served(loaded, lambda: pipeline(TEXT, guidance_scale=1.0, **options))
    assert {name for _, name in seen} == {"transformer", "transformer_2"}
    ours = load_teacher(folder, "cpu", **SMALL)
    assert ours.boundary == 875.0
    assert all((name == "transformer_2") == (t < ours.boundary) for t, name in seen)


@pytest.mark.parametrize("second", [None, 2.0])
def test_priors_are_those_of_maps_materialised_in_each_expert(
    folder: Path, teacher: Any, clip: np.ndarray, second: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' plain models and attention, one evaluation at a time; each map is written out in float64."""
    steps, guidance = 4, 5.0
    prior = read(teacher, clip, steps=steps, memory=False, guidance_scale=guidance, guidance_scale_2=second)
    assert prior.settings.guidance_scale_2 == second
    experts = [WanTransformer3DModel.from_pretrained(folder / n) for n in ("transformer", "transformer_2")]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    attend = transformer_wan.dispatch_attention_fn

    def note(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append((query[0].transpose(0, 1).double(), key[0].transpose(0, 1).double()))
        return attend(query, key, *args, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", note)
    texts = [teacher.encode_text(text).embeds for text in ("", TEXT)]
    sigmas = [3 * s / (1 + 2 * s) for s in (i / steps for i in range(steps + 1))]

    @torch.no_grad()
    def evaluate(latents: torch.Tensor, sigma: float, text: torch.Tensor) -> torch.Tensor:
        model: Any = experts[0 if sigma >= 0.875 else 1]
        return model(latents, torch.tensor([1000 * sigma]), text, return_dict=False)[0]

    latents = teacher.encode_video(clip).latents
    for below, sigma in pairwise(sigmas):
        latents = latents + (sigma - below) * evaluate(latents, sigma, texts[0])
    words, vision = [], []
    for level in range(steps, 0, -1):
        empty = evaluate(latents, sigmas[level], texts[0])
        calls.clear()
        output = evaluate(latents, sigmas[level], texts[1])
        for query, key in calls:
            scores = query @ key.transpose(1, 2) / 4.0
            if query.shape == key.shape:
                vision.append(scores.softmax(-1))
            else:
                words.append(scores.transpose(1, 2).softmax(-1).mean(0))
        scale = guidance if second is None or sigmas[level] >= 0.875 else second
        latents = latents + (sigmas[level - 1] - sigmas[level]) * (empty + scale * (output - empty))
    assert len(words) == len(vision) == 2 * steps
    expected = torch.stack(words).mean(0)[: len(prior.tokens)]
    torch.testing.assert_close(prior.attention.double(), expected, rtol=2e-3, atol=1e-6)
    pooled = torch.stack(vision).mean(0).numpy().reshape(3, 5, 16, 5, 16)
    diagonal = np.einsum("hfpgp->hfgp", pooled)
    share = (diagonal >= pooled.mean(axis=(1, 2, 3, 4))[:, None, None, None]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(prior.head_scores["dsr"], share, atol=5e-3)


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_each_expert_counts_where_it_serves_and_nowhere_else(
    folder: Path, teacher: Any, clip: np.ndarray, part: str, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (file,) = (changed / part).glob("*.safetensors")
    weights = {k: v * (0.5 if "attn1.to_q.weight" in k else 1) for k, v in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    other = load_teacher(changed, "cpu", **SMALL)
    assert other.id != teacher.id
    one = {"mode": "renoise", "noise_level": 950 if part == "transformer" else 300}
    two = {"mode": "renoise", "noise_level": 300 if part == "transformer" else 950}
    pairs = [(read(other, clip, **o), read(teacher, clip, **o)) for o in (one, two, {"steps": 2})]
    same = [torch.equal(a.attention, b.attention) and a.head_scores == b.head_scores for a, b in pairs]
    assert same == [False, True, False]


def test_memory_and_plan_count_both_experts(folder: Path, teacher: Any) -> None:
    plan = plan_teacher(folder, **SMALL)
    assert set(plan.weights) == {"transformer", "transformer_2", "text_encoder", "vae"}
    for part, count in plan.weights.items():
        assert count == sum(p.numel() for p in getattr(teacher.pipeline, part).parameters()), part
    prior = PriorArguments(teacher=str(folder), teacher_size="64x64", teacher_frames=17)
    memory = teacher_cost(folder, PriorSettings(), **prior.cost_options("cpu"))
    assert memory.weights["transformer_2"] == memory.weights["transformer"] > 0
    assert "transformer_2" in str(memory)
    assert not any(p.requires_grad for p in teacher.pipeline.transformer_2.parameters())


def refused(path: Path, match: str) -> None:
    """Loading, planning and checking a run all refuse a folder with the same line."""
    for use in (
        lambda: load_teacher(path, "cpu"),
        lambda: plan_teacher(path),
        lambda: check_settings(PriorSettings(), path),
    ):
        with pytest.raises(ValueError, match=match):
            use()


def test_a_boundary_without_its_second_expert_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    shutil.copytree(folder, path)
    for value in ([None, None], ...):
        edit(path / "model_index.json", transformer_2=value)
        refused(path, "boundary_ratio is 0.875, but there is no transformer_2")
    edit(path / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    shutil.rmtree(path / "transformer_2")
    for use in (load_teacher, plan_teacher, lambda path: check_settings(PriorSettings(), path)):
        with pytest.raises(FileNotFoundError, match="transformer_2"):
            use(path)


@pytest.mark.parametrize("ratio", [True, "0.875", -0.1, 1.5])
def test_a_boundary_that_is_none(folder: Path, tmp_path: Path, ratio: object) -> None:
    shutil.copytree(folder, tmp_path / "teacher")
    edit(tmp_path / "teacher" / "model_index.json", boundary_ratio=ratio)
    refused(tmp_path / "teacher", "boundary_ratio is .*; it must be a number from 0 to 1")


def test_experts_of_two_shapes_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "teacher")
    edit(tmp_path / "teacher" / "transformer_2" / "config.json", num_attention_heads=6)
    refused(
        tmp_path / "teacher", r"num_attention_heads is 6, but 3 in transformer; both must have the same shape"
    )


def test_without_a_boundary_the_first_transformer_serves_all(
    folder: Path, tmp_path: Path, clip: np.ndarray
) -> None:
    """The second transformer is neither loaded nor counted, as a pipeline never uses it."""
    path = tmp_path / "teacher"
    shutil.copytree(folder, path)
    priors = []
    for fields in (
        {"boundary_ratio": None},
        {"boundary_ratio": None, "transformer_2": [None, None]},
        {"boundary_ratio": ..., "transformer_2": ...},
    ):
        edit(path / "model_index.json", **fields)
        loaded = load_teacher(path, "cpu", **SMALL)
        assert loaded.boundary is None
        assert loaded.pipeline.transformer_2 is None
        assert "transformer_2" not in plan_teacher(path).weights
        priors.append(read(loaded, clip, steps=2).attention)
    assert torch.equal(priors[0], priors[1])
    assert torch.equal(priors[0], priors[2])
    # A guidance for a missing expert would have no effect, so it is refused.
    with pytest.raises(ValueError, match="guidance_scale_2"):
        read(loaded, clip, steps=2, guidance_scale_2=3.0)
    with pytest.raises(ValueError, match="--guidance_scale_2"):
        check_settings(PriorSettings(guidance_scale_2=3.0), path)


def test_a_folder_of_the_low_noise_expert_alone(
    folder: Path, teacher: Any, tmp_path: Path, clip: np.ndarray
) -> None:
    path = tmp_path / "teacher"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "transformer")
    edit(path / "model_index.json", transformer=[None, None])
    low = load_teacher(path, "cpu", **SMALL)
    assert low.pipeline.transformer is None
    assert (low.heads, low.layers, low.boundary) == (3, 2, 875.0)
    assert set(plan_teacher(path).weights) == {"transformer_2", "text_encoder", "vae"}
    assert size_multiple(path) == 16
    assert low.encode_video(clip).tokens == teacher.encode_video(clip).tokens
    options = {"mode": "renoise", "noise_level": 874}
    assert torch.equal(read(low, clip, **options).attention, read(teacher, clip, **options).attention)
    check_settings(PriorSettings(mode="renoise", noise_level=874), path)
    for settings in (PriorSettings(mode="renoise", noise_level=875), PriorSettings()):
        with pytest.raises(ValueError, match="no transformer for timestep"):
            check_settings(settings, path)
    with pytest.raises(ValueError, match="no transformer for timestep 875"):
        low.level(875)
    with pytest.raises(ValueError, match="no transformer for timestep 1000"):
        read(low, clip, steps=2)
    edit(path / "model_index.json", boundary_ratio=1.0)
    whole = load_teacher(path, "cpu", **SMALL)
    check_settings(PriorSettings(), path)
    assert read(whole, clip, steps=2).evaluations == 2 + 8
    edit(path / "model_index.json", boundary_ratio=None)
    refused(path, "must name a transformer")


def test_guidance_of_the_second_expert_needs_guidance() -> None:
    with pytest.raises(ValueError, match="guidance_scale_2"):
        PriorSettings(guidance_scale=1.0, guidance_scale_2=3.0)
    with pytest.raises(ValueError, match="guidance_scale_2"):
        PriorSettings(guidance_scale_2=float("inf"))


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "ti2v", expand_timesteps=True)


def test_a_time_step_for_each_token(ti2v: Path, clip: np.ndarray) -> None:
    """The time steps are the pipeline's; its mask is one everywhere in text-to-video."""
    teacher: Any = load_teacher(ti2v, "cpu", **SMALL)
    video = teacher.encode_video(clip)
    assert video.latents.shape == (1, 48, 5, 4, 4)
    assert video.tokens.grid == plan_teacher(ti2v, **SMALL).grid == (5, 2, 2)
    embeds = teacher.encode_text(TEXT).embeds
    shapes = []
    hook = teacher.pipeline.transformer.condition_embedder.register_forward_pre_hook(
        lambda module, args, options: shapes.append((args[0].shape, options["timestep_seq_len"])),
        with_kwargs=True,
    )
    found = teacher.predict(torch.cat([video.latents] * 2), torch.cat([embeds] * 2), 500.0)
    hook.remove()
    assert shapes == [(torch.Size([2 * 20]), 20)]
    mask = torch.ones(video.latents.shape)
    steps = (mask[0][0][:, ::2, ::2] * 500.0).flatten()[None]
    plain: Any = WanTransformer3DModel.from_pretrained(ti2v / "transformer")
    with torch.no_grad():
        expected = plain(video.latents, steps, embeds, return_dict=False)[0]
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-5)
    prior = read(teacher, clip, steps=2)
    assert prior.grid == (5, 2, 2)
    torch.testing.assert_close(
        prior.attention.float().sum(-1), torch.ones(len(prior.tokens)), rtol=0, atol=2e-3
    )


def test_clips_of_the_time_step_per_token_model(ti2v: Path) -> None:
    plan, loaded = plan_teacher(ti2v), load_teacher(ti2v, "cpu")
    assert (plan.size, plan.frames) == (loaded.size, loaded.max_frames) == ((704, 1280), 121)  # type: ignore[attr-defined]
    assert plan.grid == (31, 22, 40)
    assert size_multiple(ti2v) == 32
    with pytest.raises(ValueError, match=re.escape("multiples of 32")):
        load_teacher(ti2v, "cpu", size=(48, 64))
    prior = PriorArguments(teacher=str(ti2v), teacher_size="64x64", teacher_frames=17)
    # Pixels are folded two by two before the first layer: 12 channels of a quarter of the places.
    assert (
        teacher_cost(ti2v, PriorSettings(), **prior.cost_options("cpu")).encoding
        == (4 + 12) * 4 * 32 * 32 * 4
    )
