"""InternVL3, Qwen3-VL and LLaVA-OneVision: tokens as their processors', attention as their eager one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_students import SAVE, tiny_student
from vlm_support import (
    TEXTS,
    assert_keeps_a_third,
    checkpoint_layers,
    clip,
    dialogue,
    eager_attention,
    full_precision_softmax,
    gradients,
    pick,
    random_rows,
    restore,
)

from motionenhancer.data.sample import Sample
from motionenhancer.vlm import capture_attention

VISION = ("pixel_values", "pixel_values_videos")


@pytest.fixture(scope="module", params=list(SAVE))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_student(request.param, tmp_path_factory.mktemp("students") / request.param)


def one_of(name: str, factory: pytest.TempPathFactory) -> Any:
    return tiny_student(name, factory.mktemp("students") / name)


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_of("internvl", tmp_path_factory)


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_of("qwen3_vl", tmp_path_factory)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_of("llava_onevision", tmp_path_factory)


def picture(height: int, width: int, seed: int = 9) -> Image.Image:
    return Image.fromarray(clip(1, height, width, seed=seed).frames[0])


def mixed() -> Sample:
    """Two turns, a video and an image between texts, another video in the second turn."""
    text = {"type": "text", "text": "What moves, and where?"}
    return Sample(
        "mixed",
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [text, {"type": "video"}, {"type": "image"}, text]},
            {"role": "assistant", "content": [{"type": "text", "text": "The red one, left."}]},
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And naïve 動く?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Nothing. 👩‍🚀"}]},
        ],
    )


def batch_of(student: Any, side: str = "right", multiple: int | None = None) -> Any:
    _, processor, family = student
    samples = [
        family.encode(processor, dialogue(*TEXTS[0]), [clip(4, 32, 48)]),
        family.encode(
            processor, mixed(), [clip(4, 32, 48, seed=1), clip(4, 16, 24, seed=2)], [picture(30, 50)]
        ),
        family.encode(processor, dialogue(*TEXTS[2], videos=0), []),
    ]
    batch = family.collate(
        samples,
        pad_token_id=processor.tokenizer.pad_token_id,
        padding_side=side,
        pad_to_multiple_of=multiple,
    )
    layouts = batch.pop("layouts")
    return {k: v.double() if k in VISION else v for k, v in batch.items()}, layouts, samples


# ---- tokens, answers, places ----


@pytest.mark.parametrize("frames", [2, 3, 6])
def test_inputs_are_the_processors_own(student: Any, frames: int) -> None:
    """One video and one image: what the family's processor makes of the rendered conversation."""
    _, processor, family = student
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "Left?"},
                {"type": "video"},
                {"type": "text", "text": "Or right?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Left."}]},
    ]
    video, image = clip(frames, 32, 48, fps=2.0), picture(30, 50)
    encoded = family.encode(processor, Sample("s", messages), [video], [image])
    own = processor(
        text=[processor.apply_chat_template(messages, tokenize=False)],
        images=[image],
        videos=[torch.from_numpy(video.frames).permute(0, 3, 1, 2)],
        return_tensors="pt",
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [
                {"total_num_frames": frames, "fps": 2.0, "frames_indices": list(range(frames))}
            ],
        },
    )
    assert torch.equal(encoded.input_ids, own["input_ids"][0])
    given = {**encoded.vision_inputs, **encoded.token_inputs}
    assert set(given) == set(own) - {"input_ids", "attention_mask"}
    for name, value in given.items():
        other = own[name][0] if name in encoded.token_inputs else own[name]
        assert torch.equal(value, torch.as_tensor(other)), name


def test_answers_are_trained_and_texts_found(student: Any) -> None:
    _, processor, family = student
    videos = [clip(4, 32, 48), clip(4, 16, 24)]
    encoded = family.encode(processor, mixed(), videos, [picture(30, 50)])
    answers = ["The red one, left.", "Nothing. 👩‍🚀"]
    ends = (encoded.labels >= 0).int().diff(prepend=torch.zeros(1, dtype=torch.int32)).eq(1).sum()
    assert int(ends) == 2
    kept = encoded.labels[encoded.labels >= 0]
    assert processor.tokenizer.decode(kept) == "".join(a + "<|im_end|>" for a in answers)
    assert torch.equal(kept, encoded.input_ids[encoded.labels >= 0])
    layout = encoded.layout
    shown = [[layout.text[a:b] for a, b in parts] for parts in layout.message_spans]
    question = "What moves, and where?"
    assert shown == [["Be brief."], [question, question], answers[:1], ["And naïve 動く?"], answers[1:]]
    covered = np.zeros(len(layout.text), bool)
    for start, end in layout.offsets.tolist():
        covered[start:end] = True
    assert covered.all()


def test_no_vision_token_is_lost_or_taken_twice(student: Any) -> None:
    _, processor, family = student
    videos = [clip(4, 32, 48), clip(4, 16, 24)]
    encoded = family.encode(processor, mixed(), videos, [picture(30, 50)])
    positions = torch.cat([video.positions for video in encoded.layout.videos])
    assert len(encoded.layout.videos) == 2
    assert len(positions.unique()) == len(positions)
    for video in encoded.layout.videos:
        assert len(video.positions) == np.prod(video.grid)
        assert len(set(encoded.input_ids[video.positions].tolist())) == 1
    with pytest.raises(ValueError, match="must not contain"):
        family.encode(processor, dialogue(f"a {processor.video_token}", "b"), [clip(4, 16, 16)])
    with pytest.raises(ValueError, match="shows 1 videos in its messages, got 0"):
        family.encode(processor, dialogue("a", "b"), [])


def test_a_changed_pixel_changes_the_token_at_its_place(student: Any) -> None:
    """Through the model's own vision tower: positions and grid are those of the frames' pixels."""
    model, processor, family = student
    frames, height, width = (
        family.encode(processor, dialogue("a", "b"), [clip(4, 48, 48)]).layout.videos[0].grid
    )
    base = clip(4, 48, 48)
    per = len(base.frames) // frames

    def embedded(video: Any) -> torch.Tensor:
        encoded = family.encode(processor, dialogue("a", "b"), [video])
        batch = family.collate([encoded], pad_token_id=0)
        (layout,) = batch.pop("layouts")
        seen = []
        handle = model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            model(**{k: v.double() if k in VISION else v for k, v in batch.items()})
        handle.remove()
        return seen[0][0, layout.videos[0].positions].reshape(frames, height, width, -1)

    before = embedded(base)
    for t, y, x in ((0, 0, 0), (frames - 1, height - 1, 0), (1, 0, width - 1)):
        pixels = base.frames.copy()
        rows = slice(y * 48 // height, (y + 1) * 48 // height)
        columns = slice(x * 48 // width, (x + 1) * 48 // width)
        pixels[t * per : (t + 1) * per, rows, columns] = 255 - pixels[t * per : (t + 1) * per, rows, columns]
        moved = (embedded(type(base)(pixels, *_rest(base))) - before).norm(dim=-1)
        assert np.unravel_index(int(moved.argmax()), (frames, height, width)) == (t, y, x)
        others = [i for i in range(frames) if i != t]
        assert float(moved[others].max()) < 1e-9


def _rest(video: Any) -> tuple[Any, ...]:
    return (video.timestamps, video.fps, video.duration, video.decoded, video.source_frames)


def test_cut_text(student: Any) -> None:
    _, processor, family = student
    whole = family.encode(processor, dialogue(*TEXTS[0]), [clip(4, 16, 16)])
    ids = whole.input_ids
    needed = int((ids == ids[whole.layout.videos[0].positions[-1]]).nonzero()[-1]) + 1
    cut = family.encode(processor, dialogue(*TEXTS[0]), [clip(4, 16, 16)], max_length=needed + 3)
    assert torch.equal(cut.input_ids, ids[: needed + 3])
    assert len(cut.layout.offsets) == len(cut.labels) == len(cut.attention_mask) == needed + 3
    with pytest.raises(ValueError, match=f"max_length must be at least {needed} "):
        family.encode(processor, dialogue(*TEXTS[0]), [clip(4, 16, 16)], max_length=needed - 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 64])
def test_padding_changes_no_sample(student: Any, side: str, multiple: int | None) -> None:
    model, _, family = student
    batch, layouts, samples = batch_of(student, side, multiple)
    with torch.no_grad():
        together = model(**batch).logits
    for i, (sample, layout) in enumerate(zip(samples, layouts, strict=True)):
        own = slice(layout.start, layout.start + len(sample.input_ids))
        assert torch.equal(batch["input_ids"][i, own], sample.input_ids)
        for video, alone in zip(layout.videos, sample.layout.videos, strict=True):
            assert torch.equal(video.positions, alone.positions + layout.start)
        single = family.collate([sample], pad_token_id=0)
        del single["layouts"]
        with torch.no_grad():
            logits = model(**{k: v.double() if k in VISION else v for k, v in single.items()}).logits[0]
        torch.testing.assert_close(together[i, own], logits, rtol=1e-5, atol=1e-6)


# ---- captured attention ----


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13 * largest, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_captured_attention_is_eagers(student: Any, side: str, use_checkpoints: bool) -> None:
    model = student[0]
    batch, layouts, _ = batch_of(student, side)
    seed = 2 * use_checkpoints + (side == "left")
    rows, columns = random_rows(batch, 6, seed)
    columns = torch.cat([columns, torch.stack([layout_positions(layout, 12) for layout in layouts])], 1)
    model.train()
    try:
        expected, out = eager_attention(model, batch, rows, columns)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        reference = gradients(model, (expected * weight).sum() + out.loss)
        assert any("vision" in n or "visual" in n for n in reference)
        if use_checkpoints:
            checkpoint_layers(model)
        with full_precision_softmax():
            with capture_attention(model, rows, columns) as captured:
                out = model(**batch)
            found = gradients(model, (captured.attention * weight).sum() + out.loss)
    finally:
        restore(model)
    assert float(captured.attention.detach().std()) > 1e-3
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    assert_same_gradients(found, reference)


def layout_positions(layout: Any, count: int) -> torch.Tensor:
    """The first vision tokens of a sample, -1 where it has none."""
    chosen = torch.full((count,), -1)
    if layout.videos:
        chosen[:] = layout.videos[0].positions[:count]
    return chosen


def test_captured_attention_of_lora(student: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model, processor, family = tiny_student(student[2].name, tmp_path / "student")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.[qkv]_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).to(torch.float64)
    batch, _, _ = batch_of((model, processor, family))
    rows, columns = random_rows(batch, 5)
    expected, out = eager_attention(wrapped.get_base_model(), batch, rows, columns)
    reference = gradients(wrapped, expected.square().sum() + out.loss)
    assert reference
    assert all("lora_" in name for name in reference)
    for use_checkpoints in (False, True):
        if use_checkpoints:
            wrapped.get_base_model().enable_input_require_grads()
            checkpoint_layers(wrapped.get_base_model())
        with capture_attention(wrapped, rows, columns) as captured:
            out = wrapped(**batch)
        torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
        found = gradients(wrapped, captured.attention.square().sum() + out.loss)
        assert_same_gradients(found, reference)


def test_keeps_a_third_of_what_eager_keeps(student: Any) -> None:
    model = copy.deepcopy(student[0]).float()
    model.train()
    assert_keeps_a_third(model)


def double(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if k in VISION else v for k, v in batch.items()}


def packed(student: Any) -> Any:
    """Two samples with a video each in one row, told apart by positions; the batches of each alone."""
    model, processor, family = student
    samples = [family.encode(processor, dialogue(*TEXTS[i]), [clip(4, 32, 48, seed=i)]) for i in range(2)]
    singles, positions = [], []
    for sample in samples:
        single = double(family.collate([sample], pad_token_id=0))
        del single["layouts"], single["attention_mask"]
        seen: list[torch.Tensor] = []
        handle = model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        with torch.no_grad():
            model(**single)
        handle.remove()
        length = single["input_ids"].shape[1]
        own = torch.arange(length)[None]
        # What the model computes where nothing is given; 3-D positions go with those that tell samples apart.
        spatial = seen[0] if seen[0] is not None and seen[0].dim() == 3 else None
        if spatial is not None:
            positions.append(torch.cat([own[None], spatial[-3:]]))
        else:
            positions.append(own)
        singles.append(single)
    # A sample's first token predicts nothing of the sample before it.
    for single in singles:
        single["labels"][0, 0] = -100
    batch = {name: torch.cat([s[name] for s in singles], 0) for name in singles[0] if name in VISION}
    batch |= {
        name: torch.cat([s[name] for s in singles], 0 if name.endswith(("thw", "ts")) else 1)
        for name in singles[0]
        if name not in VISION
    }
    batch |= {"position_ids": torch.cat(positions, -1), "use_cache": False}
    return batch, singles


@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_packed_samples(student: Any, use_checkpoints: bool) -> None:
    """As eager's, in values and gradients, and as each sample by itself."""
    model = student[0]
    batch, singles = packed(student)
    lengths = [single["input_ids"].shape[1] for single in singles]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(total, (1, 9), generator=generator)
    rows[0, 0], rows[0, 1] = lengths[0], -1
    columns = torch.arange(total)[None]
    model.train()
    try:
        expected, out = eager_attention(model, batch, rows, columns)
        weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        reference = gradients(model, (expected * weight).sum() + out.loss)
        if use_checkpoints:
            checkpoint_layers(model)
        with full_precision_softmax():
            with capture_attention(model, rows, columns) as captured:
                out = model(**batch)
            found = gradients(model, (captured.attention * weight).sum() + out.loss)
        blocks = []
        for single, length in zip(singles, lengths, strict=True):
            with capture_attention(model, torch.arange(length)[None], slice(0, length)) as alone:
                model(**single)
            blocks.append(alone.attention[0])
    finally:
        restore(model)
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    assert_same_gradients(found, reference)
    apart = pick(torch.block_diag(*blocks)[None], rows, columns)
    torch.testing.assert_close(captured.attention, apart, rtol=1e-6, atol=1e-8)


def test_compiled_students(student: Any) -> None:
    """On texts, padded: what is compiled of a vision tower is never captured, and takes minutes."""
    model, processor, family = student
    samples = [family.encode(processor, dialogue(*TEXTS[i], videos=0), []) for i in (0, 2)]
    batch = family.collate(samples, pad_token_id=processor.tokenizer.pad_token_id, padding_side="left")
    del batch["layouts"]
    batch["use_cache"] = False
    rows, columns = random_rows(batch, 6)
    torch._dynamo.reset()
    model.train()
    try:
        expected, out = eager_attention(model, batch, rows, columns)
        reference = gradients(model, expected.square().sum() + out.loss)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            with full_precision_softmax(), capture_attention(compiled, rows, columns) as captured:
                out = compiled(**batch)
            torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
            found = gradients(model, captured.attention.square().sum() + out.loss)
            assert_same_gradients(found, reference)
    finally:
        restore(model)
        torch._dynamo.reset()


def test_vision_tower_by_name(student: Any) -> None:
    model, _, family = student
    tower = {n for n, _ in model.named_parameters() if family.in_vision_tower(n)}
    assert tower
    for name in tower:
        assert "language_model" not in name
        assert "lm_head" not in name
        assert "projector" not in name
        assert "merger" not in name
    rest = {n for n, _ in model.named_parameters()} - tower
    kept = ("language_model", "lm_head", "projector", "merger", "image_newline")
    assert all(any(part in n for part in kept) for n in rest)


# ---- what is each family's own ----


def test_internvl_announces_each_frame(internvl: Any) -> None:
    _, processor, family = internvl
    encoded = family.encode(processor, dialogue("What moves?", "It."), [clip(3, 20, 30)])
    (video,) = encoded.layout.videos
    assert video.grid == (3, 2, 2)
    assert isinstance(video.columns, torch.Tensor)
    frame = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert f"Frame1: {frame}\nFrame2: {frame}\nFrame3: {frame}\nWhat moves?" in encoded.layout.text


def test_internvl_takes_videos_of_different_lengths(internvl: Any) -> None:
    _, processor, family = internvl
    videos = [clip(2, 16, 16), clip(5, 24, 16)]
    encoded = family.encode(processor, dialogue("a", "b", videos=2), videos)
    assert [video.grid for video in encoded.layout.videos] == [(2, 2, 2), (5, 2, 2)]
    assert len(encoded.vision_inputs["pixel_values"]) == 7
    capped = family.encode(processor, dialogue("a", "b", videos=2), videos, max_pixels=16)
    assert torch.equal(capped.input_ids, encoded.input_ids), "frames have one size, whatever the cap"


def test_qwen3_vl_says_the_time_of_each_pair_of_frames(qwen3_vl: Any) -> None:
    _, processor, family = qwen3_vl
    video = clip(5, 16, 24, fps=2.0)
    encoded = family.encode(processor, dialogue("What moves?", "It."), [video])
    (layout,) = encoded.layout.videos
    assert layout.grid == (3, 2, 3)
    run = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    # The last frame stands for its missing partner.
    expected = "".join(f"<{time} seconds>{run}" for time in ("0.2", "1.2", "2.0"))
    assert expected in encoded.layout.text


def test_qwen3_vl_caps_the_pixels_of_each_frame(qwen3_vl: Any) -> None:
    _, processor, family = qwen3_vl
    videos = [clip(2, 64, 64), clip(6, 64, 64)]
    encoded = family.encode(processor, dialogue("a", "b", videos=2), videos, max_pixels=32 * 32)
    assert [video.grid for video in encoded.layout.videos] == [(1, 4, 4), (3, 4, 4)]
    with pytest.raises(ValueError, match="max_pixels must be at least 64"):
        family.encode(processor, dialogue("a", "b"), videos[:1], max_pixels=63)
    single = family.encode(processor, dialogue("a", "b"), [clip(1, 16, 16)])
    assert single.layout.videos[0].grid == (1, 2, 2)


def test_llava_onevision_has_a_line_break_after_the_grid(llava: Any) -> None:
    _, processor, family = llava
    encoded = family.encode(processor, dialogue("a", "b"), [clip(3, 20, 30)])
    (video,) = encoded.layout.videos
    assert video.grid == (3, 3, 3)
    tokens = (encoded.input_ids == processor.video_token_id).nonzero()[:, 0]
    assert torch.equal(tokens[:-1], video.positions)


def test_llava_onevision_refuses_videos_of_different_lengths(llava: Any) -> None:
    _, processor, family = llava
    videos = [clip(2, 16, 16), clip(3, 16, 16)]
    with pytest.raises(ValueError, match=r"equally many frames.*got \[2, 3\]"):
        family.encode(processor, dialogue("a", "b", videos=2), videos)
    samples = [family.encode(processor, dialogue("a", "b"), [video]) for video in videos]
    with pytest.raises(ValueError, match="equally many frames"):
        family.collate(samples, pad_token_id=0)


def test_llava_onevision_batches_images_of_different_sizes(llava: Any) -> None:
    model, processor, family = llava
    part = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    two = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}]}
    samples = [
        family.encode(processor, Sample("s", [part, answer]), [], [picture(20, 20)]),
        family.encode(processor, Sample("s", [part, answer]), [], [picture(40, 40)]),
        family.encode(processor, Sample("s", [two, answer]), [], [picture(40, 40), picture(20, 40)]),
    ]
    batch = family.collate(samples, pad_token_id=0)
    layouts = batch.pop("layouts")
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        together = model(**batch).logits
        for i, sample in enumerate(samples):
            single = family.collate([sample], pad_token_id=0)
            del single["layouts"]
            single["pixel_values"] = single["pixel_values"].double()
            own = together[i, layouts[i].start :][: len(sample.input_ids)]
            torch.testing.assert_close(own, model(**single).logits[0], rtol=1e-5, atol=1e-6)
