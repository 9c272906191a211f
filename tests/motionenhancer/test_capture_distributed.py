"""Capture in two gloo processes, under DDP and FSDP2, against one eager process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from students_support import (
    checkpoint_layers,
    eager_attention,
    gradients,
    make_batch,
    random_rows,
    sharp_student,
)

from motionenhancer.students import capture_attention


def wrap(model: Any, kind: str) -> Any:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(gradient: Any) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for kind, use_checkpoints in (("ddp", False), ("fsdp2", True)):
        model, processor = sharp_student(layers=2, dtype=torch.float64)
        batches = [make_batch(processor, side=side, dtype=torch.float64)[0] for side in ("right", "left")]
        reference: dict[str, torch.Tensor] = {}
        for batch in batches:
            expected, out = eager_attention(model, batch, *random_rows(batch, 5))
            for name, gradient in gradients(model, expected.square().sum() + out.loss).items():
                reference[name] = reference.get(name, 0) + gradient / world
        expected, _ = eager_attention(model, batches[rank], *random_rows(batches[rank], 5))
        if use_checkpoints:
            checkpoint_layers(model)
        wrapped = wrap(model, kind)
        with capture_attention(wrapped, *random_rows(batches[rank], 5)) as captured:
            out = wrapped(**batches[rank])
        torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
        (captured.attention.square().sum() + out.loss).backward()
        largest = max(float(g.abs().max()) for g in reference.values())
        for name, parameter in model.named_parameters():
            found = whole(parameter.grad)
            torch.testing.assert_close(
                found, reference[name], rtol=1e-6, atol=1e-9 * largest, msg=f"{kind} {name}"
            )
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
