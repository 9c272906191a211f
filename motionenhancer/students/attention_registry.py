"""Observe calls of transformers' attention functions for a limited time, by patching their registry.

A function is wrapped under its own name, because a model looks up its mask by that name. A new name would
silently get no mask.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .keys import implementation_name


class ObservedCall(NamedTuple):
    """A module's call of its attention function.

    implementation: see ``implementation_name``.
    query, key: (B, Hq, N, D) and (B, Hkv, N, D).
    kwargs: the keyword arguments.
    """

    implementation: str
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]


Callback = Callable[[ObservedCall], torch.Tensor]


@dataclass(frozen=True)
class _Observer:
    modules: dict[int, nn.Module]
    callback: Callback


_lock = threading.Lock()
_observer: _Observer | None = None


@contextlib.contextmanager
def observe_attention(modules: Sequence[nn.Module], callback: Callback) -> Iterator[None]:
    """Call ``callback`` before each attention of ``modules``; other modules are not observed.

    The callback returns the query for the attention. At the end of the context, also after an error, the
    registry is restored.

    Raises:
        RuntimeError: another observation is active.
        ValueError: a module does not call transformers' registry, or its implementation is not registered.
    """
    global _observer
    if not _lock.acquire(blocking=False):
        raise RuntimeError("a capture is already active: captures can be neither nested nor concurrent")
    try:
        with contextlib.ExitStack() as stack:
            for patch in _patches(modules):
                stack.enter_context(patch)
            _observer = _Observer({id(module): module for module in modules}, callback)
            try:
                yield
            finally:
                _observer = None
    finally:
        _lock.release()


def _patches(modules: Sequence[nn.Module]) -> list[contextlib.AbstractContextManager[None]]:
    """One patch for each implementation that the modules use, and for each place where it is looked up."""
    patches: dict[tuple[int, str], contextlib.AbstractContextManager[None]] = {}
    for module in modules:
        kind = type(module).__name__
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        # A subclass may inherit its forward from another file: what counts is where forward was written.
        namespace = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        registry = namespace.get("ALL_ATTENTION_FUNCTIONS")
        if registry is None or name is None:
            raise ValueError(f"model must call transformers' ALL_ATTENTION_FUNCTIONS, {kind} does not")
        if name == "eager":
            # The registry has no eager attention: forward passes it to the look-up as the default.
            if "eager_attention_forward" not in namespace:
                raise ValueError(f"model must define eager_attention_forward next to {kind} to run eager")
            patch = _patched(namespace, "eager_attention_forward", namespace, name)
            patches.setdefault((id(namespace), name), patch)
            continue
        # Some versions of transformers look up the prefix of a paged cache, others drop it.
        names = [known for known in dict.fromkeys([name, name.removeprefix("paged|")]) if known in registry]
        if not names:
            raise ValueError(f"attn_implementation must be registered in transformers; {name!r} is not")
        for known in names:
            if (id(registry), known) not in patches:
                read_as, own = implementation_name(known, registry[known]), registry._local_mapping
                patches[id(registry), known] = _patched(registry, known, own, read_as)
    return list(patches.values())


@contextlib.contextmanager
def _patched(registry: Any, name: str, local: dict[str, Any], implementation: str) -> Iterator[None]:
    """Wrap an entry of a registry; `local` holds its own entries, without those of all registries."""
    was_local, before = name in local, registry[name]
    wrapper = _wrapped(implementation, before)
    registry[name] = wrapper
    try:
        yield
    finally:
        # Another function was registered meanwhile: it stays. A wrapper inside it does nothing from now on.
        if local.get(name) is wrapper:
            if was_local:
                registry[name] = before
            else:
                del registry[name]


#: Parameters of attention functions that are read, or that change no attention weight before dropout.
_READ = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "scaling",
    "dropout",
    "is_causal",
    "s_aux",
    "sliding_window",
    "softcap",
}


def _unread(function: Callable[..., Any]) -> dict[str, Any]:
    """Options of an attention function that a capture does not support, with their defaults."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())[5:]  # the tensors and the mask
    return {p.name: p.default for p in parameters if p.kind in named and p.name not in _READ}


# Compiled models guard on the function they called: the same wrapper each time keeps them from recompiling.
@functools.lru_cache(maxsize=64)
def _wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    unread = _unread(original)

    def watched(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        observer = _observer
        if observer is not None and id(module) in observer.modules:
            if args:
                raise ValueError(f"{type(module).__name__} must pass the options of its attention by keyword")
            query = observer.callback(ObservedCall(name, module, query, key, attention_mask, kwargs))
            for option in unread.keys() & kwargs.keys():
                if kwargs[option] is not None and kwargs[option] != unread[option]:
                    raise ValueError(
                        f"{type(module).__name__} gives its attention {option}, which a capture does not read"
                    )
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    uncompiled = torch._disable_dynamo(watched)

    @functools.wraps(original)
    def attention_function(*args: Any, **kwargs: Any) -> Any:
        # The wrapper that breaks a compiled graph is slow, so only compiled code runs it.
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(*args, **kwargs)
        return watched(*args, **kwargs)

    return attention_function
