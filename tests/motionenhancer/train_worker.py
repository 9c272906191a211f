"""Training runs inside one launch of several CPU processes: `torchrun ... train_worker.py runs.json`.

runs.json lists {"environment": {...}, "flags": [...]} with, if wanted, "without": ids of samples to have no
prior; "die_after": a step; "spoil_rank": the process whose model gives NaN; "code": what the run returns.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate.state import AcceleratorState, DistributedType, PartialState
from train_support import Death, Died, without_priors_of

from motionenhancer import train
from motionenhancer.alignment.trainer import MotionTrainer


def let_cpus_shard() -> None:
    """Run FSDP and DeepSpeed on CPUs, where they work but accelerate does not choose them."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        sharded, zero = kwargs.get("fsdp_plugin"), kwargs.get("deepspeed_plugin")
        if self.distributed_type != DistributedType.MULTI_CPU or (sharded or zero) is None:
            return
        if sharded is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = sharded
        else:
            self.distributed_type = DistributedType.DEEPSPEED
            zero.set_mixed_precision("no")
            zero.select(_from_accelerator_state=True)
            self.deepspeed_plugins = zero
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
    with contextlib.suppress(ImportError):
        # Its shared-memory collectives are compiled on first use, which takes a minute; gloo's do as well.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def main(runs: Path) -> None:
    let_cpus_shard()
    torch.set_num_threads(1)
    build, launched = MotionTrainer.__init__, dict(os.environ)
    for run in json.loads(runs.read_text()):
        os.environ.clear()
        os.environ.update({**launched, **run["environment"]})
        step, spoiled = run.get("die_after"), run.get("spoil_rank")

        def init(
            self: MotionTrainer,
            *args: Any,
            step: int | None = step,
            spoiled: int | None = spoiled,
            **kwargs: Any,
        ) -> None:
            build(self, *args, **kwargs)
            if step is not None:
                self.add_callback(Death(step))
            if spoiled == self.args.process_index:
                # Where it reaches the loss without passing through a weight that the processes share.
                self.model.lm_head.register_forward_hook(lambda module, given, out: out * float("nan"))

        MotionTrainer.__init__ = init  # type: ignore[method-assign]
        try:
            with without_priors_of(run.get("without", [])):
                code = train.main(run["flags"])
        except Died:
            code = None
        assert code == run.get("code", 0 if step is None else None), (run, code)
        torch.distributed.barrier()
        MotionTrainer.__init__ = build  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    # DeepSpeed on CPUs hangs in its destructors after everything is done.
    os._exit(0)
