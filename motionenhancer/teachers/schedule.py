"""Noise levels and deterministic steps between them, in both directions, for DDIM and for flow matching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

#: Training timesteps of the flow-matching families.
FLOW_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule(ABC):
    """The noise levels of a deterministic run, from clean (level 0) to noisy (level `steps`).

    Attributes:
        timesteps: the timesteps of the model at levels 1 to K, ascending.
        levels: K + 1 values, entry 0 at the clean end, entry i + 1 at `timesteps[i]`: ᾱ of a diffusion in
            float64, σ of a flow.
    """

    timesteps: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @abstractmethod
    def step(self, latents: torch.Tensor, output: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Move latents from level `source` to level `target`, given the model's output."""

    @abstractmethod
    def noised(self, latents: torch.Tensor, noise: torch.Tensor, level: int) -> torch.Tensor:
        """Add the given Gaussian noise to clean latents, for `level`."""

    def below(self, timestep: float) -> Self:
        """The schedule of the levels below `timestep`, for a run that stops before the noisy end.

        Raises:
            ValueError: there is no such level.
        """
        kept = tuple(t for t in self.timesteps if t < timestep)
        if not kept:
            raise ValueError(f"no level of {self.timesteps} lies below timestep {timestep}")
        return replace(self, timesteps=kept, levels=self.levels[: len(kept) + 1])


@dataclass(frozen=True)
class DiffusionSchedule(Schedule):
    """Levels of a variance-preserving diffusion, stepped by DDIM with σ = 0.

    Attributes:
        prediction_type: "v_prediction" or "epsilon".
    """

    prediction_type: str

    def step(self, latents: torch.Tensor, output: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """One formula for both directions: x₀ and ε from the output at the source, recombined at the target.

        Source: Song et al., "Denoising Diffusion Implicit Models", eq. 12.
        """
        signal, noise = self.levels[source] ** 0.5, (1.0 - self.levels[source]) ** 0.5
        if self.prediction_type == "v_prediction":
            clean = signal * latents - noise * output
            epsilon = signal * output + noise * latents
        else:
            clean, epsilon = (latents - noise * output) / signal, output
        return self.noised(clean, epsilon, target)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, level: int) -> torch.Tensor:
        a = self.levels[level]
        return a**0.5 * latents + (1.0 - a) ** 0.5 * noise


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Levels of a rectified flow x = (1 − σ)·x₀ + σ·ε, whose model predicts ε − x₀, stepped by Euler."""

    def step(self, latents: torch.Tensor, output: torch.Tensor, source: int, target: int) -> torch.Tensor:
        return latents + (self.levels[target] - self.levels[source]) * output

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, level: int) -> torch.Tensor:
        sigma = self.levels[level]
        return (1.0 - sigma) * latents + sigma * noise


def flow_schedule(steps: int, shift: float, terminal: float | None = None) -> FlowSchedule:
    """K evenly spaced levels of a flow, shifted by its scheduler's `shift` toward noise (1: no shift).

    The levels above the clean end are stretched down to σ = `terminal`; None or 0: no stretching.

    Raises:
        ValueError: steps do not divide the 1000 training timesteps.

    Example:
        >>> flow_schedule(2, 3.0).levels
        (0.0, 0.75, 1.0)
    """
    check_steps(steps, FLOW_TIMESTEPS)
    even = [level / steps for level in range(steps + 1)]
    sigmas = tuple(shift * s / (1 + (shift - 1) * s) for s in even)
    if terminal and steps > 1:
        stretch = (1 - terminal) / (1 - sigmas[1])
        sigmas = (0.0, *(1 - stretch * (1 - s) for s in sigmas[1:]))
    return FlowSchedule(tuple(FLOW_TIMESTEPS * s for s in sigmas[1:]), sigmas)


def flow_level(timestep: int) -> FlowSchedule:
    """A schedule of one noise level of a flow.

    Raises:
        ValueError: the timestep is not one of the 1000.
    """
    check_level(timestep, FLOW_TIMESTEPS)
    return FlowSchedule((float(timestep),), (0.0, timestep / FLOW_TIMESTEPS))


def is_low_noise(timestep: float, boundary: float | None) -> bool:
    """Whether the second of two experts is used at a noise level, which is the case below the boundary.

    A level that equals the boundary up to rounding belongs to the first expert.

    Source: diffusers, `WanPipeline.__call__`.

    Example:
        >>> [is_low_noise(t, 875.0) for t in (874.0, 874.9999999999, 875.0)], is_low_noise(1.0, None)
        ([True, False, False], False)
    """
    return boundary is not None and round(timestep, 6) < round(boundary, 6)


def check_experts(timesteps: Iterable[float], boundary: float | None, high: bool) -> None:
    """Raise if a noise level has no expert. A folder may hold only the expert for low noise levels."""
    lacking = [] if high else [t for t in timesteps if not is_low_noise(t, boundary)]
    if lacking:
        raise ValueError(
            f"the teacher has no transformer for timestep {lacking[-1]:g}: its folder holds only "
            f"transformer_2, for timesteps below {boundary:g}; read single levels below {boundary:g} "
            "(--prior_mode renoise --noise_level)"
        )


def make_schedule(scheduler: Any, steps: int) -> DiffusionSchedule:
    """The levels that a DDIM-style `scheduler` of diffusers visits in `steps` steps.

    ᾱ is read from the scheduler itself, after its own zero-terminal-SNR rescaling and SNR shift. diffusers'
    `DDIMInverseScheduler` is not used, because it silently drops the shift.

    Raises:
        ValueError: steps do not divide the training timesteps, or an ε-prediction model has zero SNR.
    """
    check_steps(steps, int(scheduler.config.num_train_timesteps))
    scheduler.set_timesteps(steps)
    return _diffusion(scheduler, sorted(int(t) for t in scheduler.timesteps))


def one_level(scheduler: Any, timestep: int) -> DiffusionSchedule:
    """A schedule of one noise level, for reading a clip at that level in one evaluation.

    Raises:
        ValueError: the timestep is not one of the scheduler's.
    """
    check_level(timestep, int(scheduler.config.num_train_timesteps))
    return _diffusion(scheduler, [timestep])


def _diffusion(scheduler: Any, timesteps: list[int]) -> DiffusionSchedule:
    kind = scheduler.config.prediction_type
    if kind not in ("v_prediction", "epsilon"):
        raise ValueError(f"the teacher's scheduler predicts {kind!r}; supported are v_prediction and epsilon")
    alphas = scheduler.alphas_cumprod.double()
    levels = (float(scheduler.final_alpha_cumprod), *(float(alphas[t]) for t in timesteps))
    if kind == "epsilon" and min(levels) <= 0.0:
        raise ValueError(
            "an epsilon-prediction teacher cannot start from zero terminal SNR (ᾱ = 0 divides by zero)"
        )
    return DiffusionSchedule(tuple(timesteps), levels, kind)


def check_steps(steps: int, total: int) -> None:
    """Raise unless `steps` divides the `total` training timesteps."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 1 or steps > total or total % steps:
        raise ValueError(
            f"steps={steps} (--ddim_steps) must divide the teacher's {total} training timesteps "
            "(for example 1, 2, 5, 10)"
        )


def check_level(timestep: int, total: int) -> None:
    """Raise unless `timestep` is one of the `total` training timesteps."""
    if isinstance(timestep, bool) or not isinstance(timestep, int):
        raise TypeError(f"noise_level must be an int, got {type(timestep).__name__}")
    if not 0 <= timestep < total:
        raise ValueError(f"noise_level={timestep} must be a timestep of the teacher, 0 to {total - 1}")
