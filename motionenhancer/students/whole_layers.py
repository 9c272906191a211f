"""Gather the attention calls of a module that attends to a packed sequence part by part into one call.

Vision towers of Qwen's kind call ``eager`` and ``sdpa`` attention once for each image, frame or window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .attention_registry import Callback, ObservedCall
from .keys import Parts


@contextlib.contextmanager
def whole_layers(modules: Sequence[nn.Module], callback: Callback) -> Iterator[Callback]:
    """Yield a function that takes a module's parts; after the module has run, ``callback`` gets the whole.

    The function returns queries unchanged. If a module attends in several parts, the mask is a
    :class:`Parts`.

    Raises:
        ValueError: raised by the yielded function, if the calls of a module cannot be followed or its parts
            are masked.
    """
    running: dict[int, list[ObservedCall]] = {}
    known: dict[tuple[Any, ...], Parts] = {}

    @torch._disable_dynamo
    def begin(module: nn.Module, _: Any) -> None:
        running[id(module)] = []

    def part(call: ObservedCall) -> torch.Tensor:
        if id(call.module) not in running:
            raise ValueError(f"{type(call.module).__name__} runs without its forward hooks: not supported")
        running[id(call.module)].append(call)
        return call.query

    @torch._disable_dynamo
    def end(module: nn.Module, _: Any, __: Any) -> None:
        calls = running.pop(id(module))
        if len(calls) > 1:
            calls = [_joined(calls, known)]
        for call in calls:
            callback(call)

    with contextlib.ExitStack() as stack:
        for module in modules:
            for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end)):
                stack.callback(handle.remove)
        yield part


def _joined(calls: Sequence[ObservedCall], known: dict[tuple[Any, ...], Parts]) -> ObservedCall:
    if any(call.mask is not None or len(call.query) != 1 for call in calls):
        raise ValueError(
            f"{type(calls[0].module).__name__} attends in {len(calls)} parts, which cannot be captured with "
            "a mask or a batch above 1"
        )
    queries = torch.cat([call.query for call in calls], 2)
    keys = torch.cat([call.key for call in calls], 2)
    ends = tuple(accumulate(call.query.shape[2] for call in calls))
    # One object for all layers of the same parts, whose masks are then examined once.
    place = queries.device, *ends
    if place not in known:
        known[place] = Parts(torch.tensor((0, *ends), device=queries.device))
    return calls[0]._replace(query=queries, key=keys, mask=known[place])
