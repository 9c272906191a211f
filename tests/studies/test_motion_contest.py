"""The captioner learns what it is told to, the same every time; the contest repeats nothing and adds up."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from motionenhancer.toy.models import save_teacher
from motionenhancer.toy.render import FRAMES
from motionenhancer.toy.tokenizers import t5_tokenizer
from studies.motion import contest
from studies.motion.captioner import Captioner, Regime, Targets, measure, own_rows, train, word_positions
from studies.motion.clips import GRID, MAP_GRID, Maps, draw, make_clips, words_of
from studies.motion.outcome import rank_correlation, seeds_needed, summarise, table

TINY = Regime(clips=6, test_clips=6, steps=3, batch=2)


class Told(nn.Module):
    """A stand-in for a captioner, which says given captions with some tokens exchanged."""

    def __init__(self, said: torch.Tensor) -> None:
        super().__init__()
        self.said = said
        self.language = Captioner(768, 0, 16, 1).language

    def forward(self, tubes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        embedded = torch.cat([torch.zeros(len(tokens), 32, 16), torch.zeros(*tokens.shape, 16)], 1)
        self.language.model(inputs_embeds=embedded, use_cache=False)
        return nn.functional.one_hot(self.said[:, 1:], 200).float()


@pytest.mark.parametrize(("wrong", "right"), [((), 100.0), ((0,), 100 * 5 / 6), ((0, 1, 2), 50.0)])
def test_a_right_answer_is_the_whole_phrase(wrong: tuple[int, ...], right: float) -> None:
    clips = make_clips(0, "test", 6)
    for token, name in ((3, "verb"), (4, "direction")):
        said = clips.tokens.clone()
        said[list(wrong), token] = 0
        found = measure(Told(said), clips)  # type: ignore[arg-type]
        assert found["right"] == pytest.approx(right)
        assert found["verb"] == pytest.approx(right if name == "verb" else 100.0)
    said = clips.tokens.clone()
    said[:, 9:] = 0  # words about the other objects do not count
    assert measure(Told(said), clips)["right"] == 100.0  # type: ignore[arg-type]


def test_the_colour_is_that_of_the_last_object() -> None:
    clips = make_clips(0, "test", 6)
    colours = [re.findall(r"\w+", text)[12] for text in clips.texts]
    assert colours == [draw(0, "test", i)[0].objects[-1].colour for i in range(6)]
    assert measure(Told(clips.tokens), clips)["colour"] == 100.0  # type: ignore[arg-type]
    said = clips.tokens.clone()
    for i in (0, 4):
        said[i, [t5_tokenizer().decode([t]) for t in said[i]].index(colours[i])] = 0
    found = measure(Told(said), clips)  # type: ignore[arg-type]
    assert found["colour"] == pytest.approx(100 * 4 / 6)
    assert found["right"] == pytest.approx(100.0)


def test_own_maps_are_the_models_attention() -> None:
    clips = make_clips(0, "train", 2)
    model = Captioner(clips.tubes.shape[-1], 0, 16, 2).eval()
    model.language.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    for layer in model.language.model.layers:
        layer.self_attn.register_forward_hook(lambda *call: seen.append(call[2][1].mean(1)))
    found = own_rows(model, clips)
    whole = torch.stack(seen).mean(0)[:, :, :32]
    for i, text in enumerate(clips.texts):
        starts = [start for start, _ in clips.spans[i]]
        at = [32 + starts.index(start) for start, _ in words_of(text)]
        row = whole[i, at].unflatten(-1, GRID)
        wanted = (
            nn.functional.interpolate(row, MAP_GRID, mode="trilinear", align_corners=False)
            if row.dim() == 5
            else nn.functional.interpolate(row[:, None], MAP_GRID, mode="trilinear")[:, 0]
        )
        wanted = wanted.flatten(1) / wanted.flatten(1).sum(-1, keepdim=True)
        torch.testing.assert_close(found[i].float(), wanted.detach(), atol=1e-4, rtol=2e-3)


def test_a_training_is_the_same_every_time_and_maps_matter() -> None:
    clips = make_clips(0, "train", 6)
    plain, again = (train(clips, None, 1, TINY).state_dict() for _ in range(2))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    pulled = train(clips, clips.masks, 1, TINY).state_dict()
    assert any(not torch.equal(plain[name], pulled[name]) for name in plain)
    unweighted = train(clips, clips.masks, 1, replace(TINY, weight=0.0)).state_dict()
    assert all(torch.allclose(plain[name], unweighted[name], atol=1e-6) for name in plain)


def test_maps_bring_attention_to_where_they_are() -> None:
    clips = make_clips(0, "train", 6)
    regime = replace(TINY, steps=60, batch=6, weight=30.0)
    near = measure(train(clips, clips.masks, 0, regime), clips)["distance"]
    far = measure(train(clips, None, 0, regime), clips)["distance"]
    assert near < 0.9 * far


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.25), ("loss", "squared"), ("normalize", False)]
)
def test_how_maps_are_compared_reaches_the_distance(name: str, value: Any) -> None:
    clips = make_clips(0, "train", 2)
    words = word_positions(clips)
    captured = SimpleNamespace(attention=torch.rand(2, int(clips.masks.kept.sum(1).max()), 32))
    plain, changed = (
        float(Targets(maps, words).distance(captured, [0, 1]))
        for maps in (clips.masks, replace(clips.masks, **{name: value}))
    )
    assert plain != pytest.approx(changed, rel=1e-3)


def test_an_arm_has_the_reading_that_its_name_says_and_what_it_asks_for_is_read() -> None:
    class Asked(contest.Material):
        def __init__(self) -> None:
            self.asked: list[tuple[str, bool, bool]] = []

        def teacher(
            self, way: str = "level 200", *, heads: bool = True, words: bool = True, number: int = 0
        ) -> Maps:
            self.asked.append((way, heads, words))
            return Maps(torch.ones(2, 16, 80).half(), torch.ones(2, 16, dtype=torch.bool))

    placebos = [f"{kind}'s" for kind in ("another clip", "another object")]
    placebos += ["frames shuffled", "frames reversed", "mean of all clips"]
    wanted = {
        "": ("level 200", True, True),
        ", MTTI only": ("level 200", False, True),
        ", inverted": ("inverted", True, True),
        ", inverted, MTTI only": ("inverted", False, True),
    }
    arms = {f"{who}{suffix}": how for suffix, how in wanted.items() for who in [*placebos, "teacher"]}
    arms |= {f"{who}, no selection": ("level 200", False, False) for who in ("teacher", "another clip's")}
    arms |= {"teacher, wide diagonal": ("wide diagonal", True, True)}
    arms |= {"teacher, standardized scores, MTTI only": ("standardized", False, True)}
    for arm, how in arms.items():
        material = Asked()
        contest.ARMS[arm](material, 0)
        assert (contest.way_of(arm), material.asked) == (how[0], [how]), arm


def test_the_contest_runs_every_arm_once_and_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(
        tmp_path / "teacher", layers=1, frames=FRAMES, height=32, width=32, temporal_compression=2
    )
    other = save_teacher(
        tmp_path / "other", seed=1, layers=1, frames=FRAMES, height=32, width=32, temporal_compression=2
    )
    flags = ["--output_dir", str(tmp_path / "out"), "--teacher", str(teacher), str(other), "--seeds", "1"]
    flags += ["--clips", "4", "--test_clips", "4", "--steps", "2"]
    assert contest.main(flags) == 0
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*.json")]
    assert {(r["arm"], r["seed"]) for r in runs} == {(a, s) for a in contest.ARMS for s in (1,)}
    by_arm = {r["arm"]: r for r in runs if r["seed"] == 1}
    assert by_arm["uniform"]["lift"] == pytest.approx(1.0)
    assert by_arm["true masks"]["lift"] > by_arm["own, untrained"]["lift"]
    first, second = by_arm["teacher"]["teacher"], by_arm["second teacher"]["teacher"]
    assert first != second
    assert {by_arm[arm]["teacher"] for arm in ("all teachers", "all teachers, MTTI only")} == {
        f"{first}+{second}"
    }
    whose = [
        f"{who}{words}"
        for who in ("teacher", "second teacher", "all teachers")
        for words in ("", ", MTTI only")
    ]
    assert len({by_arm[arm]["lift"] for arm in whose}) == 6
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["regime"]["steps"] == 2
    assert summary["command"].startswith("python -m studies.motion.contest --output_dir ")
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 2 + len(contest.ARMS)

    monkeypatch.setattr(contest, "run", lambda *given: pytest.fail("ran again"))
    assert contest.main(flags) == 0
    with pytest.raises(SystemExit):
        contest.main([*flags, "--weight", "1"])
    assert "of another study" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        contest.main([*flags[:2], "--teacher", str(teacher), *flags[-6:], "--arms", "plain", "all teachers"])
    assert "more than one --teacher" in capsys.readouterr().err


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    def record(arm: str, seed: int, right: float, lift: float) -> dict[str, Any]:
        test = {"right": 5.0, "verb": 70.0, "direction": right, "colour": 5.0, "distance": 0.3}
        return {"arm": arm, "seed": seed, "regime": asdict(TINY), "test": test, "lift": lift}

    (tmp_path / "runs").mkdir()
    rows = [("plain", s, 20.0 + s, 1.0) for s in (1, 2, 3)] + [("teacher", 1, 31.0, 4.0)]
    rows += [("teacher", 2, 33.0, 4.0), ("uniform", 2, 12.0, 1.0)]
    for row in rows:
        (tmp_path / "runs" / f"{row[0]}-{row[1]}.json").write_text(json.dumps(record(*row)))
    other = record("teacher", 9, 99.0, 1.0) | {"regime": asdict(replace(TINY, steps=9))}
    (tmp_path / "runs" / "other.json").write_text(json.dumps(other))
    summary = summarise(tmp_path, TINY)
    teacher = summary["arms"]["teacher"]
    assert teacher["seeds"] == [1, 2]
    assert teacher["over plain"]["direction"]["mean"] == pytest.approx(10.5)
    assert teacher["over plain"]["direction"]["half"] == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert summary["arms"]["uniform"]["over teacher"]["direction"]["mean"] == pytest.approx(-21.0)
    shown = table(summary, ["plain", "teacher", "never run"]).splitlines()
    assert len(shown) == 4
    assert "| teacher | 2 | 32.0 ± 12.7 | +10.5 ± 6.4 |" in shown[3]


def test_the_seeds_an_interval_needs_follow_from_the_spread() -> None:
    assert seeds_needed([4.0]) is None
    assert seeds_needed([0.0, 10.0, 20.0]) == 385  # (1.96 · 10)² = 384.2
    assert seeds_needed([1.0, 1.0, 1.0]) == 2


@pytest.mark.parametrize(
    ("other", "mean"),
    # By hand: 1 - 6 * (1 + 1) / (5 * 24); with a tie the correlation of the ranks 1, 2.5, 2.5, 4, 5.
    [([1, 2, 3, 4, 5], 1.0), ([9, 7, 5, 3, -1], -1.0), ([2, 1, 3, 4, 5], 0.9), ([1, 2, 2, 4, 5], 0.9747)],
)
def test_a_rank_correlation_and_its_interval(other: list[float], mean: float) -> None:
    found = rank_correlation([10.0, 20.0, 30.0, 40.0, 50.0], other)
    assert found["mean"] == pytest.approx(mean, abs=1e-4)
    assert found["low"] <= found["mean"] <= found["high"]
    assert found["pairs"] == 5


def test_lift_is_set_against_the_gain_of_all_maps_but_the_true_ones(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for arm, right, lift in (
        *(("plain", 10.0, None), ("true masks", 5.0, 9.0), ("teacher", 30.0, 3.0)),
        *(("teacher, inverted", 40.0, 4.0), ("teacher, no selection", 20.0, 2.0), ("uniform", 90.0, 1.0)),
    ):
        test = dict.fromkeys(("direction", "verb", "right", "colour", "distance"), right)
        record = {"arm": arm, "seed": 1, "regime": asdict(TINY), "test": test}
        record |= {} if lift is None else {"lift": lift}
        (tmp_path / "runs" / f"{arm}.json").write_text(json.dumps(record))
    found = summarise(tmp_path, TINY)["lift against gain, ranks"]
    assert found["readings of the teacher"]["mean"] == pytest.approx(1.0)
    assert found["all maps"]["mean"] == pytest.approx(-0.2)
    assert found["all maps"]["pairs"] == 4
