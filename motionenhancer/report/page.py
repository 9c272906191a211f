"""One self-contained HTML file that shows clips, their maps, and their run."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.video import Video
from ..files import read_json, write_text
from .picture import COLOURS, headings, scale_of
from .run_report import REPORT
from .views import KEPT, Maps, View, load_views, read_clip

PAGE = "report.html"
#: Maximum bytes of all clips, and of all maps, of a page, before base64 adds a third.
CLIP_BYTES, MAP_BYTES = 5_500_000, 4_500_000
_CURVES = ("loss_ar", "loss_align", "lambda", "learning_rate", "words_mapped", "confidence", "grad_norm")


def write_run_page(folder: Path, output: Path | None = None, ids: Sequence[str] | None = None) -> Path:
    """Write the page of a training run, and return its file.

    Args:
        folder: the run's output folder.
        output: the file; `report.html` in the folder by default.
        ids: samples to show; by default all samples that the run kept.

    Raises:
        ValueError: the folder is not a training run, or it has no sample with a given id.
        OSError: a file cannot be read or written.
    """
    try:
        report = read_json(folder / REPORT)
        log = report.get("training", {}).get("log", [])
        curves = {
            name: [[entry["step"], entry[name]] for entry in log if name in entry and "step" in entry]
            for name in _CURVES
        }
        temperature = report.get("identity", {}).get("prior_temperature", 1.0)
        facts = _facts(report)
    except FileNotFoundError:
        raise ValueError(f"{folder}: not the folder of a training run, as it has no {REPORT}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / REPORT}: not a run's report ({error})") from error
    views = pick(load_views(folder), ids, f"{folder / KEPT}")
    shown = ("status", "error", "identity", "plan", "versions", "teacher", "alignment", "resumed_from")
    run = {
        "name": str(folder),
        "facts": facts,
        "curves": curves,
        "evaluation": report.get("evaluation"),
        "settings": _flat({key: report[key] for key in shown if key in report}),
        "temperature": temperature,
    }
    target = output or folder / PAGE
    write_page(target, views, f"Training run {folder}", run)
    return target


def _facts(report: dict[str, Any]) -> list[list[str]]:
    """What a run's report says of its models, of λ and of its length, as pairs of a name and a text."""
    given, plan = report.get("identity", {}), report.get("plan", {})
    teacher, steps = given.get("teacher"), plan.get("steps")
    found = {
        "status": ": ".join(filter(None, (report.get("status"), report.get("error")))),
        "student": given.get("student"),
        "teacher": " + ".join(teacher) if isinstance(teacher, list) else teacher,
        "λ, the weight of the alignment loss": plan.get("schedule"),
        "data": given.get("data"),
        "steps": steps and f"{steps['total']}, each of {steps['batch']} samples",
    }
    return [[name, value] for name, value in found.items() if value]


def pick(views: Sequence[View], ids: Sequence[str] | None, where: str) -> list[View]:
    """Return the views of these ids, in their order.

    Raises:
        ValueError: an id has no view.
    """
    if not ids:
        return list(views)
    known = {view.id: view for view in views}
    for name in ids:
        if name not in known:
            raise ValueError(f"--id {name}: not in {where}; it has {', '.join(known) or 'none'}")
    return [known[name] for name in ids]


def write_page(path: Path, views: Sequence[View], title: str, run: dict[str, Any] | None = None) -> None:
    """Write a page of clips; with `run`, also the facts about their run.

    Raises:
        OSError: the file cannot be written.
    """
    clips = [read_clip(view) for view in views]
    maps = [
        view.sources(1.0 if clip is None else clip.duration) for view, clip in zip(views, clips, strict=True)
    ]
    for pool in (1, 2, 4, 8):
        packed = [_pack(sources, pool) for sources in maps]
        size = sum(len(one["data"]) for entry in packed for one in entry["sources"].values())
        if size <= MAP_BYTES * 4 / 3:
            break
    budget = CLIP_BYTES // max(4, len(views))
    body = {
        "title": title,
        "colours": COLOURS,
        "names": headings({name for sources in maps for name in sources}),
        "run": run,
        "views": [
            {**_about(view), **_frames(clip, budget, entry["sources"]), "maps": entry}
            for view, clip, entry in zip(views, clips, packed, strict=True)
        ],
    }
    # json has no NaN and no infinity: they become null.
    body = json.loads(json.dumps(body), parse_constant=lambda _: None)
    # Without "<" no text can begin a comment or end the script.
    data = json.dumps(body, ensure_ascii=False).replace("<", "\\u003c")
    kinds = ("html", "css", "js")
    html, css, js = ((files(__package__) / f"page.{kind}").read_text("utf-8") for kind in kinds)
    parts = {"STYLE": css, "DATA": data, "SCRIPT": js}
    write_text(path, re.sub(r"/\*(STYLE|DATA|SCRIPT)\*/", lambda found: parts[found[1]], html))


def _about(view: View) -> dict[str, Any]:
    prior = view.prior
    about: dict[str, Any] = {
        "id": view.id,
        "task": view.task,
        "answer": view.answer,
        "words": view.words(),
        "scores": view.scores,
        "video": None if view.video is None else str(view.video),
    }
    if prior is not None:
        about |= {"heads": None, "confidence": prior.confidence, "timed": bool(prior.times)}
        if prior.heads:  # A prior of regions has none.
            heads = {"scores": prior.head_scores, "chosen": prior.heads}
            how = prior.settings
            about["heads"] = {**heads, "selection": how.head_selection, "ratio": how.head_ratio}
            about["reading"] = (
                f"in one pass at noise level {how.noise_level}; 0 is the clean clip, 999 is almost noise"
                if how.mode == "renoise"
                else f"by {how.steps} steps of inversion and {how.steps} steps of reconstruction"
            )
    return about


def _frames(video: Video | None, budget: int, sources: dict[str, Any]) -> dict[str, Any]:
    """A clip as JPEGs of at most `budget` bytes in all; without the clip, the times of its maps."""
    if video is None:
        times = sorted({time for one in sources.values() for time in one["times"]})
        _, height, width = max((one["grid"] for one in sources.values()), default=(1, 1, 1))
        return {"frames": [], "times": times, "duration": max(times, default=0.0), "size": [width, height]}
    encoded: list[bytes] = []
    height, width = video.frames.shape[1:3]
    for share, quality in ((1.0, 90), (1.0, 75), (0.8, 70), (0.6, 60), (0.4, 50), (0.25, 40), (0.12, 30)):
        size = (max(1, round(width * share)), max(1, round(height * share)))
        encoded = [_jpeg(Image.fromarray(frame).resize(size), quality) for frame in video.frames]
        if sum(map(len, encoded)) <= budget:
            break
    return {
        "frames": [base64.b64encode(one).decode() for one in encoded],
        "times": [round(float(time), 4) for time in video.timestamps],
        "duration": video.duration,
        "size": [width, height],
    }


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
    return stream.getvalue()


def _pack(sources: dict[str, Maps], pool: int) -> dict[str, Any]:
    """Maps as compressed bytes: the square root of a density over the word's highest, in 255 steps.

    Args:
        sources: of one view.
        pool: cells of a side that become one, where a page would be too large.
    """
    pooled = {name: _pooled(maps, pool) for name, maps in sources.items()}
    rows = sorted({row for maps in pooled.values() for row in maps.rows})
    peaks, tops, found = {}, {}, {}
    for row in rows:
        each = [maps.rows[row] for maps in pooled.values() if row in maps.rows]
        peaks[row] = max(float(values.max()) for values in each) or 1.0
        tops[row] = scale_of(each)
    for name, maps in pooled.items():
        steps = [np.rint(255 * np.sqrt(values.clip(0) / peaks[row])) for row, values in maps.rows.items()]
        data = np.stack(steps).astype(np.uint8).tobytes() if steps else b""
        found[name] = {
            "grid": maps.grid,
            "times": [round(time, 4) for time in maps.times],
            "rows": list(maps.rows),
            "data": base64.b64encode(zlib.compress(data)).decode(),
        }
    return {"sources": found, "peaks": peaks, "tops": tops}


def _pooled(maps: Maps, pool: int) -> Maps:
    frames, height, width = maps.grid
    if pool == 1:
        return maps
    small = (frames, -(-height // pool), -(-width // pool))

    def shrunk(values: np.ndarray) -> np.ndarray:
        cells = torch.from_numpy(values.reshape(1, *maps.grid))
        return torch.nn.functional.interpolate(cells, small[1:], mode="area").numpy().reshape(-1)

    return Maps(small, maps.times, {row: shrunk(values) for row, values in maps.rows.items()})


def _flat(value: Any, name: str = "") -> list[list[str]]:
    """Nested settings as pairs of a dotted name and a text."""
    if isinstance(value, dict):
        named = ((f"{name}.{key}" if name else key, entry) for key, entry in value.items())
        return [pair for dotted, entry in named for pair in _flat(entry, dotted)]
    return [[name, value if isinstance(value, str) else json.dumps(value)]]
