"""What a motion prior is, and how a teacher makes one.

Source: MotionEnhancer (arXiv 2606.06853), sections on motion-sensitive head selection and motion-salient
    tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from mekernels import select_heads

from ..teachers.frames import grid_times
from ..teachers.inversion import invert, reconstruct, renoise
from ..teachers.protocol import TextEncoding, VideoLatents
from ..teachers.teacher import Teacher
from .confidence import prior_confidence
from .pool import AttentionPool
from .prior_settings import PriorSettings, batch_settings, check_guidance, check_heads
from .token_choice import choose_tokens

#: Note of a prior whose text has characters that are in none of its words; see `MotionPrior.unknown`.
PARTLY_UNKNOWN = "text with characters that the teacher's tokenizer does not know"


def say_cut(texts: int, words: int) -> str:
    """Say how many texts were cut to the teacher's length, and how many words they lost."""
    return f"{texts} texts cut to the teacher's length" + (f", {words} words left out" if texts else "")


#: Written into every stored prior and its key; raised when the arithmetic behind a prior changes.
FORMAT = 5


@dataclass(frozen=True, repr=False)
class MotionPrior:
    """Where and when the teacher places each motion-salient word of a text in a video.

    Attributes:
        attention: (T', S) float16 on the CPU, A_VDM: one row for each kept token, over the S = F·H·W vision
            tokens in raster order t, h, w. Rows are attention mass and do not sum to one.
        tokens: T' token strings, as the teacher's tokenizer spells them.
        spans: T' character ranges in `prompt`.
        prompt: the text of the teacher.
        grid: (F, H, W) of the vision tokens.
        heads: ascending indices of the chosen heads; all heads without selection. They are heads of the
            self-attention; with `head_selection="cross"`, of the cross-attention.
        head_scores: {"dfc", "tcs", "dsr", "composite"}: one value for each head.
        all_tokens: every real token of the prompt, kept or not.
        all_spans: their character ranges.
        token_scores: motion score of every real token.
        kept: indices of the kept tokens among all, ascending.
        confidence: {"concentration", "variation", "confidence"}, each in [0, 1]; see `prior_confidence`.
        teacher: digest of the teacher's folder.
        settings: settings of the extraction.
        frames_given: number of given video frames.
        frames_used: number of video frames that the teacher encoded.
        truncated: number of text tokens that were cut because the teacher takes fewer.
        cut_words: number of words of the text, separated by spaces, that were cut with them.
        unknown: number of characters for which the teacher's tokenizer has no piece; see `TextEncoding`.
        evaluations: number of transformer evaluations, counted per batch row.
        seconds: stage → wall time; it is neither compared nor part of the key.
        times: F times in seconds since the clip's first frame, one for each frame of the grid; empty if the
            times of the frames were not given.
        clip: digest of the clip's file and its segment, as in the prior's key; empty without a store.
        origin: names of the clip's file and of its teacher, for lists; empty without a store.
    """

    attention: torch.Tensor
    tokens: list[str]
    spans: list[tuple[int, int]]
    prompt: str
    grid: tuple[int, int, int]
    heads: list[int]
    head_scores: dict[str, list[float]]
    all_tokens: list[str]
    all_spans: list[tuple[int, int]]
    token_scores: list[float]
    kept: list[int]
    confidence: dict[str, float]
    teacher: str
    settings: PriorSettings
    frames_given: int
    frames_used: int
    truncated: int = 0
    cut_words: int = 0
    unknown: int = 0
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    times: list[float] = field(default_factory=list)
    clip: str = ""
    origin: str = ""

    def __repr__(self) -> str:
        """The text, words, grid, teacher and non-default settings, in one line."""
        words = ", ".join(self.prompt[slice(*span)] for span in self.spans)
        given = [
            f"{one.name}={value}"
            for one in fields(self.settings)
            if (value := getattr(self.settings, one.name)) != one.default
        ]
        about = [
            shorten(repr(self.prompt), 60, placeholder="..."),
            f"words: {shorten(words, 60, placeholder=' ...')}",
            f"grid {'×'.join(map(str, self.grid))}",
            f"teacher {self.teacher[:8]}",
            " ".join(given) or "default settings",
        ]
        return f"MotionPrior({', '.join(about)})"

    def _repr_html_(self) -> str:
        """A table for notebooks: each word's share of attention on each frame; darker means more."""
        frames, high, wide = self.grid
        rows = self.attention.float().reshape(-1, frames, high * wide).sum(dim=2)
        shares = rows / rows.sum(dim=1, keepdim=True).clamp(min=1e-12)
        lines = [
            f"<tr><th>{escape(self.prompt[slice(*span)])}</th>"
            + "".join(f'<td style="background:rgba(200,60,40,{s:.2f})">{s:.2f}</td>' for s in row)
            + "</tr>"
            for span, row in zip(self.spans, shares.tolist(), strict=True)
        ]
        head = "".join(f"<th>{number}</th>" for number in range(frames))
        table = f"<table><tr><th>word, frame</th>{head}</tr>{''.join(lines)}</table>"
        return f"<p>{escape(repr(self))}</p>{table}"

    def describe(self) -> dict[str, Any]:
        """All fields except the attention, ready for JSON."""

        def listed(kept: bool) -> list[dict[str, Any]]:
            return [
                {"token": token, "text": self.prompt[slice(*span)], "score": score}
                for i, (token, span, score) in enumerate(
                    zip(self.all_tokens, self.all_spans, self.token_scores, strict=True)
                )
                if (i in self.kept) == kept
            ]

        return {
            "prompt": self.prompt,
            "grid": list(self.grid),
            "head_selection": self.settings.head_selection,
            "token_selection": self.settings.token_selection,
            "heads": self.heads,
            "head_scores": self.head_scores,
            "kept_tokens": listed(True),
            "dropped_tokens": listed(False),
            "confidence": self.confidence,
            "frames_given": self.frames_given,
            "frames_used": self.frames_used,
            "truncated_tokens": self.truncated,
            "unknown_characters": self.unknown,
            "evaluations": self.evaluations,
            "teacher": self.teacher,
            "settings": asdict(self.settings),
            "seconds": self.seconds,
        }


class PriorError(ValueError):
    """This clip and text cannot give a prior; the message says why. Other clips are not affected."""


@torch.no_grad()
def extract_prior(
    teacher: Teacher,
    frames: np.ndarray,
    text: str,
    steps: int = 5,
    guidance_scale: float = 6.0,
    start: str = "inverted",
    memory: bool = True,
    head_ratio: float = 0.5,
    token_ratio: float = 0.5,
    *,
    times: Sequence[float] | np.ndarray | None = None,
    **options: Any,
) -> MotionPrior:
    """Read the motion prior of one clip and text from a frozen teacher.

    The clip is encoded, inverted in `steps` DDIM steps with an empty prompt, and reconstructed under the
    text. The attention of the conditional generated stream is pooled over all layers and steps. The paper's
    parameter-free scores select the heads and tokens to keep, by default half of each.

    Args:
        teacher: from `load_teacher`.
        frames: (n, h, w, 3) uint8, n ≥ 2; resampled and resized to a frame count and size that the teacher
            takes.
        text: description of the clip; its tokens are the rows of the prior.
        steps, guidance_scale, start, memory, head_ratio, token_ratio: see `PriorSettings`.
        times: (n,) times of the frames in seconds; the prior then has `times` for the frames of its grid.
        **options: the other fields of `PriorSettings`: sampled_rows, seed, mode, noise_level, step_weights,
            head_selection, token_selection, guidance_scale_2, diagonal_width, token_scores, token_unit.

    Returns:
        A `MotionPrior`.

    Raises:
        TypeError: frames or text have the wrong type, or an option is unknown.
        ValueError: frames have the wrong shape, a setting is out of range, or steps do not divide the
            schedule.
        PriorError: the text is empty, the teacher's tokenizer has no pieces for it, or the teacher's
            attention holds NaN or infinity.

    Example:
        >>> prior = extract_prior(teacher, frames, "the red square moves left")   # doctest: +SKIP
        >>> prior.attention.shape, prior.tokens                                   # doctest: +SKIP
    """
    settings = PriorSettings(steps, guidance_scale, start, memory, head_ratio, token_ratio, **options)
    reading = read_attention(teacher, frames, text, settings)
    prior = select_prior(reading, settings)
    if times is None:
        return prior
    seen = reading.video
    return replace(prior, times=grid_times(times, seen.frames_used, prior.grid[0], seen.stride))


@dataclass(frozen=True)
class Reading:
    """A clip's attention under a text, read once; `select_prior` selects heads and tokens."""

    pool: AttentionPool
    video: VideoLatents
    prompt: TextEncoding
    teacher: str
    settings: PriorSettings
    evaluations: int
    seconds: dict[str, float]


@torch.no_grad()
def read_attention(
    teacher: Teacher,
    frames: np.ndarray | VideoLatents,
    text: str,
    settings: PriorSettings,
) -> Reading:
    """Read a clip's attention under a text from a frozen teacher; arguments as in `extract_prior`.

    To read a clip in several ways, encode it only once: `frames` may be the result of `teacher.encode_video`.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    if not text.strip():
        raise PriorError("text is empty")
    check_guidance(settings, teacher.boundary)
    check_heads(settings, teacher.plan.joint)
    full = settings.mode == "reconstruct"
    seconds: dict[str, float] = {}
    with _timed(seconds, "encode", teacher):
        video = frames if isinstance(frames, VideoLatents) else teacher.encode_video(frames)
        prompt = teacher.encode_text(text)
    vision = video.tokens.vision
    schedule = teacher.schedule(settings.steps, vision) if full else teacher.level(settings.noise_level)
    if not prompt.words:
        raise PriorError(f"text {text[:60]!r} has no word that the teacher's tokenizer knows")
    if not torch.isfinite(video.latents).all():
        raise PriorError("the encoded video holds NaN or infinity")
    # Masked padding takes no part in the attention.
    attended = video.tokens.text if prompt.attended is None else prompt.attended
    layout = replace(video.tokens, text=attended)
    count = len(prompt.tokens)
    pool = AttentionPool(layout, teacher.heads, count, settings, teacher.device, prompt.rows)
    if full:
        empty = teacher.encode_text("").embeds
        with _timed(seconds, "invert", teacher), teacher.showing(video):
            trajectory = invert(teacher, video.latents, schedule, empty)
        with _timed(seconds, "reconstruct", teacher), teacher.showing(video):
            reconstruct(
                teacher,
                trajectory,
                schedule,
                prompt.embeds,
                empty,
                guidance_scale=settings.guidance_scale,
                guidance_scale_2=settings.guidance_scale_2,
                start=settings.start,
                memory=settings.memory,
                seed=settings.seed,
                readers=pool.at_level,
            )
    else:
        with _timed(seconds, "renoise", teacher), teacher.showing(video):
            renoise(teacher, video.latents, schedule, prompt.embeds, pool, seed=settings.seed)
    evaluations = batch_settings(settings, teacher.plan).evaluations
    return Reading(pool, video, prompt, teacher.id, settings, evaluations, seconds)


@torch.no_grad()
def select_prior(reading: Reading, settings: PriorSettings) -> MotionPrior:
    """Select heads and tokens of a reading. `settings` may differ from its own only in the selection.

    Raises:
        PriorError: NaN or infinity in the teacher's attention.
    """
    began = time.perf_counter()
    video, prompt, pool = reading.video, reading.prompt, reading.pool
    try:
        scores = pool.scores()
        named = {"dfc": scores.dfc, "tcs": scores.tcs, "dsr": scores.dsr, "composite": scores.composite()}
        heads = select_heads(scores, settings.head_ratio)
        text_attention = pool.text_attention(heads)
    except ValueError as error:
        raise PriorError(f"the teacher's attention cannot be scored: {error}") from error
    if not torch.isfinite(text_attention).all():
        raise PriorError("the teacher's attention holds NaN or infinity")
    token_scores, chosen = choose_tokens(
        text_attention, prompt, video.tokens, settings.token_ratio, settings.token_scores, settings.token_unit
    )
    attention, kept = text_attention.cpu()[chosen].half(), chosen.tolist()
    return MotionPrior(
        attention=attention,
        tokens=[prompt.tokens[i] for i in kept],
        spans=[prompt.spans[i] for i in kept],
        prompt=prompt.text,
        grid=video.tokens.grid,
        heads=heads.tolist(),
        head_scores={name: values.tolist() for name, values in named.items()},
        all_tokens=list(prompt.tokens),
        all_spans=list(prompt.spans),
        token_scores=token_scores.tolist(),
        kept=kept,
        confidence=prior_confidence(attention, video.tokens.grid),
        teacher=reading.teacher,
        settings=settings,
        frames_given=video.frames_given,
        frames_used=video.frames_used,
        truncated=prompt.truncated,
        cut_words=len(prompt.text[prompt.read :].split()),
        unknown=prompt.unknown,
        evaluations=reading.evaluations,
        seconds={**reading.seconds, "select": round(time.perf_counter() - began, 4)},
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str, teacher: Teacher) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if teacher.device.type == "cuda":
        # Not the whole device: a training may be running on another stream of it.
        torch.cuda.current_stream(teacher.device).synchronize()
    seconds[name] = round(time.perf_counter() - began, 4)
