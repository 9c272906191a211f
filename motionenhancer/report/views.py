"""The data of one clip on a page: its text, its prior and a student's maps before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..data import Clip, read_frames
from ..data.clip import segment_of
from ..data.video import Video
from ..files import whole_file
from ..priors.prior import MotionPrior
from ..priors.storage import prior_from_text, text_of_prior

#: Sources of the maps on a page, in their order.
SOURCES = ("teacher", "before", "after")
KEPT = Path("report") / "samples.safetensors"
MOST_FRAMES = 49
Grid = tuple[int, int, int]


class Maps(NamedTuple):
    """Maps of words over a grid.

    Attributes:
        grid: (F, H, W).
        times: F seconds since the clip's first frame.
        rows: row of `View.spans` → (F·H·W,) float32 with mean 1, so that maps on any grids are comparable.
    """

    grid: Grid
    times: list[float]
    rows: dict[int, np.ndarray]


@dataclass
class View:
    """One clip of a page.

    Attributes:
        id: id of the sample, or the start of the prior's key.
        prompt: the text of the teacher.
        video: the file or its segment; None if unknown.
        task: task of the sample; may be empty.
        prior: the teacher's prior.
        spans: character ranges in `prompt` of the words with maps; for a prior, of its kept tokens.
        grid, times: (F, H, W) of the student's vision tokens, and F seconds.
        found: indices of the `spans` that are among the student's tokens.
        maps: "before", "after" → (len(found), F·H·W) half precision, the student's attention.
        scores: "before", "after" → {"loss_ar", "loss_align", "right", "said"}, as far as they are known.
        answer: the answer that the student is trained on.
    """

    id: str
    prompt: str
    video: Path | Clip | None = None
    task: str = ""
    prior: MotionPrior | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    grid: Grid | None = None
    times: list[float] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    answer: str = ""

    @classmethod
    def of_prior(cls, prior: MotionPrior, **known: Any) -> View:
        """Return a view of a prior only; `known` holds other fields."""
        return cls(**{"id": "prior", "prompt": prior.prompt, "prior": prior, "spans": prior.spans, **known})

    def sources(self, duration: float) -> dict[str, Maps]:
        """Return the maps of every source that exists.

        Args:
            duration: seconds of the clip; frames of a prior without times are spread evenly over it.
        """
        found: dict[str, Maps] = {}
        if self.prior is not None:
            grid = self.prior.grid
            times = self.prior.times or np.linspace(0, duration, grid[0]).tolist()
            found["teacher"] = Maps(grid, times, dict(enumerate(_densities(self.prior.attention))))
        for name, rows in self.maps.items():
            assert self.grid is not None
            densities = _densities(rows)
            found[name] = Maps(self.grid, self.times, dict(zip(self.found, densities, strict=True)))
        return found

    def words(self) -> list[dict[str, Any]]:
        """Return the pieces of the text in their order, each with its state.

        The states: "kept", "dropped" by the teacher's scores, "missing": kept, but not found among the
        student's tokens, "cut": behind the last token that the teacher took, "plain": none of these.
        """
        spans: list[tuple[tuple[int, int], dict[str, Any]]] = []
        if self.prior is None:
            spans = [(at, {"state": "plain", "row": row}) for row, at in enumerate(self.spans)]
        else:
            read = bool(self.maps or self.scores)
            row_of = {token: row for row, token in enumerate(self.prior.kept)}
            for token, at in enumerate(self.prior.all_spans):
                row, state = row_of.get(token), "dropped"
                if row is not None:
                    state = "missing" if read and row not in self.found else "kept"
                spans.append((at, {"state": state, "row": row, "score": self.prior.token_scores[token]}))
        pieces: list[dict[str, Any]] = []
        end = 0
        for (start, stop), about in sorted(spans, key=lambda span: span[0]):
            # SentencePiece's pieces begin with the space before them.
            text = self.prompt[max(end, start) : stop].lstrip()
            if not text:
                continue
            if between := self.prompt[end : stop - len(text)]:
                pieces.append({"text": between, "state": "plain"})
            pieces.append({"text": text, **about})
            end = stop
        if rest := self.prompt[end:]:
            cut = self.prior is not None and self.prior.truncated > 0
            pieces.append({"text": rest, "state": "cut" if cut else "plain"})
        return pieces

    def rows_of(self, words: Sequence[str] | None, most: int = 3) -> list[int]:
        """Return the rows of words by their text, or of the words that score highest.

        Raises:
            ValueError: a word has no map; the message lists those that have.
        """
        listed = [piece for piece in self.words() if piece.get("row") is not None]
        if words is None:
            best = sorted(listed, key=lambda piece: -piece.get("score", 0))[:most]
            return sorted(piece["row"] for piece in best)
        known = {piece["text"].lower(): piece["row"] for piece in reversed(listed)}
        for word in words:
            if word.lower() not in known:
                names = ", ".join(piece["text"] for piece in listed)
                raise ValueError(f"--word {word}: {self.id} has maps of {names or 'no words'} only")
        return [known[word.lower()] for word in words]


def _densities(rows: torch.Tensor) -> np.ndarray:
    """Scale each row to mean 1; a row of zeros stays."""
    values = rows.float().numpy()
    mean = values.mean(axis=1, keepdims=True)
    return values / np.where(mean == 0, 1, mean)


def read_clip(view: View, max_pixels: int = 480 * 320) -> Video | None:
    """Decode at most `MOST_FRAMES` small frames of a view's clip; None if it cannot be read."""
    if view.video is None:
        return None
    try:
        return read_frames(view.video, max_frames=MOST_FRAMES, max_pixels=max_pixels)
    except (ValueError, OSError) as error:
        print(f"{view.id}: its clip is not shown ({error})")
        return None


def save_views(folder: Path, views: Sequence[View]) -> Path:
    """Save a run's views in its output folder: maps in half precision, the rest as json."""
    tensors: dict[str, torch.Tensor] = {}
    listed = []
    for i, view in enumerate(views):
        about = {k: v for k, v in vars(view).items() if k not in ("prior", "maps", "video")}
        if view.video is not None:
            clip = view.video if isinstance(view.video, Clip) else Clip(view.video)
            about["video"] = {"path": str(clip.path.absolute()), "start": clip.start, "end": clip.end}
        if view.prior is not None:
            about["prior"] = text_of_prior(view.prior)
            # A copy: samples of one clip and text share their prior, and files hold no tensor twice.
            tensors[f"{i}.teacher"] = view.prior.attention.half().clone()
        tensors |= {f"{i}.{name}": rows.half().clone() for name, rows in view.maps.items()}
        listed.append(about)
    target = folder / KEPT
    with whole_file(target) as temporary:
        save_file(tensors, temporary, {"views": json.dumps(listed)})
    return target


def load_views(folder: Path) -> list[View]:
    """Read the views that `save_views` wrote; an empty list if the run kept nothing.

    Raises:
        ValueError: `save_views` did not write the file.
    """
    if not (folder / KEPT).is_file():
        return []
    try:
        with safe_open(folder / KEPT, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            listed = json.loads((file.metadata() or {})["views"])
        return [_view(about, tensors, str(i)) for i, about in enumerate(listed)]
    except Exception as error:
        raise ValueError(f"{folder / KEPT}: not a file that a run wrote for its page ({error})") from error


def _view(about: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> View:
    prior, clip = about.pop("prior", None), about.pop("video", None)
    view = View(**about)
    if clip is not None:
        view.video = segment_of(Clip(Path(clip["path"]), clip["start"], clip["end"]))
    if prior is not None:
        view.prior = prior_from_text(tensors[f"{name}.teacher"], prior)
    view.maps = {when: tensors[f"{name}.{when}"] for when in SOURCES[1:] if f"{name}.{when}" in tensors}
    return view
