"""Running means of the attention statistics that head and token selection need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, reference
from ..diagonal_attention.call import Call
from ..diagonal_attention.op import check_side_inputs, diagonal_attention
from ..layout import VideoTokens
from ..motion_scores import MotionScores, energy_ratio, motion_scores
from . import rows as row_choice
from .composite import finite_or_nan
from .op import motion_statistics_op
from .pending import Pending
from .square_sums import vision_square_sums
from .sums import Sums, padded

CHUNK_ELEMENTS = 1 << 20
"""Maximum number of attention entries that the composite holds at a time."""
PENDING_BYTES = 3 << 29
"""1.5 GiB: seven layers of CogVideoX-5B."""


class MotionStatistics:
    """Pools the attention of many layers and steps per head, exactly, without an attention map.

    For each head it keeps the diagonals (F, F, P), the text rows (T, S), some whole rows (R, S) and the mass
    of every video token on the video (S,): memory O(heads * S * (F + T + R)). Sums are float32, or float64
    for float64 input.

    Args:
        video: where text and video tokens lie.
        heads: number of heads, at least 1.
        text_rows: positions of text tokens in the token sequence, in the order of the result; all text by
            default. Leave out padding tokens.
        sampled_rows: number of video rows that estimate the squares off the diagonals; or ``"all"``, which is
            exact and holds the whole block. The sequence is cut into that many equal parts and one row is
            drawn from each, so the rows are spread evenly over the frames. The default was chosen on six
            kinds of maps (local, diagonal, diffuse, sinks, mostly text, a few sharp rows): with 64 rows the
            root mean square of the relative error of DFC is 1 to 12 % (21 % for a few sharp rows), and 1 %
            of the chosen heads differ from the choice with all rows; with 32 rows 3 %, with 16 rows 6 %.
            Most of what an update writes is these rows times the tokens.
        device: device of the sums; by default the device of the first update.
        seed: seed of the drawn rows.
        pooling: the maps that are scored. ``"pooled"``: the mean of all maps, as in the paper.
            ``"per_layer"``: the map of every update, and the scores are averaged over the updates. Then no
            row is sampled (``sampled_rows`` has no effect), the squares are exact, memory is
            O(heads * S * T), and an update costs ``fold * (fold + 1) / 2`` more flash attentions over the
            video tokens (one for ``fold=1``). The squares off the diagonals are then a difference, so in
            float32 a DFC above about 1e5 is rounding noise. Text rows are the same with both.
        diagonal_width: two places p and p' of the grid, numbered in raster order, count as one place if
            |p - p'| is at most this; the paper names no width. Every additional place on either side costs
            one more :func:`mekernels.diagonal_attention` for each update and F * F * P more entries for each
            head. Only for ``pooling="pooled"``.

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
        pooling: str = "pooled",
        pending_bytes: int = PENDING_BYTES,
        diagonal_width: int = 0,
    ) -> None:
        checks.video_tokens("video", video)
        checks.number("heads", heads, 1)
        self.video = video
        self.heads = heads
        self.text_rows = row_choice.text_rows(text_rows, video)
        """(T,) int64 positions in the token sequence, on the CPU."""
        count = row_choice.sampled_count(sampled_rows, video)
        checks.choice("pooling", pooling, ("pooled", "per_layer"))
        self.pooling = pooling
        if pooling == "per_layer":
            count = 0
        self.sampled_rows, self.row_weights = row_choice.stratified(video.vision, count, seed)
        """(R,) int64 sampled video tokens, and (R,) the number of tokens that each stands for, on the CPU."""
        self.updates = 0
        """Number of maps pooled so far."""
        checks.number("pending_bytes", pending_bytes, 0)
        checks.number("diagonal_width", diagonal_width, 0)
        if diagonal_width and pooling == "per_layer":
            raise ValueError(f"diagonal_width must be 0 with pooling='per_layer', got {diagonal_width}")
        self.diagonal_width = min(diagonal_width, video.positions - 1)
        self._pending = Pending(pending_bytes)
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
            lse: (1, H, N) natural-log logsumexp over all keys that a row may see. If text keys are masked, as
                padding is, only ``lse`` changes: give that of the masked attention.
            softmax_scale: factor on the scores, 1 / sqrt(D) by default; the same factor that gave ``lse``.
            fold: number of equal parts of the key axis whose masses are added; 2 where reference keys follow
                the own keys.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. :meth:`scores` and
                :meth:`text_attention` report NaN, so that an update need not wait for the device.
            RuntimeError: a kept tensor of an earlier update was overwritten; see ``pending_bytes``.
            BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.
        """
        self._pending.check()
        scale = check_side_inputs(query, key, lse, self.video, softmax_scale, fold)
        checks.shape("query", query, (1, self.heads, *query.shape[2:]), meaning="(one sample, heads, ...)")
        held = self._ready(query)
        call = Call.of(query.detach(), key.detach(), lse.detach(), self.video, scale, fold)
        if self.pooling == "per_layer":
            self._add_scores(held, call)
        elif self._waits(call):
            self._pending.add(self._pooled, call)
        else:
            self._flush()
            self._add(self._pooled, call)
        if self.diagonal_width:
            self._add_neighbours(held["neighbours"], call)
        self.updates += 1

    @property
    def _pooled(self) -> Sums:
        return Sums(**{name: self._sums[name] for name in Sums._fields})

    def _waits(self, call: Call) -> bool:
        if torch.compiler.is_compiling() or backends.active() == "reference" or not self._pending.takes(call):
            return False
        chosen = backends.choose(motion_statistics_op.name, backends.active(), self._pooled, call)
        return chosen is backends.table(motion_statistics_op.name)["triton"].run

    def _flush(self) -> None:
        if self.pooling == "pooled" and self._sums:
            self._pending.flush(self._pooled)

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return self.__dict__

    def _add(self, sums: Sums, call: Call) -> None:
        if backends.active() == "reference":
            options = (self.video, call.softmax_scale, call.fold)
            backends.by_reference(_reference_update, call.query, call.key, call.lse, sums, *options)
        else:
            motion_statistics_op(sums, call)

    @property
    def _shifts(self) -> list[int]:
        width = self.diagonal_width
        return [shift for shift in range(-width, width + 1) if shift]

    def _add_neighbours(self, held: Tensor, call: Call) -> None:
        video, part = self.video, self.video.vision_slice
        for sums, shift in zip(held, self._shifts, strict=True):
            # The key of place p + shift lies at place p, so that the diagonals hold the neighbour's entries.
            key = call.key.unflatten(2, (call.fold, video.length)).clone()
            places = key[..., part, :].unflatten(-2, (video.frames, -1))
            key[..., part, :] = places.roll(-shift, -2).flatten(-3, -2)
            options: dict[str, Any] = {"softmax_scale": call.softmax_scale, "fold": call.fold}
            read = diagonal_attention(call.query, key.flatten(2, 3), call.lse, video, **options)[0]
            inside = slice(max(0, -shift), video.positions - max(0, shift))
            sums[..., inside] += read[..., inside]

    def _add_scores(self, held: dict[str, Tensor], call: Call) -> None:
        inputs = (call.query, call.key, call.lse, self.video, call.softmax_scale, call.fold)
        squares = backends.exactly(vision_square_sums, *inputs)
        mass = held["rows"].new_zeros(self.heads, self.video.vision)
        diagonal = _zero_diagonal(self.video, self.heads, held["rows"])
        self._add(Sums(diagonal, held["rows"], mass, held["tokens"]), call)
        inside = torch.stack([head.double().square().sum() for head in diagonal])
        # The named backend reads the map; another backend may compute the scores.
        with backends.use_backend("reference" if backends.active() == "reference" else "auto"):
            scores = self._scores(diagonal, mass, inside, squares - inside)
        held["scores"] += torch.stack([scores.dfc, scores.tcs, scores.dsr]).double()

    def _scores(self, diagonal: Tensor, mass: Tensor, inside: Tensor, outside: Tensor) -> MotionScores:
        tau = (mass.double().sum(1) / self.video.vision**2).to(mass.dtype)
        scores = motion_scores(diagonal, tau, (inside + outside).to(diagonal.dtype))
        if self.video.positions == 1:
            outside = torch.zeros_like(outside)
        return dataclasses.replace(scores, dfc=energy_ratio(inside, outside).to(diagonal.dtype))

    def merge(self, other: MotionStatistics) -> MotionStatistics:
        """Add the maps that ``other`` pooled; every update has the same weight. Returns ``self``.

        Raises:
            TypeError: ``other`` is not a MotionStatistics, or has another dtype.
            ValueError: ``other`` has another video, number of heads, pooling, diagonal width, text rows or
                sampled rows.
        """
        if not isinstance(other, MotionStatistics):
            raise TypeError(f"other must be a MotionStatistics, got {type(other).__name__}")
        for name in ("video", "heads", "pooling", "diagonal_width"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other must have {name} {getattr(self, name)}, got {getattr(other, name)}")
        for name in ("text_rows", "sampled_rows"):
            if not torch.equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"other must have the {name} of this MotionStatistics, got different ones")
        self._flush()
        other._flush()
        if other._sums:
            if not self._sums:
                self._allocate(other._sums["rows"].dtype, self._device or other._sums["rows"].device)
            if self._sums["rows"].dtype != other._sums["rows"].dtype:
                mine, theirs = self._sums["rows"].dtype, other._sums["rows"].dtype
                raise TypeError(f"other must hold sums of dtype {mine}, got {theirs}")
            for name in self._names:
                self._sums[name] += other._sums[name].to(self._sums[name].device)
        self.updates += other.updates
        return self

    def scores(self) -> MotionScores:
        """DFC, TCS and DSR of every head's pooled map; with per-layer pooling, their mean over the updates.

        For a pooled map, the squares off the diagonals are estimated from the sampled rows; all else is
        exact. The denominator of DFC is computed in float64.

        Raises:
            ValueError: there was no update yet, or an update had NaN or infinite values.
        """
        sums = self._finished()
        if self.pooling == "per_layer":
            dtype = sums["rows"].dtype
            return MotionScores(*(sums["scores"] / self.updates).to(dtype))
        diagonal = sums["diagonal"] / self.updates
        inside = torch.stack([head.double().square().sum() for head in diagonal])
        mass = sums["vision_mass"] / self.updates
        if not self.diagonal_width:
            return self._scores(diagonal, mass, inside, self._outside(sums))
        near = sums["neighbours"] / self.updates
        inside += torch.stack([head.double().square().sum() for head in near.unbind(1)])
        scores = self._scores(diagonal, mass, inside, self._outside(sums))
        tau = mass.double().sum(1) / self.video.vision**2
        # Places beyond the grid's ends hold zeros. They are not entries.
        entries = [diagonal] + [
            one[..., max(0, -shift) : self.video.positions - max(0, shift)]
            for one, shift in zip(near, self._shifts, strict=True)
        ]
        above = torch.stack([(e >= tau.to(e)[:, None, None, None]).sum((1, 2, 3)) for e in entries]).sum(0)
        dsr = above.double() / sum(e[0].numel() for e in entries)
        return dataclasses.replace(scores, dsr=dsr.to(scores.dsr))

    def text_attention(self, heads: Tensor | Sequence[int]) -> Tensor:
        """(T, S) attention of text rows to video columns, averaged over the given heads and all updates.

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
        self._flush()
        state = {name: self._read(name) for name in self._names if self._sums}
        return {**state, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by the state of a MotionStatistics that has the same arguments.

        Raises:
            ValueError: entries are missing or unknown, or a shape differs.
        """
        expected = {"updates", *self._names} if len(state) > 1 else {"updates"}
        if set(state) != expected:
            raise ValueError(f"state must have the entries {sorted(expected)}, got {sorted(state)}")
        self._pending.drop()
        if len(state) == 1:
            self._sums = {}
        else:
            rows = state["rows"]
            self._allocate(rows.dtype, self._device or rows.device)
            for name in self._names:
                checks.shape(f"state[{name!r}]", state[name], self._read(name).shape)
                self._read(name).copy_(state[name])
        self.updates = int(state["updates"])

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        video, heads = self.video, self.heads
        index = torch.cat([self.text_rows, self.sampled_rows + video.vision_slice.start])
        rows = torch.zeros(heads, len(index), padded(video.vision), dtype=dtype, device=device)
        self._sums = {"rows": rows, "tokens": index.to(device)}
        if self.pooling == "per_layer":
            self._sums["scores"] = rows.new_zeros(3, heads, dtype=torch.float64)
        else:
            self._sums["diagonal"] = _zero_diagonal(video, heads, rows)
            self._sums["vision_mass"] = rows.new_zeros(heads, video.vision)
        if self.diagonal_width:
            shape = (2 * self.diagonal_width, *self._sums["diagonal"].shape)
            self._sums["neighbours"] = rows.new_zeros(shape)

    @property
    def _names(self) -> tuple[str, ...]:
        if self.pooling == "per_layer":
            return ("rows", "scores")
        return ("diagonal", "rows", "vision_mass", *(["neighbours"] if self.diagonal_width else []))

    def _read(self, name: str) -> Tensor:
        held = self._sums[name]
        return held[..., : self.video.vision] if name == "rows" else held

    def _ready(self, query: Tensor) -> dict[str, Tensor]:
        dtype = checks.accumulate_dtype(query.dtype)
        if not self._sums:
            self._allocate(dtype, self._device or query.device)
        held = self._sums["rows"]
        if held.dtype != dtype:
            raise TypeError(f"query must be summed in {held.dtype} like earlier updates, got {query.dtype}")
        if held.device != query.device:
            raise ValueError(f"query must be on {held.device} like the sums, got {query.device}")
        return self._sums

    def _finished(self) -> dict[str, Tensor]:
        if not self.updates:
            raise ValueError("MotionStatistics has no update yet: call update() before reading it")
        self._flush()
        sums = {name: self._read(name) for name in self._names}
        broken = [name for name, held in sums.items() if _broken(name, held)]
        if broken:
            raise ValueError(
                f"attention statistics must be finite, got NaN or infinity in {', '.join(broken)}: "
                "the query, key or lse of an update held such values, or lse did not belong to them"
            )
        return sums

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
                squares = (rows[some].double() / self.updates).square_().unflatten(1, (video.frames, -1))
                distance = torch.arange(video.positions, device=place.device) - place[some, None]
                squares.masked_fill_((distance.abs() <= self.diagonal_width)[:, None], 0)
                total += (squares.sum((1, 2)) * weights[some]).sum()
            totals.append(total)
        return torch.stack(totals)


def _broken(name: str, held: Tensor) -> bool:
    # A DFC is infinite where there is nothing off the diagonals.
    return bool(held.isnan().any()) if name == "scores" else not bool(held.sum().isfinite())


def _zero_diagonal(video: VideoTokens, heads: int, like: Tensor) -> Tensor:
    """(H, F, F, P) zeros, positions first in memory, as an update computes one position's F x F at a time."""
    return like.new_zeros(heads, video.positions, video.frames, video.frames).permute(0, 2, 3, 1)


def _reference_update(
    query: Tensor, key: Tensor, lse: Tensor, sums: Sums, video: VideoTokens, scale: float, fold: int
) -> None:
    scores = reference.attention_scores(query, key, softmax_scale=scale)
    attention = reference.fold_keys((scores - finite_or_nan(lse)[..., None]).exp(), fold)[0]
    block = reference.vision_block(attention, video)
    sums.diagonal.add_(reference.diagonal(block, video))
    sums.rows[..., : video.vision].add_(attention[:, sums.tokens, video.vision_slice])
    sums.vision_mass.add_(block.sum(-1))
