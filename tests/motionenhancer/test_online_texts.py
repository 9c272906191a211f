"""A teacher's text embeddings on disk, and a teacher that is loaded whole whatever engine is configured."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers.integrations import deepspeed

from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.prior import extract_prior
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.folder import whole_weights
from motionenhancer.teachers.text_cache import TextCache, encoder_id
from motionenhancer.toy.models import save_teacher

TEXT = "the red square moves left"


@pytest.fixture
def cache(teacher_dir: Path, tmp_path: Path) -> TextCache:
    return TextCache(tmp_path / "texts", encoder_id(teacher_dir, torch.float32))


def test_a_teacher_without_its_encoder_reads_the_same_prior(
    teacher_dir: Path, cache: TextCache, clip: np.ndarray
) -> None:
    plain = extract_prior(load_teacher(teacher_dir, "cpu"), clip, TEXT, steps=1)
    first = load_teacher(teacher_dir, "cpu", texts=cache)
    for text in (TEXT, ""):
        first.encode_text(text)
    bare = load_teacher(teacher_dir, "cpu", text_encoder=False, texts=cache)
    assert bare.pipeline.text_encoder is None
    for teacher in (first, bare):
        prior = extract_prior(teacher, clip, TEXT, steps=1)
        assert torch.equal(prior.attention, plain.attention)
        assert (prior.tokens, prior.spans, prior.kept) == (plain.tokens, plain.spans, plain.kept)
    with pytest.raises(ValueError, match=r"'something else'.*no text encoder is loaded"):
        bare.encode_text("something else")
    first.drop_encoder()
    assert first.encode_text(TEXT).tokens == bare.encode_text(TEXT).tokens


def test_what_is_kept_is_what_the_encoder_said(teacher_dir: Path, cache: TextCache) -> None:
    teacher = load_teacher(teacher_dir, "cpu")
    for text in (TEXT, "", "word " * 500, "red 动 square"):
        said = teacher.encode_text(text)
        cache.write(said)
        kept = cache.read(text)
        assert kept is not None
        assert torch.equal(kept.embeds, said.embeds)
        assert (kept.tokens, kept.spans, kept.text) == (said.tokens, said.spans, text)
        assert (kept.truncated, kept.unknown) == (said.truncated, said.unknown)
    assert cache.read("word " * 500).truncated > 0  # type: ignore[union-attr]
    assert cache.read("red 动 square").unknown == 1  # type: ignore[union-attr]


def test_a_cached_text_of_before_unknown_pieces_were_told_apart_counts_as_missing(
    teacher_dir: Path, cache: TextCache
) -> None:
    teacher = load_teacher(teacher_dir, "cpu")
    path = cache.write(teacher.encode_text("red 动 square"))
    with safe_open(path, framework="pt") as file:
        embeds, about = (
            file.get_tensor("embeds"),
            json.loads(file.metadata()["text_encoding"].partition(" ")[2]),
        )
    del about["words"]
    path.write_bytes(save({"embeds": embeds}, {"text_encoding": json.dumps(about)}))
    assert cache.read("red 动 square") is None


def test_masked_padding_takes_no_room(teacher_dir: Path, cache: TextCache) -> None:
    said = load_teacher(teacher_dir, "cpu").encode_text(TEXT)
    whole = cache.write(said).stat().st_size
    said.embeds[:, len(said.tokens) :] = 0
    assert cache.write(said).stat().st_size < whole / 2
    assert torch.equal(cache.read(TEXT).embeds, said.embeds)  # type: ignore[union-attr]


def test_damage_counts_as_missing(teacher_dir: Path, cache: TextCache) -> None:
    teacher = load_teacher(teacher_dir, "cpu", texts=cache)
    said = teacher.encode_text(TEXT)
    path = cache.path(TEXT)
    path.write_bytes(path.read_bytes()[:50])
    assert cache.read(TEXT) is None
    assert torch.equal(teacher.encode_text(TEXT).embeds, said.embeds)
    assert cache.read(TEXT) is not None
    assert [f for f in path.parent.iterdir() if f != path] == []


def test_a_text_that_was_altered_or_exchanged_counts_as_missing(teacher_dir: Path, cache: TextCache) -> None:
    teacher = load_teacher(teacher_dir, "cpu", texts=cache)
    for text in (TEXT, "another text"):
        teacher.encode_text(text)
    path, other = cache.path(TEXT), cache.path("another text")
    body = path.read_bytes()
    for harm in (
        body[:-9] + bytes([body[-9] ^ 1]) + body[-8:],
        body.replace(b"moves", b"stays"),
        other.read_bytes(),
    ):
        assert harm != body
        path.write_bytes(harm)
        assert cache.read(TEXT) is None
    path.write_bytes(body)
    assert cache.read(TEXT) is not None


def test_another_encoder_or_dtype_has_texts_of_its_own(teacher_dir: Path, tmp_path: Path) -> None:
    other = save_teacher(tmp_path / "other", layers=2, heads=4, seed=5)
    ids = {
        encoder_id(teacher_dir, torch.float32),
        encoder_id(teacher_dir, torch.bfloat16),
        encoder_id(other, torch.float32),
    }
    assert len(ids) == 3
    assert encoder_id(teacher_dir, torch.float32) in ids


def test_a_teacher_without_encoder_and_cache_says_so(teacher_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"'red': there is no text cache, and no text encoder is loaded"):
        load_teacher(teacher_dir, "cpu", text_encoder=False).encode_text("red")


def test_the_flag_gives_the_teacher_its_cache(teacher_dir: Path, tmp_path: Path) -> None:
    prior = PriorArguments(teacher=str(teacher_dir), text_cache=str(tmp_path / "texts"))
    teacher = prior.load("cpu")
    teacher.encode_text(TEXT)
    bare = prior.load("cpu", text_encoder=False)
    assert torch.equal(bare.encode_text(TEXT).embeds, teacher.encode_text(TEXT).embeds)
    assert teacher.id == prior.teacher_id("cpu")


# ---- engines that shard the student ----


def test_zero_3_does_not_split_the_teacher(teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        def __init__(self) -> None:
            self.config: dict = {}

        def is_zero3(self) -> bool:
            return True

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a model was to be split")

    config = Config()
    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(Init=refuse)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    deepspeed.set_hf_deepspeed_config(config)
    try:
        from transformers import T5EncoderModel

        with pytest.raises(AssertionError, match="split"):
            T5EncoderModel.from_pretrained(teacher_dir / "text_encoder")
        teacher = load_teacher(teacher_dir, "cpu")
        assert all(p.numel() for p in teacher.pipeline.text_encoder.parameters())  # type: ignore[attr-defined]
        assert deepspeed.is_deepspeed_zero3_enabled(), "the student's own engine must be as it was"
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.mark.parametrize("before", [None, "true"])
def test_the_switch_is_put_back(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    seen = []

    def fail() -> None:
        with whole_weights():
            seen.append(os.environ[name])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert seen == ["false"]
    assert os.environ.get(name) == before
