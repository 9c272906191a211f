"""Noise levels and deterministic DDIM steps between them, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a deterministic run, from clean to noisy.

    Attributes:
        timesteps: K training timesteps in ascending order.
        alphas_cumprod: K + 1 values of ᾱ in float64; entry 0 is the clean end, entry i + 1 belongs to
            `timesteps[i]`.
        prediction_type: "v_prediction" or "epsilon".
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    prediction_type: str

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def below(self, timestep: int) -> Schedule:
        """The levels under `timestep` only, for a run that stops short of the noisy end."""
        kept = tuple(t for t in self.timesteps if t < timestep)
        if not kept:
            raise ValueError(f"no level of {self.timesteps} lies below timestep {timestep}")
        return Schedule(kept, self.alphas_cumprod[: len(kept) + 1], self.prediction_type)

    def step(self, latents: torch.Tensor, output: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Move latents from level `source` to level `target` (0 = clean, K = noisiest).

        The same formula runs both ways: x₀ and ε from the output at the source level, recombined at the
            target
        (Song et al., "Denoising Diffusion Implicit Models", eq. 12 with σ = 0).
        """
        a_source, a_target = self.alphas_cumprod[source], self.alphas_cumprod[target]
        signal, noise = a_source**0.5, (1.0 - a_source) ** 0.5
        if self.prediction_type == "v_prediction":
            clean = signal * latents - noise * output
            epsilon = signal * output + noise * latents
        else:
            clean, epsilon = (latents - noise * output) / signal, output
        return a_target**0.5 * clean + (1.0 - a_target) ** 0.5 * epsilon


def make_schedule(scheduler: Any, steps: int) -> Schedule:
    """The levels a diffusers DDIM-style `scheduler` visits in `steps` steps.

    ᾱ is read from the scheduler itself, after its own zero-terminal-SNR rescaling and SNR shift:
    diffusers' `DDIMInverseScheduler` drops the shift without a word, so it is not used here.

    Args:
        scheduler: a forward scheduler with `alphas_cumprod`, `final_alpha_cumprod`, `set_timesteps` and a
            config.
        steps: number of levels K; must divide the number of training timesteps.

    Raises:
        ValueError: steps out of range or not dividing the schedule; an ε-prediction model at zero SNR.
    """
    total = int(scheduler.config.num_train_timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 1 or steps > total or total % steps:
        raise ValueError(
            f"steps={steps} must divide the {total} training timesteps of the teacher's schedule "
            "(for example 1, 2, 5, 10)"
        )
    kind = scheduler.config.prediction_type
    if kind not in ("v_prediction", "epsilon"):
        raise ValueError(f"the teacher's scheduler predicts {kind!r}; supported are v_prediction and epsilon")
    scheduler.set_timesteps(steps)
    timesteps = tuple(sorted(int(t) for t in scheduler.timesteps))
    alphas = scheduler.alphas_cumprod.double()
    levels = (float(scheduler.final_alpha_cumprod), *(float(alphas[t]) for t in timesteps))
    if kind == "epsilon" and min(levels) <= 0.0:
        raise ValueError(
            "an epsilon-prediction teacher cannot start from zero terminal SNR (ᾱ = 0 divides by zero)"
        )
    return Schedule(timesteps, levels, kind)
