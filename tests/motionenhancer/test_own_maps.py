"""Priors of a student's own attention, before it is tuned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extract_support import report_in, stored
from tiny_world import World
from train_support import flags, report_of

from motionenhancer import extract, train
from motionenhancer.data import SkipLog, prompt_text, read_frames, read_samples
from motionenhancer.data.encode import encode_video
from motionenhancer.data.sample import whole_words
from motionenhancer.data.video import VideoError
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.own_maps import OwnMaps
from motionenhancer.priors.prior import PriorError
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import PriorRequest
from motionenhancer.priors.storage import PriorStore
from motionenhancer.students import load_student
from motionenhancer.students.words import map_words

FRAMES = {"teacher_frames": 6, "num_frames": 6, "video_fps": None}


def extracted(world: World, priors: Path, **options: object) -> PriorStore:
    given = {"student": None, "teacher": world.student, "prior_dir": priors, "teacher_frames": 6, **options}
    assert extract.main(world.flags(**given)) == 0
    return PriorStore(priors)


def test_a_prior_is_the_mean_of_eager_attention(world: World, tmp_path: Path) -> None:
    kept = extracted(world, tmp_path / "priors", limit=2, token_selection="off")
    priors = {kept.read(key).prompt: kept.read(key) for key in kept}
    model, processor, family = load_student(world.student, attn_implementation="eager")
    for sample in read_samples(world.data, world.videos, SkipLog(), limit=2):
        text, segments = prompt_text(sample)
        prior = priors[text]
        video = read_frames(sample.videos[0], num_frames=6)
        encoded = family.encode(processor, sample, [video])
        batch = family.collate([encoded], pad_token_id=processor.tokenizer.pad_token_id)
        (layout,) = batch.pop("layouts")
        with torch.no_grad():
            maps = model(**batch, output_attentions=True).attentions
        mean = torch.stack(maps).mean(dim=(0, 1, 2))[:, layout.videos[0].positions]
        words = whole_words(text)
        assert (prior.grid, prior.prompt) == (layout.videos[0].grid, text)
        assert prior.spans == words
        assert prior.tokens == text.split()
        spans = layout.message_spans
        found = map_words(words, text, segments, layout.text, layout.offsets, message_spans=spans)
        for word in range(len(words)):
            rows = [r for r, w in zip(found.rows, found.row_tokens, strict=True) if w == word]
            expected = mean[rows].mean(dim=0)
            torch.testing.assert_close(prior.attention[word].float(), expected, atol=2e-5, rtol=2e-3)


def test_a_student_begins_at_its_own_maps(world: World, tmp_path: Path) -> None:
    """With the same frames and no aligner, the first step's distance is only rounding, unlike a teacher's."""
    options = {"aligner": "identity", "ddim_steps": None, "prior_source": "hybrid", **FRAMES}
    options |= {"learning_rate": 0.05, "max_steps": 3}
    assert train.main(flags(world, tmp_path / "own", teacher="self", **options)) == 0
    report = report_of(tmp_path / "own")
    log = [entry["loss_align"] for entry in report["training"]["log"] if "loss_align" in entry]
    assert log[0] < 1e-3
    assert log[-1] > 10 * log[0], "the student moved away, and the prior stayed"
    assert report["teacher"]["path"] == str(world.student)
    assert {entry["evaluations"] for entry in report["samples"]} == {1}
    # The student's folder is the same teacher as "self": the priors are read from the store.
    options["prior_source"] = "store"
    assert train.main(flags(world, tmp_path / "again", teacher=world.student, **options)) == 0
    again = report_of(tmp_path / "again")["training"]["log"]
    assert [entry["loss_align"] for entry in again if "loss_align" in entry] == log


def test_words_are_kept_by_their_scores(world: World, tmp_path: Path) -> None:
    whole = extracted(world, tmp_path / "whole", limit=1, token_selection="off")
    half = extracted(world, tmp_path / "half", limit=1)
    (one,), (other,) = ([store.read(key) for key in store] for store in (whole, half))
    best = sorted(sorted(range(len(one.tokens)), key=lambda i: -one.token_scores[i])[: len(other.kept)])
    assert len(other.kept) == max(1, int(len(one.tokens) / 2 + 0.5))
    assert (other.kept, other.all_tokens) == (best, one.tokens)
    assert torch.equal(other.attention, one.attention[best])


def test_what_names_a_prior(world: World, tmp_path: Path) -> None:
    """The conversation and the frames are part of the key, settings of a video model are not."""
    priors = tmp_path / "priors"
    extracted(world, priors, limit=2)
    before = stored(priors)
    extracted(world, priors, limit=2)
    assert stored(priors) == before
    extracted(world, priors, limit=2, teacher_frames=4)
    assert report_in(priors)["made"] == 2
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:1]]
    # The same text, moved into the question.
    turns = rows[0]["conversations"]
    turns[0]["value"] += " " + turns[1]["value"]
    turns[1]["value"] = "x"
    moved = tmp_path / "moved.jsonl"
    moved.write_text(json.dumps(rows[0]))
    extracted(world, priors, data=moved, prompt_source="question")
    assert report_in(priors)["made"] == 1
    kept = PriorStore(priors)
    texts = [kept.read(key).prompt for key in kept]
    assert len(texts) == 5
    prior = PriorArguments(teacher=str(world.student))
    assert prior.reading(PriorSettings(steps=10)) == prior.reading(PriorSettings())


def test_what_a_student_cannot_read_has_a_reason(world: World, tmp_path: Path) -> None:
    """A still has no motion, a student with NaN no maps, and images are no part of a prior."""
    source = PriorArguments(teacher=str(world.student), teacher_frames=2).load("cpu")
    assert isinstance(source, OwnMaps)
    (sample,) = read_samples(world.data, world.videos, SkipLog(), limit=1)
    encode_video(tmp_path / "still.mp4", torch.zeros(1, 32, 32, 3, dtype=torch.uint8).numpy())
    with pytest.raises(VideoError, match="has 1 frame, needs at least 2"):
        source.decode(PriorRequest(tmp_path / "still.mp4", "x"))
    with pytest.raises(ValueError, match="without images"):
        source.said(replace(sample, images=(Path("a.png"),)), "both")
    request = PriorRequest(Path(sample.videos[0]), prompt_text(sample)[0], said=source.said(sample, "both"))
    video = source.decode(request)
    assert source.read(request, video, PriorSettings())[0].attention.isfinite().all()
    torch.nn.init.constant_(next(p for n, p in source.model.named_parameters() if "q_proj" in n), torch.nan)
    with pytest.raises(PriorError, match="attention holds NaN or infinity"):
        source.read(request, video, PriorSettings())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prior_source": "online"}, "--prior_source online: the maps of the student"),
        ({"ddim_steps": 10}, "--ddim_steps does nothing with --teacher"),
        ({"head_selection": "off"}, "--head_ratio does nothing with --teacher"),
        ({"region_grid": "2x2x2"}, "--region_grid does nothing with --teacher"),
        ({"teacher_size": "32"}, "--teacher_size must be HEIGHTxWIDTH"),
    ],
)  # fmt: skip
def test_what_does_nothing_is_refused(
    world: World, tmp_path: Path, options: dict, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"ddim_steps": None, "teacher": "self", "prior_source": "hybrid", **options}
    assert train.main(flags(world, tmp_path / "out", **given)) == 2
    assert f"error: {says}" in capsys.readouterr().err


def test_self_is_a_student_in_training(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract.main(world.flags(student=None, teacher="self", prior_dir=tmp_path / "priors")) == 2
    assert "error: --teacher self is the student of a training" in capsys.readouterr().err


def test_clips_of_several_sizes_need_the_identity(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grids of such clips differ, unless --teacher_size gives all clips one size."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    wide = torch.zeros(9, 32, 64, 3, dtype=torch.uint8).numpy()
    encode_video(tmp_path / "wide.mp4", wide)
    rows[0]["video"], rows[1]["video"] = str(tmp_path / "wide.mp4"), str(world.videos / rows[1]["video"])
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"teacher": "self", "ddim_steps": None, "prior_source": "hybrid", "data": data, **FRAMES}
    assert train.main(flags(world, tmp_path / "mlp", **options)) == 2
    assert "--aligner mlp needs priors of one grid, found" in capsys.readouterr().err
    assert train.main(flags(world, tmp_path / "identity", aligner="identity", **options)) == 0
    assert train.main(flags(world, tmp_path / "sized", teacher_size="32x32", **options)) == 0
