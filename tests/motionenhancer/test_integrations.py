"""The pieces that know no framework: priors by video, question and answer, layouts out of ids, a collator."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families_support import picture
from students_support import clip, dialogue
from tiny_students import SAVE, tiny_student
from tiny_world import World

from motionenhancer import extract
from motionenhancer.alignment.dataset import MotionCollator, MotionDataset
from motionenhancer.data import Clip, Sample, prompt_text, read_samples
from motionenhancer.integrations import AlignedCollator, PriorLookup, read_layout, video_grid
from motionenhancer.integrations.aligned_collator import _grids
from motionenhancer.priors.storage import PriorStore
from motionenhancer.students import load_student, map_words

GRIDS = ("qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v", "video_llama_3")
FRAMES = [name for name in ("internvl", "llava_onevision", "smolvlm") if name in SAVE]
TURNS = [
    ("What moves?", "A green one."),
    ("Which  object\nmoves, naïve 動く 👩‍🚀?", "The red circle 動く left, and é stays."),
    ("assistant", "user"),  # the names of roles
    ("You are a helpful assistant.", "helpful"),  # the system's prompt
    ("a", "t", "r", "e"),
    ("What moves?", "What moves?", "What moves?", "Nothing."),
]


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    folder = tmp_path_factory.mktemp("lookup") / "priors"
    flags = world.flags(student=None, prior_dir=folder, ddim_steps=1, prompt_source="both")
    assert extract.main(flags) == 0
    return folder


@pytest.fixture(scope="module", params=["qwen2_5_vl", *GRIDS, *FRAMES])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, student_dir: Path):
    if request.param == "qwen2_5_vl":
        return load_student(student_dir)
    student = tiny_student(request.param, tmp_path_factory.mktemp("students") / request.param)
    if request.param == "video_llama_3":
        student[1].video_processor.use_token_compression = False
    return student


def found_rows(sample: Sample, layout: Any) -> tuple[list[int], list[int]]:
    """Rows and tokens of every word of a sample."""
    text, segments = prompt_text(sample)
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    words = map_words(spans, text, segments, layout.text, layout.offsets, message_spans=layout.message_spans)
    return words.rows, words.row_tokens


@pytest.mark.parametrize("turns", TURNS)
def test_ids_alone_say_what_the_family_says(student: Any, turns: tuple[str, ...]) -> None:
    _, processor, family = student
    sample = dialogue(*turns)
    encoded = family.encode(processor, sample, [clip(4, 32, 48)])
    thw = encoded.vision_inputs.get("video_grid_thw")
    layout = read_layout(encoded.input_ids, sample, processor, grid_thw=None if thw is None else thw[0])
    assert layout.videos[0].grid == encoded.layout.videos[0].grid
    assert torch.equal(layout.videos[0].positions, encoded.layout.videos[0].positions)
    rows = found_rows(sample, layout)
    assert rows == found_rows(sample, encoded.layout)
    assert rows[0]


def test_padding_before_the_first_token_moves_the_video(student: Any) -> None:
    _, processor, family = student
    sample = dialogue("What moves?", "This.")
    encoded = family.encode(processor, sample, [clip(4, 32, 48)])
    thw = encoded.vision_inputs.get("video_grid_thw")
    options = {"grid_thw": None if thw is None else thw[0]}
    plain = read_layout(encoded.input_ids, sample, processor, **options)
    moved = read_layout(encoded.input_ids, sample, processor, start=3, **options)
    assert torch.equal(moved.videos[0].positions, plain.videos[0].positions + 3)
    assert (moved.start, moved.offsets.tolist()) == (3, plain.offsets.tolist())


@pytest.mark.parametrize("lost", [3, 5, 7])
def test_words_before_a_cut_are_found(student: Any, lost: int) -> None:
    _, processor, family = student
    sample = dialogue("What moves?", "The red circle moves slowly to the left side.")
    encoded = family.encode(processor, sample, [clip(4, 32, 48)])
    thw = encoded.vision_inputs.get("video_grid_thw")
    kept = encoded.input_ids[:-lost]
    layout = read_layout(kept, sample, processor, grid_thw=None if thw is None else thw[0])
    rows, tokens = found_rows(sample, encoded.layout)
    expected = [(r, t) for r, t in zip(rows, tokens, strict=True) if r < len(kept)]
    assert list(zip(*found_rows(sample, layout), strict=True)) == expected
    assert len(expected) < len(rows)


def test_video_tokens_that_fill_no_grid_are_refused(student: Any) -> None:
    _, processor, family = student
    sample = dialogue("What moves?", "This.")
    encoded = family.encode(processor, sample, [clip(4, 32, 48)])
    thw = encoded.vision_inputs.get("video_grid_thw")
    at = int(encoded.layout.videos[0].positions[0])
    fewer = torch.cat([encoded.input_ids[:at], encoded.input_ids[at + 1 :]])
    with pytest.raises(ValueError, match="video tokens do not fill the grid"):
        read_layout(fewer, sample, processor, grid_thw=None if thw is None else thw[0])


def test_what_tells_no_layout_is_refused(student: Any) -> None:
    _, processor, family = student
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(ValueError, match="slow tokenizer"):
        read_layout(torch.zeros(3, dtype=torch.int64), dialogue("a", "b"), slow)
    shown = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What moves?"}]
    messages = [{"role": "user", "content": shown}, dialogue("a", "b").messages[-1]]
    sample = Sample("s", messages, images=(Path("a.png"),))
    if family.name in ("internvl", "smolvlm", "glm4v", "glm46v"):
        with pytest.raises(ValueError, match="share a token"):
            read_layout(torch.zeros(3, dtype=torch.int64), sample, processor)
    else:
        encoded = family.encode(processor, sample, [clip(4, 32, 48)], [picture(30, 50)])
        thw = encoded.vision_inputs.get("video_grid_thw")
        layout = read_layout(encoded.input_ids, sample, processor, grid_thw=None if thw is None else thw[0])
        assert torch.equal(layout.videos[0].positions, encoded.layout.videos[0].positions)
    if family.name in FRAMES:
        with pytest.raises(ValueError, match="1 video tokens do not fill a frame"):
            video_grid(processor, 1)
        with pytest.raises(ValueError, match="17 video tokens do not fill the grid"):
            video_grid(processor, 17)
    else:
        with pytest.raises(ValueError, match="video_grid_thw"):
            video_grid(processor, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma4", "the batch has no video_position_ids"),
        ("minicpmv4_6", "in how many rows and columns it slices a frame"),
        ("llava_next_video", "how much it crops"),
        ("video_llava", "how much it crops"),
        ("video_llama_3", "use_token_compression drops tokens"),
    ],
)
def test_families_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    _, processor, family = tiny_student(name, tmp_path)
    sample, video = dialogue("What moves?", "This."), clip(4, 32, 48)
    video.frames[1:] = video.frames[:1]
    encoded = family.encode(processor, sample, [video])
    grids = encoded.vision_inputs.get("video_grid_thw")
    with pytest.raises(ValueError, match=f"{type(processor).__name__}.*: .*{reason}"):
        read_layout(encoded.input_ids, sample, processor, grid_thw=None if grids is None else grids[0])


def test_an_unknown_processor_is_refused_by_name() -> None:
    fast = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=True))
    with pytest.raises(ValueError, match="SimpleNamespace is the processor of no supported student"):
        read_layout(torch.zeros(3, dtype=torch.int64), dialogue("a", "b"), fast)


# ---- priors ----


def test_every_sample_finds_its_prior(priors: Path, world: World) -> None:
    store, lookup = PriorStore(priors), PriorLookup(priors)
    seen = []
    for sample in read_samples(world.data, world.videos):
        prior = lookup.of(sample)
        assert prior is not None
        assert prior.prompt == prompt_text(sample)[0]
        question, answer = (m["content"][-1]["text"] for m in sample.messages)
        asked = lookup(sample.videos[0], question, answer)
        assert asked is not None
        assert torch.equal(asked.attention, prior.attention)
        seen.append(prior.prompt)
    assert lookup.teacher == str(world.teacher)
    assert (lookup.found, lookup.missing.total()) == (16, 0)
    assert sorted(seen) == sorted(store.read(key).prompt for key in store)


@pytest.mark.parametrize("part", ["question", "answer"])
def test_the_store_knows_which_text_its_priors_are_of(tmp_path: Path, world: World, part: str) -> None:
    flags = world.flags(student=None, prior_dir=tmp_path, ddim_steps=2, prompt_source=part, limit=1)
    assert extract.main(flags) == 0
    sample = next(iter(read_samples(world.data, world.videos)))
    prior = PriorLookup(tmp_path).of(sample)
    assert prior is not None
    assert prior.prompt == prompt_text(sample, part)[0]  # type: ignore[arg-type]
    assert prior.settings.steps == 2


def test_what_has_no_prior_is_counted(priors: Path, world: World, caplog: Any) -> None:
    lookup = PriorLookup(priors)
    sample = next(iter(read_samples(world.data, world.videos)))
    video = Path(sample.videos[0])  # type: ignore[arg-type]
    assert lookup(video, "Another question?", "Another answer.") is None
    assert lookup("nowhere.mp4", "What?", "That.") is None
    assert lookup.of(Sample("two", sample.messages, (video, video))) is None
    question, answer = (m["content"][-1]["text"] for m in sample.messages)
    assert lookup(Clip(video, start=0.5), question, answer) is None
    assert lookup.found == 0
    assert lookup.missing.total() == 4
    assert any("nowhere.mp4" in reason for reason in lookup.missing)
    for _ in range(2):
        assert lookup("elsewhere.mp4", "What?", "That.") is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3, "the first reasons, each once"
    assert said[0] == f"{video} is trained on without alignment: no such prior in the store"
    assert said[1].startswith("nowhere.mp4 is trained on without alignment: ")


def test_a_prior_on_another_grid_is_left_out(priors: Path, world: World) -> None:
    sample = next(iter(read_samples(world.data, world.videos)))
    grid = PriorLookup(priors, grid=True).grid
    assert grid is not None
    assert PriorLookup(priors, grid=grid).of(sample) is not None
    other = PriorLookup(priors, grid=(grid[0] + 1, *grid[1:]))
    assert other.of(sample) is None
    assert "its prior has grid" in next(iter(other.missing))


def test_priors_of_other_data_stop_the_run(priors: Path) -> None:
    lookup = PriorLookup(priors)
    for _ in range(31):
        lookup("nowhere.mp4", "What?", "That.")
    with pytest.raises(ValueError, match=r"none of the first 32 samples .*--prompt_source both"):
        lookup("nowhere.mp4", "What?", "That.")


def test_a_folder_without_an_extraction_is_refused(tmp_path: Path, priors: Path) -> None:
    with pytest.raises(ValueError, match=r"prior_dir .*holds no extraction\.json"):
        PriorLookup(tmp_path)
    record = tmp_path / "extraction.json"
    record.write_text((priors / "extraction.json").read_text())
    with pytest.raises(ValueError, match="holds no prior"):
        PriorLookup(tmp_path)
    record.write_text(json.dumps({"teacher": {}}))
    with pytest.raises(ValueError, match="not the record of an extraction"):
        PriorLookup(tmp_path)


def test_a_worker_of_a_data_loader_gets_a_lookup(priors: Path, world: World) -> None:
    sample = next(iter(read_samples(world.data, world.videos)))
    lookup = PriorLookup(priors)
    assert lookup.of(sample) is not None
    assert pickle.loads(pickle.dumps(lookup)).of(sample) is not None


# ---- the collator ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_alignment_is_that_of_our_own_training(priors: Path, world: World, side: str) -> None:
    _, processor, family = load_student(world.student)
    samples, store = list(read_samples(world.data, world.videos)), PriorStore(priors)
    keys = {store.read(key).prompt: key for key in store}
    named = {sample.id: keys[prompt_text(sample)[0]] for sample in samples}
    items = [MotionDataset(samples, family, processor, keys=named, store=store, fps=4)[i] for i in range(4)]
    own = MotionCollator(family, processor, side)(items)
    rows = {s.id: {"messages": s.messages, "videos": [str(v) for v in s.videos]} for s in samples}

    def collate(given: list[Any]) -> dict[str, Any]:
        batch = family.collate(
            [item.encoded for item in given],
            pad_token_id=processor.tokenizer.pad_token_id,
            padding_side=side,
        )
        batch.pop("layouts")
        return batch

    wrapped = AlignedCollator(collate, PriorLookup(priors), processor, row_of=lambda item: rows[item.id])
    batch = wrapped(items)
    mine, theirs = batch["alignment"], own["alignment"]
    for name in ("rows", "columns", "row_tokens"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert (mine.grids, mine.count, mine.words) == (theirs.grids, 4, theirs.words)
    assert all(items[i].id in batch["ids"][i] or "mp4" in batch["ids"][i] for i in range(4))


def test_grids_are_those_of_each_samples_own_video(priors: Path, world: World) -> None:
    """A sample without video, one that is not aligned and one that is: each takes its own grids."""
    _, processor, family = load_student(world.student)
    sample = next(iter(read_samples(world.data, world.videos)))
    kinds = [
        (dialogue("Hello?", "Hi.", videos=0), []),
        (dialogue("Two?", "Yes.", videos=2), [clip(4, 16, 24), clip(2, 32, 48)]),
        (sample, [clip(6, 32, 48)]),
    ]
    encoded = [family.encode(processor, one, videos) for one, videos in kinds]
    rows = [
        {"messages": copy.deepcopy(one.messages), "videos": [f"{i}{j}.mp4" for j in range(len(videos))]}
        for i, (one, videos) in enumerate(kinds)
    ]
    rows[2]["videos"] = [str(sample.videos[0])]

    def collate(_: Any) -> dict[str, Any]:
        batch = family.collate(encoded, pad_token_id=processor.tokenizer.pad_token_id)
        batch.pop("layouts")
        return batch

    found = AlignedCollator(collate, PriorLookup(priors), processor)(rows)["alignment"]
    assert found.grids[2] == encoded[2].layout.videos[0].grid
    assert found.count == 1
    assert [prior is None for prior in found.priors] == [True, True, False]


def test_grids_of_videos_that_have_the_token_of_images(tmp_path: Path) -> None:
    _, processor, family = tiny_student("glm4v", tmp_path)
    kinds = [[], [clip(4, 16, 24), clip(2, 32, 48)], [clip(6, 32, 48)]]
    encoded = [family.encode(processor, dialogue("a", "b", videos=len(v)), v) for v in kinds]
    batch = family.collate(encoded, pad_token_id=processor.tokenizer.pad_token_id)
    found = [grid["grid_thw"][0].tolist() if grid else None for grid in _grids(batch, processor)]
    assert found == [None, *(batch["video_grid_thw"][i].tolist() for i in (0, 2))]


def test_the_layout_of_gemma_is_told_by_the_places_of_its_patches(tmp_path: Path) -> None:
    """Its batch has one entry for each frame, padded to the most patches."""
    _, processor, family = tiny_student("gemma4", tmp_path)
    clips = [[], [clip(3, 16, 48)], [clip(2, 48, 24)], []]
    samples = [dialogue("What moves?", "It does.", videos=len(shown)) for shown in clips]
    encoded = [family.encode(processor, s, shown) for s, shown in zip(samples, clips, strict=True)]
    batch = family.collate(encoded, pad_token_id=processor.tokenizer.pad_token_id)
    found = _grids(batch, processor)
    assert found[0] == found[3] == {}
    for i, (frames, wide) in {1: (3, True), 2: (2, False)}.items():
        layout = read_layout(encoded[i].input_ids, samples[i], processor, **found[i])
        (video,), (own,) = layout.videos, encoded[i].layout.videos
        assert video.grid == own.grid
        assert video.grid[0] == frames
        assert (video.grid[2] > video.grid[1]) == wide
        assert torch.equal(video.positions, own.positions)
        assert found_rows(samples[i], layout) == found_rows(samples[i], encoded[i].layout)


def test_packed_batches_are_refused(priors: Path, world: World) -> None:
    _, processor, _ = load_student(world.student)
    packed = lambda rows: {"input_ids": torch.zeros(1, 9, dtype=torch.int64)}  # noqa: E731
    with pytest.raises(ValueError, match="switch packing"):
        AlignedCollator(packed, PriorLookup(priors), processor)([{}, {}])


def test_a_row_that_is_no_conversation_is_left_out(priors: Path, world: World) -> None:
    _, processor, _ = load_student(world.student)
    lookup = PriorLookup(priors)
    plain = lambda rows: {"input_ids": torch.zeros(len(rows), 9, dtype=torch.int64)}  # noqa: E731
    batch = AlignedCollator(plain, lookup, processor)([{"messages": "?"}, {"text": "a"}])
    assert batch["alignment"] is None
    assert lookup.missing.total() == 2
