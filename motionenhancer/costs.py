"""Estimate a run's cost before it starts: weights, gradients, optimizer, priors, evaluations.

All such figures come from this file. No weight is read: parameters are counted on the meta device or from the
headers of safetensors files, and sizes come from configuration files.

| figure | kind |
| --- | --- |
| weights, gradients, optimizer state, copies in half precision | counted, exact |
| evaluations of the transformer | counted, exact |
| size of the priors in the store | upper bound: the longest selection of each text |
| memory to read a clip | lower bound: the sums of one clip and one layer's hidden states |
| memory to encode a clip | lower bound: the VAE's first layer; its peak is many times that |
| activations of a student | guess: a rule of thumb over its layers' widths |
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from .files import read_json, readable
from .priors.prior_settings import PriorSettings, batch_settings
from .teachers.plan import TEXT_MODELS, TeacherPlan, plan_teacher

BEFORE = "before the first step"

#: Bytes of optimizer state a trained parameter; other optimizers are counted like AdamW.
_STATE = {"sgd": 0, "adafactor": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "lion_32bit": 4}


# ---- the teacher ----


@dataclass(frozen=True)
class TeacherCost:
    """Bytes that a teacher needs on its device.

    Attributes:
        weights: part of the model → bytes.
        host: bytes of weights that stay in CPU memory: an offloaded text encoder.
        reading, encoding: lower bounds of the memory, besides the weights, to read or encode a clip.
    """

    plan: TeacherPlan
    weights: dict[str, int]
    host: int
    reading: int
    encoding: int

    @property
    def total(self) -> int:
        """Lower bound of the total. A clip is first encoded, then read."""
        return sum(self.weights.values()) + max(self.reading, self.encoding)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self.weights.items())
        host = f", {readable(self.host)} in the CPU's memory" if self.host else ""
        weights = f"{readable(sum(self.weights.values()))} ({parts}){host}"
        return (
            f"at least {readable(self.total)}: weights {weights}; "
            f"then at least {readable(self.encoding)} to encode a clip and at least "
            f"{readable(self.reading)} to read it. These bounds are for one layer: encoding takes many times "
            "more. Only a run shows how much"
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weights", "host", "reading", "encoding", "total")}


def teacher_cost(
    teacher: str | Path,
    settings: PriorSettings,
    *,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    vae_tiling: bool = False,
    split_batch: bool = False,
    text_encoder: str = "device",
    words: int | None = None,
) -> TeacherCost:
    """Work out a teacher's memory from its folder's configuration files.

    Args:
        teacher, dtype, size, frames, vae_tiling, split_batch: as given to `load_teacher`.
        text_encoder: place of its weights: "device", "host", or "none" if a text cache replaces it.
        words: number of tokens of the longest text; by default the teacher's maximum.

    Raises:
        ValueError, OSError: the teacher's folder lacks files, or is of a family that is not supported.
    """
    plan = plan_teacher(teacher, size=size, frames=frames)
    weights, host = {part: count * dtype.itemsize for part, count in plan.weights.items()}, 0
    if text_encoder != "device":
        encoder = sum(weights.pop(part) for part in list(weights) if part in TEXT_MODELS)
        host = encoder if text_encoder == "host" else 0
    sampled = 0 if settings.sampled_rows == "all" else int(settings.sampled_rows)
    rows = plan.text_length if words is None else words
    sums = 4 * plan.heads * plan.vision * (rows + sampled + plan.grid[0])
    # The stream, its normalised copy, and a feed-forward layer of four times the width.
    length = plan.vision + (plan.text_length if plan.joint else 0)
    states = 6 * batch_settings(settings, plan).rows(split=split_batch) * length * plan.width * dtype.itemsize
    config = read_json(Path(teacher) / "vae" / "config.json")
    height, across = (math.ceil(n / 2) if vae_tiling else n for n in plan.size)
    # Video frames that the family's VAE encodes at a time.
    count = min(9 if plan.joint else 4, plan.frames)
    channels = config.get("block_out_channels", [config.get("base_dim", 0)])[0]
    # Some VAEs first fold patches of pixels into channels.
    patch = (config.get("patch_size") or 1) ** 2
    encoding = (channels + 3 * patch) * count * (height * across // patch) * dtype.itemsize
    return TeacherCost(plan, weights, host, sums + states, encoding)


@dataclass(frozen=True)
class ExtractionCost:
    """Cost of the missing priors: evaluations per batch row, and an upper bound of bytes in the store."""

    stored: int
    missing: int
    evaluations: int
    prior_bytes: int
    teacher: TeacherCost

    def __str__(self) -> str:
        grid = "×".join(map(str, self.teacher.plan.grid))
        return (
            f"priors: {self.stored} stored, {self.missing} to make; "
            f"clips of up to {self.teacher.plan.frames} frames become a grid of {grid}\n"
            f"evaluations of the transformer: {self.evaluations:,}\n"
            f"disk: at most {readable(self.prior_bytes)} of attention, a few KB per prior for the rest\n"
            f"memory per process: {self.teacher}"
        )


def extraction_cost(
    missing: Iterable[str], settings: PriorSettings, teacher: str | Path, **options: Any
) -> ExtractionCost:
    """Estimate the cost of making priors. Only the tokenizer and configuration files are read.

    Args:
        missing: the texts of all priors to make; they are not kept.
        settings, teacher, **options: as for `teacher_cost`.

    Raises:
        ValueError, OSError: the teacher's folder lacks files, or is of a family that is not supported.
    """
    plan = plan_teacher(teacher, size=options.get("size"), frames=options.get("frames"))
    count = longest = rows = 0
    tokenizer: Any = AutoTokenizer.from_pretrained(Path(teacher) / "tokenizer", local_files_only=True)
    most = plan.text_length - tokenizer.num_special_tokens_to_add()
    texts = iter(missing)
    while some := list(islice(texts, 256)):
        count += len(some)
        for tokens in map(len, tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]):
            longest = max(longest, min(tokens, most))
            rows += max(1, math.floor(settings.token_ratio * min(tokens, most) + 0.5))
    return ExtractionCost(
        stored=0,
        missing=count,
        evaluations=count * batch_settings(settings, plan).evaluations,
        prior_bytes=2 * plan.vision * rows,
        teacher=teacher_cost(teacher, settings, words=longest, **options),
    )


# ---- the student ----


@dataclass(frozen=True)
class StudentCost:
    """Bytes on each device of a training run.

    Attributes:
        weights, gradients, optimizer: bytes of the model and the aligner.
        copies: bytes of weight copies in the precision of the computation, if it differs.
        activations: bytes of the language model's activations and logits for `tokens`; None if no sample was
            read.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int | None
    tokens: int | None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.copies + (self.activations or 0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        if self.copies:
            parts["copies in half precision"] = self.copies
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items())
        if self.activations is None:
            return f"memory per device: {listed}, and activations"
        return (
            f"memory per device: about {readable(self.total)} ({listed}, activations about "
            f"{readable(self.activations)} at {self.tokens:,} tokens a sample, as the first one has)"
        )


def student_cost(
    model: nn.Module,
    training: Any,
    *,
    engine: str,
    processes: int,
    tokens: int | None,
    aligner: int = 0,
) -> StudentCost:
    """Count weights, gradients and optimizer states, and guess activations.

    Args:
        model, training: the student, on any device, and its TrainingArguments.
        engine: "plain", "DDP", "FSDP", "ZeRO-1", "ZeRO-2" or "ZeRO-3".
        processes: number of processes that share the model under FSDP and ZeRO.
        tokens: number of tokens of one sample; None leaves activations out.
        aligner: number of parameters of the aligner, which each device holds completely.
    """
    sizes = [(parameter_count(p), p.dtype.itemsize, p.requires_grad) for p in model.parameters()]
    everything = sum(count for count, _, _ in sizes)
    trained = sum(count for count, _, needs in sizes if needs)
    stored = sum(count * size for count, size, _ in sizes)
    half = bool(training.bf16 or training.fp16)
    state = _STATE.get(str(getattr(training.optim, "value", training.optim)), 8)
    if engine.startswith("ZeRO"):
        stage = int(engine[-1])
        width = 2 if half else 4
        # DeepSpeed computes in the model's copy and steps another in float32.
        weights = everything * width // (processes if stage == 3 else 1)
        gradients = trained * width // (processes if stage >= 2 else 1)
        optimizer, copies = trained * (state + 4) // processes, 0
    else:
        shards = processes if engine == "FSDP" else 1
        weights, gradients = stored // shards, trained * 4 // shards
        optimizer = trained * state // shards
        # Autocast keeps a copy of every weight of other precision; FSDP of the layers at work only.
        wide = sum(count for count, size, _ in sizes if size > 2)
        copies = 2 * wide if half and engine != "FSDP" else 0
    weights, gradients, optimizer = weights + 4 * aligner, gradients + 4 * aligner, optimizer + 8 * aligner
    activations = None
    if tokens is not None:
        batch = training.per_device_train_batch_size
        checkpointed = bool(getattr(training, "gradient_checkpointing", False))
        activations = _activations(model.config, batch * tokens, 2 if half else 4, checkpointed)
    return StudentCost(weights, gradients, optimizer, copies, activations, tokens)


def parameter_count(parameter: nn.Parameter) -> int:
    """Return the full size of a parameter, also if DeepSpeed holds only a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _activations(config: Any, tokens: int, width: int, checkpointed: bool) -> int:
    text = config.get_text_config()
    # Heads of one model may differ from layer to layer.
    each = getattr(text, "per_layer_config", None)
    layers = [_layer(each[i] if each else text) * width for i in range(text.num_hidden_layers)]
    kept = len(layers) * text.hidden_size * width + max(layers) if checkpointed else sum(layers)
    logits = text.vocab_size * (width + 4 + 4)
    return tokens * (kept + logits)


def _layer(config: Any) -> int:
    """Count the values per token that autograd keeps for one layer.

    They are input and output of both norms, queries, keys, values, output and projection of the attention,
    and the four tensors of a gated feed-forward layer, or of the experts that process the token.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or hidden // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * per_head
    experts = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    if experts:
        wide = experts * config.moe_intermediate_size
        wide += getattr(config, "shared_expert_intermediate_size", None) or 0
    else:
        wide = config.intermediate_size
    return 6 * hidden + 2 * heads * per_head + 2 * keys + 4 * wide


# ---- measured ----


def measured_memory() -> dict[str, Any]:
    """Return the peak memory so far: of this process's GPU allocator, else of the process itself."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"device": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": "cpu", "peak_bytes": peak if sys.platform == "darwin" else peak * 1024}
