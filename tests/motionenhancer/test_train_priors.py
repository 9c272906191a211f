"""Clips that give no prior: the same run whenever priors are made, and every one of them named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_world import World
from train_support import flags, parts, report_of, weights_of

from motionenhancer import train
from motionenhancer.alignment.dataset import align_batch
from motionenhancer.data import digests
from motionenhancer.data.video import content_digest
from motionenhancer.priors import reader as priors_reader
from motionenhancer.students.words import find_words

#: More than a pass over the data: whatever is left out changes the order of the rest.
OPTIONS = {"max_steps": 4, "per_device_train_batch_size": 2}


def with_broken_clips(world: World, folder: Path) -> dict[str, object]:
    """The data flags of four good clips and two that are no video."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()][:4]
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for row in rows:
        (videos / row["video"]).write_bytes((world.videos / row["video"]).read_bytes())
    for index in range(2):
        (videos / f"broken-{index}.mp4").write_bytes(bytes([index]) * 4000)
        rows.insert(1 + 2 * index, {**rows[0], "id": f"broken-{index}", "video": f"broken-{index}.mp4"})
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"data": data, "video_root": videos, **OPTIONS}


def test_words_before_the_video_cannot_see_it_and_are_dropped(world: World, tmp_path: Path) -> None:
    _, dataset, _ = parts(world, tmp_path)
    sample = dataset.samples[0]
    (video, text), answer = sample.messages[0]["content"], sample.messages[1]
    assert (video["type"], text["type"]) == ("video", "text")
    first = dataset[0]
    assert first.words.mapped == first.words.count
    dataset.samples[0] = replace(sample, messages=[{"role": "user", "content": [text, video]}, answer])
    last = dataset[0]
    assert last.prior.prompt == first.prior.prompt, "the teacher's text is the same"
    seen = int(last.encoded.layout.videos[0].positions[0])
    assert last.words.rows
    assert min(last.words.rows) > seen
    asked = first.prior.prompt.index(answer["content"][0]["text"])
    said = [i for i, (start, _) in enumerate(first.prior.spans) if start >= asked]
    assert sorted(set(last.words.row_tokens)) == said
    assert last.words.dropped == [i for i in range(first.words.count) if i not in said]
    # With priors made while training, words are found in the padded batch.
    padded = last.encoded.layout.shifted(1000)
    assert find_words(dataset.samples[0], last.prior, padded, "both") == last.words
    # A sample whose request gets no prior is trained on without alignment.
    assert align_batch([last.prior], [last.words.after(10_000)], [last.encoded.layout]) is None


def test_a_prior_that_goes_while_training_costs_its_sample_alone(world: World, tmp_path: Path) -> None:
    _, dataset, _ = parts(world, tmp_path)
    first, second = (sample.id for sample in dataset.samples[:2])
    dataset.keys[first] = "f" * 64
    item = dataset[0]
    assert item.id == second
    assert "no prior ffff" in item.skipped[first]


def test_unreadable_clips_are_treated_alike_whenever_priors_are_made(world: World, tmp_path: Path) -> None:
    chosen, reports, weights = with_broken_clips(world, tmp_path), {}, {}
    for name, how in (
        ("first", {"priors_first": True, "prior_dir": tmp_path / "priors"}),
        ("while", {"prior_source": "online"}),
    ):
        assert train.main(flags(world, tmp_path / name, **chosen, **how)) == 0
        reports[name], weights[name] = report_of(tmp_path / name), weights_of(tmp_path / name)
    for name, value in weights["first"].items():
        assert torch.equal(value, weights["while"][name]), name
    assert reports["first"]["alignment"] == reports["while"]["alignment"]
    assert reports["first"]["plan"]["steps"]["samples"] == 6
    for report in reports.values():
        gave_way = [
            e["id"] for e in report["skipped"]["entries"] if e["reason"] == "unreadable while training"
        ]
        assert sorted(gave_way) == ["broken-0", "broken-1"]
    counts = reports["first"]["skipped"]["counts"]
    assert counts == {"unreadable video": 2, "unreadable while training": 2}


def test_clips_left_out_of_the_agreement_are_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, stumbled = priors_reader.extract_prior, []

    def extract_prior(teacher, frames, text, **options):
        if options["mode"] == "reconstruct" and not stumbled:
            stumbled.append(text)
            raise RuntimeError("the teacher stumbled")
        return make(teacher, frames, text, **options)

    monkeypatch.setattr(priors_reader, "extract_prior", extract_prior)
    options = {"prior_source": "online", "prior_mode": "renoise", "agreement_clips": 3, "max_steps": 1}
    assert train.main(flags(world, tmp_path / "out", **options)) == 0
    report = report_of(tmp_path / "out")
    assert report["teacher"]["agreement"]["clips"] == 2
    (entry,) = report["skipped"]["entries"]
    first = json.loads(world.data.read_text().splitlines()[0])["id"]
    assert (entry["id"], entry["reason"]) == (first, "left out of the agreement")
    assert entry["detail"] == "the teacher stumbled"
    assert "left out of the agreement: the teacher stumbled" in caplog.text


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves the clock on: the cache does not trust a file that was written just now."""
    now = digests.time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 2 * digests.REST)


def test_clips_that_an_earlier_run_has_read_are_not_read_again_for_their_digests(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def digest(path: Path) -> str:
        if Path(path).suffix == ".mp4":
            read.append(Path(path).name)
        return content_digest(path)

    monkeypatch.setattr(digests, "content_digest", digest)
    later(monkeypatch)
    options = {"limit": 3, "max_steps": 1, "prior_dir": tmp_path / "priors"}
    assert train.main(flags(world, tmp_path / "first", **options)) == 0
    assert len(read) == len(set(read)) == 3
    for source in ("store", "hybrid"):
        assert train.main(flags(world, tmp_path / source, prior_source=source, **options)) == 0
    assert len(read) == 3
    assert report_of(tmp_path / "store")["alignment"]["aligned_samples"] == 2


def test_a_folder_of_priors_that_is_not_there_is_not_made_by_a_run_that_only_reads_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch)
    chosen = {"prior_source": "store", "prior_dir": tmp_path / "none", "limit": 2}
    assert train.main(flags(world, tmp_path / "out", **chosen)) == 2
    assert "2 of 2 priors are missing" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
