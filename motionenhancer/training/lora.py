"""Training low-rank adapters (LoRA, through PEFT) instead of all weights."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..settings import StudentArguments
from ..students.locate import text_model


def add_lora(model: nn.Module, student: StudentArguments, seed: int) -> Any:
    """Freeze a student and add adapters as `--lora_*` say. Adapters start as the identity.

    The student's layers are replaced in place. `seed` draws the adapters' weights; the global random state
    does not change.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ValueError: PEFT is not installed; `lora_r` is above the rank of every layer; `lora_target` names no
            layer; or with `lora_merge`, a named layer shares its weight with another layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"--lora_r {student.lora_r} needs PEFT: pip install peft ({error})") from error
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    widest = max((min(layer.in_features, layer.out_features) for layer in layers), default=0)
    if student.lora_r > widest:
        raise ValueError(
            f"--lora_r {student.lora_r}: must be at most {widest}, the largest rank of the student's layers"
        )
    target = student.lora_target
    known = {"language": _language_layers(model), "all": "all-linear"}
    chosen = known.get(target) or [name.strip() for name in target.split(",") if name.strip()]
    config = LoraConfig(
        r=student.lora_r,
        lora_alpha=2 * student.lora_r if student.lora_alpha is None else student.lora_alpha,
        lora_dropout=student.lora_dropout,
        target_modules=chosen,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"--lora_target {target}: {error}") from error
    if student.lora_merge and (tied := _tied_targets(adapted)):
        raise ValueError(
            f"--lora_merge: {' and '.join(tied)} of --lora_target share one weight with another layer (tied "
            "embeddings), which the merge would change too; leave them out of --lora_target, or leave out "
            "--lora_merge and keep the adapter"
        )
    return adapted


def _tied_targets(model: nn.Module) -> list[str]:
    """Return the names of layers with adapters that share their weight with another layer."""
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    return [
        plain_name(name)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
        and any(owners[id(parameter)] > 1 for parameter in module.base_layer.parameters())
    ]


def _language_layers(model: nn.Module) -> str:
    """A pattern for all linear layers inside the language model; its output head is not among them."""
    decoder = text_model(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = {name.split(".")[-1] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    inside = rf"{re.escape(prefix)}\." if prefix else ""
    return rf"{inside}.*\.({'|'.join(sorted(leaves))})"


def plain_name(parameter: str) -> str:
    """A parameter's name without PEFT's prefix.

    >>> plain_name("base_model.model.model.visual.patch_embed.proj.weight")
    'model.visual.patch_embed.proj.weight'
    """
    return parameter.removeprefix("base_model.model.")
