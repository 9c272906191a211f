"""DDIM inversion of a clip and its reconstruction with guidance and memory, attention read on the way.

Source: MotionEnhancer (arXiv 2606.06853), section on the teacher's attention and its supplement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import AttentionReader, Teacher
from .schedule import Schedule

STARTS = ("inverted", "random")


@dataclass(frozen=True)
class Reconstruction:
    """The end of a reconstruction.

    Attributes:
        latents: (1, f, c, h, w) float32, the generated stream at the clean end.
        evaluations: transformer evaluations, counted per batch row.
    """

    latents: torch.Tensor
    evaluations: int


@torch.no_grad()
def invert(
    teacher: Teacher, latents: torch.Tensor, schedule: Schedule, embeds: torch.Tensor
) -> list[torch.Tensor]:
    """Carry clean latents to noise in K deterministic steps, without guidance.

    Step i goes from level i to level i + 1 and evaluates the model at the level it goes to, as diffusers'
    inverse scheduler does.

    Args:
        teacher: the model.
        latents: (1, f, c, h, w) clean latents.
        schedule: K levels.
        embeds: (1, length, width) text hidden states, the empty prompt's in the paper's procedure.

    Returns:
        K + 1 latents in float32; entry 0 is the input, entry i + 1 lies at `schedule.timesteps[i]`.
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
    start: str = "inverted",
    memory: bool = True,
    seed: int = 0,
    reader: AttentionReader | None = None,
) -> Reconstruction:
    """Denoise back in K steps under the prompt, reading the conditional generated stream.

    The batch is (generated × [empty, prompt], reference × [empty, prompt]); the empty half is left out when
    `guidance_scale` is 1 and the reference half without `memory`. Each reference row carries the text of the
    generated row it serves, is fed the inverted latent of the same noise level, attends to itself only,
    and its prediction is discarded.

    Args:
        teacher: the model.
        trajectory: what `invert` returned, K + 1 latents.
        schedule: the same K levels.
        prompt_embeds: (1, length, width) of the text.
        empty_embeds: (1, length, width) of the empty prompt.
        guidance_scale: classifier-free guidance; 1 switches it off.
        start: "inverted" begins at the inverted noise, "random" at seeded Gaussian noise.
        memory: give the generated stream the keys and values of the reference stream.
        seed: of the random start.
        reader: receives (query, key, lse, fold) of every layer and step.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if len(trajectory) != schedule.steps + 1:
        raise ValueError(f"trajectory has {len(trajectory)} latents, the schedule needs {schedule.steps + 1}")
    latents = trajectory[-1]
    if start == "random":
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents.device)
    guided = guidance_scale != 1.0
    copies = 2 if guided else 1
    embeds = torch.cat([empty_embeds, prompt_embeds]) if guided else prompt_embeds
    if memory:
        embeds = torch.cat([embeds, embeds])
    evaluations = 0
    with teacher.reading(reader, memory=memory, row=copies - 1):
        for level in range(schedule.steps, 0, -1):
            batch = [latents] * copies + ([trajectory[level]] * copies if memory else [])
            output = teacher.predict(torch.cat(batch), embeds, schedule.timesteps[level - 1])
            evaluations += len(batch)
            if guided:
                output = output[:1] + guidance_scale * (output[1:2] - output[:1])
            else:
                output = output[:1]
            latents = schedule.step(latents, output, level, level - 1)
    return Reconstruction(latents, evaluations)


def roundtrip_error(
    teacher: Teacher, latents: torch.Tensor, schedule: Schedule, embeds: torch.Tensor
) -> float:
    """Relative L2 error of latents inverted and reconstructed with the same text, no guidance and no memory.

    It vanishes as the steps of a schedule that stops short of zero SNR grow. At the zero-SNR end the last
    latent is pure noise in the model's eyes, whatever the clip, so some error stays.

    Args:
        teacher: the model.
        latents: (1, f, c, h, w) clean latents.
        schedule: its levels; `Schedule.below` cuts the noisy end off.
        embeds: (1, length, width) text hidden states used both ways.
    """
    trajectory = invert(teacher, latents, schedule, embeds)
    back = reconstruct(
        teacher, trajectory, schedule, embeds, embeds, guidance_scale=1.0, memory=False
    ).latents
    return float((back - trajectory[0]).norm() / trajectory[0].norm().clamp(min=1e-12))
