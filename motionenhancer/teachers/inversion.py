"""DDIM inversion of a clip, and its reconstruction with guidance and memory while attention is read.

Source: MotionEnhancer (arXiv 2606.06853), section on the teacher's attention and its supplement.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch

from .protocol import AttentionReader
from .schedule import Schedule, is_low_noise
from .teacher import Teacher

STARTS = ("inverted", "random")

#: Level (1 = cleanest, K = noisiest) → reader of its evaluation; None: not read.
LevelReader = Callable[[int], AttentionReader | None]


@torch.no_grad()
def invert(
    teacher: Teacher, latents: torch.Tensor, schedule: Schedule, embeds: torch.Tensor
) -> list[torch.Tensor]:
    """Bring clean latents to noise in K deterministic steps, without guidance.

    Step i goes from level i to level i + 1 and evaluates the model at its target level, like diffusers'
    inverse scheduler.

    Args:
        teacher, latents, schedule: the model, (1, ...) clean latents, and K levels.
        embeds: (1, length, width) text hidden states; in the paper's procedure, of the empty prompt.

    Returns:
        K + 1 latents in float32; entry 0 is the input, entry i + 1 is at `schedule.timesteps[i]`.
    """
    trajectory = [latents.float()]
    for level, timestep in enumerate(schedule.timesteps):
        output = teacher.predict(trajectory[-1], embeds, timestep)
        trajectory.append(schedule.step(trajectory[-1], output, level, level + 1))
    return trajectory


@torch.no_grad()
def reconstruct(
    teacher: Teacher,
    trajectory: list[torch.Tensor],
    schedule: Schedule,
    prompt_embeds: torch.Tensor,
    empty_embeds: torch.Tensor,
    *,
    guidance_scale: float = 6.0,
    guidance_scale_2: float | None = None,
    start: str = "inverted",
    memory: bool = True,
    seed: int = 0,
    readers: LevelReader = lambda level: None,
) -> torch.Tensor:
    """Denoise back in K steps under the prompt, and read the conditional generated stream.

    The batch is (generated × [empty, prompt], reference × [empty, prompt]). The rows of the empty prompt are
    left out if `guidance_scale` is 1, and the reference rows without `memory`. Each reference row has the
    text of its generated row. Its input is the inverted latent of the same noise level. It attends only to
    itself, and its prediction is discarded.

    Args:
        teacher, trajectory, schedule: the model, the K + 1 latents that `invert` returned, and the same
            levels.
        prompt_embeds, empty_embeds: (1, length, width) of the text and of the empty prompt.
        guidance_scale: scale of classifier-free guidance, or the guidance input of a model; 1 is off.
        guidance_scale_2: guidance at the levels of a second expert; None: the same.
        start: "inverted" starts at the inverted noise, "random" at Gaussian noise of `seed`.
        memory: give the generated stream the keys and values of the reference stream.
        readers: level → reader of its evaluation.

    Returns:
        The generated stream's latents at the clean end, float32.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if len(trajectory) != schedule.steps + 1:
        raise ValueError(f"trajectory has {len(trajectory)} latents, the schedule needs {schedule.steps + 1}")
    latents = trajectory[-1]
    if start == "random":
        latents = gaussian(latents, seed)
    if teacher.plan.embedded_guidance:
        teacher = copy(teacher)
        teacher.guidance, guidance_scale = guidance_scale, 1.0
    guided = guidance_scale != 1.0
    texts = [empty_embeds, prompt_embeds] if guided else [prompt_embeds]
    for level in range(schedule.steps, 0, -1):
        reference = trajectory[level] if memory else None
        outputs = _evaluate(teacher, latents, reference, texts, schedule.timesteps[level - 1], readers(level))
        output = outputs[-1:]
        if guided:
            low = is_low_noise(schedule.timesteps[level - 1], teacher.boundary)
            scale = guidance_scale_2 if low and guidance_scale_2 is not None else guidance_scale
            output = outputs[:1] + scale * (output - outputs[:1])
        latents = schedule.step(latents, output, level, level - 1)
    return latents


@torch.no_grad()
def renoise(
    teacher: Teacher,
    latents: torch.Tensor,
    schedule: Schedule,
    prompt_embeds: torch.Tensor,
    reader: AttentionReader,
    *,
    seed: int = 0,
) -> None:
    """Read a clip in one evaluation of its latents with seeded Gaussian noise, under the prompt, unguided.

    Args:
        teacher, latents, schedule: the model, (1, ...) clean latents, and one level.
        prompt_embeds: (1, length, width) of the text.
    """
    noisy = schedule.noised(latents.float(), gaussian(latents, seed), 1)
    with teacher.reading(reader, memory=False, row=0):
        teacher.predict(noisy, prompt_embeds, schedule.timesteps[0])


def gaussian(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal float32 noise; the same seed gives the same noise on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)


def _evaluate(
    teacher: Teacher,
    latents: torch.Tensor,
    reference: torch.Tensor | None,
    texts: list[torch.Tensor],
    timestep: float,
    reader: AttentionReader | None,
) -> torch.Tensor:
    """Predictions of the generated rows, one per text; the last row is read. Splits if memory runs out."""

    def predicted(texts: list[torch.Tensor], reader: AttentionReader | None) -> torch.Tensor:
        rows = [latents] * len(texts) + ([] if reference is None else [reference] * len(texts))
        embeds = texts if reference is None else texts + texts
        if reader is None and reference is None:
            return teacher.predict(torch.cat(rows), torch.cat(embeds), timestep)
        with teacher.reading(reader, memory=reference is not None, row=len(texts) - 1):
            return teacher.predict(torch.cat(rows), torch.cat(embeds), timestep)[: len(texts)]

    if not teacher.split_batch and len(texts) > 1:
        resumable = None if reader is None else _Resumable(reader)
        try:
            return predicted(texts, resumable)
        except torch.OutOfMemoryError:
            if resumable is not None and resumable.inside:
                raise
            teacher.split_batch = True
            reader = None if resumable is None else resumable.rest()
    return torch.cat([predicted([text], reader if text is texts[-1] else None) for text in texts])


class _Resumable:
    """Passes layers to a reader and counts them, so that a repeated evaluation reads no layer twice."""

    def __init__(self, reader: AttentionReader, skip: int = 0) -> None:
        self.reader, self.skip, self.seen, self.inside = reader, skip, 0, False

    def rest(self) -> _Resumable:
        """A reader for a repetition of the evaluation, which ignores layers that were already read."""
        return _Resumable(self.reader, self.seen)

    def _pass(self, read: Callable[..., None], *args: object) -> None:
        self.seen += 1
        if self.seen > self.skip:
            self.inside = True
            read(*args)
            self.inside = False

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
        self._pass(self.reader.self_attention, query, key, lse, fold)

    def cross_attention(self, text: torch.Tensor, vision: torch.Tensor) -> None:
        self._pass(self.reader.cross_attention, text, vision)


def roundtrip_error(
    teacher: Teacher, latents: torch.Tensor, schedule: Schedule, embeds: torch.Tensor
) -> float:
    """Relative L2 error of latents that are inverted and reconstructed without guidance, memory or new text.

    On a schedule that stops before zero SNR (`Schedule.below`), it tends to 0 with more steps. At zero SNR,
    the model treats the last latent of any clip as pure noise, so some error stays.
    """
    trajectory = invert(teacher, latents, schedule, embeds)
    back = reconstruct(teacher, trajectory, schedule, embeds, embeds, guidance_scale=1.0, memory=False)
    return float((back - trajectory[0]).norm() / trajectory[0].norm().clamp(min=1e-12))
