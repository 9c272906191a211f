"""How a prior is read: the settings that change its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..flags import MAX_SEED, check_fields, setting
from ..teachers.config import boundary_of, read_folder
from ..teachers.inversion import STARTS
from ..teachers.plan import TeacherPlan, teacher_class
from ..teachers.schedule import check_experts, check_level, check_steps
from .token_choice import SCORES, UNITS

MODES = ("reconstruct", "renoise")
HEAD_SELECTIONS = ("mhs", "cross", "off")
TOKEN_SELECTIONS = ("mtti", "off")


@dataclass(frozen=True)
class PriorSettings:
    """How a prior is read: every choice that changes its values, except the teacher's own options."""

    steps: int = setting(
        5,
        "DDIM steps of inversion, and of reconstruction; must divide the teacher's training timesteps.",
        flag="ddim_steps",
        least=1,
    )
    guidance_scale: float = setting(6.0, "Scale of classifier-free guidance; 1 switches it off.", least=0)
    start: str = setting("inverted", "Latent from which the reconstruction starts.", choices=STARTS)
    memory: bool = setting(True, "Reconstruction also attends to the inverted clip's keys and values.")
    head_ratio: float = setting(0.5, "Share of heads kept; 1 keeps all.", above=0, most=1)
    token_ratio: float = setting(0.5, "Share of words kept; 1 keeps all.", above=0, most=1)
    sampled_rows: int | str = setting(
        64, 'Number of rows from which sums of squares are estimated, or "all".', type=str
    )
    seed: int = setting(
        0,
        "Seed of the noise of --start random and of --prior_mode renoise.",
        flag="prior_seed",
        least=0,
        most=MAX_SEED,
    )
    mode: str = setting(
        "reconstruct",
        "reconstruct: invert and reconstruct, as in the paper; renoise: one evaluation of the noised clip.",
        flag="prior_mode",
        choices=MODES,
    )
    noise_level: int = setting(200, "Noise level of renoise: a training timestep, 0 to 999.")
    step_weights: tuple[float, ...] | None = setting(
        None, "Weights of the steps in the pooled map, noisiest step first, such as 0,0,0,1,1.", type=str
    )
    head_selection: str = setting(
        "mhs",
        "mhs: motion-sensitive head selection; cross: the same for heads of a cross-attention to the text "
        "(Wan, LTX); off: the mean over all heads.",
        choices=HEAD_SELECTIONS,
    )
    token_selection: str = setting(
        "mtti", "mtti: motion-salient token identification; off: keep all words.", choices=TOKEN_SELECTIONS
    )
    guidance_scale_2: float | None = setting(
        None,
        "--guidance_scale of the low-noise expert (Wan 2.2 A14B). Default: the same.",
        metavar="SCALE",
        least=0,
    )
    diagonal_width: int = setting(
        0,
        "Head selection: two places of the grid count as one if they are at most N apart in raster order.",
        least=0,
    )
    token_scores: str = setting(
        "raw",
        "Token selection adds mean attention and its change. raw: both as they are; standardized: both "
        "standardized over the words of the text.",
        choices=SCORES,
    )
    token_unit: str = setting(
        "piece",
        "What token selection chooses: the tokenizer's pieces of words, or whole words.",
        choices=UNITS,
    )

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise ValueError(f"--ddim_steps must be an int, got {self.steps!r}")
        check_fields(self)
        if self.guidance_scale == 1.0 and self.guidance_scale_2 not in (None, 1.0):
            raise ValueError(
                f"guidance_scale_2 must not be given if guidance_scale is 1, which switches guidance off, "
                f"got {self.guidance_scale_2}"
            )
        if isinstance(self.sampled_rows, str) and self.sampled_rows.isdecimal():
            object.__setattr__(self, "sampled_rows", int(self.sampled_rows))
        if self.sampled_rows != "all" and not (isinstance(self.sampled_rows, int) and self.sampled_rows > 0):
            raise ValueError(f'sampled_rows must be a positive int or "all", got {self.sampled_rows!r}')
        if self.step_weights is not None:
            weights = _numbers(self.step_weights)
            if len(weights) != self.steps or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
                raise ValueError(
                    f"step_weights must be {self.steps} weights >= 0, one per step and not all zero, "
                    f"got {self.step_weights}"
                )
            object.__setattr__(self, "step_weights", weights)
        # Two spellings of a number, or a value without effect, must not give one prior two keys.
        if self.guidance_scale_2 == self.guidance_scale:
            object.__setattr__(self, "guidance_scale_2", None)
        if self.diagonal_width and self.head_selection != "mhs":
            raise ValueError(
                f"diagonal_width {self.diagonal_width} needs head_selection 'mhs', got "
                f"{self.head_selection!r}"
            )
        for name in ("token_scores", "token_unit"):
            if self.token_selection == "off" and getattr(self, name) != getattr(PriorSettings, name):
                raise ValueError(f"{name} {getattr(self, name)!r} needs token_selection 'mtti', got 'off'")
        for kind in ("head", "token"):
            if getattr(self, f"{kind}_selection") == "off":
                object.__setattr__(self, f"{kind}_ratio", 1.0)
        for name in ("guidance_scale", "guidance_scale_2", "head_ratio", "token_ratio"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))

    def rows(self, *, split: bool = False) -> int:
        """Batch rows of one evaluation. With `split`, the two texts are evaluated one after the other."""
        if self.mode == "renoise":
            return 1
        texts = 1 if split or self.guidance_scale == 1.0 else 2
        return texts * (2 if self.memory else 1)

    @property
    def evaluations(self) -> int:
        """The transformer's evaluations for one prior, counted per batch row."""
        return 1 if self.mode == "renoise" else self.steps * (1 + self.rows())


def batch_settings(settings: PriorSettings, plan: TeacherPlan) -> PriorSettings:
    """Settings that give the teacher's batch rows: guidance that is a model input needs no second row."""
    return replace(settings, guidance_scale=1.0) if plan.embedded_guidance else settings


def _numbers(given: str | Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in (given.split(",") if isinstance(given, str) else given))
    except (ValueError, TypeError):
        raise ValueError(f"step_weights must be numbers separated by commas, got {given!r}") from None


def check_settings(settings: PriorSettings, teacher: str | Path) -> None:
    """Check from its configuration files that a teacher is supported and that the settings fit it.

    Raises:
        ValueError: a configuration field is not supported, or the teacher lacks a noise level or an expert.
        OSError: the folder or its files are missing.
    """
    family, parts = read_folder(teacher)
    check_heads(settings, teacher_class(family).sizes(parts).joint)
    total, boundary = parts["scheduler"]["num_train_timesteps"], boundary_of(parts)
    check_guidance(settings, boundary)
    if settings.mode == "renoise":
        try:
            check_level(settings.noise_level, total)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        levels: Sequence[float] = (settings.noise_level,)
    else:
        check_steps(settings.steps, total)
        # If the noisiest level has an expert, all levels have one.
        levels = (total,)
    check_experts(levels, boundary, "transformer" in parts)


def check_heads(settings: PriorSettings, joint: bool) -> None:
    """Raise if settings select heads of a cross-attention, but the teacher has none."""
    if settings.head_selection == "cross" and joint:
        raise ValueError(
            "head_selection='cross' (--head_selection) needs a teacher with a cross-attention to the text; "
            "this teacher has text and vision in one self-attention"
        )


def check_guidance(settings: PriorSettings, boundary: float | None) -> None:
    """Raise if settings give a guidance for a second expert, but the teacher has none."""
    if settings.guidance_scale_2 is not None and boundary is None:
        raise ValueError(
            f"guidance_scale_2={settings.guidance_scale_2} (--guidance_scale_2) needs a teacher with a "
            "second expert for low noise levels; this teacher has none"
        )
