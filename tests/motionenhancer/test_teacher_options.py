"""Noise levels, weights, memory and the other choices of how a teacher is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import World

from motionenhancer import agreement
from motionenhancer.priors import comparison
from motionenhancer.priors.prior import extract_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.teachers import invert, load_teacher, reconstruct, teacher_id
from motionenhancer.toy.models import save_teacher

TEXT = "the red square moves left and the blue ring stays"


@pytest.fixture
def teacher(teacher_dir: Path):
    return load_teacher(teacher_dir, device="cpu")


def full_attention(teacher, clip: np.ndarray, **options: object) -> torch.Tensor:
    """A_VDM of all heads and words, without any selection."""
    options = {"steps": 2, "head_ratio": 1.0, "token_ratio": 1.0, "sampled_rows": "all", **options}
    return extract_prior(teacher, clip, TEXT, **options).attention.double()


def test_weights_pool_the_steps_they_name(teacher, clip: np.ndarray) -> None:
    noisy, clean = (full_attention(teacher, clip, step_weights=w) for w in ((1, 0), (0, 1)))
    assert float((noisy - clean).abs().max()) > 1e-6
    mixed = full_attention(teacher, clip, step_weights=(1, 3))
    torch.testing.assert_close(mixed, 0.25 * noisy + 0.75 * clean, rtol=2e-3, atol=1e-7)
    even = full_attention(teacher, clip, step_weights=(2, 2))
    torch.testing.assert_close(even, full_attention(teacher, clip), rtol=2e-3, atol=1e-7)


def test_weights_pool_the_head_scores_too(teacher, clip: np.ndarray) -> None:
    even, plain = (
        extract_prior(teacher, clip, TEXT, steps=2, sampled_rows="all", step_weights=w)
        for w in ((5, 5), None)
    )
    for name, values in plain.head_scores.items():
        np.testing.assert_allclose(even.head_scores[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (0, 0), (-1, 2), (float("nan"), 1)])
def test_weights_that_do_not_fit(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="step_weights"):
        PriorSettings(steps=2, step_weights=weights)


def test_renoise_is_one_evaluation_of_the_noised_latent(teacher, clip: np.ndarray) -> None:
    made = extract_prior(teacher, clip, TEXT, mode="renoise", noise_level=300, seed=3, sampled_rows="all")
    assert made.evaluations == 1
    assert set(made.seconds) == {"encode", "renoise", "select"}
    latents = teacher.encode_video(clip).latents
    alpha = float(teacher.pipeline.scheduler.alphas_cumprod[300])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    seen = []

    class Reader:
        def self_attention(self, query, key, lse, fold) -> None:
            scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
            seen.append(scores.softmax(-1)[0])

    encoding = teacher.encode_text(TEXT)
    with teacher.reading(Reader(), memory=False, row=0):
        teacher.predict(alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise, encoding.embeds, 300)
    maps = torch.stack(seen).mean(0)
    expected = maps[made.heads][:, : len(encoding.tokens), 48:].mean(0)[made.kept]
    torch.testing.assert_close(made.attention.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("level", [-1, 1000, 2.5])
def test_levels_outside_the_schedule(teacher, clip: np.ndarray, level: object) -> None:
    with pytest.raises((ValueError, TypeError), match="noise_level"):
        extract_prior(teacher, clip, TEXT, mode="renoise", noise_level=level)


def test_a_split_batch_gives_the_same_prior(teacher, clip: np.ndarray) -> None:
    whole = full_attention(teacher, clip)
    teacher.split_batch = True
    torch.testing.assert_close(full_attention(teacher, clip), whole, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("after", [0, 1])
def test_when_memory_runs_out_the_batch_splits_and_no_layer_is_read_twice(
    teacher, clip: np.ndarray, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = full_attention(teacher, clip)
    block = teacher.pipeline.transformer.transformer_blocks[after]
    forward, sizes = block.forward, []

    def short_of_memory(hidden_states: torch.Tensor, *args: object, **kwargs: object):
        sizes.append(len(hidden_states))
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("simulated")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(block, "forward", short_of_memory)
    torch.testing.assert_close(full_attention(teacher, clip), whole, rtol=2e-3, atol=1e-7)
    assert teacher.split_batch, "it must not try the large batch again"
    assert sizes.count(4) == 1


def test_memory_that_cannot_be_split_further_is_an_error(
    teacher, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(teacher.pipeline.transformer, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        extract_prior(teacher, clip, TEXT, steps=1)


def test_no_guidance_during_inversion_and_one_encoding_a_text(
    teacher, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, texts = [], []
    predict, encode = teacher.predict, teacher.pipeline.text_encoder.forward
    monkeypatch.setattr(teacher, "predict", lambda x, e, t: batches.append(len(x)) or predict(x, e, t))
    monkeypatch.setattr(
        teacher.pipeline.text_encoder, "forward", lambda *a, **k: texts.append(1) or encode(*a, **k)
    )
    made = extract_prior(teacher, clip, TEXT, steps=2)
    assert batches == [1, 1, 4, 4]
    assert made.evaluations == sum(batches)
    assert len(texts) == 2, "the text and the empty prompt"
    extract_prior(teacher, clip, TEXT + " slowly", steps=1)
    assert len(texts) == 3, "the empty prompt is kept"


def test_bfloat16_agrees_with_float32(teacher_dir: Path, teacher, clip: np.ndarray) -> None:
    half = load_teacher(teacher_dir, device="cpu", dtype=torch.bfloat16)
    one, two = full_attention(teacher, clip, steps=1), full_attention(half, clip, steps=1)
    assert float(torch.nn.functional.cosine_similarity(one, two).min()) > 0.999
    assert half.id != teacher.id


def test_offloaded_text_encoder_changes_nothing(teacher_dir: Path, teacher, clip: np.ndarray) -> None:
    other = load_teacher(teacher_dir, device="cpu", offload_text_encoder=True)
    assert other.id == teacher.id
    assert torch.equal(full_attention(other, clip, steps=1), full_attention(teacher, clip, steps=1))


def test_compiled_blocks_agree(teacher_dir: Path, teacher, clip: np.ndarray) -> None:
    compiled = load_teacher(teacher_dir, device="cpu", compile="eager")
    plain = full_attention(teacher, clip, steps=1)
    torch.testing.assert_close(full_attention(compiled, clip, steps=1), plain, rtol=2e-3, atol=1e-7)


def test_tiling_is_part_of_the_teachers_name(teacher_dir: Path, clip: np.ndarray) -> None:
    tiled = load_teacher(teacher_dir, device="cpu", vae_tiling=True)
    assert tiled.id == teacher_id(teacher_dir, vae_tiling=True) != teacher_id(teacher_dir)
    with pytest.raises(ValueError, match="cannot be encoded in tiles"):
        tiled.encode_video(clip)  # tiles of the toy VAE do not fit together at its own size


def test_tiles_of_a_480_by_720_clip_fit_together(tmp_path: Path, clip: np.ndarray) -> None:
    sizes = {"height": 480, "width": 720, "frames": 5, "vae_channels": (4, 4, 4, 4), "scaling_factor": 1.0}
    path = save_teacher(tmp_path / "teacher", layers=1, **sizes)
    tiled = load_teacher(path, device="cpu", vae_tiling=True)
    assert tiled.encode_video(clip).latents.shape == (1, 2, 8, 60, 90)


def test_size_and_frames(teacher_dir: Path, clip: np.ndarray) -> None:
    small = load_teacher(teacher_dir, device="cpu", size=(32, 64), frames=9)
    video = small.encode_video(clip)
    assert video.tokens.grid == (3, 4, 8)
    assert (video.frames_given, video.frames_used) == (17, 9)
    assert small.id == teacher_id(teacher_dir, size=(32, 64), frames=9)
    with pytest.raises(ValueError, match="multiples of 8"):
        load_teacher(teacher_dir, device="cpu", size=(30, 64))


def test_1_5_does_not_take_its_rotary_table_for_the_clip_size(tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "teacher", layers=1, patch_size_t=2, frames=13)
    config = path / "transformer" / "config.json"
    text = config.read_text()
    for side in ("sample_height", "sample_width"):
        text = text.replace(f'"{side}": 16', f'"{side}": 400')
    config.write_text(text)
    assert load_teacher(path, device="cpu").size == (768, 1360)


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_rotary_positions_of_the_reference_are_the_generated_streams(
    positions: str, tmp_path: Path, clip: np.ndarray
) -> None:
    """Exchanging two identical streams, generated and reference, changes nothing."""
    teacher = load_teacher(save_teacher(tmp_path, layers=1, positions=positions), device="cpu")
    latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text(TEXT).embeds
    other = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    seen = []

    class Reader:
        def self_attention(self, query, key, lse, fold) -> None:
            own, reference = key.chunk(2, dim=2)
            seen.append((own, reference))

    for pair in ((latents, other), (other, latents)):
        with teacher.reading(Reader(), memory=True, row=0):
            teacher.predict(torch.cat(pair), torch.cat([embeds] * 2), 399)
    torch.testing.assert_close(seen[0][0], seen[1][1])
    torch.testing.assert_close(seen[0][1], seen[1][0])


def test_unread_levels_are_not_read(teacher, clip: np.ndarray) -> None:
    latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text(TEXT).embeds
    schedule = teacher.schedule(4)
    trajectory = invert(teacher, latents, schedule, embeds)
    levels: list[int] = []

    class Reader:
        def __init__(self, level: int) -> None:
            self.level = level

        def self_attention(self, query, key, lse, fold) -> None:
            levels.append(self.level)

    reconstruct(
        teacher, trajectory, schedule, embeds, embeds, readers=lambda n: Reader(n) if n in (1, 3) else None
    )
    assert levels == [3, 3, 1, 1]


def test_a_prior_agrees_with_itself(teacher, clip: np.ndarray) -> None:
    one = extract_prior(teacher, clip, TEXT, steps=1)
    same = comparison.compare_priors(one, one)
    assert same == pytest.approx({"head_rank": 1.0, "heads": 1.0, "tokens": 1.0, "cosine": 1.0})
    with pytest.raises(ValueError, match="the same prompt"):
        comparison.compare_priors(one, extract_prior(teacher, clip, "a red square", steps=1))


def test_ranks_share_ties_and_reverse() -> None:
    assert comparison._spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert comparison._spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert comparison._ranks(torch.tensor([5.0, 1.0, 5.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert np.isnan(comparison._spearman([1, 1, 1], [1, 2, 3]))


def test_the_command_reports_agreement_and_cost(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "agreement.json"
    chosen = world.flags(student=None, ddim_steps=2, noise_levels="100,500", limit=2, report=out)
    assert agreement.main(chosen) == 0
    printed = capsys.readouterr().out
    assert "mean over 2 clips" in printed
    assert "1 of  10" in printed
    assert out.read_text().count("noise_level") == 2
    assert agreement.main([*chosen, "--noise_levels", "5000"]) == 2
    assert "noise_level=5000" in capsys.readouterr().err
    assert agreement.main([*chosen, "--noise_levels", "100;200"]) == 2
    assert (
        "--noise_levels must be whole numbers separated by commas, got '100;200'" in capsys.readouterr().err
    )


def test_the_command_names_samples_that_it_cannot_compare(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads(world.data.read_text().splitlines()[0])
    two = {**good, "id": "two clips", "video": [good["video"], good["video"]]}
    two["conversations"] = [{"from": "human", "value": "<video><video>\nWhich?"}, good["conversations"][1]]
    silent = {**good, "id": "no words", "conversations": [{"from": "human", "value": "<video>"}]}
    silent["conversations"].append({"from": "gpt", "value": " "})
    data = tmp_path / "data.jsonl"

    def compare(*rows: dict) -> int:
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        chosen = world.flags(student=None, ddim_steps=1, noise_levels="100", data=data)
        return agreement.main(chosen)

    assert compare(two, silent, good) == 0
    printed = capsys.readouterr().out
    assert "mean over 1 clips" in printed
    assert "1 no prior: alignment needs one video (line 1, id two clips: has 2 videos)" in printed
    assert "1 empty text (line 2, id no words" in printed
    assert compare(two) == 2
    assert "no sample has a text and exactly one video that exists" in capsys.readouterr().err
