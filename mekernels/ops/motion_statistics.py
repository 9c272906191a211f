"""Running means of what head and token selection read of a model's attention maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import backends, checks, reference, row_choice
from ..layout import VideoTokens
from .diagonal_attention import check_side_inputs, head_diagonal
from .motion_scores import MotionScores, energy_ratio, motion_scores

CHUNK_ELEMENTS = 1 << 20
"""Attention entries the composite holds at a time."""


class MotionStatistics:
    """Pools the attention of many layers and steps per head, exactly, without an attention map.

    Kept per head are the diagonals (F, F, P), the text rows (T, S), some whole rows (R, S) and the mean of
    the vision-to-vision block: memory O(heads * S * (F + T + R)). Sums are float32, or float64 for float64
    input.

    Args:
        video: where text and video tokens lie.
        heads: number of heads, at least 1.
        text_rows: positions of text tokens in the token sequence, in the order wanted; all text by default.
            Padding tokens are best left out.
        sampled_rows: how many video rows estimate the squares off the diagonals, or ``"all"``, which is exact
            and holds the whole block. Rows are drawn one from each of that many equal stretches of the
            sequence, hence evenly over the frames.
        device: where the sums lie; that of the first update by default.
        seed: of the drawn rows.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: motion-sensitive head selection and motion-salient token identification in the paper
    "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> video = mekernels.VideoTokens(frames=3, height=2, width=2, text=5)
        >>> statistics = mekernels.MotionStatistics(video, heads=4, sampled_rows="all")
        >>> for layer in range(2):
        ...     query, key, value = torch.randn(3, 1, 4, video.length, 16)
        ...     out, lse = mekernels.flash_attention(query, key, value)
        ...     statistics.update(query, key, lse)
        >>> chosen = mekernels.select_heads(statistics.scores())
        >>> statistics.text_attention(chosen).shape
        torch.Size([5, 12])
    """

    def __init__(
        self,
        video: VideoTokens,
        heads: int,
        *,
        text_rows: Sequence[int] | Tensor | None = None,
        sampled_rows: int | str = 64,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        checks.video_tokens("video", video)
        if isinstance(heads, bool) or not isinstance(heads, int):
            raise TypeError(f"heads must be an int, got {type(heads).__name__}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        self.video = video
        self.heads = heads
        self.text_rows = row_choice.text_rows(text_rows, video)
        """(T,) int64 positions in the token sequence, on the CPU."""
        count = row_choice.sampled_count(sampled_rows, video)
        self.sampled_rows, self.row_weights = row_choice.stratified(video.vision, count, seed)
        """(R,) int64 sampled video tokens and (R,) how many tokens each stands for, on the CPU."""
        self.updates = 0
        """Maps pooled so far."""
        self._device = None if device is None else torch.device(device)
        self._sums: dict[str, Tensor] = {}

    def update(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        *,
        softmax_scale: float | None = None,
        fold: int = 1,
    ) -> None:
        """Add one layer of one step.

        Args:
            query: (1, H, N, D) with N = ``video.length``, floating point, any strides.
            key: (1, H, fold * N, D).
            lse: (1, H, N) natural-log logsumexp over all keys.
            softmax_scale: factor on the scores, 1 / sqrt(D) by default; the one ``lse`` was made with.
            fold: number of equal parts of the key axis whose masses are added; 2 where reference keys follow
                the own keys.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. NaN is reported by
                :meth:`scores` and :meth:`text_attention`, so that an update need not wait for the device.
            BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.
        """
        scale = check_side_inputs(query, key, lse, self.video, softmax_scale, fold)
        checks.shape("query", query, (1, self.heads, *query.shape[2:]), meaning="(one sample, heads, ...)")
        sums = self._ready(query)
        backend = backends.active()
        query, key, lse = query.detach(), key.detach(), lse.detach()
        if backend == "reference":
            backends.exactly(_reference_update, query, key, lse, sums, self.video, scale, fold)
        else:
            video = self.video
            start, text = video.vision_slice.start, video.text_slice.start
            layout = (video.frames, video.positions, start, video.text, text)
            accumulated = (sums["diagonal"], sums["rows"], sums["vision_mass"])
            motion_statistics_op(*accumulated, query, key, lse, sums["index"], *layout, scale, fold, backend)
        self.updates += 1

    def merge(self, other: MotionStatistics) -> MotionStatistics:
        """Add what ``other`` pooled, every update counting the same; returns ``self``.

        Raises:
            TypeError: ``other`` is no MotionStatistics, or of another dtype.
            ValueError: ``other`` has another video, number of heads, text rows or sampled rows.
        """
        if not isinstance(other, MotionStatistics):
            raise TypeError(f"other must be a MotionStatistics, got {type(other).__name__}")
        for name in ("video", "heads"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other must have {name} {getattr(self, name)}, got {getattr(other, name)}")
        for name in ("text_rows", "sampled_rows"):
            if not torch.equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"other must have the {name} of this MotionStatistics, got different ones")
        if other._sums:
            if not self._sums:
                self._allocate(other._sums["diagonal"].dtype, self._device or other._sums["diagonal"].device)
            if self._sums["diagonal"].dtype != other._sums["diagonal"].dtype:
                mine, theirs = self._sums["diagonal"].dtype, other._sums["diagonal"].dtype
                raise TypeError(f"other must hold sums of dtype {mine}, got {theirs}")
            for name in _SUMS:
                self._sums[name] += other._sums[name].to(self._sums[name].device)
        self.updates += other.updates
        return self

    def scores(self) -> MotionScores:
        """DFC, TCS and DSR of every head's pooled map.

        The squares off the diagonals are those of the sampled rows, scaled up; all else is exact. The
        denominator of DFC is kept in float64.

        Raises:
            ValueError: there was no update yet, or an update had NaN or infinite values.
        """
        sums = self._finished()
        video = self.video
        diagonal = sums["diagonal"] / self.updates
        tau = sums["vision_mass"] / (self.updates * video.vision**2)
        inside = torch.stack([head.double().square().sum() for head in diagonal])
        outside = self._outside(sums)
        scores = motion_scores(diagonal, tau, (inside + outside).to(diagonal.dtype))
        return dataclasses.replace(scores, dfc=energy_ratio(inside, outside).to(diagonal.dtype))

    def text_attention(self, heads: Tensor | Sequence[int]) -> Tensor:
        """Text rows over video columns, mean over the given heads and all updates, (T, S).

        Args:
            heads: head indices, as :func:`mekernels.select_heads` returns them; at least one.

        Raises:
            TypeError, ValueError: ``heads`` does not fit, there was no update yet, or an update had NaN or
                infinite values.
        """
        chosen = torch.as_tensor(heads)
        if chosen.ndim != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool or not len(chosen):
            raise ValueError(f"heads must be a non-empty sequence of head indices, got {heads!r}")
        if bool((chosen < 0).any()) or bool((chosen >= self.heads).any()):
            raise ValueError(f"heads must lie between 0 and {self.heads - 1}, got {chosen.tolist()}")
        rows = self._finished()["rows"][:, : len(self.text_rows)]
        total = rows.new_zeros(rows.shape[1:])
        for head in chosen.tolist():
            total += rows[head]
        return total / (self.updates * len(chosen))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and the number of updates, as tensors that :meth:`load_state_dict` takes."""
        state = {name: self._sums[name] for name in _SUMS if self._sums}
        return {**state, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by those of a MotionStatistics made with the same arguments.

        Raises:
            ValueError: entries are missing or unknown, or a shape differs.
        """
        expected = {"updates", *_SUMS} if len(state) > 1 else {"updates"}
        if set(state) != expected:
            raise ValueError(f"state must have the entries {sorted(expected)}, got {sorted(state)}")
        if len(state) == 1:
            self._sums = {}
        else:
            diagonal = state["diagonal"]
            self._allocate(diagonal.dtype, self._device or diagonal.device)
            for name in _SUMS:
                checks.shape(f"state[{name!r}]", state[name], self._sums[name].shape)
                self._sums[name].copy_(state[name])
        self.updates = int(state["updates"])

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        video, heads = self.video, self.heads
        index = torch.cat([self.text_rows, self.sampled_rows + video.vision_slice.start])
        sizes = {
            "diagonal": (heads, video.frames, video.frames, video.positions),
            "rows": (heads, len(index), video.vision),
            "vision_mass": (heads,),
        }
        self._sums = {name: torch.zeros(size, dtype=dtype, device=device) for name, size in sizes.items()}
        self._sums["index"] = index.to(device)

    def _ready(self, query: Tensor) -> dict[str, Tensor]:
        dtype = checks.accumulate_dtype(query.dtype)
        if not self._sums:
            self._allocate(dtype, self._device or query.device)
        held = self._sums["diagonal"]
        if held.dtype != dtype:
            raise TypeError(f"query must be summed in {held.dtype} like earlier updates, got {query.dtype}")
        if held.device != query.device:
            raise ValueError(f"query must be on {held.device} like the sums, got {query.device}")
        return self._sums

    def _finished(self) -> dict[str, Tensor]:
        if not self.updates:
            raise ValueError("MotionStatistics has no update yet: call update() before reading it")
        broken = [name for name in _SUMS if not bool(self._sums[name].sum().isfinite())]
        if broken:
            raise ValueError(
                f"attention statistics must be finite, got NaN or infinity in {', '.join(broken)}: "
                "the query, key or lse of an update held such values, or lse did not belong to them"
            )
        return self._sums

    def _outside(self, sums: dict[str, Tensor]) -> Tensor:
        """(H,) float64 estimate of the squares off the diagonals."""
        video = self.video
        weights = self.row_weights.to(sums["rows"].device, torch.float64)
        place = (self.sampled_rows % video.positions).to(weights.device)
        totals = []
        for head in sums["rows"]:
            rows = head[len(self.text_rows) :]
            total = weights.new_zeros(())
            step = max(1, CHUNK_ELEMENTS // video.vision)
            for first in range(0, len(rows), step):
                some = slice(first, first + step)
                squares = rows[some].double().div_(self.updates).square_().unflatten(1, (video.frames, -1))
                own = place[some, None, None].expand(-1, video.frames, 1)
                squares.scatter_(2, own, 0)
                total += (squares.sum((1, 2)) * weights[some]).sum()
            totals.append(total)
        return torch.stack(totals)


_SUMS = ("diagonal", "rows", "vision_mass")


def _reference_update(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    sums: dict[str, Tensor],
    video: VideoTokens,
    scale: float,
    fold: int,
) -> None:
    dtype = sums["diagonal"].dtype
    scores = reference.attention_scores(query, key, softmax_scale=scale)
    attention = reference.fold_keys((scores - lse[..., None]).exp(), fold)[0]
    block = reference.vision_block(attention, video)
    sums["diagonal"] += reference.diagonal(block, video).to(dtype)
    sums["rows"] += attention[:, sums["index"], video.vision_slice].to(dtype)
    sums["vision_mass"] += block.sum((1, 2)).to(dtype)


@torch.library.custom_op(
    "mekernels::motion_statistics_update", mutates_args=("diagonal", "rows", "vision_mass")
)
def motion_statistics_op(
    diagonal: Tensor,
    rows: Tensor,
    vision_mass: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    frames: int,
    positions: int,
    vision_start: int,
    text: int,
    text_start: int,
    softmax_scale: float,
    fold: int,
    backend: str,
) -> None:
    """Add one map to diagonal (H, F, F, P), rows (H, len(index), S) and vision_mass (H,).

    ``index`` holds positions in the token sequence; ``text`` keys from ``text_start`` on are no video tokens.
    """
    backends.dispatch(
        "motion_statistics_update",
        backend,
        diagonal,
        rows,
        vision_mass,
        query,
        key,
        lse,
        index,
        frames,
        positions,
        vision_start,
        text,
        text_start,
        softmax_scale,
        fold,
    )


@motion_statistics_op.register_fake
def _(*args) -> None:
    return None


def _composite(
    diagonal: Tensor,
    rows: Tensor,
    vision_mass: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    frames: int,
    positions: int,
    vision_start: int,
    text: int,
    text_start: int,
    softmax_scale: float,
    fold: int,
) -> None:
    dtype = diagonal.dtype
    vision = slice(vision_start, vision_start + frames * positions)
    written = slice(text_start, text_start + text)
    for head in range(query.shape[1]):
        scaled = query[0, head].to(dtype) * softmax_scale
        keys, shift = key[0, head].to(dtype), lse[0, head].to(dtype)
        parts = keys.unflatten(0, (fold, -1))
        diagonal[head] += head_diagonal(scaled, keys, shift, frames, positions, vision_start, fold)
        chosen, chosen_shift = scaled[index], shift[index, None]
        for part in parts:
            _add_rows(rows[head], chosen, part[vision], chosen_shift)
        words = parts[:, written].reshape(-1, keys.shape[1])
        vision_mass[head] += _mass_on_vision(scaled[vision], words, shift[vision])


def _add_rows(total: Tensor, query: Tensor, key: Tensor, lse: Tensor) -> None:
    step = max(1, CHUNK_ELEMENTS // len(key))
    for first in range(0, len(query), step):
        some = slice(first, first + step)
        total[some] += (query[some] @ key.T).sub_(lse[some]).exp_()


def _mass_on_vision(query: Tensor, words: Tensor, lse: Tensor) -> Tensor:
    """Sum over the rows of one minus the mass on the text keys, which are far fewer than the video's."""
    if not len(words):
        return query.new_full((), len(query))
    step = max(1, CHUNK_ELEMENTS // len(words))
    total = query.new_zeros(())
    for first in range(0, len(query), step):
        some = slice(first, first + step)
        on_text = (query[some] @ words.T).sub_(lse[some, None]).exp_().sum(-1)
        total += (1 - on_text).clamp_(min=0).sum()
    return total


backends.register("motion_statistics_update", "torch", _composite)
