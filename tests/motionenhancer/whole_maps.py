"""The teacher's procedure written out: single evaluations, attention materialised in float64, no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers import (
    transformer_hunyuan_video,
    transformer_hunyuan_video15,
    transformer_ltx,
    transformer_ltx2,
    transformer_wan,
)
from test_prior import half_up, independent_prior

from motionenhancer.priors.prior import MotionPrior
from motionenhancer.teachers import TextEncoding

Step = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


class WholeAttention:
    """Stands in for diffusers' `dispatch_attention_fn`, and keeps the maps of the first sample.

    `maps` are of self-attention, (heads, tokens, tokens). `words` are of attention to a text, the other way
    round: (heads, text, vision), the softmax over vision of each text token's scores.

    With two samples the second is the reference: the first attends to its keys too. A mask says which keys a
    sample has.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self.maps: list[np.ndarray] = []
        self.words: list[np.ndarray] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        tokens = query.shape[1]
        q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
        if key.shape[1] != tokens:
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            if self.tokens in (None, tokens):
                self.words.append(scores[0].transpose(1, 2).softmax(-1).numpy())
            return (
                ((scores + (0 if attn_mask is None else attn_mask)).softmax(-1) @ v).transpose(1, 2).to(query)
            )
        seen = torch.ones(len(query), tokens, dtype=torch.bool)
        if attn_mask is not None:
            # The row of the first query, a vision token, which sees all that is no padding.
            seen = attn_mask.bool()[:, 0, 0]
        outs = []
        for i in range(len(query)):
            keys, values, there = [k[i]], [v[i]], [seen[i]]
            if i == 0 and len(query) == 2:
                keys, values, there = [*k], [*v], [*seen]
            scores = q[i] @ torch.cat(keys, 1).transpose(1, 2) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~torch.cat(there), -torch.inf).softmax(-1)
            outs.append(weights @ torch.cat(values, 1))
            if i == 0 and self.tokens in (None, tokens):
                self.maps.append(weights.unflatten(-1, (-1, tokens)).sum(-2).numpy())
        return torch.stack(outs).transpose(1, 2).to(query.dtype)

    def of_heads_first(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> Any:
        """The same for tensors with heads first, as torch's own function takes them."""
        return self(*(x.transpose(1, 2) for x in (query, key, value)), **options).transpose(1, 2)


def flow(sigmas: list[float]) -> tuple[list[float], Step]:
    """Timesteps of levels 1 to K of a flow, and Euler's step between levels."""

    def step(latents: torch.Tensor, output: torch.Tensor, source: int, target: int) -> torch.Tensor:
        return latents + (sigmas[target] - sigmas[source]) * output

    return [1000 * sigma for sigma in sigmas[1:]], step


@torch.no_grad()
def written_out(
    evaluate: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    schedule: tuple[list[float], Step],
    texts: tuple[Any, Any],
    *,
    guidance: float,
    memory: bool,
    embedded: bool = False,
    sdpa: bool = False,
    tokens: int | None = None,
) -> WholeAttention:
    """Invert a clip and rebuild it; the attention of the conditional evaluations.

    Args:
        evaluate: (latents, timestep, text, guidance) of a batch whose samples share text and level.
        latents: (1, ...) clean.
        schedule: timesteps of levels 1 to K, and the step between levels.
        texts: the empty one and the prompt.
        guidance: scale of the reconstruction.
        memory: with a reference stream.
        embedded: guidance is an input of the model.
        tokens: attention of other than so many queries is not kept.
        sdpa: the model calls torch's attention itself, not diffusers' choice of one.
    """
    whole, (timesteps, step) = WholeAttention(tokens), schedule
    steps = len(timesteps)
    with pytest.MonkeyPatch.context() as patch:
        if sdpa:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", whole.of_heads_first)
        for module in (
            transformer_hunyuan_video,
            transformer_hunyuan_video15,
            transformer_ltx,
            transformer_ltx2,
            transformer_wan,
        ):
            patch.setattr(module, "dispatch_attention_fn", whole)
        trajectory = [latents]
        for level in range(steps):
            output = evaluate(trajectory[-1], timesteps[level], texts[0], 1.0)
            trajectory.append(step(trajectory[-1], output, level, level + 1))
        latents, maps, words = trajectory[-1], [], []
        for level in range(steps, 0, -1):
            batch = torch.cat([latents, trajectory[level]]) if memory else latents
            scale = guidance if embedded else 1.0
            whole.maps, whole.words = [], []
            output = evaluate(batch, timesteps[level - 1], texts[1], scale)[:1]
            maps += whole.maps
            words += whole.words
            if guidance != 1 and not embedded:
                empty = evaluate(batch, timesteps[level - 1], texts[0], scale)[:1]
                output = empty + guidance * (output - empty)
            latents = step(latents, output, level, level - 1)
    whole.maps, whole.words = maps, words
    return whole


def agrees(
    prior: MotionPrior, whole: WholeAttention, encoding: TextEncoding, vision: int, *, text_first: int = 0
) -> None:
    """Heads, tokens and rows of a prior are those of the mean of whole maps.

    Text stands after `vision` tokens of vision, or, `text_first` tokens with padding, before them; or apart,
    in a cross-attention.
    """
    rows, words = encoding.rows, np.array(encoding.words)
    assert rows is not None
    mean = sum(whole.maps) / len(whole.maps)
    if whole.words:
        # Each head of the self-attention has all heads of the cross-attention for its text.
        text = (sum(whole.words) / len(whole.words)).mean(0)[list(rows)]
        above = np.concatenate([np.zeros((len(rows), len(rows))), text], axis=1)
        below = np.concatenate([np.zeros((len(mean), vision, len(rows))), mean], axis=2)
        mean = np.concatenate([np.broadcast_to(above, (len(mean), *above.shape)), below], axis=1)
        rows, text_first = tuple(range(len(rows))), len(rows)
    start = 0 if text_first else vision
    order = [*(start + row for row in rows), *range(text_first, text_first + vision)]
    mean = mean[:, order][:, :, order]
    count = len(rows)
    metrics, composite, heads, scores, _, _ = independent_prior(mean, prior.grid, count, count)
    for name, values in {**metrics, "composite": composite}.items():
        np.testing.assert_allclose(prior.head_scores[name], values, rtol=5e-3, atol=5e-3, err_msg=name)
    assert prior.heads == heads.tolist()
    np.testing.assert_allclose(prior.token_scores, scores, rtol=1e-3)
    best = np.argsort(-scores[words], kind="stable")[: half_up(0.5, len(words))]
    assert prior.kept == np.sort(words[best]).tolist()
    expected = mean[heads][:, prior.kept, count:].mean(0)
    np.testing.assert_allclose(prior.attention.double().numpy(), expected, rtol=2e-3, atol=1e-7)
