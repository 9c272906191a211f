"""Load a whole model, even if an engine shards the trained model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH = "FSDP_CPU_RAM_EFFICIENT_LOADING"
#: The switch is global to the process: one load at a time.
_lock = threading.RLock()


@contextmanager
def whole_weights() -> Iterator[None]:
    """While open, transformers loads models as if no engine were configured.

    Under ZeRO-3, `from_pretrained` splits every model over the processes. Under FSDP with RAM-efficient
    loading, only the first process gets weights. No engine would ever gather a teacher's text encoder, so it
    must be loaded without both.
    """
    from transformers.integrations import deepspeed

    with _lock:
        held = deepspeed._hf_deepspeed_config_weak_ref
        before = os.environ.get(_SWITCH)
        deepspeed.unset_hf_deepspeed_config()
        os.environ[_SWITCH] = "false"
        try:
            yield
        finally:
            deepspeed._hf_deepspeed_config_weak_ref = held
            if before is None:
                del os.environ[_SWITCH]
            else:
                os.environ[_SWITCH] = before
