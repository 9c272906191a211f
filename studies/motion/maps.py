"""The targets of a captioner's attention: the teacher's maps, the true masks, and controls made from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from motionenhancer.files import whole_file
from motionenhancer.priors.combination import combine_priors
from motionenhancer.priors.confidence import prior_confidence
from motionenhancer.priors.prior import MotionPrior, read_attention, select_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.protocol import VideoLatents
from motionenhancer.teachers.teacher import Teacher
from motionenhancer.toy.language import caption
from studies.motion.clips import MAP_GRID, Maps, draw, words_of
from studies.toy.masks import prior_of_rows

__all__ = ["combined", "lift", "read_teacher", "teacher_maps"]

_PART = 100
_ONCE = PriorSettings(mode="renoise", noise_level=200, sampled_rows="all")
WAYS: dict[str, PriorSettings] = {
    "level 200": _ONCE,
    "wide diagonal": replace(_ONCE, diagonal_width=1),
    "standardized": replace(_ONCE, token_scores="standardized"),
    "inverted": PriorSettings(steps=5, sampled_rows="all"),
}


def read_teacher(
    teacher: Path, folder: Path, seed: int, count: int, ways: Sequence[str], movers: int = 2
) -> None:
    """Read the teacher's maps of the training clips with their captions; continues where it was stopped.

    One file holds a hundred clips read in one way: the rows of all words, and which words token selection
    keeps, with head selection ("mhs") and without it ("off"). Kept punctuation is left out.
    """
    wanted = {
        start: [way for way in ways if not _part(folder, seed, movers, way, start).exists()]
        for start in range(0, count, _PART)
    }
    missing = {start: left for start, left in wanted.items() if left}
    if not missing:
        return
    loaded = load_teacher(teacher, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for start, left in tqdm(missing.items(), desc="teacher's maps", unit="part"):
        found: dict[str, dict[str, list[torch.Tensor]]] = {way: {} for way in left}
        for i in range(start, min(start + _PART, count)):
            scene, clip = draw(seed, "train", i, movers)
            video = loaded.encode_video(clip.frames)
            for way in left:
                for name, value in _read(loaded, video, caption(scene), WAYS[way]).items():
                    found[way].setdefault(name, []).append(value)
        for way, values in found.items():
            with whole_file(_part(folder, seed, movers, way, start)) as temporary:
                save_file({name: torch.stack(each) for name, each in values.items()}, temporary)


def _read(loaded: Teacher, video: VideoLatents, text: str, way: PriorSettings) -> dict[str, torch.Tensor]:
    """One clip's tensors of a file of :func:`read_teacher`."""
    reading = read_attention(loaded, video, text, way)
    found = {}
    for heads in ("mhs", "off"):
        width = way.diagonal_width if heads == "mhs" else 0
        settings = replace(way, head_selection=heads, diagonal_width=width)
        every = select_prior(reading, replace(settings, token_selection="off", token_scores="raw"))
        spans = {span: k for k, span in enumerate(every.spans)}
        chosen = set(select_prior(reading, settings).spans)
        found[f"{heads}.rows"] = every.attention[[spans[span] for span in words_of(text)]]
        found[f"{heads}.kept"] = torch.tensor([span in chosen for span in words_of(text)])
    return found


def _part(folder: Path, seed: int, movers: int, way: str, start: int) -> Path:
    return folder / f"{way.replace(' ', '_')}-{seed}-{movers}-{start:05d}.safetensors"


def teacher_maps(
    folder: Path,
    seed: int,
    count: int,
    way: str,
    *,
    heads: bool,
    words: bool,
    temperature: float,
    movers: int = 2,
) -> Maps:
    """The maps that :func:`read_teacher` stored, with or without each of the selections."""
    parts = [load_file(_part(folder, seed, movers, way, start)) for start in range(0, count, _PART)]
    name = "mhs" if heads else "off"
    rows = torch.cat([part[f"{name}.rows"] for part in parts])
    kept = torch.cat([part[f"{name}.kept"] for part in parts])
    return Maps(rows, kept if words else torch.ones_like(kept), temperature)


def combined(each: Sequence[Maps], texts: Sequence[str]) -> Maps:
    """Several teachers' maps of the captions, combined by confidence as the package combines their priors."""
    rows, kept = torch.zeros_like(each[0].rows), torch.zeros_like(each[0].kept)
    for i, text in enumerate(texts):
        prior = combine_priors([_prior(maps.rows[i], maps.kept[i], text) for maps in each], None)
        words = {start: k for k, (start, _) in enumerate(words_of(text))}
        chosen = [words[start] for start, _ in prior.spans]
        rows[i, chosen], kept[i, chosen] = prior.attention, True
    return replace(each[0], rows=rows, kept=kept)


def _prior(rows: torch.Tensor, kept: torch.Tensor, text: str) -> MotionPrior:
    spans = [span for span, one in zip(words_of(text), kept, strict=True) if one]
    prior = prior_of_rows(text, spans, list(rows[kept].numpy()), MAP_GRID, frames=0)
    return replace(prior, confidence=prior_confidence(prior.attention, MAP_GRID))


# ---- controls: the same words, other maps ----


def _frames(maps: Maps) -> torch.Tensor:
    return maps.rows.unflatten(-1, MAP_GRID)


def another_clip(maps: Maps, seed: int) -> Maps:
    """Each clip has the maps of another clip, drawn at random: the n-th word has the n-th map."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(maps.rows), generator=generator)
    rows = torch.empty_like(maps.rows)
    rows[order] = maps.rows[order.roll(1)]
    return replace(maps, rows=rows)


def uniform(maps: Maps) -> Maps:
    return replace(maps, rows=torch.ones_like(maps.rows))


def mean_map(maps: Maps) -> Maps:
    """Each word has the mean of its rows over all clips, each row scaled to sum to one."""
    rows = maps.rows.float()
    mean = (rows / rows.sum(-1, keepdim=True)).mean(0, keepdim=True)
    return replace(maps, rows=mean.expand_as(rows).half())


def shuffled_frames(maps: Maps, seed: int) -> Maps:
    """Each clip's frames are in an order drawn at random, the same for all its words."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(MAP_GRID[0], generator=generator) for _ in maps.rows]
    return replace(
        maps,
        rows=torch.stack([f[:, order] for f, order in zip(_frames(maps), orders, strict=True)]).flatten(2),
    )


def reversed_frames(maps: Maps) -> Maps:
    return replace(maps, rows=_frames(maps).flip(2).flatten(2))


def another_object(maps: Maps) -> Maps:
    """Each word has the row of the same place in the next object's phrase; "and" keeps its row."""
    phrase = 5
    words = list(range(maps.rows.shape[1]))
    phrases = [words[0:phrase], words[phrase : 2 * phrase], words[-phrase:]]
    source = torch.arange(len(words))
    for mine, theirs in zip(phrases, [*phrases[1:], phrases[0]], strict=True):
        source[mine] = torch.tensor(theirs)
    return replace(maps, rows=maps.rows[:, source])


def lift(maps: Maps, masks: Maps) -> float:
    """Density of the maps on the objects of their words, divided by the density of a uniform map.

    The mean over the content words that are kept, after sharpening.
    """
    both = maps.kept & masks.kept
    rows, where = maps.rows[both].double(), masks.rows[both].double()
    rows = (rows / rows.amax(-1, keepdim=True)) ** (1 / maps.temperature)
    share = (rows * where).sum(-1) / rows.sum(-1)
    return float((share / where.mean(-1)).mean())
