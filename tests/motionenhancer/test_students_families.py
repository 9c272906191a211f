"""Every family of students: tokens as its processor's own, each at its place."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families_support import VISION, batch_of, encode_mixed, mixed, picture
from students_support import TEXTS, clip, dialogue
from tiny_students import SAVE, save_gemma4, save_minicpm, tiny_student
from tokenizers.processors import TemplateProcessing

from motionenhancer.data.clip import Clip
from motionenhancer.data.sample import Sample, prompt_text
from motionenhancer.students import capture_attention, load_student, map_words
from motionenhancer.students.locate import text_model

#: What ends an answer, where it is not ``<|im_end|>``; GLM ends it with the next role.
END = defaultdict(
    lambda: "<|im_end|>", glm4v="", glm4v_moe="", glm46v="", gemma4="<turn|>", smolvlm="<end_of_utterance>"
)


@pytest.fixture(scope="module", params=list(SAVE))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_student(request.param, tmp_path_factory.mktemp("students") / request.param)


def one_of(name: str, factory: pytest.TempPathFactory) -> Any:
    return tiny_student(name, factory.mktemp("students") / name)


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_of("internvl", tmp_path_factory)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_of("llava_onevision", tmp_path_factory)


# ---- tokens, answers, places ----


@pytest.mark.parametrize("frames", [2, 3, 6])
def test_inputs_are_the_processors_own(student: Any, frames: int) -> None:
    """With one video and one image, the inputs equal those of the family's processor."""
    _, processor, family = student
    # SmolVLM's processor loses an image beside a video, GLM's model cannot take both.
    images = [picture(30, 50)] if family.images_with_videos and family.name != "smolvlm" else []
    messages = [
        {
            "role": "user",
            "content": [
                *[{"type": "image"}] * len(images),
                {"type": "text", "text": "Left?"},
                {"type": "video"},
                {"type": "text", "text": "Or right?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Left."}]},
    ]
    video = clip(frames, 32, 48, fps=2.0)
    shown = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
    encoded = family.encode(processor, Sample("s", messages), [video], images)
    own = processor(
        text=[processor.apply_chat_template(messages, tokenize=False)],
        images=images or None,
        videos=[shown] if family.name != "smolvlm" else [[shown]],
        return_tensors="pt",
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [
                {
                    "total_num_frames": frames,
                    "fps": 2.0,
                    "frames_indices": list(range(frames)),
                    "duration": frames / 2.0,
                }
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
    model, processor, _ = student
    encoded = encode_mixed(student, clip(4, 32, 48), clip(4, 16, 24))
    answers = ["The red one, left.", "Nothing. 👩‍🚀"]
    ends = (encoded.labels >= 0).int().diff(prepend=torch.zeros(1, dtype=torch.int32)).eq(1).sum()
    assert int(ends) == 2
    kept = encoded.labels[encoded.labels >= 0]
    end, lead = END[model.config.model_type], " " if model.config.model_type == "smolvlm" else ""
    assert processor.tokenizer.decode(kept) == "".join(lead + answer + end for answer in answers)
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
    encoded = encode_mixed(student, clip(4, 32, 48), clip(4, 16, 24))
    positions = torch.cat([video.positions for video in encoded.layout.videos])
    positions = positions[positions >= 0]
    assert len(encoded.layout.videos) == 2
    assert len(positions.unique()) == len(positions)
    for video in encoded.layout.videos:
        assert len(video.positions) == np.prod(video.grid)
        assert len(set(encoded.input_ids[video.positions[video.positions >= 0]].tolist())) == 1
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
        handle = text_model(model).register_forward_pre_hook(
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
    needed = int((ids == ids[whole.layout.videos[0].first]).nonzero()[-1]) + 1
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
    if family.name == "gemma4":
        # Gemma 4 counts padding as positions, so angles are rounded differently.
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch).logits
    for i, (sample, layout) in enumerate(zip(samples, layouts, strict=True)):
        own = slice(layout.start, layout.start + len(sample.input_ids))
        assert torch.equal(batch["input_ids"][i, own], sample.input_ids)
        for video, alone in zip(layout.videos, sample.layout.videos, strict=True):
            assert torch.equal(video.positions, alone.shifted(layout.start).positions)
        single = family.collate([sample], pad_token_id=0)
        del single["layouts"]
        with torch.no_grad():
            logits = model(**{k: v.double() if k in VISION else v for k, v in single.items()}).logits[0]
        torch.testing.assert_close(together[i, own], logits, rtol=1e-5, atol=1e-6)


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


def test_qwen3_vl_says_the_time_of_each_pair_of_frames(tmp_path: Path) -> None:
    _, processor, family = tiny_student("qwen3_vl", tmp_path)
    video = clip(5, 16, 24, fps=2.0)
    encoded = family.encode(processor, dialogue("What moves?", "It."), [video])
    (layout,) = encoded.layout.videos
    assert layout.grid == (3, 2, 3)
    run = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    # The last frame is repeated to fill its pair.
    expected = "".join(f"<{time} seconds>{run}" for time in ("0.2", "1.2", "2.0"))
    assert expected in encoded.layout.text


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_pixels_of_a_frame(student: Any, frames: int) -> None:
    """A run's maximum and a row's minimum are pixels of one frame, whatever the processor's limits count."""
    _, processor, family = student
    if family.pixels is None:
        pytest.skip("pixels do not choose the size of a frame")
    own = dialogue("a", "b")
    own = dataclasses.replace(own, videos=(Clip(Path("clip.mp4"), min_pixels=96 * 96),))
    capped = family.encode(processor, dialogue("a", "b"), [clip(frames, 64, 64)], max_pixels=32 * 32)
    raised = family.encode(processor, own, [clip(frames, 32, 32)])
    assert [e.layout.videos[0].grid[1:] for e in (capped, raised)] == [(4, 4), (12, 12)]
    with pytest.raises(ValueError, match="max_pixels must be at least 64"):
        family.encode(processor, dialogue("a", "b"), [clip(frames, 64, 64)], max_pixels=63)
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    sample = Sample("s", [shown, answer])
    image = family.encode(processor, sample, [], [picture(64, 64)], max_pixels=32 * 32)
    assert image.vision_inputs["image_grid_thw"].tolist() == [[1, 8, 8]]


@pytest.mark.parametrize("slices", [1, 4])
def test_a_cap_makes_the_frames_of_minicpm_fewer_slices_or_smaller(tmp_path: Path, slices: int) -> None:
    _, processor, family = load_student(save_minicpm(tmp_path / "student", slices=slices))
    sizes = {}
    for cap in (None, 96 * 96, 48 * 48, 32 * 32, 16 * 16):
        encoded = family.encode(processor, dialogue("a", "b"), [clip(2, 96, 96)], max_pixels=cap)
        _, height, width = encoded.layout.videos[0].grid
        sizes[cap] = (16 * height, 16 * width)
        assert cap is None or 256 * height * width <= cap
    whole = {1: (48, 48), 4: (96, 96)}[slices]
    assert sizes == {None: whole, 9216: whole, 2304: (48, 48), 1024: (32, 32), 256: (16, 16)}
    with pytest.raises(ValueError, match=r"at least 256 for a frame of \(96, 96\), got 255"):
        family.encode(processor, dialogue("a", "b"), [clip(2, 96, 96)], max_pixels=255)


def test_a_cap_lowers_the_tokens_of_gemma(tmp_path: Path) -> None:
    _, processor, family = load_student(save_gemma4(tmp_path / "student"))
    processor.video_processor.max_soft_tokens = processor.image_processor.max_soft_tokens = 280
    for cap, most in ((None, 280), (10**9, 280), (140 * 64, 140), (140 * 64 - 1, 70)):
        encoded = family.encode(processor, dialogue("a", "b"), [clip(2, 64, 64)], max_pixels=cap)
        _, height, width = encoded.layout.videos[0].grid
        assert height == width == math.isqrt(most)
    with pytest.raises(ValueError, match=r"at least 4480 \(70 tokens\), got 4479"):
        family.encode(processor, dialogue("a", "b"), [clip(2, 64, 64)], max_pixels=4479)


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
    with pytest.raises(ValueError, match=r"the same number of frames.*got \[2, 3\]"):
        family.encode(processor, dialogue("a", "b", videos=2), videos)
    samples = [family.encode(processor, dialogue("a", "b"), [video]) for video in videos]
    with pytest.raises(ValueError, match="the same number of frames"):
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


# ---- templates ----


@pytest.mark.parametrize("in_template", [True, False])
def test_a_sequence_begins_once(tmp_path: Path, in_template: bool) -> None:
    """There is one first token, from the template or from the tokenizer."""
    _, processor, family = tiny_student("qwen3_vl", tmp_path)
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|box_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|box_start|> $A", special_tokens=[("<|box_start|>", tokenizer.bos_token_id)]
    )
    if in_template:
        processor.chat_template = "{{- '<|box_start|>' -}}" + processor.chat_template
    encoded = family.encode(processor, dialogue(*TEXTS[0]), [clip(2, 16, 16)])
    assert (encoded.input_ids == tokenizer.bos_token_id).nonzero()[:, 0].tolist() == [0]
    assert processor.tokenizer.decode(encoded.labels[encoded.labels >= 0]) == TEXTS[0][1] + "<|im_end|>"


def trained(student: Any, *turns: str) -> str:
    """What the labels of a dialogue spell; each text that is shown whole is found where it is."""
    _, processor, family = student
    encoded = family.encode(processor, dialogue(*turns), [clip(2, 16, 16)])
    shown = [encoded.layout.text[a:b] for parts in encoded.layout.message_spans for a, b in parts]
    assert shown[0] == turns[0]
    assert [text.split("</think>")[-1].strip() for text in shown[1::2]] == [
        text.split("</think>")[-1].strip() for text in turns[1::2]
    ]
    return processor.tokenizer.decode(encoded.labels[encoded.labels >= 0])


@pytest.mark.parametrize(
    ("name", "thought", "learnt"),
    [
        # The prompt opens the block of thoughts.
        ("qwen3_5", "<think>\nIt looks red.\n</think>\n\nRed.", "It looks red.\n</think>\n\nRed.<|im_end|>"),
        ("glm4v", "<think>It looks red.</think>Red.", "It looks red.</think>Red."),
        # The model opens it itself.
        ("glm46v", "<think>It looks red.</think>Red.", "<think>It looks red.</think>\nRed."),
    ],
)
def test_thinking_templates(tmp_path: Path, name: str, thought: str, learnt: str) -> None:
    """Thoughts in the last answer are trained on, from where the model writes; an empty block is not."""
    student, end = tiny_student(name, tmp_path), END[name]
    assert trained(student, "What?", "Red.") == f"Red.{end}"
    assert trained(student, "What?", "Red.", "And?", "Blue.") == f"Red.{end}Blue.{end}"
    assert trained(student, "What?", thought).lstrip() == learnt
    # GLM-4.1V shows all thoughts, the others those of the last answer.
    earlier = learnt if name == "glm4v" else f"Red.{end}"
    assert trained(student, "What?", thought, "And?", "Blue.") == f"{earlier}Blue.{end}"
    last = trained(student, "What?", "Blue.", "And?", thought)
    assert last.startswith(f"Blue.{end}")
    assert last.removeprefix(f"Blue.{end}").lstrip() == learnt


@pytest.mark.parametrize("name", ["qwen3_5", "glm4v", "glm46v"])
def test_words_of_an_answer_with_thoughts_are_found(tmp_path: Path, name: str) -> None:
    _, processor, family = tiny_student(name, tmp_path)
    answer = "<think>\nIt looks red.\n</think>\nRed."
    for later, lost in (((), []), (("And?", "Blue."), [] if name == "glm4v" else [0])):
        sample = dialogue("What?", answer, *later)
        layout = family.encode(processor, sample, [clip(2, 16, 16)]).layout
        prompt, segments = prompt_text(sample)
        spans = [(at, at + 3) for at in (prompt.index("red."), prompt.index("Red."))]
        words = map_words(
            spans, prompt, segments, layout.text, layout.offsets, message_spans=layout.message_spans
        )
        assert words.dropped == lost
        for row, token in zip(words.rows, words.row_tokens, strict=True):
            first, last = layout.offsets[row].tolist()
            assert layout.text[first:last].strip() in ("red", "Red")[token]


def test_gemma_has_no_thoughts(tmp_path: Path) -> None:
    """Its prompt has an empty block of thoughts, its conversations have none."""
    student = tiny_student("gemma4", tmp_path)
    assert trained(student, "What?", "Red.") == "Red.<turn|>"
    assert trained(student, "What?", "Red.", "And?", "Blue.") == "Red.<turn|>Blue.<turn|>"
    with pytest.raises(ValueError, match=r"message 1 must not contain '<channel\|>' as text"):
        trained(student, "What?", "<|channel>thought\nIt looks red.<channel|>Red.")


# ---- places without a token ----


def test_dropped_tokens_leave_holes(tmp_path: Path) -> None:
    """VideoLLaMA3 drops what did not change since the frame before."""
    model, processor, family = tiny_student("video_llama_3", tmp_path)
    video = clip(3, 16, 24)
    video.frames[1] = video.frames[0]
    video.frames[1, :8, 16:] = 255 - video.frames[0, :8, 16:]
    video.frames[2] = video.frames[1]
    encoded = family.encode(processor, dialogue("a", "b"), [video])
    (layout,) = encoded.layout.videos
    assert layout.grid == (3, 2, 3)
    # A frame that did not change at all keeps its first token.
    kept = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert (layout.positions >= 0).view(3, 6).int().tolist() == kept
    pads = (encoded.input_ids == processor.video_token_id).nonzero()[:, 0]
    assert torch.equal(layout.positions[layout.positions >= 0], pads)
    assert isinstance(layout.columns, torch.Tensor)
    assert layout.first == int(pads[0])
    batch = family.collate([encoded], pad_token_id=0, pad_to_multiple_of=64, padding_side="left")
    (moved,) = batch.pop("layouts")
    assert moved.start > 0
    assert torch.equal(moved.videos[0].positions < 0, layout.positions < 0)
    rows = torch.tensor([[batch["input_ids"].shape[1] - 1]])
    batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    with torch.no_grad(), capture_attention(model, rows, moved.videos[0].columns[None]) as captured:
        model(**batch)
    assert torch.equal(captured.attention[0, 0] > 0, layout.positions >= 0)


@pytest.mark.parametrize(("name", "side"), [("llava_next_video", 3), ("video_llava", 6)])
@pytest.mark.parametrize("wide", [True, False])
def test_cropped_edges_leave_holes(tmp_path: Path, name: str, side: int, wide: bool) -> None:
    """The grid covers the whole frame, and each token has the place of its pixels."""
    _, processor, family = tiny_student(name, tmp_path)
    video = clip(2, 24, 48) if wide else clip(2, 48, 24)
    encoded = family.encode(processor, dialogue("a", "b"), [video])
    (layout,) = encoded.layout.videos
    margin = round(side / 2)
    assert layout.grid == ((2, side, side + 2 * margin) if wide else (2, side + 2 * margin, side))
    shown = (layout.positions >= 0).view(layout.grid)
    inside = torch.zeros_like(shown)
    inside.narrow(2 if wide else 1, margin, side).fill_(True)
    assert torch.equal(shown, inside)


@pytest.mark.parametrize("name", [name for name in SAVE if name.startswith("minicpm")])
def test_minicpm_slices(tmp_path: Path, name: str) -> None:
    """A larger frame is shown small, without places in the grid, and then in slices with their places."""
    save_minicpm(tmp_path, slices=9, kind=name[-1])
    _, processor, family = load_student(tmp_path)
    encoded = family.encode(processor, dialogue("a", "b", videos=2), [clip(2, 64, 96), clip(1, 32, 32)])
    wide, small = encoded.layout.videos
    text = encoded.layout.text
    numbered = name == "minicpmv4_6"
    assert ("<image_id>0</image_id>" in text) == ("<image_id>1</image_id>" in text) == numbered
    assert small.grid[0] == 1
    assert bool((small.positions >= 0).all())
    shown = text[: int(encoded.layout.offsets[small.first, 0])]
    rows, columns = (shown.count(mark) for mark in ("</slice>\n<slice>", "<slice>"))
    assert columns > 0
    slices = columns // 2
    rows = rows // 2 + 1
    each = text.split("<slice>")[1].count("<|video_pad|>")
    assert math.prod(wide.grid) == 2 * slices * each
    assert bool((wide.positions >= 0).all())
    # The first row of places runs over all slices of the first row.
    across = wide.positions.view(wide.grid)[0, 0]
    starts = [int(encoded.layout.offsets[p, 0]) for p in across]
    assert len({text[:start].count("<slice>") for start in starts}) == slices // rows
    processor.video_processor.stack_frames = 2
    with pytest.raises(ValueError, match="stack_frames must be 1 for videos, got 2"):
        family.places(processor, (2, 16, 16), {}, 0)


def test_glm_takes_videos_or_images(tmp_path: Path) -> None:
    _, processor, family = tiny_student("glm4v", tmp_path)
    with pytest.raises(ValueError, match="a batch must hold videos or images, as glm4v uses one token"):
        family.encode(processor, mixed(), [clip(2, 16, 16), clip(2, 16, 16)], [picture(16, 16)])
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    samples = [
        family.encode(processor, Sample("s", [shown, answer]), [], [picture(16, 16)]),
        family.encode(processor, dialogue("a", "b"), [clip(2, 16, 16)]),
    ]
    with pytest.raises(ValueError, match="leave out the samples with images"):
        family.collate(samples, pad_token_id=0)
