"""The flags of priors that are made while training."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ranks import split_ranks

SOURCES = ("store", "online", "hybrid")


@dataclass
class OnlineArguments:
    """When and where a training's priors are made."""

    priors_first: bool = field(
        default=False,
        metadata={
            "help": "hybrid: make what is missing before training and let the teacher go, where teacher and "
            "student do not fit into memory together."
        },
    )
    prior_prefetch: int = field(
        default=1, metadata={"help": "Steps ahead of which the teacher reads clips; 0 waits at every step."}
    )
    prior_workers: int = field(
        default=2, metadata={"help": "Threads that decode clips ahead of the teacher."}
    )
    agreement_clips: int = field(
        default=4,
        metadata={
            "help": "renoise: read so many clips by the full procedure too, at the start, and print how far "
            "both agree; 0 leaves it out."
        },
    )
    teacher_ranks: int = field(
        default=0,
        metadata={"help": "The last so many ranks of the launch hold the teacher and do not train."},
    )

    def __post_init__(self) -> None:
        for name, least in (("prior_prefetch", 0), ("prior_workers", 1), ("agreement_clips", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        # The process group is made right after this, by transformers' own arguments.
        split_ranks(self.teacher_ranks)

    def check(self, source: str) -> None:
        """Raise unless these options make sense with `--prior_source source`.

        Raises:
            ValueError: they do not.
        """
        if self.priors_first and source != "hybrid":
            raise ValueError(
                f"--priors_first needs --prior_source hybrid, got {source}: "
                "store makes no priors and online keeps none"
            )
        if self.teacher_ranks and (source == "store" or self.priors_first):
            given = "--priors_first" if self.priors_first else "--prior_source store"
            raise ValueError(
                f"--teacher_ranks {self.teacher_ranks} with {given}: nothing would be made while training; "
                "use --prior_source online or hybrid"
            )
