from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mekernels import VideoTokens
from motionenhancer.teachers import invert, load_teacher, reconstruct, roundtrip_error, teacher_id
from motionenhancer.teachers.frames import grid_times, nearest_valid_count, resample_frames, to_pixels
from motionenhancer.toy.models import save_teacher


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path):
    return load_teacher(teacher_dir, device="cpu")


class Maps:
    """A reader that materialises every map (heads, queries, own keys), reference mass folded in."""

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []
        self.unfolded: list[torch.Tensor] = []

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
        query, key = query.double(), key.double()
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        weights = scores.softmax(-1)[0]
        self.unfolded.append(weights)
        self.maps.append(weights.unflatten(-1, (fold, -1)).sum(-2))


def test_geometry(teacher, clip: np.ndarray) -> None:
    video = teacher.encode_video(clip)
    assert video.tokens == VideoTokens(5, 8, 8, text=48)
    assert video.latents.shape == (1, 5, 8, 16, 16)
    assert (video.frames_given, video.frames_used) == (17, 17)
    assert not any(p.requires_grad for p in teacher.pipeline.transformer.parameters())


def test_the_posterior_mode_times_the_scaling_factor(teacher, clip: np.ndarray) -> None:
    vae = teacher.pipeline.vae
    mode = vae.encode(to_pixels(clip, (64, 64))).latent_dist.mode()
    expected = mode.transpose(1, 2) * vae.config.scaling_factor
    torch.testing.assert_close(teacher.encode_video(clip).latents, expected)
    torch.testing.assert_close(teacher.encode_video(clip).latents, teacher.encode_video(clip).latents)


def test_text_tokens_carry_their_characters_and_no_padding(teacher) -> None:
    text = "the red square moves left"
    encoding = teacher.encode_text(text)
    assert encoding.embeds.shape[1] == 48
    assert "".join(text[a:b] for a, b in encoding.spans).replace(" ", "") == text.replace(" ", "")
    assert len(encoding.tokens) == len(encoding.spans) < 48
    assert encoding.truncated == 0
    assert teacher.encode_text("").tokens == ()


def test_text_that_does_not_fit_is_cut_and_counted(teacher) -> None:
    encoding = teacher.encode_text("red square " * 60)
    assert encoding.truncated > 0
    assert len(encoding.tokens) == 47  # the end token takes one of the 48 places


def test_reading_changes_nothing(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    embeds = teacher.encode_text("the red square moves").embeds
    plain = teacher.predict(latents, embeds, 399)
    before = [b.attn1.processor for b in teacher.pipeline.transformer.transformer_blocks]
    with teacher.reading(Maps(), memory=False, row=0):
        read = teacher.predict(latents, embeds, 399)
    torch.testing.assert_close(read, plain, rtol=1e-5, atol=1e-5)
    assert [b.attn1.processor for b in teacher.pipeline.transformer.transformer_blocks] == before


def test_processors_come_back_after_an_exception(teacher) -> None:
    blocks = teacher.pipeline.transformer.transformer_blocks
    before = [b.attn1.processor for b in blocks]
    with pytest.raises(KeyError), teacher.reading(None, memory=True, row=0):
        raise KeyError
    assert [b.attn1.processor for b in blocks] == before


def test_identical_streams_fold_to_plain_attention(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    embeds = teacher.encode_text("the red square moves").embeds
    alone, both = Maps(), Maps()
    with teacher.reading(alone, memory=False, row=0):
        plain = teacher.predict(latents, embeds, 599)
    with teacher.reading(both, memory=True, row=0):
        doubled = teacher.predict(torch.cat([latents] * 2), torch.cat([embeds] * 2), 599)
    assert len(both.maps) == teacher.layers
    for own, folded in zip(alone.maps, both.maps, strict=True):
        assert float((own - folded).abs().max()) < 1e-6
        torch.testing.assert_close(folded.sum(-1), torch.ones_like(folded.sum(-1)))
    torch.testing.assert_close(doubled[:1], plain, rtol=1e-4, atol=1e-5)


def test_the_reference_stream_ignores_the_generated_one(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    embeds = teacher.encode_text("the red square moves").embeds
    other = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    alone = teacher.predict(latents, embeds, 599)
    with teacher.reading(None, memory=True, row=0):
        pair = teacher.predict(torch.cat([other, latents]), torch.cat([embeds] * 2), 599)
    torch.testing.assert_close(pair[1:], alone, rtol=1e-4, atol=1e-5)
    without = teacher.predict(other, embeds, 599)
    assert float((pair[:1] - without).abs().max()) > 1e-4, "the memory must matter"


def test_only_the_conditional_generated_row_is_read(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    text, empty = teacher.encode_text("the red square moves").embeds, teacher.encode_text("").embeds
    alone, guided = Maps(), Maps()
    with teacher.reading(alone, memory=False, row=0):
        teacher.predict(latents, text, 599)
    with teacher.reading(guided, memory=False, row=1):
        teacher.predict(torch.cat([latents] * 2), torch.cat([empty, text]), 599)
    for one, two in zip(alone.maps, guided.maps, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_inversion_keeps_every_level_and_walks_up(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    schedule = teacher.schedule(5)
    trajectory = invert(teacher, latents, schedule, teacher.encode_text("").embeds)
    assert len(trajectory) == 6
    torch.testing.assert_close(trajectory[0], latents)
    by_hand = latents
    for level, timestep in enumerate(schedule.timesteps):
        output = teacher.predict(by_hand, teacher.encode_text("").embeds, timestep)
        by_hand = schedule.step(by_hand, output, level, level + 1)
        torch.testing.assert_close(trajectory[level + 1], by_hand)


def test_reconstruction_by_hand(teacher, clip: np.ndarray) -> None:
    """Guidance, start, memory and the pairing of noise levels, spelled out one evaluation at a time."""
    latents = teacher.encode_video(clip).latents
    text, empty = teacher.encode_text("the red square moves").embeds, teacher.encode_text("").embeds
    schedule = teacher.schedule(2)
    trajectory = invert(teacher, latents, schedule, empty)
    reader = Maps()
    result = reconstruct(
        teacher, trajectory, schedule, text, empty, guidance_scale=6.0, readers=lambda level: reader
    )
    x, maps = trajectory[-1], Maps()
    for level in (2, 1):
        outputs = []
        for embeds, read in ((empty, None), (text, maps)):
            with teacher.reading(read, memory=True, row=0):
                pair = torch.cat([x, trajectory[level]])
                outputs.append(
                    teacher.predict(pair, torch.cat([embeds] * 2), schedule.timesteps[level - 1])[:1]
                )
        x = schedule.step(x, outputs[0] + 6.0 * (outputs[1] - outputs[0]), level, level - 1)
    torch.testing.assert_close(result, x, rtol=1e-3, atol=1e-4)
    assert len(reader.maps) == 2 * teacher.layers
    for one, two in zip(reader.maps, maps.maps, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_random_start_is_seeded_and_unguided_runs_cost_half(
    teacher, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = teacher.encode_video(clip).latents
    text, empty = teacher.encode_text("a red square").embeds, teacher.encode_text("").embeds
    schedule = teacher.schedule(1)
    trajectory = invert(teacher, latents, schedule, empty)

    def run(**options: object):
        return reconstruct(teacher, trajectory, schedule, text, empty, **options)

    first, again, other = (run(start="random", seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows: list[int] = []
    predict = teacher.predict
    monkeypatch.setattr(teacher, "predict", lambda x, *args: rows.append(len(x)) or predict(x, *args))
    run(guidance_scale=1.0)
    run(guidance_scale=1.0, memory=False)
    assert rows == [2, 1]
    with pytest.raises(ValueError, match="start"):
        run(start="middle")
    with pytest.raises(ValueError, match="trajectory"):
        reconstruct(teacher, trajectory[:1], schedule, text, empty)


def test_round_trip_error_falls_with_the_steps_short_of_zero_snr(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    embeds = teacher.encode_text("the red square moves left").embeds
    steps = (20, 100, 200)
    errors = [roundtrip_error(teacher, latents, teacher.schedule(k).below(600), embeds) for k in steps]
    assert errors[0] < 0.3
    # Inversion is a first-order scheme: error × steps settles to a constant.
    products = [error * k for error, k in zip(errors, steps, strict=True)]
    assert max(products) < 1.5 * min(products)


def test_round_trip_error_at_the_zero_snr_end_is_finite(teacher, clip: np.ndarray) -> None:
    latents = teacher.encode_video(clip).latents
    embeds = teacher.encode_text("the red square moves left").embeds
    error = roundtrip_error(teacher, latents, teacher.schedule(20), embeds)
    assert np.isfinite(error)
    assert error > roundtrip_error(teacher, latents, teacher.schedule(20).below(600), embeds)


@pytest.mark.parametrize(
    ("given", "stride", "offset", "expected"),
    [
        (1, 4, 1, 1),
        (2, 4, 1, 1),
        (3, 4, 1, 5),
        (48, 4, 1, 49),
        (50, 4, 1, 49),
        (51, 4, 1, 53),
        (1, 8, 5, 5),
        (80, 8, 5, 77),
        (81, 8, 5, 85),
        (85, 8, 5, 85),
    ],
)
def test_nearest_frame_counts(given: int, stride: int, offset: int, expected: int) -> None:
    assert nearest_valid_count(given, stride, offset) == expected


def test_frames_are_resampled_to_what_the_model_takes(teacher, clip: np.ndarray) -> None:
    for count, used in ((17, 17), (12, 13), (4, 5), (2, 1)):
        video = teacher.encode_video(clip[:count])
        assert (video.frames_given, video.frames_used) == (count, used)
        assert video.tokens.frames == (used - 1) // 4 + 1
    longer = teacher.encode_video(np.concatenate([clip] * 3))
    assert (longer.frames_given, longer.frames_used) == (51, 17)
    assert resample_frames(clip, 5)[-1].tolist() == clip[-1].tolist()


@pytest.mark.parametrize(
    ("given", "used", "frames", "stride", "expected"),
    [
        (17, 17, 5, 4, [0, 2.5, 6.5, 10.5, 14.5]),
        (13, 13, 2, 8, [2, 8.5]),  # CogVideoX 1.5: the first grid frame covers five frames
        (3, 5, 2, 4, [0, 1.25]),  # frames at 0, 0, 1, 2, 2: a repeated frame counts twice
        (2, 1, 1, 4, [0]),
    ],
)
def test_a_grids_frames_are_when_their_video_frames_are(
    given: int, used: int, frames: int, stride: int, expected: list[float]
) -> None:
    assert grid_times(np.arange(given) * 1.0, used, frames, stride) == expected


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (np.zeros((1, 64, 64, 3), np.uint8), ValueError),
        (np.zeros((0, 64, 64, 3), np.uint8), ValueError),
        (np.zeros((5, 64, 64), np.uint8), ValueError),
        (np.zeros((5, 64, 64, 3), np.float32), ValueError),
        ([1, 2], TypeError),
    ],
)
def test_bad_frames_are_refused(teacher, frames: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="frames"):
        teacher.encode_video(frames)  # type: ignore[arg-type]


def test_another_size_is_resized(teacher) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (17, 37, 51, 3), dtype=np.uint8)
    video = teacher.encode_video(frames)
    assert video.latents.shape[-2:] == (16, 16)
    assert video.tokens.grid == (5, 8, 8)


@pytest.mark.parametrize(
    ("options", "frames", "grid"),
    [
        ({"positions": "sinusoidal"}, 17, (5, 8, 8)),
        ({"positions": "learned"}, 17, (5, 8, 8)),
        ({"patch_size_t": 2, "frames": 13}, 13, (2, 8, 8)),
        ({"patch_size_t": 2, "frames": 17}, 21, (3, 8, 8)),
    ],
)
def test_the_other_members_of_the_family(
    options: dict[str, object], frames: int, grid: tuple[int, int, int], tmp_path: Path, clip: np.ndarray
) -> None:
    teacher = load_teacher(save_teacher(tmp_path, layers=1, **options), device="cpu")
    video = teacher.encode_video(clip)
    assert video.frames_used == frames
    assert video.stride == 4 * int(options.get("patch_size_t", 1))  # type: ignore[call-overload]
    assert video.tokens.grid == grid
    reader = Maps()
    with teacher.reading(reader, memory=False, row=0):
        out = teacher.predict(video.latents, teacher.encode_text("a red square").embeds, 199)
    assert out.shape == video.latents.shape
    assert reader.maps[0].shape[-1] == video.tokens.length


def test_rotary_reading_equals_the_models_own_output_for_1_5(tmp_path: Path, clip: np.ndarray) -> None:
    teacher = load_teacher(save_teacher(tmp_path, layers=2, patch_size_t=2, frames=13), device="cpu")
    latents, embeds = teacher.encode_video(clip).latents, teacher.encode_text("a red square").embeds
    plain = teacher.predict(latents, embeds, 199)
    with teacher.reading(Maps(), memory=False, row=0):
        torch.testing.assert_close(teacher.predict(latents, embeds, 199), plain, rtol=1e-4, atol=1e-5)


def test_folders_that_are_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_teacher(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="model_index"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_teacher(tmp_path)
    for name in ('"FluxPipeline"', '["FluxPipeline"]', "null", "7"):
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": {name}}}')
        with pytest.raises(ValueError, match=r"pipeline class .* is not supported"):
            load_teacher(tmp_path)


def test_the_id_follows_weights_and_settings(tmp_path: Path) -> None:
    one, same, other = (
        save_teacher(tmp_path / n, layers=1, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert teacher_id(one) == teacher_id(same) != teacher_id(other)
    config = one / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"snr_shift_scale": 1.0', '"snr_shift_scale": 3.0'))
    assert teacher_id(one) != teacher_id(same)
    large, body = one / "transformer" / "large.safetensors", bytearray(66 << 20)
    ids = set()
    for place in (0, 70_000, len(body) - 1):
        body[place] = 1
        large.write_bytes(body)
        ids.add(teacher_id(one))
    assert len(ids) == 3, "every byte counts, also of a large file"
    large.unlink()
    with pytest.raises(FileNotFoundError):
        teacher_id(tmp_path / "missing")
    # A folder put together of links names what they lead to, and a link in a circle does no harm.
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in same.iterdir():
        (linked / part.name).symlink_to(part)
    assert teacher_id(linked) == teacher_id(same)
    (linked / "transformer").unlink()
    (linked / "transformer").symlink_to(other / "transformer")
    assert teacher_id(linked) not in (teacher_id(same), teacher_id(other))
    (same / "round").symlink_to(same)
    assert teacher_id(same) == teacher_id(other.with_name("b"))
