"""Find the language model and its self-attention modules inside the wrappers of a training loop."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

#: Kinds of attention whose rows see a part of the sequence only: a video may lie outside of it.
_LOCAL = ("sliding_attention", "chunked_attention")

_WRAPPER_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "module")


def unwrap_model(model: nn.Module) -> nn.Module:
    """Remove ``torch.compile``, DDP, FSDP, DeepSpeed and PEFT wrappers; return the transformers model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is a ``torch.nn.DataParallel`` over several devices: its replicas are other
            modules.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    current: Any = model
    while not isinstance(current, PreTrainedModel):
        if isinstance(current, nn.DataParallel) and len(current.device_ids) > 1:
            raise ValueError(
                f"model must not be a torch.nn.DataParallel over {len(current.device_ids)} devices, whose "
                "replicas cannot be followed; use DistributedDataParallel, or one visible device per process"
            )
        children = {**vars(current), **current._modules}
        wrapped = [name for name in _WRAPPER_ATTRIBUTES if isinstance(children.get(name), nn.Module)]
        inner = getattr(current, wrapped[0]) if wrapped else None
        if inner is None and hasattr(current, "get_base_model"):
            inner = current.get_base_model()
        if inner is None or inner is current:
            return current
        current = inner
    # A PEFT model nests the transformers model; a wrapper may sit inside a wrapper.
    return current


def text_model(model: nn.Module) -> nn.Module:
    """Return the language model inside ``model``: never its vision tower.

    ``model`` may be wrapped as in :func:`unwrap_model`. A model without a separate text model is returned
    itself.
    """
    inner = unwrap_model(model)
    get_decoder = getattr(inner, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else inner
    return decoder if isinstance(decoder, nn.Module) else inner


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules of the language model of ``model``, first layer first.

    They are the modules whose attention weights ``output_attentions=True`` would return.

    Raises:
        ValueError: no self-attention was found.
    """
    decoder = text_model(model)
    kinds = _recordable_attention(decoder)
    found = _outermost(decoder, lambda module: isinstance(module, kinds)) if kinds else []
    if not found:
        found = [module for name, module in decoder.named_modules() if name.split(".")[-1] == "self_attn"]
    if not found:
        raise ValueError(
            f"model must have a language model with self-attention, found none in {type(decoder).__name__}"
        )
    return found


def named_attention(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules inside ``name`` that call transformers' attention functions, in their order.

    Args:
        model: may be wrapped as in :func:`unwrap_model`.
        name: a module of the transformers model, such as ``model.visual``, or one attention inside it.

    Raises:
        TypeError, ValueError: there is no such module, or no such attention in it.
    """
    if not isinstance(name, str):
        raise TypeError(f"module must be the name of a module, got {type(name).__name__}")
    inner = unwrap_model(model)
    modules = dict(inner.named_modules())
    if name not in modules:
        close = difflib.get_close_matches(name, modules, 3) or [n for n, _ in inner.named_children()]
        raise ValueError(
            f"module must name a module of {type(inner).__name__}, got {name!r}; similar names: {close}"
        )
    found = _outermost(modules[name], _calls_registry)
    if not found:
        raise ValueError(
            f"module must hold attention that calls transformers' ALL_ATTENTION_FUNCTIONS, {name!r} "
            f"({type(modules[name]).__name__}) holds none"
        )
    return found


def _calls_registry(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attends_locally(module: nn.Module, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a self-attention, called with these options, sees only a part of the sequence."""
    return getattr(module, "layer_type", None) in _LOCAL or options.get("sliding_window") is not None


class LayersRead(NamedTuple):
    """Which layers of a language model are read.

    modules: self-attention modules of the read layers, first layer first.
    left_out: number of other layers with self-attention.
    without: number of layers without self-attention, such as layers of linear attention.
    """

    modules: list[nn.Module]
    left_out: int
    without: int

    def __str__(self) -> str:
        others = {"have a sliding window or are not among --alignment_layers": self.left_out}
        others["have no softmax attention"] = self.without
        total = len(self.modules) + sum(others.values())
        said = "".join(f"; {count} {what}" for what, count in others.items() if count)
        return f"attention is read in {len(self.modules)} of {total} layers{said}"


def layers_read(
    model: nn.Module, layers: Sequence[int] | str | None = None, module: str | None = None
) -> LayersRead:
    """Return the self-attention modules of the language model, or of a named module, that are read.

    Args:
        model: bare or wrapped.
        layers: numbers of layers, from 0 over all layers of the language model; ``"all"`` layers with
            self-attention; or None for layers with global attention. None leaves out layers with a sliding
            window, through which a word may not see the video, unless the model has no other layers.
        module: as ``name`` of :func:`named_attention`. Then ``layers`` counts the layers of this module.

    Raises:
        ValueError: a layer has no self-attention or is named twice, or no layer is left.
    """
    modules = attention_modules(model) if module is None else named_attention(model, module)
    numbers = [int(getattr(layer, "layer_idx", None) or 0) for layer in modules]
    if len(set(numbers)) != len(numbers):
        numbers = list(range(len(modules)))
    if layers is None:
        chosen = [layer for layer in modules if not attends_locally(layer)] or modules
    elif isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers must be numbers of layers, "all" or None, got {layers!r}')
        chosen = modules
    else:
        if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(numbers):
            raise ValueError(
                f"layers must be different numbers of {numbers}, the layers with self-attention to read, got "
                f"{list(layers)}"
            )
        chosen = [layer for layer, number in zip(modules, numbers, strict=True) if number in set(layers)]
    blocks = modules if module is not None else getattr(text_model(model), "layers", modules)
    total = max(len(modules), len(blocks) if isinstance(blocks, nn.ModuleList) else 0)
    return LayersRead(chosen, len(modules) - len(chosen), total - len(modules))


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The requested modules in order, each once, without modules inside another one."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if wanted(current):
            found.setdefault(id(current), current)
        else:
            waiting.extend(child for child in reversed(current._modules.values()) if child is not None)
    return list(found.values())


def _recordable_attention(decoder: nn.Module) -> tuple[type, ...]:
    recordable = getattr(decoder, "_can_record_outputs", None) or {}
    entries = recordable.get("attentions", ())
    kinds: list[type] = []
    for entry in entries if isinstance(entries, list | tuple) else (entries,):
        kind = getattr(entry, "target_class", entry)
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            kinds.append(kind)
    return tuple(kinds)
