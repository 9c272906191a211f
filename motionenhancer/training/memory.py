"""How much memory a training run takes on each device, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..extraction.estimate import readable

#: Bytes of optimizer state a trained parameter; other optimizers are counted like AdamW.
_STATE = {"sgd": 0, "adafactor": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "lion_32bit": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights, gradients, optimizer: of the model and the aligner, counted from their parameters.
        copies: weights in the precision that is computed in, where it is another.
        activations: of the language model and its logits, a rule of thumb; None where no sample was read.
        tokens: length of the sequence the activations are for.
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
            return f"memory a device: {listed}, and activations"
        return (
            f"memory a device: about {readable(self.total)} ({listed}, activations about "
            f"{readable(self.activations)} at {self.tokens:,} tokens, as the first sample has)"
        )


def estimate_memory(
    model: nn.Module,
    training: Any,
    *,
    engine: str,
    processes: int,
    tokens: int | None,
    aligner: int = 0,
) -> Memory:
    """Count weights, gradients and optimizer states, and estimate activations.

    Args:
        model: the student, on any device, "meta" included.
        training: TrainingArguments.
        engine: "plain", "DDP", "FSDP", "ZeRO-1", "ZeRO-2" or "ZeRO-3".
        processes: that share the model under FSDP and ZeRO.
        tokens: of one sample; None leaves activations out.
        aligner: parameters of the aligner, whole on each device.
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
    return Memory(weights, gradients, optimizer, copies, activations, tokens)


def parameter_count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also where DeepSpeed left only a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _activations(config: Any, tokens: int, width: int, checkpointed: bool) -> int:
    text = config.get_text_config()
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads = text.num_attention_heads
    per_head = getattr(text, "head_dim", None) or hidden // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * per_head
    # What autograd keeps of one layer: both norms' input and output, queries, keys, values, the attention's
    # output and projection, and the four tensors of a gated feed-forward layer.
    layer = (6 * hidden + 2 * heads * per_head + 2 * keys + 4 * text.intermediate_size) * width
    kept = layers * hidden * width + layer if checkpointed else layers * layer
    logits = vocabulary * (width + 4 + 4)
    return tokens * (kept + logits)
