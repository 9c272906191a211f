"""Qwen2.5-VL: rendering, labels, vision tokens and batches, against what model and processor do."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from students_support import TEXTS, clip, dialogue, sharp_student

from motionenhancer.data.decode import PIXELS
from motionenhancer.data.sample import Sample
from motionenhancer.students import student_family
from motionenhancer.students.chat import render

FAMILY = student_family("qwen2_5_vl")


@pytest.fixture(scope="module")
def student() -> Any:
    return sharp_student(layers=2, dtype=torch.float64)


@pytest.fixture(scope="module")
def processor(student: Any) -> Any:
    return student[1]


def trained(processor: Any, encoded: Any) -> list[str]:
    """The trained stretches of a sample, decoded."""
    stretches: list[list[int]] = [[]]
    for label in encoded.labels.tolist():
        if label >= 0:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [processor.tokenizer.decode(stretch) for stretch in stretches if stretch]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(clip(1, height, width).frames[0])


def test_answers_and_their_end_are_trained(processor: Any) -> None:
    turns = ("What moves?", "The red one.\n\nIt moves left.", "Sure?", "Yes — naïve 動く 👩‍🚀!")
    encoded = FAMILY.encode(processor, dialogue(*turns), [clip(4, 32, 32)])
    assert trained(processor, encoded) == [turns[1] + "<|im_end|>", turns[3] + "<|im_end|>"]
    assert torch.equal(encoded.labels[encoded.labels >= 0], encoded.input_ids[encoded.labels >= 0])


def test_answer_that_looks_like_a_template(processor: Any) -> None:
    turns = ("\nassistant\nno", "assistant\n user", "user", "a")
    encoded = FAMILY.encode(processor, dialogue(*turns), [clip(2, 16, 16)])
    assert trained(processor, encoded) == [turns[1] + "<|im_end|>", "a<|im_end|>"]
    shown = [encoded.layout.text[a:b] for parts in encoded.layout.message_spans for a, b in parts]
    assert shown == list(turns)


def test_system_message_and_several_parts(processor: Any) -> None:
    text = {"type": "text", "text": "a"}
    sample = Sample(
        "s",
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [text, {"type": "video"}, text, {"type": "image"}, {"type": "video"}, text],
            },
            {"role": "assistant", "content": [text]},
        ],
    )
    encoded = FAMILY.encode(processor, sample, [clip(4, 16, 32), clip(2, 24, 16)], [picture(16, 16)])
    layout = encoded.layout
    assert [len(parts) for parts in layout.message_spans] == [1, 3, 1]
    flat = [span for parts in layout.message_spans for span in parts]
    assert [layout.text[a:b] for a, b in flat] == ["Be brief.", "a", "a", "a", "a"]
    assert flat == sorted(flat)
    assert [video.grid for video in layout.videos] == [(2, 2, 4), (1, 3, 2)]
    kinds = encoded.token_inputs["mm_token_type_ids"]
    for video in layout.videos:
        assert bool((kinds[video.positions] == 2).all())
    assert int((kinds == 2).sum()) == 16 + 6
    assert int((kinds == 1).sum()) == 4


def test_ids_are_the_processors_own(processor: Any) -> None:
    sample, video = dialogue(*TEXTS[0]), clip(5, 32, 48, fps=1.0)
    encoded = FAMILY.encode(processor, sample, [video])
    text = processor.apply_chat_template(sample.messages, tokenize=False)
    frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
    own = processor(
        text=[text], videos=[frames], return_tensors="pt", videos_kwargs={"do_sample_frames": False}
    )
    assert torch.equal(encoded.input_ids, own["input_ids"][0])
    assert torch.equal(encoded.token_inputs["mm_token_type_ids"], own["mm_token_type_ids"][0].long())
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(encoded.vision_inputs[name], own[name])


def test_offsets_cover_the_text(processor: Any) -> None:
    encoded = FAMILY.encode(processor, dialogue("Où — 動く?", "naïve 👩‍🚀"), [clip(3, 16, 16)])
    layout = encoded.layout
    assert layout.offsets.shape == (len(encoded.input_ids), 2)
    covered = np.zeros(len(layout.text), bool)
    for start, end in layout.offsets.tolist():
        covered[start:end] = True
    assert covered.all()
    video = layout.videos[0]
    pieces = [layout.text[a:b] for a, b in layout.offsets[video.positions].tolist()]
    assert pieces == [processor.video_token] * (2 * 2 * 2)
    assert video.columns == slice(int(video.positions[0]), int(video.positions[-1]) + 1)


def test_vision_tokens_are_in_raster_order(student: Any) -> None:
    """The model's own three-dimensional positions of the tokens are those of the grid."""
    model, processor = student
    encoded = FAMILY.encode(processor, dialogue(*TEXTS[0]), [clip(6, 32, 48, fps=1.0)])
    (video,) = encoded.layout.videos
    batch = FAMILY.collate([encoded], pad_token_id=0)
    positions, _ = model.model.get_rope_index(
        **{k: batch[k] for k in ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")}
    )
    at = positions[:, 0, video.positions]
    at = at - at[:, :1]
    frames, height, width = video.grid
    step = 2 * processor.video_processor.temporal_patch_size
    expected = torch.stack(torch.meshgrid(*map(torch.arange, video.grid), indexing="ij")).reshape(3, -1)
    assert (frames, height, width) == (3, 4, 6)
    assert torch.equal(at, expected * torch.tensor([step, 1, 1])[:, None])


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        (np.arange(4) / 2.0, 1.0),
        (np.arange(4) * 1.001, 2.0),
        (np.arange(4) * 3.03, 6.0),
        (np.arange(4) / 7.0, 2 / 7),
        (np.arange(4) * 1.5, 3.0),
        (np.zeros(4), 2.0),
        (np.zeros(1), 2.0),
    ],
)
def test_seconds_between_token_frames(processor: Any, stamps: np.ndarray, seconds: float) -> None:
    video = dataclasses.replace(clip(len(stamps), 16, 16), timestamps=stamps)
    encoded = FAMILY.encode(processor, dialogue("a", "b"), [video])
    assert encoded.vision_inputs["second_per_grid_ts"].tolist() == pytest.approx([seconds])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 64])
def test_padding_changes_no_sample(student: Any, side: str, multiple: int | None) -> None:
    model, processor = student
    samples = [
        FAMILY.encode(processor, dialogue(*TEXTS[0]), [clip(4, 32, 48)]),
        FAMILY.encode(processor, dialogue(*TEXTS[1], videos=2), [clip(1, 16, 16), clip(3, 24, 16, seed=1)]),
        FAMILY.encode(processor, dialogue(*TEXTS[2], videos=0), []),
    ]
    batch = FAMILY.collate(samples, pad_token_id=7, padding_side=side, pad_to_multiple_of=multiple)
    layouts = batch.pop("layouts")
    length = batch["input_ids"].shape[1]
    assert length % (multiple or 1) == 0
    batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    with torch.no_grad():
        together = model(**batch).logits
    for i, (sample, layout) in enumerate(zip(samples, layouts, strict=True)):
        own = slice(layout.start, layout.start + len(sample.input_ids))
        assert layout.start == (length - len(sample.input_ids) if side == "left" else 0)
        assert torch.equal(batch["input_ids"][i, own], sample.input_ids)
        assert torch.equal(batch["labels"][i, own], sample.labels)
        outside = torch.ones(length, dtype=torch.bool)
        outside[own] = False
        for name, fill in (
            ("input_ids", 7),
            ("labels", -100),
            ("attention_mask", 0),
            ("mm_token_type_ids", 0),
        ):
            assert bool((batch[name][i, outside] == fill).all())
        for video in layout.videos:
            assert bool((batch["input_ids"][i, video.positions] == processor.video_token_id).all())
        alone = FAMILY.collate([sample], pad_token_id=7)
        del alone["layouts"]
        if "pixel_values_videos" in alone:
            alone["pixel_values_videos"] = alone["pixel_values_videos"].double()
        with torch.no_grad():
            logits = model(**alone).logits[0]
        torch.testing.assert_close(together[i, own], logits, rtol=1e-5, atol=1e-6)


def test_collate_refuses(processor: Any) -> None:
    encoded = FAMILY.encode(processor, dialogue("a", "b", videos=0), [])
    with pytest.raises(ValueError, match="samples must not be empty"):
        FAMILY.collate([], pad_token_id=0)
    with pytest.raises(ValueError, match="padding_side must be 'right' or 'left', got 'up'"):
        FAMILY.collate([encoded], pad_token_id=0, padding_side="up")
    with pytest.raises(ValueError, match="pad_to_multiple_of must be positive, got 0"):
        FAMILY.collate([encoded], pad_token_id=0, pad_to_multiple_of=0)
    other = dataclasses.replace(encoded, token_inputs={})
    with pytest.raises(ValueError, match="the same names in token_inputs"):
        FAMILY.collate([encoded, other], pad_token_id=0)


def test_pixel_cap(processor: Any) -> None:
    encoded = FAMILY.encode(processor, dialogue("a", "b"), [clip(2, 64, 64)], max_pixels=32 * 32)
    assert encoded.layout.videos[0].grid == (1, 4, 4)
    with pytest.raises(ValueError, match="max_pixels must be at least 64"):
        FAMILY.encode(processor, dialogue("a", "b"), [clip(2, 64, 64)], max_pixels=63)


def test_cut_text(processor: Any) -> None:
    encoded = FAMILY.encode(processor, dialogue(*TEXTS[0]), [clip(2, 16, 16)])
    last = int(encoded.layout.videos[0].positions[-1])
    cut = FAMILY.encode(processor, dialogue(*TEXTS[0]), [clip(2, 16, 16)], max_length=last + 4)
    for tensor in (
        cut.input_ids,
        cut.labels,
        cut.attention_mask,
        cut.layout.offsets,
        *cut.token_inputs.values(),
    ):
        assert len(tensor) == last + 4
    assert torch.equal(cut.input_ids, encoded.input_ids[: last + 4])
    with pytest.raises(ValueError, match=f"max_length must be at least {last + 1}"):
        FAMILY.encode(processor, dialogue(*TEXTS[0]), [clip(2, 16, 16)], max_length=last)


def test_cut_does_not_lose_image_tokens(processor: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    with pytest.raises(ValueError, match="max_length must be at least"):
        FAMILY.encode(processor, Sample("s", messages), [], [picture(16, 16)], max_length=4)


def test_images_from_files(processor: Any, tmp_path: Path) -> None:
    picture(16, 24).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    encoded = FAMILY.encode(processor, Sample("s", messages, images=(tmp_path / "a.png",)), [])
    assert encoded.vision_inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PIXELS, "383")
        with pytest.raises(ValueError, match="has 24×16 pixels, more than 383"):
            FAMILY.encode(processor, Sample("s", messages, images=(tmp_path / "a.png",)), [])
    picture(16, 24).save(tmp_path / "d.png", "EPS")
    # A picture of 2**32 pixels in a few bytes.
    body = bytearray((tmp_path / "a.png").read_bytes())
    body[16:24] = (65536).to_bytes(4, "big") * 2
    body[29:33] = zlib.crc32(bytes(body[12:29])).to_bytes(4, "big")
    (tmp_path / "e.png").write_bytes(body)
    for name in ("b.png", "c.png", "d.png", "e.png"):
        with pytest.raises(ValueError, match=f"{name} is not a readable image"):
            FAMILY.encode(processor, Sample("s", messages, images=(tmp_path / name,)), [])


@pytest.mark.parametrize(
    ("sample", "videos", "message"),
    [
        (dialogue("a", "b"), 0, "sample 'sample' shows 1 videos in its messages, got 0"),
        (dialogue("a", "b", videos=0), 1, "shows 0 videos in its messages, got 1"),
        (dialogue("see <|video_pad|>", "b"), 1, "message 0 must not contain '<|video_pad|>' as text"),
        (dialogue("a", "see <|image_pad|>"), 1, "message 1 must not contain '<|image_pad|>' as text"),
        (dialogue("<|im_end|>\n<|im_start|>user", "b"), 1, "message 0 must not contain '<|im_end|>' as text"),
        (dialogue("a", "b<|im_start|>"), 1, "message 1 must not contain '<|im_start|>' as text"),
        (dialogue("a"), 1, "no assistant message to train on"),
        (Sample("sample", []), 0, "has no messages"),
        (
            Sample("sample", [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]),
            0,
            "begins with an assistant message",
        ),
    ],
)
def test_refused_conversations(processor: Any, sample: Sample, videos: int, message: str) -> None:
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        FAMILY.encode(processor, sample, [clip(2, 16, 16)] * videos)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% for", "{{ 1 / 0 }}"]
)
def test_a_chat_template_that_fails_is_named(processor: Any, template: str) -> None:
    """Templates that raise an error, or that the sandbox refuses, are named with the sample."""
    with pytest.raises(ValueError, match=r"sample 'sample': the chat template fails \("):
        render(processor, dialogue("a", "b"), template)


class Template:
    """A processor that renders with a function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        return self.function(messages, add_generation_prompt)


def rendered_by(line: Any) -> Template:
    def function(messages: Any, prompt: bool) -> str:
        parts = [line(m, i, len(messages)) for i, m in enumerate(messages)]
        return "".join(parts) + ("[assistant]" if prompt else "")

    return Template(function)


def test_template_that_trims() -> None:
    line = rendered_by(lambda m, i, n: f"[{m['role']}]{m['content'][0]['text'].strip()}  \n")
    rendered = render(line, dialogue("  a ", "\n b\n", "c", "d", videos=0))
    assert [rendered.text[a:b] for a, b in rendered.answer_spans] == ["b", "d"]
    assert [rendered.text[a:b] for ((a, b),) in rendered.text_spans] == ["a", "b", "c", "d"]


def test_template_that_rewrites_earlier_answers() -> None:
    line = rendered_by(lambda m, i, n: f"[{m['role']}]" + ("" if i < n - 2 else m["content"][0]["text"]))
    with pytest.raises(ValueError, match="differently once later ones are added"):
        render(line, dialogue("a", "b", "c", "d", videos=0))


def test_template_that_hides_a_text() -> None:
    line = rendered_by(lambda m, i, n: f"[{m['role']}]")
    with pytest.raises(ValueError, match="does not show text part 0 of message 0"):
        render(line, dialogue("a", "b", videos=0))


def test_without_mm_token_type_ids_positions_are_lost(student: Any) -> None:
    """Without mm_token_type_ids the model silently computes other positions, so a batch has them."""
    model, processor = student
    batch = FAMILY.collate([FAMILY.encode(processor, dialogue(*TEXTS[0]), [clip(4, 32, 48)])], pad_token_id=0)
    del batch["layouts"]
    batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    with torch.no_grad():
        right = model(**batch).loss
        del batch["mm_token_type_ids"]
        wrong = model(**batch).loss
    assert not torch.allclose(right, wrong)
