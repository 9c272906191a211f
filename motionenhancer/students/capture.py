"""Capture attention at chosen rows and columns while a model runs its own fast attention.

The chosen entries are computed from the same queries and keys as each self-attention: beside each call by
:func:`mekernels.attention_rows`, or on a CPU for several layers together. The queries of the chosen rows are
taken first, and their gradient is added to the attention's gradient of its query.

Under gradient checkpointing, the entries leave the checkpointed layer as a side output. The tensors for their
backward (keys and the queries of the chosen rows) are kept outside of the checkpoint. So the recomputation is
unchanged, does not know the capture, and may happen long after it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .attention_registry import Callback, ObservedCall, observe_attention
from .entries import ForwardEntries
from .locate import layers_read
from .whole_layers import whole_layers

_REENTRANT = (
    "re-entrant gradient checkpointing silently drops the gradient of captured attention; use "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)


@contextlib.contextmanager
def capture_attention(
    model: nn.Module,
    rows: torch.Tensor | None,
    columns: torch.Tensor | slice,
    *,
    layers: Sequence[int] | str | None = None,
    heads: Sequence[int] | None = None,
    reduce: str = "mean",
    module: str | None = None,
) -> Iterator[CapturedAttention]:
    """Capture the attention of ``model`` while it runs, by default averaged over layers and heads.

    Section 4 of the MotionEnhancer paper (CVPR 2026, arXiv 2606.06853) calls it A_VLM. Entries are exact and
    differentiable with ``eager``, ``sdpa``, ``flash_attention_2`` and ``flex_attention``: they are the
    attention weights of ``eager`` before dropout. Padding, packing, sliding windows, soft caps and learned
    sinks have the same effect as in the model's own attention.

    Args:
        model: a transformers model, bare or wrapped by DDP, FSDP, PEFT or ``torch.compile``.
        rows: (B, R) int64, positions of query tokens in the sequence; negative entries are padding and give
            rows of zeros. Pass them on the CPU, also for a model on a GPU: values on the CPU are checked.
            Values on another device are not checked, because reading them would wait for it; there, a
            position beyond the sequence makes every captured entry NaN. None reads the last row of every
            forward, so that ``model.generate`` gives one row for each word: the position that predicted it.
        columns: (B, C) int64, positions of key tokens; negative entries give columns of zeros, otherwise as
            ``rows``. Or a slice of step 1 that all samples share. With ``rows=None`` they are positions in
            the whole sequence, prompt and words; a word that does not exist yet gives zeros. B is the number
            of sequences that run, such as samples times beams.
        layers: numbers of the layers to read, from 0 over all layers of the language model; ``"all"`` layers
            with self-attention; by default all layers with global attention, see
            :func:`motionenhancer.students.locate.layers_read`. ``layers`` and ``left_out`` of the yielded
            object are the numbers of layers that are read and left out.
        heads: the query heads to read; all by default.
        reduce: ``"mean"`` over layers and heads, or ``"none"``.
        module: name of a module in the transformers model, such as ``"model.visual"``: its attention is read
            instead of the language model's. B and positions are those of its attention: B is the number of
            images or frames; or 1 if a tower packs all patches into one sequence, in the order of its layers.

    Yields:
        An object whose ``attention`` is, after the forward, (B, R, C) float32 (float64 for a float64 model);
        with ``reduce="none"`` (B, L, H, R, C), layers and heads in ascending order. With ``rows=None`` it is
        readable after every forward, and R is the number of forwards so far. It is a RuntimeError to read it
        before a forward, after a failed forward, or with ``rows`` after a second forward. After the end of
        the context it stays readable, and its graph stays valid.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or dtype; the model has no self-attention,
            or an implementation whose masks are unknown; re-entrant gradient checkpointing is on. During the
            forward: a mask or key-value cache cannot be read exactly, heads are split over devices, or the
            batch or length does not fit ``rows`` and ``columns``.
        RuntimeError: a capture is already active.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    >>> with capture_attention(model, torch.tensor([[2, 3]]), slice(0, 2)) as captured:
    ...     out = model(input_ids=torch.arange(5)[None])
    >>> captured.attention.shape
    torch.Size([1, 2, 2])

    Where each of three generated words looks:

    >>> with capture_attention(model, None, slice(0, 5)) as captured:
    ...     out = model.generate(torch.arange(5)[None], max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    >>> captured.attention.shape
    torch.Size([1, 3, 5])
    """
    _check_positions(rows, columns)
    if rows is None and module is not None:
        raise ValueError("rows must be a tensor if module is given: rows=None reads generated words only")
    found = layers_read(model, layers, module)
    if reduce not in ("mean", "none"):
        raise ValueError(f'reduce must be "mean" or "none", got {reduce!r}')
    if heads is not None and (not heads or len(set(heads)) != len(heads) or min(heads) < 0):
        raise ValueError(f"heads must be different numbers of heads, got {list(heads)}")
    _refuse_reentrant(model)
    ordered = None if heads is None else sorted(heads)
    captured = CapturedAttention(rows, columns, len(found.modules), ordered, reduce, found.left_out)
    with contextlib.ExitStack() as stack:
        callback: Callback = captured._record
        if module is not None:
            callback = stack.enter_context(whole_layers(found.modules, callback))
        stack.enter_context(observe_attention(found.modules, callback))
        stack.callback(captured._forget)
        yield captured


@dataclass(eq=False, repr=False)
class CapturedAttention:
    """The result of a capture; made by :func:`capture_attention`."""

    rows: torch.Tensor | None
    columns: torch.Tensor | slice
    layers: int
    heads: Sequence[int] | None
    reduce: str
    left_out: int
    _forwards: list[ForwardEntries] = field(default_factory=list)
    _repeated: bool = False

    @property
    def attention(self) -> torch.Tensor:
        """(B, R, C), mean over layers and heads, or (B, L, H, R, C); differentiable if the forward was."""
        if self._repeated:
            raise RuntimeError("the model ran more than once inside the capture; give each forward its own")
        if not self._forwards:
            raise RuntimeError("no forward of the captured model has run inside the capture")
        last = self._forwards[-1]
        if not last.complete:
            raise RuntimeError(
                f"{len(last.seen)} of the {self.layers} attention layers to read ran inside the capture: did "
                "the forward fail, or the attention implementation change?"
            )
        return torch.cat([forward.attention for forward in self._forwards], -2)

    def _record(self, call: ObservedCall) -> torch.Tensor:
        # Inside a backward pass this is a checkpoint's recomputation: the entries were read in the forward.
        if torch._C._current_graph_task_id() != -1:
            return call.query
        if not torch.is_grad_enabled() and _inside_reentrant_checkpoint():
            raise ValueError(_REENTRANT)
        if not self._forwards or (self.rows is None and self._forwards[-1].complete):
            self._forwards.append(self._begin(call.query))
        forward = self._forwards[-1]
        forward.check(call)
        if id(call.module) in forward.seen:
            self._repeated = True
            return call.query
        return forward.read(call)

    def _begin(self, query: torch.Tensor) -> ForwardEntries:
        rows, tokens, length = self.rows, None, query.shape[2]
        if rows is None:
            rows = torch.full((query.shape[0], 1), length - 1)
            tokens = length + (self._forwards[-1].tokens or 0 if self._forwards else 0)
        return ForwardEntries(rows, self.columns, self.layers, self.heads, self.reduce, tokens)

    def _forget(self) -> None:
        for forward in self._forwards:
            forward.forget()


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        # The class's default is False; a look-up of a missing attribute of a module is slow.
        if vars(module).get("gradient_checkpointing") is True and module.training:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant") is True:
                raise ValueError(_REENTRANT)


def _inside_reentrant_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _check_positions(rows: Any, columns: Any) -> None:
    for name, positions in (("rows", rows), ("columns", columns)):
        if (positions is None and name == "rows") or (isinstance(positions, slice) and name == "columns"):
            continue
        if not isinstance(positions, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(positions).__name__}")
        if positions.dtype != torch.int64 or positions.dim() != 2:
            found = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"{name} must be (batch, count) int64, got {found}")
    if not isinstance(columns, slice):
        if rows is not None and columns.shape[0] != rows.shape[0]:
            raise ValueError(
                f"columns must have one entry per sample ({rows.shape[0]}), got {columns.shape[0]}"
            )
        return
    start, stop = columns.start or 0, columns.stop
    if columns.step not in (None, 1) or not isinstance(stop, int) or not 0 <= start <= stop:
        raise ValueError(f"columns must be a slice of step 1 with 0 <= start <= stop, got {columns}")
