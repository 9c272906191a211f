"""Find the language model and its self-attention modules inside what a training loop wrapped around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["attention_modules", "text_model", "unwrap_model"]

_WRAPPER_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "module")


def unwrap_model(model: nn.Module) -> nn.Module:
    """Take off ``torch.compile``, DDP, FSDP, DeepSpeed and PEFT wrappers and return the transformers model.

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
                "replicas cannot be followed; use DistributedDataParallel, or one visible device a process"
            )
        inner = next(
            (
                getattr(current, name)
                for name in _WRAPPER_ATTRIBUTES
                if isinstance(_child(current, name), nn.Module)
            ),
            None,
        )
        if inner is None and hasattr(current, "get_base_model"):
            inner = current.get_base_model()
        if inner is None or inner is current:
            return current
        current = inner
    # A PEFT model nests the transformers model; a wrapper may sit inside a wrapper.
    return current


def _child(module: nn.Module, name: str) -> Any:
    return module._modules.get(name) or vars(module).get(name)


def text_model(model: nn.Module) -> nn.Module:
    """Return the language model inside ``model``: never its vision tower.

    ``model`` may be wrapped as in :func:`unwrap_model`. A model without an own text model is its own.
    """
    inner = unwrap_model(model)
    get_decoder = getattr(inner, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else inner
    return decoder if isinstance(decoder, nn.Module) else inner


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules of the language model of ``model``, first layer first.

    They are the modules whose weights ``output_attentions=True`` would return.

    Raises:
        ValueError: no self-attention was found.
    """
    decoder = text_model(model)
    kinds = _recordable_attention(decoder)
    found = _outermost(decoder, kinds) if kinds else []
    if not found:
        found = [module for name, module in decoder.named_modules() if name.split(".")[-1] == "self_attn"]
    if not found:
        raise ValueError(
            f"model must have a language model with self-attention, found none in {type(decoder).__name__}"
        )
    return found


def _outermost(module: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    """Modules of these kinds in order, each once and none inside another."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if isinstance(current, kinds):
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
