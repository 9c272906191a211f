"""The arms of the toy study: what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass, replace

from motionenhancer.priors.prior_settings import PriorSettings
from studies.toy.controls import CONTROLS

__all__ = ["ARMS", "BOTH", "LEVEL", "PAIRS", "SWEEPS", "Arm", "Regime"]


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning.

    Attributes:
        name: in tables.
        weight: λ at the start; 0 is plain fine-tuning.
        schedule: of λ over the run; "linear" falls to 0.
        prior: "teacher"; "masks", the true masks of the objects; "student", the base student's own maps of
            the words that the teacher's priors keep; or "none".
        control: name in `controls.CONTROLS` of the maps that replace the teacher's; "" for none.
        mode, noise_level, steps, head_selection, token_selection, ratio: of the teacher's reading, as in
            `PriorSettings`; ratio is the ratio of heads and of words.
        aligner: of the alignment.
        temperature: of the teacher's priors, see `align`; true masks are sharp.
        shown: "video"; or a control that hides motion: "shuffled" frames or the "middle" frame alone.
    """

    name: str
    weight: float = 1.0
    schedule: str = "linear"
    prior: str = "teacher"
    control: str = ""
    mode: str = "reconstruct"
    noise_level: int = 200
    steps: int = 5
    head_selection: str = "mhs"
    token_selection: str = "mtti"
    ratio: float = 0.5
    aligner: str = "identity"
    temperature: float = 0.25
    shown: str = "video"

    def settings(self) -> PriorSettings:
        """The teacher's settings for this arm's priors."""
        return PriorSettings(
            steps=self.steps,
            mode=self.mode,
            noise_level=self.noise_level,
            head_ratio=self.ratio,
            token_ratio=self.ratio,
            head_selection=self.head_selection,
            token_selection=self.token_selection,
            sampled_rows="all",
        )


@dataclass(frozen=True)
class Regime:
    """What all arms share: clips, steps of ``batch`` clips, peak learning rate, the seed of the clips."""

    clips: int = 9600
    test_clips: int = 600
    steps: int = 2400
    batch: int = 16
    learning_rate: float = 1e-3
    world_seed: int = 1


BOTH = Arm("both selections")
ARMS: tuple[Arm, ...] = (
    Arm("plain", weight=0.0, prior="none"),
    Arm("no selection", head_selection="off", token_selection="off"),
    Arm("MHS only", token_selection="off"),
    Arm("MTTI only", head_selection="off"),
    BOTH,
    Arm("true masks", prior="masks", temperature=1.0),
    Arm("plain, shuffled", weight=0.0, prior="none", shown="shuffled"),
    Arm("plain, middle frame", weight=0.0, prior="none", shown="middle"),
)
#: Both selections of one evaluation, in place of the paper's inversion and reconstruction.
LEVEL = replace(BOTH, name="level 200", mode="renoise")
SWEEPS: dict[str, tuple[Arm, ...]] = {
    "steps": tuple(replace(BOTH, name=f"{n} steps", steps=n) for n in (2, 10)),
    "noise level": tuple(
        replace(LEVEL, name=f"level {level}", noise_level=level) for level in (20, 100, 200, 400, 700)
    ),
    "selection at level 200": (
        replace(LEVEL, name="level 200, no selection", head_selection="off", token_selection="off"),
        replace(LEVEL, name="level 200, MHS only", token_selection="off"),
        replace(LEVEL, name="level 200, MTTI only", head_selection="off"),
        LEVEL,
    ),
    "ratio": (LEVEL, *(replace(LEVEL, name=f"ratio {r}", ratio=r) for r in (0.25, 0.75))),
    "weight": (LEVEL, *(replace(LEVEL, name=f"weight {w:g}", weight=w) for w in (0.1, 0.3, 3.0))),
    "temperature": (
        LEVEL,
        *(replace(LEVEL, name=f"temperature {t:g}", temperature=t) for t in (0.5, 1.0)),
    ),
    "schedule": (LEVEL, replace(LEVEL, name="schedule constant", schedule="constant")),
    "aligner": (
        LEVEL,
        *(replace(LEVEL, name=f"aligner {a}", aligner=a) for a in ("mlp", "pointwise", "conv")),
    ),
}
SWEEPS["controls"] = (
    LEVEL,
    *(replace(LEVEL, name=name, control=name) for name in CONTROLS),
    replace(LEVEL, name="own maps", prior="student", temperature=1.0),
    replace(LEVEL, name="own maps, sharpened", prior="student"),
)
#: Pairs of arms that are compared seed by seed: an arm and the arm that it adds to.
PAIRS: tuple[tuple[str, str], ...] = (
    ("MHS only", "no selection"),
    ("MTTI only", "no selection"),
    ("both selections", "no selection"),
    ("both selections", "MHS only"),
    ("both selections", "MTTI only"),
    ("both selections", "level 200"),
    ("level 200, MHS only", "level 200, no selection"),
    ("level 200, MTTI only", "level 200, no selection"),
    ("level 200", "level 200, no selection"),
    ("level 200", "level 200, MHS only"),
    ("level 200", "level 200, MTTI only"),
    *(("level 200", arm.name) for arm in SWEEPS["controls"][1:]),
)
