"""Getting a teacher ready to read while a student trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..arguments import PriorArguments
from ..prior import PriorSettings
from ..vdm import Teacher
from .text_cache import CachedTextTeacher


def ready_teacher(
    prior: PriorArguments,
    settings: PriorSettings,
    device: torch.device,
    texts: Sequence[str],
    *,
    index: int = 0,
    count: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Teacher:
    """Load the teacher and check that it can be read so; with a text cache, its encoder is let go.

    Args:
        prior, settings: which teacher, and how it is read.
        device: where it runs.
        texts: all it will be given.
        index, count: this process encodes every `count`-th of the missing texts.
        wait: called when it has; waits for the others.

    Raises:
        ValueError: steps that do not divide the schedule, or a level outside of it.
    """
    cache = prior.texts(device)
    if cache is None:
        teacher = prior.load(device)
    else:
        wanted = [*texts, ""]
        # Shared out before looking: a process that looks later finds what another has written since.
        mine = [text for text in wanted[index::count] if cache.read(text) is None]
        teacher = prior.load(device, text_encoder=bool(mine))
        assert isinstance(teacher, CachedTextTeacher)
        teacher.fill(mine)
        teacher.drop_encoder()
        wait()
    if settings.mode == "reconstruct":
        teacher.schedule(settings.steps)
    else:
        teacher.level(settings.noise_level)
    return teacher
