"""A prior against an independent implementation in numpy that materialises every map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from motionenhancer.priors.prior import MotionPrior, PriorError, extract_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.storage import prior_from_text, text_of_prior
from motionenhancer.teachers import invert, load_teacher, reconstruct

TEXT = "the red square moves left and the blue ring stays"


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path):
    return load_teacher(teacher_dir, device="cpu")


@pytest.fixture(scope="module")
def prior(teacher, clip: np.ndarray) -> MotionPrior:
    return extract_prior(teacher, clip, TEXT, steps=2, sampled_rows="all")


def mean_maps(teacher, clip: np.ndarray, text: str, steps: int, **options: object) -> np.ndarray:
    """Ā of every head over text and vision, (heads, N, N), from whole softmax maps in float64."""
    total, count = 0.0, 0

    class Reader:
        @staticmethod
        def self_attention(query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
            nonlocal total, count
            q, k = query[0].double().numpy(), key[0].double().numpy()
            scores = np.einsum("hid,hjd->hij", q, k) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            n = q.shape[1]
            total = total + sum(weights[..., i * n : (i + 1) * n] for i in range(fold))
            count += 1

    schedule = teacher.schedule(steps)
    latents = teacher.encode_video(clip).latents
    empty, prompt = teacher.encode_text("").embeds, teacher.encode_text(text).embeds
    trajectory = invert(teacher, latents, schedule, empty)
    reconstruct(teacher, trajectory, schedule, prompt, empty, readers=lambda level: Reader(), **options)
    assert count == teacher.layers * steps
    return total / count


def runs(row: np.ndarray) -> list[int]:
    lengths, current = [], 0
    for value in [*row, False]:
        if value:
            current += 1
        elif current:
            lengths.append(current)
            current = 0
    return lengths


def half_up(ratio: float, count: int) -> int:
    return max(1, int(np.floor(ratio * count + 0.5)))


def independent_prior(
    maps: np.ndarray,
    grid: tuple[int, int, int],
    pad: int,
    tokens: int,
    ratio: float = 0.5,
    width: int = 0,
):
    frames, positions = grid[0], grid[1] * grid[2]
    vision = maps[:, pad:, pad:].reshape(len(maps), frames, positions, frames, positions)
    metrics = {"dfc": [], "tcs": [], "dsr": []}
    for block in vision:
        diagonal = np.einsum("fpgp->fgp", block)
        tau = block.mean()
        near = [
            block[:, p, :, q]
            for p in range(positions)
            for q in range(max(0, p - width), min(positions, p + width + 1))
        ]
        on = sum((entries**2).sum() for entries in near)
        metrics["dfc"].append(on / ((block**2).sum() - on))
        means = []
        for p in range(positions):
            lengths = [n for f in range(frames) for n in runs(diagonal[f, :, p] > tau)]
            means.append(np.mean(lengths) if lengths else 0.0)
        metrics["tcs"].append(np.mean(means))
        metrics["dsr"].append(np.mean([entries >= tau for entries in near]))
    composite = np.zeros(len(maps))
    for values in metrics.values():
        array = np.array(values)
        if array.std() > 0:
            composite += (array - array.mean()) / array.std()
    heads = np.sort(np.argsort(-composite, kind="stable")[: half_up(ratio, len(maps))])
    text = maps[heads, :tokens, pad:].mean(0)
    over_frames = text.reshape(tokens, frames, positions).mean(-1)
    scores = over_frames.mean(1)
    if frames > 1:
        scores = scores + np.abs(np.diff(over_frames, axis=1)).sum(1) / (frames - 1)
    kept = np.sort(np.argsort(-scores, kind="stable")[: half_up(ratio, tokens)])
    return metrics, composite, heads, scores, kept, text[kept]


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 1.0}, {"memory": False}, {"start": "random"}, {"diagonal_width": 3}],
    ids=["full", "plain", "alone", "random", "wide"],
)
def test_agrees_with_whole_maps(teacher, clip: np.ndarray, options: dict[str, object]) -> None:
    prior = extract_prior(teacher, clip, TEXT, steps=2, sampled_rows="all", **options)
    others = {name: value for name, value in options.items() if name != "diagonal_width"}
    maps = mean_maps(teacher, clip, TEXT, 2, **others)
    count = len(prior.all_tokens)
    metrics, composite, heads, scores, kept, attention = independent_prior(
        maps, (5, 8, 8), 48, count, width=options.get("diagonal_width", 0)
    )
    for name, values in {**metrics, "composite": composite}.items():
        np.testing.assert_allclose(prior.head_scores[name], values, rtol=2e-3, atol=2e-3, err_msg=name)
    assert prior.heads == heads.tolist()
    np.testing.assert_allclose(prior.token_scores, scores, rtol=1e-4)
    assert prior.kept == kept.tolist()
    np.testing.assert_allclose(prior.attention.double().numpy(), attention, rtol=1e-3, atol=1e-7)


def test_what_a_prior_says_of_itself(prior: MotionPrior, teacher) -> None:
    assert prior.attention.dtype == torch.float16
    assert prior.attention.shape == (len(prior.tokens), 5 * 8 * 8)
    assert prior.grid == (5, 8, 8)
    assert len(prior.tokens) == half_up(0.5, len(prior.all_tokens))
    assert [prior.all_tokens[i] for i in prior.kept] == prior.tokens
    assert [prior.all_spans[i] for i in prior.kept] == prior.spans
    assert prior.prompt == TEXT
    assert len(prior.heads) == 2
    assert prior.teacher == teacher.id
    assert prior.evaluations == 2 + 4 * 2
    about = json.loads(json.dumps(prior.describe()))
    assert {e["token"] for e in about["kept_tokens"]} | {e["token"] for e in about["dropped_tokens"]} == set(
        prior.all_tokens
    )
    assert set(about["seconds"]) == {"encode", "invert", "reconstruct", "select"}


def test_the_same_call_gives_the_same_prior(teacher, clip: np.ndarray, prior: MotionPrior) -> None:
    again = extract_prior(teacher, clip, TEXT, steps=2, sampled_rows="all")
    assert torch.equal(again.attention, prior.attention)
    assert again.head_scores == prior.head_scores


def test_ratios_of_one_keep_everything(teacher, clip: np.ndarray) -> None:
    everything = extract_prior(teacher, clip, TEXT, steps=1, head_ratio=1.0, token_ratio=1.0)
    assert everything.heads == [0, 1, 2, 3]
    assert everything.kept == list(range(len(everything.all_tokens)))


@pytest.mark.parametrize("selection", ["mtti", "off"])
def test_a_bare_space_takes_no_words_place(teacher, clip: np.ndarray, selection: str) -> None:
    """SentencePiece makes a separate token of a space before a piece that it knows only without the space."""
    text = "red , blue 動 , moves"
    prior = extract_prior(teacher, clip, text, steps=1, token_selection=selection)
    bare = [i for i, token in enumerate(prior.all_tokens) if token == "▁"]
    words = [i for i, token in enumerate(prior.all_tokens) if token not in ("▁", "<unk>")]
    assert len(bare) == 3
    assert not set(prior.kept) & set(bare)
    if selection == "off":
        assert prior.kept == words
    else:
        best = sorted(words, key=lambda i: -prior.token_scores[i])[: half_up(0.5, len(words))]
        assert prior.kept == sorted(best)
    assert len(prior.token_scores) == len(prior.all_tokens)


@pytest.mark.parametrize("text", ["红色方块向左移动", "🏃💨", "动 🏃", "</s> <pad>", "<unk>"])
def test_a_text_of_unknown_pieces_gives_no_prior(teacher, clip: np.ndarray, text: str) -> None:
    with pytest.raises(PriorError, match=r"has no word that the teacher's tokenizer knows"):
        extract_prior(teacher, clip, text, steps=1)


@pytest.mark.parametrize("selection", ["mtti", "off"])
def test_an_unknown_piece_is_never_a_word(teacher, clip: np.ndarray, selection: str) -> None:
    texts = [("the red square 向左 moves 🏃", 3), ("the red square 动 moves </s>", 5)]
    for text, unknown in texts:
        prior = extract_prior(teacher, clip, text, steps=1, token_selection=selection)
        assert set(prior.tokens) <= {"▁the", "▁red", "▁square", "▁moves"}
        assert prior.unknown == unknown
        assert prior.describe()["unknown_characters"] == unknown
        assert prior_from_text(prior.attention, text_of_prior(prior)).unknown == unknown


@pytest.mark.parametrize("heads_off", [False, True])
@pytest.mark.parametrize("tokens_off", [False, True])
def test_selections_switched_off_by_name(
    teacher, clip: np.ndarray, heads_off: bool, tokens_off: bool
) -> None:
    options = {
        "head_selection": "off" if heads_off else "mhs",
        "token_selection": "off" if tokens_off else "mtti",
    }
    prior = extract_prior(teacher, clip, TEXT, steps=2, sampled_rows="all", **options)
    maps = mean_maps(teacher, clip, TEXT, 2)
    count = len(prior.all_tokens)
    selected = independent_prior(maps, (5, 8, 8), 48, count)[2]
    heads = np.arange(4) if heads_off else selected
    rows = maps[heads][:, :count, 48:].mean(0)
    assert prior.heads == heads.tolist()
    assert prior.kept == list(range(count)) if tokens_off else len(prior.kept) == half_up(0.5, count)
    np.testing.assert_allclose(prior.attention.double().numpy(), rows[prior.kept], rtol=1e-3, atol=1e-7)
    about = prior.describe()
    assert {name: about[name] for name in options} == options
    assert len(about["head_scores"]["composite"]) == 4


def test_a_ratio_of_a_selection_that_is_off_tells_no_priors_apart() -> None:
    off = {"head_selection": "off", "token_selection": "off"}
    assert PriorSettings(head_ratio=0.25, token_ratio=0.75, **off) == PriorSettings(**off)
    assert PriorSettings(**off) != PriorSettings(head_ratio=1.0, token_ratio=1.0)


def test_one_frame_of_tokens_is_no_error(teacher, clip: np.ndarray) -> None:
    still = extract_prior(teacher, clip[:2], TEXT, steps=1)
    assert still.grid == (1, 8, 8)
    assert still.frames_used == 1


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_text(teacher, clip: np.ndarray, text: str) -> None:
    with pytest.raises(PriorError, match="empty"):
        extract_prior(teacher, clip, text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 3}, "steps"),
        ({"steps": 0}, "steps"),
        ({"head_ratio": 0.0}, "head_ratio"),
        ({"token_ratio": 1.5}, "token_ratio"),
        ({"start": "noise"}, "start"),
        ({"head_selection": "on"}, "head_selection"),
        ({"token_selection": "mhs"}, "token_selection"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"sampled_rows": 0}, "sampled_rows"),
        ({"diagonal_width": -1}, "diagonal_width"),
        ({"diagonal_width": 1, "head_selection": "off"}, "diagonal_width 1 needs head_selection 'mhs'"),
        ({"token_scores": "z"}, "token_scores"),
        ({"token_unit": "word", "token_selection": "off"}, "token_unit 'word' needs token_selection 'mtti'"),
    ],
)
def test_settings_out_of_range(teacher, clip: np.ndarray, options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        extract_prior(teacher, clip, TEXT, **options)


def test_text_of_another_type(teacher, clip: np.ndarray) -> None:
    with pytest.raises(TypeError, match="text"):
        extract_prior(teacher, clip, None)  # type: ignore[arg-type]


def test_nan_in_the_teachers_attention_is_an_error_of_that_clip(teacher_dir: Path, clip: np.ndarray) -> None:
    broken = load_teacher(teacher_dir, device="cpu")
    with torch.no_grad():
        broken.pipeline.transformer.transformer_blocks[1].attn1.to_k.weight[0, 0] = float("nan")
    with pytest.raises(PriorError, match=r"NaN|nan|finite"):
        extract_prior(broken, clip, TEXT, steps=1)


def test_settings_are_checked_when_made() -> None:
    assert PriorSettings().sampled_rows == 64
    with pytest.raises(ValueError, match="steps"):
        PriorSettings(steps=True)
