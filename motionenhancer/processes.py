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
    """Join the processes of `accelerate launch` or `torchrun`, with or without a GPU.

    Without a GPU, accelerate itself joins the processes only if it is told to use the CPU.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.cuda.is_available()),
        # A process with short clips may wait for the others for longer than torch's usual timeout.
        timeout=timedelta(days=7),
    )


def from_main(value: Value) -> Value:
    """Return the main process's value in every process, so that all decide alike.

    >>> from_main({"missing": 3})
    {'missing': 3}
    """
    held = [value]
    broadcast_object_list(held)
    return held[0]
