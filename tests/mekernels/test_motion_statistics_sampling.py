"""The error of sampled rows: in DFC and in the chosen heads, over several kinds of maps."""

import functools

import pytest
import torch
from map_kinds import KINDS, layer

import mekernels
from mekernels import MotionStatistics, VideoTokens

VIDEO = VideoTokens(8, 6, 8, text=12)
SEEDS = range(5)


@functools.cache
def layers(kinds, seed):
    found = []
    for step in range(2):
        query, key = (item.float() for item in layer(list(kinds), VIDEO, seed + step))
        found.append((query, key, mekernels.flash_attention(query, key, key)[1]))
    return found


@functools.cache
def scores(kinds, rows, seed=0, data=3):
    statistics = MotionStatistics(VIDEO, len(kinds), text_rows=[], sampled_rows=rows, seed=seed)
    for query, key, lse in layers(kinds, data):
        statistics.update(query, key, lse)
    return statistics.scores()


def dfc_error(kinds, rows):
    """Root mean square over heads and draws of the relative error of DFC."""
    exact = scores(kinds, "all").dfc
    errors = torch.stack([scores(kinds, rows, seed).dfc / exact - 1 for seed in SEEDS])
    return errors.square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("local", 0.1), ("diagonal", 0.15), ("diffuse", 0.01), ("sink", 0.08), ("text", 0.2), ("uneven", 0.5)],
)
def test_error_of_dfc_at_the_default(kind, limit):
    kinds = tuple((kind, strength / 5) for strength in range(6))
    few, default, more = (dfc_error(kinds, rows) for rows in (16, 64, 256))
    assert default < limit
    assert more < default < few
    assert len(MotionStatistics(VIDEO, 1).sampled_rows) == 64


def mixture(seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(KINDS), (16,), generator=generator).tolist()
    return tuple(
        zip([KINDS[place] for place in places], torch.rand(16, generator=generator).tolist(), strict=True)
    )


def wrong_heads(rows):
    """Share of the chosen heads that sampling chose wrongly, mean over mixtures and draws."""
    wrong = []
    for data in range(3):
        kinds = mixture(data)
        exact = set(mekernels.select_heads(scores(kinds, "all", data=100 * data)).tolist())
        for seed in SEEDS:
            chosen = set(mekernels.select_heads(scores(kinds, rows, seed, 100 * data)).tolist())
            wrong.append(len(chosen - exact) / len(exact))
    return sum(wrong) / len(wrong)


def test_error_of_the_chosen_heads_at_the_default():
    few, default = wrong_heads(8), wrong_heads(64)
    assert default < few
    assert default < 0.05


def test_the_kinds_are_what_they_say():
    """Each kind of map has its typical property, so that the errors above come from different maps."""
    kinds = tuple((kind, 1.0) for kind in KINDS)
    query, key = layer(list(kinds), VIDEO, 0)
    attention = dict(zip(KINDS, mekernels.reference.attention_map(query, key)[0], strict=True))
    block = {kind: mekernels.reference.vision_block(item, VIDEO) for kind, item in attention.items()}
    on_video = {kind: item.sum(-1).mean().item() for kind, item in block.items()}
    diagonal = {
        kind: mekernels.reference.diagonal(item, VIDEO).sum(1).mean().item() for kind, item in block.items()
    }
    assert max(diagonal, key=diagonal.get) == "diagonal"
    assert min(on_video, key=on_video.get) == "text"
    columns = {kind: item.sum(0).max().item() for kind, item in block.items()}
    assert max(columns, key=columns.get) == "sink"
    spread = {kind: (item.amax(-1).std() / item.amax(-1).mean()).item() for kind, item in block.items()}
    assert max(spread, key=spread.get) in ("uneven", "text")
