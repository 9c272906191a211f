"""Joining the processes that a launcher started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

Value = TypeVar("Value")


def join_processes() -> PartialState:
    """This process's place among those of `accelerate launch` or `torchrun`, also where there is no GPU.

    accelerate on its own stays alone there unless it is told to use the CPU.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.cuda.is_available()),
        # A process whose clips are short waits for the others at the end: longer than the usual minutes.
        timeout=timedelta(days=7),
    )


def from_main(value: Value) -> Value:
    """The main process's value, in every process: what is decided once cannot be decided differently.

    >>> from_main({"missing": 3})
    {'missing': 3}
    """
    held = [value]
    broadcast_object_list(held)
    return held[0]
