from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from motionenhancer.teachers.schedule import make_schedule


def scheduler(**options: object) -> CogVideoXDDIMScheduler:
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "snr_shift_scale": 3.0,
        "clip_sample": False,
        **options,
    }
    return CogVideoXDDIMScheduler(**settings)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_are_the_forward_schedulers(shift: float) -> None:
    forward = scheduler(snr_shift_scale=shift)
    schedule = make_schedule(forward, 5)
    assert schedule.timesteps == (199, 399, 599, 799, 999)
    expected = [1.0, *(float(forward.alphas_cumprod[t]) for t in schedule.timesteps)]
    assert list(schedule.levels) == pytest.approx(expected, abs=0, rel=1e-12)
    assert schedule.levels[-1] == pytest.approx(0.0, abs=1e-12)


def test_the_snr_shift_is_not_lost() -> None:
    plain, shifted = (make_schedule(scheduler(snr_shift_scale=s), 5) for s in (1.0, 3.0))
    gap = max(abs(a - b) for a, b in zip(plain.levels, shifted.levels, strict=True))
    assert gap > 0.2


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_denoising_steps_equal_the_schedulers_own(steps: int) -> None:
    forward = scheduler()
    schedule = make_schedule(forward, steps)
    generator = torch.Generator().manual_seed(steps)
    latents = torch.randn(1, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    for level in range(steps, 0, -1):
        output = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
        expected = forward.step(output, schedule.timesteps[level - 1], latents, return_dict=False)[0]
        torch.testing.assert_close(
            schedule.step(latents, output, level, level - 1), expected, rtol=1e-6, atol=1e-6
        )
        latents = expected


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_step_up_undoes_a_step_down_for_the_same_clean_and_noise(kind: str) -> None:
    schedule = make_schedule(scheduler(prediction_type=kind, rescale_betas_zero_snr=False), 10)
    clean, noise = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level in (1, 4, 10):
        a = schedule.levels[level]
        latents = a**0.5 * clean + (1 - a) ** 0.5 * noise
        output = a**0.5 * noise - (1 - a) ** 0.5 * clean if kind == "v_prediction" else noise
        b = schedule.levels[2]
        expected = b**0.5 * clean + (1 - b) ** 0.5 * noise
        torch.testing.assert_close(schedule.step(latents, output, level, 2), expected)


@pytest.mark.parametrize("steps", [0, -1, 3, 7, 1001])
def test_steps_that_do_not_divide_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        make_schedule(scheduler(), steps)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match="steps"):
        make_schedule(scheduler(), 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_schedule(scheduler(prediction_type="epsilon"), 5)
    with pytest.raises(ValueError, match="'sample'"):
        make_schedule(scheduler(prediction_type="sample"), 5)
    with pytest.raises(ValueError, match="below"):
        make_schedule(scheduler(), 5).below(100)


def test_cutting_off_the_noisy_end_keeps_the_lower_levels() -> None:
    whole = make_schedule(scheduler(), 10)
    cut = whole.below(500)
    assert cut.timesteps == (99, 199, 299, 399, 499)
    assert cut.levels == whole.levels[:6]
