"""The sum of squares of a whole attention block, from logsumexps alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, reference
from ..flash_attention import flash_attention
from ..layout import VideoTokens


def vision_square_sums(
    query: Tensor, key: Tensor, lse: Tensor, video: VideoTokens, softmax_scale: float, fold: int = 1
) -> Tensor:
    """Sum of the squares of the vision-to-vision block of every head's map, exact.

    A folded entry is the sum over parts x of exp(s_x - lse), so its square is the sum over pairs (x, y) of
    exp(s_x + s_y - 2 lse), and the row's sum over video keys j is exp(L_xy - 2 lse) with the logsumexp
    L_xy of s_xj + s_yj over the video keys only. For x = y this is attention at the doubled scale. Otherwise
    it is attention of the query, concatenated with itself, to key x concatenated with key y. Each pair x <= y
    costs one more flash attention over the video tokens.

    Args:
        query: (1, H, N, D).
        key: (1, H, fold * N, D).
        lse: (1, H, N) logsumexp over all keys, text included, at ``softmax_scale``.
        video: where the video's tokens lie.
        softmax_scale: factor on the scores.
        fold: equal parts of the key axis whose masses are added.

    Returns:
        (H,) float64.

    Example:
        >>> import torch, mekernels
        >>> video = mekernels.VideoTokens(frames=2, height=1, width=2, text=1)
        >>> even = torch.zeros(1, 1, 5, 8)
        >>> vision_square_sums(even, even, torch.full((1, 1, 5), 5.0).log(), video, 1.0)
        tensor([0.6400], dtype=torch.float64)
    """
    chosen = video.vision_slice
    if backends.active() == "reference":
        attention = (
            reference.attention_scores(query, key, softmax_scale=softmax_scale) - lse[..., None]
        ).exp()
        block = reference.vision_block(reference.fold_keys(attention, fold), video)
        return block.double().square().sum((-1, -2))[0]
    queries, shift = query[:, :, chosen], lse[0, :, chosen].double()
    parts = [part[:, :, chosen] for part in key.chunk(fold, dim=2)]
    total = shift.new_zeros(query.shape[1])
    # A side kernel may be chosen by name; the attention beside it is always the fastest available.
    with backends.use_backend("auto"):
        for first, one in enumerate(parts):
            for second, other in enumerate(parts[first:], first):
                if first == second:
                    pair = (queries, one, one)
                    scale, times = 2 * softmax_scale, 1
                else:
                    both = torch.cat([one, other], -1)
                    pair = (torch.cat([queries, queries], -1), both, both)
                    scale, times = softmax_scale, 2
                doubled = flash_attention(*pair, softmax_scale=scale)[1][0].double()
                total += times * (doubled - 2 * shift).exp().sum(-1)
    return total
