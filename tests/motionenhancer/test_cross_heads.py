"""Choosing among the heads of a cross-attention, by where their words look over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_prior import half_up, independent_prior
from tiny_wan import save_wan
from whole_maps import flow, written_out

from mekernels import VideoTokens, select_heads
from motionenhancer.priors.pool import word_scores
from motionenhancer.priors.prior import extract_prior
from motionenhancer.priors.prior_settings import PriorSettings, check_settings
from motionenhancer.teachers import load_teacher

TEXT = "the red square moves left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "teacher")


@pytest.mark.parametrize("options", [{}, {"step_weights": (0.25, 0.75)}], ids=["even", "weighted"])
def test_heads_and_rows_are_those_of_maps_written_out(
    folder: Path, clip: np.ndarray, options: dict[str, Any]
) -> None:
    """The S × S products of two places' words are written out, and scored as a map of self-attention."""
    teacher: Any = load_teacher(folder, "cpu", size=(64, 64), frames=17)
    prior = extract_prior(
        teacher, clip, TEXT, steps=2, guidance_scale=1.0, memory=False, head_selection="cross", **options
    )
    model = teacher.pipeline.transformer

    def evaluate(latents: torch.Tensor, timestep: float, text: torch.Tensor, guidance: float) -> torch.Tensor:
        return model(latents, torch.full((1,), timestep), text, return_dict=False)[0]

    whole = written_out(
        evaluate,
        teacher.encode_video(clip).latents,
        flow([0.0, 0.75, 1.0]),
        (teacher.encode_text("").embeds, teacher.encode_text(TEXT).embeds),
        guidance=1.0,
        memory=False,
    )
    encoding = teacher.encode_text(TEXT)
    count, weights = len(encoding.tokens), options.get("step_weights", (0.5, 0.5))
    # Two layers a step, the noisier step first.
    layers = [weights[i // 2] / 2 * rows for i, rows in enumerate(whole.words)]
    words = sum(layers)[:, :count]
    products = np.einsum("hti,htj->hij", words, words) / count
    metrics, composite, heads, *_ = independent_prior(products, prior.grid, 0, 0)
    for name, values in {**metrics, "composite": composite}.items():
        np.testing.assert_allclose(prior.head_scores[name], values, rtol=2e-3, atol=2e-3, err_msg=name)
    assert prior.heads == heads.tolist()
    assert len(heads) == half_up(0.5, 3) < 3
    expected = words[heads].mean(0)[prior.kept]
    np.testing.assert_allclose(prior.attention.double().numpy(), expected, rtol=2e-3, atol=1e-6)
    usual = extract_prior(teacher, clip, TEXT, steps=2, guidance_scale=1.0, memory=False, **options)
    assert usual.settings.head_selection == "mhs"
    every = words.mean(0)[usual.kept]
    np.testing.assert_allclose(usual.attention.double().numpy(), every, rtol=2e-3, atol=1e-6)


def test_a_head_whose_words_stay_in_their_place_is_chosen() -> None:
    """One head looks at the same place in all frames, the other head at a different place in each frame."""
    layout = VideoTokens(4, 2, 4)
    words = torch.full((2, 1, 4, 8), 1e-3)
    words[0, 0, :, 3] = 1.0
    words[1, 0, range(4), [0, 2, 4, 6]] = 1.0
    scores = word_scores((words / words.sum((2, 3), keepdim=True)).flatten(2), layout)
    assert select_heads(scores, 0.5).tolist() == [0]
    assert scores.dfc[0] > 10 * scores.dfc[1]


def test_where_text_is_in_the_self_attention(teacher_dir: Path, folder: Path, clip: np.ndarray) -> None:
    settings = PriorSettings(head_selection="cross")
    check_settings(settings, folder)
    with pytest.raises(ValueError, match="--head_selection"):
        check_settings(settings, teacher_dir)
    with pytest.raises(ValueError, match="head_selection='cross'"):
        extract_prior(load_teacher(teacher_dir, "cpu"), clip, TEXT, head_selection="cross")
