"""A training step waits for its device once, before the optimizers; non-finite values stop there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from students_support import sharp_student
from tiny_world import World
from train_support import arguments, parts
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments, masking_utils
from transformers.training_args import OptimizerNames

from motionenhancer.alignment.aligner import build_aligner
from motionenhancer.alignment.dataset import Alignment
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.students import capture_attention, entries
from motionenhancer.students.keys import AttentionCall, read_mask

META = torch.device("meta")
"""Stands for a device to wait for: whoever reads a value from there fails."""


def language_model() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))


def micro_batch(seed: int, device: torch.device = META) -> dict[str, Any]:
    """Two samples, of which one has a prior; token tensors on the device, the alignment on the host."""
    generator = torch.Generator().manual_seed(seed)
    prior = SimpleNamespace(
        truncated=0,
        attention=torch.rand(2, 6, generator=generator),
        grid=(1, 2, 3),
        confidence={"confidence": 0.5},
    )
    alignment = Alignment(
        rows=torch.tensor([[7, 8, 9], [-1, -1, -1]]),
        columns=torch.tensor([[0, 1, 2, 3, 4, 5], [-1] * 6]),
        row_tokens=torch.tensor([[0, 1, 1], [-1, -1, -1]]),
        grids=[(1, 2, 3), (1, 1, 1)],
        priors=[prior, None],
        count=1,
        words=2,
        mapped=2,
    )
    ids = torch.zeros(2, 10, dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids.clone(), "alignment": alignment, "ids": ["a", "b"]}


@pytest.mark.parametrize("loss", ["l2", "kl"])
@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_a_micro_step_reads_nothing_from_its_device(
    tmp_path: Path, kind: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model()
    monkeypatch.setattr(TrainingArguments, "device", META)
    # Autocast does not know this device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # transformers looks itself whether the batch is packed.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    trainer = MotionTrainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        aligner=build_aligner(kind, (1, 2, 3)),
        alignment_loss=loss,
        confidence_gate=0.8,
    )
    assert not trainer.args.logging_nan_inf_filter, "the Trainer's own look at every loss"
    placed = send_to_device([micro_batch(0), micro_batch(1)], META)
    batches, items = trainer.get_batch_samples(iter(placed), 2, META)
    trainer.current_gradient_accumulation_steps = 2
    model.train()
    for batch in batches:
        term = trainer.compute_loss(model, batch, num_items_in_batch=items)
        term.backward()
    assert term.device == META
    assert len(trainer._checks) == 6, "the model's loss, the attention and the alignment, of both batches"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trainer.finish_aligner_gradients()


@pytest.mark.parametrize(
    ("kind", "refused"), [("ordinary", False), ("lomo", True), ("ds, between", False), ("ds, last", True)]
)
def test_where_the_backward_changes_weights_it_is_not_reached(
    tmp_path: Path, kind: str, refused: bool
) -> None:
    model = language_model()
    model.lm_head.register_forward_hook(lambda module, given, out: out * torch.nan)
    trainer = MotionTrainer(model=model, args=arguments(tmp_path, gradient_accumulation_steps=2))
    trainer.accelerator.gradient_state._set_sync_gradients(kind == "ds, last")
    trainer.is_deepspeed_enabled = kind.startswith("ds")
    if kind == "lomo":
        trainer.args.optim = OptimizerNames.LOMO
    trainer.current_gradient_accumulation_steps = 2
    model.train()
    expected = pytest.raises(FloatingPointError, match=r"loss is nan.*'a', 'b'") if refused else nullcontext()
    with expected:
        trainer.compute_loss(model, micro_batch(0, torch.device("cpu")))


def test_packing_is_read_without_a_wait() -> None:
    """Positions that flash attention is given, whether a batch is packed or not."""
    call = AttentionCall(
        torch.nn.Identity(),
        None,
        {"position_ids": torch.zeros(1, 9, dtype=torch.int64, device=META), "sliding_window": 4},
        torch.zeros(1, 2, dtype=torch.int64, device=META),
        heads=2,
        length=9,
        keys=9,
    )
    assert read_mask("flash_attention_2", call).key_range.shape == (1, 2, 2)


class Spoiled(MotionTrainer):
    """Makes the loss of one micro-batch NaN."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = getattr(self, "seen", 0) + 1
        head = self.model.lm_head
        handle = head.register_forward_hook(lambda module, given, out: out * torch.nan)
        if self.seen != 6:
            handle.remove()
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            handle.remove()


@pytest.mark.parametrize("most", [0.0, 1.0])
def test_one_bad_micro_batch_is_named_before_weights_change(
    world: World, tmp_path: Path, most: float
) -> None:
    model, dataset, collator = parts(world, tmp_path)
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_grad_norm": most}
    trainer = Spoiled(
        model=model,
        args=arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **settings),
        train_dataset=dataset,
        data_collator=collator,
    )
    order: list[str] = []
    count = trainer._count
    trainer._count = lambda ids, alignment: (order.extend(ids), count(ids, alignment))
    with pytest.raises(FloatingPointError, match="the model's loss is nan at step 1; samples") as error:
        trainer.train()
    assert str(error.value).endswith(f"samples ['{order[5]}']"), order
    assert trainer.seen == 8, "the step's other micro-batches were queued"
    kept = type(model).from_pretrained(tmp_path / "out" / "checkpoint-1").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_attention_that_is_not_finite_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset, collator = parts(world, tmp_path)
    monkeypatch.setattr(
        entries.ForwardEntries, "_add", lambda self, read: setattr(self, "_sum", read * torch.inf)
    )
    trainer = MotionTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset, data_collator=collator
    )
    with pytest.raises(FloatingPointError, match=r"alignment failed: captured attention holds NaN.*step 0"):
        trainer.train()


class TestPositionsElsewhere:
    """Positions on a device are not read; positions that do not fit show in the result."""

    ROWS, IDS = torch.tensor([[4, -1]]), torch.arange(7)[None]

    def captured(self, columns: Any, rows: torch.Tensor = ROWS, **batch: torch.Tensor) -> torch.Tensor:
        model = sharp_student(layers=2)[0]
        with capture_attention(model, rows, columns) as captured:
            model(input_ids=self.IDS, **batch)
        return captured.attention

    @pytest.mark.parametrize("columns", [slice(0, 3), torch.tensor([[0, 1, 2]])])
    def test_that_fit(self, columns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = self.captured(columns)
        monkeypatch.setattr(entries, "read_by_host", lambda positions: isinstance(positions, slice))
        assert torch.equal(self.captured(columns), wanted)

    @pytest.mark.parametrize(
        ("rows", "columns"),
        [([[4, 7]], slice(0, 3)), ([[4, 5]], [[0, 7]]), ([[2**40, 5]], [[0, 1]])],
    )
    def test_beyond_the_sequence(self, rows: Any, columns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = columns if isinstance(columns, slice) else torch.tensor(columns)
        with pytest.raises(ValueError, match="must be below the 7 tokens"):
            self.captured(columns, torch.tensor(rows))
        monkeypatch.setattr(entries, "read_by_host", lambda positions: isinstance(positions, slice))
        assert self.captured(columns, torch.tensor(rows)).isnan().all()
        # Nor is a mask read beyond its end.
        padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
        assert self.captured(columns, torch.tensor(rows), attention_mask=padded).isnan().all()
