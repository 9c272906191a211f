"""Maps over a clip as pictures: contact sheets, overlaid clips, and the table of colours they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..data import Clip, read_frames
from ..data.encode import encode_video
from ..priors.prior import MotionPrior
from .views import SOURCES, Maps, View, read_clip

#: Ten evenly spaced colours of matplotlib's maps that readers with any colour vision can tell apart.
COLOURS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725",
    "cividis": "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838",
}
_OPACITY = 0.65
_BLANK = np.zeros((2, 64, 64, 3), np.uint8)


def scale_of(rows: Sequence[np.ndarray]) -> float:
    """Return the density that is drawn in the brightest colour: only the highest 0.5 % of cells exceed it.

    Args:
        rows: the maps of one word, of all sources: one scale serves them all.
    """
    return max((float(np.quantile(row, 0.995)) for row in rows), default=0.0) or 1.0


def headings(sources: Iterable[str]) -> dict[str, str]:
    """Return the headings of the sources' maps, in their order.

    >>> headings(["teacher", "after"])
    {'teacher': 'teacher', 'after': 'student'}
    """
    trained = "before" in sources
    names = dict(zip(SOURCES, ("teacher", "student before", "student after"), strict=True))
    return names if trained else {"teacher": "teacher", "after": "student"}


def _coloured(values: np.ndarray, colours: str) -> np.ndarray:
    """(h, w) in [0, 1] → (h, w, 3) uint8."""
    table = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in COLOURS[colours].split()])
    at = np.linspace(0, 1, len(table))
    return np.stack([np.interp(values, at, table[:, i]) for i in range(3)], axis=-1).astype(np.uint8)


def overlay(
    frame: np.ndarray, maps: Maps, row: int, time: float, scale: float, *, smooth: bool, colours: str
) -> np.ndarray:
    """Lay the map of one word over a frame.

    Args:
        frame: (h, w, 3) uint8.
        maps: maps of one source.
        row: row of the word; for a word without a map, the frame is unchanged.
        time: time of the frame in seconds; the nearest frame of the grid is drawn.
        scale: density of the brightest colour.
        smooth: interpolate between the grid's cells.
        colours: a name of `COLOURS`.
    """
    if row not in maps.rows:
        return frame
    nearest = int(np.argmin(np.abs(np.asarray(maps.times) - time)))
    cells = np.clip(maps.rows[row].reshape(maps.grid)[nearest] / scale, 0, 1)
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    size = (frame.shape[1], frame.shape[0])
    values = np.asarray(Image.fromarray(cells.astype(np.float32)).resize(size, way)).clip(0, 1)
    # Little attention is drawn more transparent, so that the clip is visible.
    share = _OPACITY * (0.25 + 0.75 * values)[..., None]
    return ((1 - share) * frame + share * _coloured(values, colours)).astype(np.uint8)


def contact_sheet(
    view: View,
    words: Sequence[str] | None = None,
    *,
    frames: int = 6,
    smooth: bool = False,
    colours: str = "viridis",
    height: int = 120,
) -> Image.Image:
    """Draw frames of a clip side by side, a row for each word and source.

    Args:
        view: the clip with its maps.
        words: words to draw; by default the three with the highest scores.
        frames: number of evenly spaced frames.
        smooth, colours: as of `overlay`.
        height: height of a frame in pixels.

    Raises:
        ValueError: a word has no map.
    """
    video = read_clip(view)
    pictures = _BLANK if video is None else video.frames
    times = np.arange(len(pictures)) if video is None else video.timestamps
    sources, rows = view.sources(1.0 if video is None else video.duration), view.rows_of(words)
    chosen = np.linspace(0, len(pictures) - 1, min(frames, len(pictures))).round().astype(int)
    width = round(height * pictures.shape[2] / pictures.shape[1])
    lines: list[tuple[str, Maps | None, int, float]] = [("clip", None, 0, 1.0)]
    for row in rows:
        scale = scale_of([maps.rows[row] for maps in sources.values() if row in maps.rows])
        word = view.prompt[slice(*view.spans[row])].strip()
        names = headings(sources)
        lines += [(f"{word}\n{names[name]}", maps, row, scale) for name, maps in sources.items()]
    margin, gap = 110, 4
    sheet = Image.new("RGB", (margin + len(chosen) * (width + gap), len(lines) * (height + gap)), "white")
    write = ImageDraw.Draw(sheet)
    for line, (label, maps, row, scale) in enumerate(lines):
        top = line * (height + gap)
        write.text((4, top + height // 2 - 14), label, fill="black", font_size=13)
        for column, index in enumerate(chosen):
            cell = Image.fromarray(pictures[index]).resize((width, height))
            if maps is not None:
                options = {"smooth": smooth, "colours": colours}
                drawn = overlay(np.asarray(cell), maps, row, float(times[index]), scale, **options)  # type: ignore[arg-type]
                cell = Image.fromarray(drawn)
            sheet.paste(cell, (margin + column * (width + gap), top))
    return sheet


def write_overlay(
    path: str | Path,
    view: View,
    words: Sequence[str] | None = None,
    *,
    smooth: bool = True,
    colours: str = "viridis",
) -> None:
    """Write an mp4 of the clip with the maps over it: sources side by side, one row of them for each word.

    Raises:
        ValueError: the clip cannot be read, or a word has no map.
    """
    video = read_clip(view)
    if video is None:
        raise ValueError(f"{view.id}: its clip is not shown, so there is no mp4")
    sources, rows = view.sources(video.duration), view.rows_of(words, most=1)
    shown = []
    for frame, time in zip(video.frames, video.timestamps, strict=True):
        lines = []
        for row in rows:
            scale = scale_of([maps.rows[row] for maps in sources.values() if row in maps.rows])
            options = {"smooth": smooth, "colours": colours}
            parts = [overlay(frame, maps, row, float(time), scale, **options) for maps in sources.values()]  # type: ignore[arg-type]
            lines.append(np.concatenate(parts, axis=1))
        shown.append(np.concatenate(lines or [frame], axis=0))
    pictures = np.stack(shown)
    # Encoders take even sides only.
    pictures = pictures[:, : pictures.shape[1] // 2 * 2, : pictures.shape[2] // 2 * 2]
    encode_video(path, np.ascontiguousarray(pictures), fps=max(1.0, len(pictures) / video.duration))


def draw_prior(
    prior: MotionPrior,
    video: str | Path | Clip | None = None,
    words: Sequence[str] | None = None,
    **how: Any,
) -> Image.Image:
    """Draw a prior as a picture, which a notebook shows by itself.

    Args:
        prior: from `extract_prior` or a store.
        video: the clip of the prior; without it, the maps are drawn on black.
        words, **how: as of `contact_sheet`.

    Raises:
        VideoError: the clip cannot be read.
        ValueError: a word has no map.

    Example:
        >>> draw_prior(prior, "clip.mp4", ["moves"])   # doctest: +SKIP
    """
    if video is not None:
        video = video if isinstance(video, Clip) else Path(video)
        read_frames(video, num_frames=1)
    return contact_sheet(View.of_prior(prior, video=video), words, **how)
