"""Training the toy's own models: ordinary folders, the same for the same seed, losses that fall."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.dataset import MotionCollator
from motionenhancer.priors.prior import extract_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.students import load_student
from motionenhancer.students.capture import capture_attention
from motionenhancer.teachers import load_teacher
from motionenhancer.toy.language import caption
from motionenhancer.toy.models import make_student
from motionenhancer.toy.render import render
from motionenhancer.toy.scene import COLOURS, SHAPES, Scene, sample_scene
from motionenhancer.toy.world import WEIGHTS
from studies.toy import lift, train_student, train_teacher
from studies.toy.masks import grid_mask, looks_prior
from studies.toy.mistakes import mistaken


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_teacher_is_trained_from_its_seed(tmp_path: Path) -> None:
    flags = ["--vae_steps", "2", "--clips", "12", "--steps", "3", "--pictures", "8", "--picture_steps", "2"]
    for name in ("a", "b"):
        assert train_teacher.main([*flags, "--output_dir", str(tmp_path / name)]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not [name for name in contents(tmp_path / "a") if name.endswith((".bin", ".pt", ".pkl"))]
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert record["steps"] == 3
    assert len(record["loss"]) == len(record["righted"]) == 1
    teacher = load_teacher(tmp_path / "a", dtype=torch.float32)
    scene, _ = train_teacher.draw(0, 5)
    prior = extract_prior(teacher, render(scene).frames, "the red square moves left", mode="renoise")
    assert prior.grid == (5, 4, 4)
    found = lift.measure(teacher, PriorSettings(mode="renoise", sampled_rows="all"), 2)
    assert {"colour", "shape", "verb", "direction"} <= set(found["lift"])
    assert 0 <= found["densest"]["verb"]["all"] <= 1
    assert "verb" in lift.lines("one", found)
    assert sum(found["chosen"]) == pytest.approx(teacher.heads / 2)


def test_a_transformer_learns_to_denoise_and_to_correct() -> None:
    pipe = train_teacher.make_teacher(seed=0, **train_teacher.TEACHER)
    scenes = [train_teacher.draw(0, 0)]
    clips = np.stack([render(scene).frames for scene, _ in scenes])
    latents = train_teacher.encode(pipe.vae, clips)
    latents = (latents.float() / latents.float().std()).half()

    def text(scene: Scene, task: str, rng: np.random.Generator) -> str:
        return caption(scene)

    lesson = train_teacher.Lesson(latents, scenes, text, 100, 8)
    steps = np.array(list(train_teacher.train_transformer(pipe, [lesson], seed=0, rate=2e-3, wrong=0.35)))
    assert steps[-20:, 0].mean() < 0.8 * steps[:20, 0].mean()
    assert np.nanmean(steps[-20:, 1]) > 0.05 + np.nanmean(steps[:20, 1])


def test_only_the_scales_of_queries_and_keys_are_sharpened() -> None:
    pipe = train_teacher.make_teacher(seed=0, **train_teacher.TEACHER)
    before = {name: weight.clone() for name, weight in pipe.transformer.named_parameters()}
    train_teacher.sharpen(pipe.transformer)
    changed = {n for n, weight in pipe.transformer.named_parameters() if not torch.equal(weight, before[n])}
    assert len(changed) == 2 * train_teacher.TEACHER["layers"]
    assert all("norm_q" in name or "norm_k" in name for name in changed)
    assert all((pipe.transformer.get_parameter(name) == 1.5).all() for name in changed)


def test_the_transformer_is_read_at_every_block_but_the_first_and_kept_as_a_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []

    def compiled(forward: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        number = len(called)
        called.append(0)

        def counted(*args: Any, **options: Any) -> Any:
            called[number] += 1
            return forward(*args, **options)

        return counted

    rates: set[float] = set()

    def exchanged(text: str, rng: np.random.Generator, *, rate: float) -> str:
        rates.add(rate)
        return mistaken(text, rng, rate=rate)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(train_teacher, "mistaken", exchanged)
    pipe = train_teacher.make_teacher(seed=0, **train_teacher.TEACHER)
    scenes = [train_teacher.draw(0, 0)]
    latents = torch.randn(1, 5, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    lesson = train_teacher.Lesson(latents, scenes, train_teacher.clip_text, 2, 2)
    steps = train_teacher.train_transformer(pipe, [lesson], seed=0, rate=1e-3, wrong=0.2, compiled=True)
    blocks = pipe.transformer.transformer_blocks
    weight = blocks[0].ff.net[0].proj.weight
    seen = [weight.detach().clone()]
    for _ in range(2):
        next(steps)
        seen.append(weight.detach().clone())
    assert [len(block._forward_hooks) for block in blocks] == [0, 1, 1, 1]
    assert next(steps, None) is None
    assert [len(block._forward_hooks) for block in blocks] == [0, 0, 0, 0]
    assert rates == {0.2}
    mean = seen[0].lerp(seen[1], 0.1).lerp(seen[2], 0.1)
    torch.testing.assert_close(weight.detach(), mean)
    assert not torch.equal(mean, seen[2])
    assert called == [2] * train_teacher.TEACHER["layers"]
    assert not any("forward" in vars(block) for block in pipe.transformer.transformer_blocks)


def test_texts_are_captions_questions_and_answers() -> None:
    scene, task = train_teacher.draw(0, 3)
    rng = np.random.default_rng(0)
    drawn = [train_teacher.clip_text(scene, task, rng) for _ in range(200)]
    assert any("?" in text for text in drawn)
    assert any(" and the " in text for text in drawn)
    assert {scene.objects[0].name in text for text in drawn} == {True, False}
    shown = [train_teacher.picture_text(scene, task, rng) for _ in range(200)]
    assert not any(word in text for text in shown for word in ("moves", "hops", "stays"))


def test_mistakes_keep_the_number_of_words_and_their_kind() -> None:
    rng = np.random.default_rng(0)
    text = "What does the red ring do? The red ring moves left and the blue bar stays still."
    made = [mistaken(text, rng) for _ in range(400)]
    words = [re.findall(r"\w+", other) for other in made]
    true = re.findall(r"\w+", text)
    assert {len(other) for other in words} == {len(true)}
    changed = [{i for i, (a, b) in enumerate(zip(true, other, strict=True)) if a != b} for other in words]
    assert 80 < sum(not places for places in changed) < 200
    assert set().union(*changed) == {3, 4, 7, 8, 9, 10, 13, 14, 15, 16}
    assert all((3 in places) == (7 in places) for places in changed)
    assert {other[3] for other in words} == set(COLOURS)
    assert {other[14] for other in words} == set(SHAPES)
    # A camera never "stays still": no sentence of the world says so.
    assert not any("stays" in mistaken("The camera moves left.", rng) for _ in range(200))


def test_a_student_is_trained_from_its_seed(tmp_path: Path) -> None:
    flags = ["--pictures", "8", "--steps", "30", "--batch", "4"]
    for name in ("a", "b"):
        assert train_student.main([*flags, "--output_dir", str(tmp_path / name)]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert len(record["loss_ar"]) == len(record["loss_align"]) == 1
    model, processor, _ = load_student(tmp_path / "a", dtype=torch.float32)
    items = train_student.Items([train_student.still_item(processor, 0, i) for i in range(8)])
    whole = train_student.FRAMES // train_student.FRAMES_A_TOKEN
    assert [item.encoded.layout.videos[0].grid for item in items.items[:3]] == [
        (whole, 4, 4),
        (1, 4, 4),
        (1, 4, 4),
    ]
    untrained, _ = make_student(seed=0, temporal_patch_size=train_student.FRAMES_A_TOKEN)
    batch = MotionCollator(train_student.FAMILY, processor)([items[i] for i in range(8)])
    alignment = batch.pop("alignment")
    batch = {name: value for name, value in batch.items() if name not in ("ids", "skipped")}
    losses = []
    for one in (model.eval(), untrained.eval()):
        with torch.no_grad(), capture_attention(one, alignment.rows, alignment.columns) as captured:
            loss = one(**batch).loss
        grids = {"grid": alignment.grids, "row_tokens": alignment.row_tokens}
        losses.append((float(loss), float(align(captured, alignment.priors, **grids))))
    assert losses[0][0] < 0.8 * losses[1][0]
    assert losses[0][1] < losses[1][1]


def test_a_still_clip_says_nothing_of_motion() -> None:
    """Question and picture are those of a clip, but every frame of it is the middle one."""
    sample, scene, picture = train_student.still_sample(0, 1)
    assert picture.frames.shape == (1, 32, 32, 3)
    assert picture.masks.shape == (len(scene.objects), 1, 32, 32)
    assert [part["type"] for part in sample.messages[0]["content"]] == ["video", "text"]
    asked = [train_student.still_sample(0, i)[0].messages[0]["content"][1]["text"] for i in range(200)]
    moving = sum(text.startswith(("What does", "How", "In which", "Which object")) for text in asked)
    assert 10 < moving < 60


def test_a_word_looks_at_the_object_it_speaks_of() -> None:
    scene = sample_scene(np.random.default_rng(0), "MR")
    picture = render(scene, frames=1)
    cells = [grid_mask(mask, (1, 4, 4)).reshape(-1) for mask in picture.masks]
    one, two = scene.objects[:2]
    text = f"Which shape is {one.colour}? The {one.name} is at the top left and the {two.name} stays still."
    prior = looks_prior(text, scene, picture.masks, (1, 4, 4))
    assert prior is not None
    assert prior.tokens == [one.colour, one.colour, one.shape, "top", "left", two.colour, two.shape]
    for row, index in zip(prior.attention, (0, 0, 0, 0, 0, 1, 1), strict=True):
        np.testing.assert_array_equal(row.numpy(), cells[index].astype(np.float16))
    asked = looks_prior(
        f"Where is the object that moves? It is {one.colour}.", scene, picture.masks, (1, 4, 4)
    )
    assert asked is not None
    assert asked.tokens == [one.colour]  # the question names no object
    before = looks_prior(f"Left is the {two.shape}.", scene, picture.masks, (1, 4, 4))
    assert before is not None
    np.testing.assert_array_equal(before.attention[0].numpy(), cells[1].astype(np.float16))
    assert looks_prior("How does the camera move?", scene, picture.masks, (1, 4, 4)) is None


def test_lift_is_one_for_a_blind_word_and_one_over_the_area_for_a_sharp_one() -> None:
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    blind, sharp, both = lift.Lift(), lift.Lift(), lift.Lift()
    blind.add(torch.full((1, 8), 0.03), mask)
    sharp.add(0.1 * mask[None], mask)
    both.add(torch.stack([torch.full((8,), 0.03), 0.1 * mask]), mask)
    assert [round(found.mean, 5) for found in (blind, sharp, both)] == [1.0, 4.0, 2.5]


def test_a_row_is_densest_where_it_has_most_for_the_area() -> None:
    masks = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 1.0, 1.0, 1.0, 0, 0], [0, 0, 0, 0, 0.1, 0]])
    assert lift.densest(torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1, 0.0]), masks) == 0
    assert lift.densest(torch.tensor([0.1, 0.2, 0.2, 0.2, 0.1, 0.2]), masks) == 1
    assert lift.densest(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.3, 0.3]), masks) == 2


def test_choices_of_heads_are_ranked_by_their_sharpened_lift() -> None:
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    blind = torch.full((8,), 0.1)
    leaning = torch.where(mask > 0, 0.2, 0.1)
    away = torch.where(mask > 0, 0.1, 0.2)
    heads = torch.stack([leaning, away, blind, blind])[:, None]
    share = 2 * 2**4 / (2 * 2**4 + 6)
    assert lift.sharpened_lift(heads[0], mask) == pytest.approx(4 * share)
    assert lift.sharpened_lift(heads[0] * 1e-12, mask) == pytest.approx(4 * share)

    def of(*ratio: float) -> float:
        on, off = (value**4 for value in ratio)
        return 4 * 2 * on / (2 * on + 6 * off)

    found = lift.compare_choices([(heads, mask, torch.tensor([2, 3])), (heads, mask, torch.tensor([0, 1]))])
    # Of six pairs of heads, two have a high lift, two a low lift, and two a lift of 1.
    expected = {"least": of(2, 3), "median": 1.0, "largest": of(3, 2), "chosen": 1.0, "all": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=6e-4)
    assert found["below"] == pytest.approx(2 / 6, abs=6e-4)
    best = lift.compare_choices([(heads, mask, torch.tensor([0, 2]))])
    assert (best["chosen"], best["below"]) == (best["largest"], pytest.approx(4 / 6, abs=6e-4))
    many = torch.rand(14, 1, 8)
    assert set(lift.compare_choices([(many, mask, torch.arange(7))])) == {"chosen", "all"}


def test_the_weights_in_the_package_look_at_what_is_named() -> None:
    teacher = load_teacher(WEIGHTS / "teacher", dtype=torch.float32)
    found = lift.measure(teacher, PriorSettings(mode="renoise", sampled_rows="all"), 15, seed=1)["lift"]
    assert found["direction"]["chosen"] > 1.3
    assert found["shape"]["all"] > 1.5
