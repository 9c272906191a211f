"""The extraction command: what is made, and what is left out."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from extract_support import damaged_world, report_in, stored
from tiny_world import World
from train_support import flags as flags_of_training

from motionenhancer import extract, train
from motionenhancer import store as store_command
from motionenhancer.data import Clip, SkipLog, content_digest, read_frames, read_samples
from motionenhancer.data.readers import load_samples
from motionenhancer.flags import parse_arguments
from motionenhancer.priors import reader
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.engine import MakerArguments
from motionenhancer.priors.prior import PARTLY_UNKNOWN, extract_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import request_priors
from motionenhancer.priors.storage import PriorStore, prior_keys
from motionenhancer.teachers import load_teacher
from motionenhancer.teachers.folder import tokenize
from motionenhancer.toy.tokenizers import t5_tokenizer


def test_the_number_of_decoding_threads_changes_nothing(world: World, tmp_path: Path) -> None:
    for workers in (1, 3):
        flags = world.flags(student=None, prior_dir=tmp_path / str(workers), ddim_steps=1, limit=4)
        assert extract.main([*flags, "--prior_workers", str(workers)]) == 0
    assert len(stored(tmp_path / "1")) == 4
    assert stored(tmp_path / "1") == stored(tmp_path / "3")


def test_what_is_left_out_is_listed_in_a_file_and_in_the_exit_code(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, videos = damaged_world(world, tmp_path / "world", 5, 2)
    with data.open("a") as file:
        file.write("{not json\n")
    priors = tmp_path / "priors"
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=priors, ddim_steps=1)
    assert extract.main(flags) == 1
    printed = capsys.readouterr().out
    assert "3 samples have their prior" in printed
    assert "2 unreadable video" in printed
    report = report_in(priors)
    assert report["status"] == "finished"
    assert (report["samples"], report["stored"], report["made"]) == (3, 0, 3)
    assert report["skipped"]["counts"] == {"unreadable video": 2, "invalid json": 1}
    ids = [json.loads(line)["id"] for line in data.read_text().splitlines()[:5]]
    assert {entry["id"] for entry in report["skipped"]["entries"]} == {*ids[-2:], ""}
    assert sorted(entry["line"] for entry in report["skipped"]["entries"]) == [4, 5, 6]
    assert extract.main(flags) == 1
    assert "(0 made now)" in capsys.readouterr().out
    assert not [path for path in priors.iterdir() if path.name.endswith(".tmp")]


def test_a_finished_extraction_typed_again_changes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, priors = tmp_path / "data.jsonl", tmp_path / "priors"
    data.write_text("".join(world.data.read_text().splitlines(keepends=True)[:3]) + "{not json\n")
    flags = world.flags(student=None, data=data, prior_dir=priors, ddim_steps=1)
    assert extract.main(flags) == 1
    capsys.readouterr()
    assert store_command.main(["list", "--prior_dir", str(priors)]) == 0
    listed = capsys.readouterr().out
    for row in map(json.loads, data.read_text().splitlines()[:3]):
        (line,) = [line for line in listed.splitlines() if row["video"] in line]
        assert "steps=1" in line
        assert f"teacher {report_in(priors)['teacher']['id'][:8]}" in line
    before, path = report_in(priors), priors / extract.EXTRACTION
    written = path.stat().st_mtime_ns
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(PriorArguments, "load", lambda *args, **options: pytest.fail("loaded"))
        assert extract.main(flags) == 1
    said = capsys.readouterr().out
    assert "this extraction is finished; nothing is done" in said
    assert "3 samples have their prior" in said
    assert report_in(priors) == before
    assert path.stat().st_mtime_ns == written
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    assert extract.main(flags) == 0
    assert "nothing is done" not in capsys.readouterr().out
    assert report_in(priors)["samples"] == 2
    next(priors.rglob("*.safetensors")).unlink()
    assert extract.main(flags) == 0
    assert (report_in(priors)["status"], report_in(priors)["made"]) == ("finished", 1)


def test_texts_that_the_teacher_knows_in_part_are_counted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:4]]
    for row, answer in zip(
        rows, ("红色", "The red 方块 moves.", "The ring 🏃 moves.", "It moves."), strict=True
    ):
        row["conversations"][1]["value"] = answer
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = world.flags(student=None, data=data, prior_dir=tmp_path / "priors", ddim_steps=1)
    for _ in range(2):  # whether priors are made or found
        assert extract.main([*flags, "--prompt_source", "answer"]) == 1
        printed = capsys.readouterr().out.splitlines()
        said = [line for line in printed if line.startswith(f"2 priors: {PARTLY_UNKNOWN}")]
        assert len(said) == 1
        skipped = json.loads((tmp_path / "priors" / extract.EXTRACTION).read_text())["skipped"]
        assert skipped["notes"] == {PARTLY_UNKNOWN: 2}
        (entry,) = skipped["entries"]
        assert entry["id"] == rows[0]["id"]
        assert "'红色' has no word that the teacher's tokenizer knows" in entry["detail"]
    assert len(list(PriorStore(tmp_path / "priors"))) == 3


def test_texts_that_are_cut_are_counted_and_no_library_warns_of_them(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher takes 47 words of 300; extraction and training both say so at their end."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    rows[0]["conversations"][1]["value"] = "red " * 300
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    chosen = {"data": data, "prompt_source": "answer"}
    given = world.flags(student=None, prior_dir=tmp_path / "priors", ddim_steps=1, **chosen)
    chosen |= {"max_steps": 1, "prior_source": "store"}
    libraries = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        for more in (["--dry_run"], [], []):  # whether priors are made or found
            assert extract.main([*given, *more]) == 0
            said = capsys.readouterr().out
        assert "\n1 texts cut to the teacher's length, 253 words left out\n" in said
        assert train.main(flags_of_training(world, tmp_path / "out", **chosen)) == 0
        # As a teacher does that puts the text into a template.
        tokenize(t5_tokenizer(), "red " * 300, 48, template=("It shows ", "."))
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(", 1 texts cut to the teacher's length, 253 words left out")
    assert [
        r.getMessage() for r in caplog.records if r.name.split(".")[0] in ("transformers", "diffusers")
    ] == []


def test_segments_of_one_clip_have_priors_of_their_own(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads(world.data.read_text().splitlines()[0])
    segments = [
        {},
        {"video_end": 0.5},
        {"video_start": 0.5},
        {"video_start": 0.5, "fps": 2},
        {"video_end": 9},
    ]
    data = tmp_path / "data.jsonl"
    asked, answer = (turn["value"] for turn in row["conversations"])
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    videos = [[{"path": row["video"], **said}] for said in segments]
    data.write_text("\n".join(json.dumps({"messages": turns, "videos": v}) for v in videos))
    priors = tmp_path / "priors"
    flags = world.flags(student=None, data=data, prior_dir=priors, ddim_steps=1)
    assert extract.main(flags) == 0
    report = json.loads((priors / extract.EXTRACTION).read_text())
    assert (report["samples"], report["made"]) == (5, 4), (
        "how a student samples a segment is not the teacher's"
    )
    samples = list(read_samples(data, world.videos, SkipLog()))
    name = PriorArguments(teacher=str(world.teacher)).teacher_id("cpu")
    settings = PriorSettings(steps=1)
    keys = prior_keys(name, settings)
    pairs = request_priors(samples, "both", SkipLog(), name=keys, digest=content_digest)
    requests = [request for _, request in pairs]
    assert [request.key in PriorStore(priors) for request in requests] == [True] * 5
    assert len({request.key for request in requests}) == 4
    assert requests[2].video == requests[3].video == Clip(world.videos / row["video"], 0.5)
    teacher = load_teacher(world.teacher, "cpu")
    for request in requests:
        frames = read_frames(request.video, num_frames=teacher.max_frames, size=teacher.size).frames
        kept = PriorStore(priors).read(request.key)
        assert torch.equal(kept.attention, extract_prior(teacher, frames, request.text, steps=1).attention)
    capsys.readouterr()
    assert extract.main(flags) == 0
    assert "(0 made now)" in capsys.readouterr().out


def test_names_that_are_no_text_do_not_spoil_the_report(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    videos = tmp_path / "videos"
    videos.mkdir()
    name = os.fsdecode(b"caf\xe9.mp4")
    (videos / rows[0]["video"]).write_bytes((world.videos / rows[0]["video"]).read_bytes())
    (videos / name).write_bytes(b"no video")
    rows[1] |= {"video": name, "id": "half \ud83d"}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main(flags) == 1
    assert "caf\\udce9.mp4" in capsys.readouterr().out
    report = report_in(tmp_path / "p")
    assert (report["status"], report["made"]) == ("finished", 1)
    (entry,) = report["skipped"]["entries"]
    assert entry["id"] == "half \ud83d"
    assert name in entry["detail"]
    assert not list((tmp_path / "p").glob(".*.tmp"))


def test_no_two_samples_are_given_one_id(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for given, expected in (
        (["a", "a", "a"], ["a", "a#2", "a#3"]),
        (["a", "a", "a#2"], ["a", "a#2", "a#2#2"]),
        (["a#2", "a", "a", "a"], ["a#2", "a", "a#3", "a#4"]),
    ):
        data = tmp_path / "data.jsonl"
        named = [{**row, "id": name} for row, name in zip(rows, given, strict=False)]
        data.write_text("\n".join(map(json.dumps, named)) + "\n")
        skips = SkipLog(shout=0)
        samples = load_samples(data, world.videos, None, skips)
        assert [sample.id for sample in samples] == expected
        assert skips.notes == {
            "repeated id, numbered": sum(a != b for a, b in zip(given, expected, strict=True))
        }


def test_a_stored_prior_that_is_damaged_is_made_anew(world: World, tmp_path: Path) -> None:
    flags = world.flags(student=None, prior_dir=tmp_path, ddim_steps=1, limit=3)
    assert extract.main(flags) == 0
    before = stored(tmp_path)
    key = min(before)
    PriorStore(tmp_path).path(key).write_bytes(before[key][:-9])
    assert extract.main(flags) == 0
    assert stored(tmp_path) == before
    report = report_in(tmp_path)
    assert (report["stored"], report["made"]) == (2, 1)
    assert report["skipped"]["notes"] == {"damaged priors made anew": 1}


def test_clips_shared_by_several_samples_are_made_and_refused_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    (world.videos / "shared-broken.mp4").write_bytes(b"no video")
    rows += [{**rows[0], "id": f"broken-{i}", "video": "shared-broken.mp4"} for i in range(3)]
    # The same clips again, next to each other and far apart.
    rows = [*rows, *({**row, "id": f"{row['id']}-again"} for row in rows), rows[0] | {"id": "last"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    decoded, decode = [], reader.read_frames
    monkeypatch.setattr(
        reader, "read_frames", lambda path, **options: (decoded.append(path.name), decode(path, **options))[1]
    )
    flags = world.flags(student=None, data=data, prior_dir=tmp_path / "priors", ddim_steps=1)
    assert extract.main(flags) == 1
    assert len(decoded) == len(set(decoded)) == 3
    report = report_in(tmp_path / "priors")
    assert (report["samples"], report["made"], report["stored"]) == (5, 2, 3)
    assert report["skipped"]["counts"] == {"unreadable video": 6}
    assert len(stored(tmp_path / "priors")) == 2


def test_a_file_that_cannot_be_digested_costs_its_samples_only(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()[:2]]
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / rows[0]["video"]).write_bytes((world.videos / rows[0]["video"]).read_bytes())
    samples = list(read_samples(world.data, world.videos, SkipLog()))[:2]
    assert samples[1].videos[0].name == rows[1]["video"]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main(flags) == 1
    report = report_in(tmp_path / "p")
    assert report["made"] == 1
    assert report["skipped"]["total"] == 1
    assert report["skipped"]["entries"][0]["id"] == rows[1]["id"]
    assert list(PriorStore(tmp_path / "p").refusals()) == []


@pytest.mark.parametrize(
    "flag",
    [
        ["--prior_workers", "0"],
        ["--decode_workers", "0"],
        ["--ddim_steps", "0"],
        ["--ddim_steps", "7"],
        ["--noise_level", "1000", "--prior_mode", "renoise"],
        ["--limit", "0"],
        ["--data", "missing.jsonl"],
        ["--data", "."],
        ["--video_root", "missing"],
        ["--head_ratio", "2"],
    ],
)
def test_bad_flags_are_named(
    world: World, tmp_path: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = world.flags(student=None, prior_dir=tmp_path / "priors")
    try:
        code = extract.main([*flags, *flag])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert flag[0] in capsys.readouterr().err
    assert not (tmp_path / "priors").exists()


def test_a_bar_shows_how_much_of_the_data_file_is_done_and_what_was_left_out(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, videos = damaged_world(world, tmp_path / "world", 4, 1)
    flags = world.flags(student=None, data=data, video_root=videos, prior_dir=tmp_path / "p", ddim_steps=1)
    assert extract.main([*flags, "--limit", "2"]) == 0
    capsys.readouterr()
    assert extract.main(flags) == 1
    last = capsys.readouterr().err.rstrip().splitlines()[-1].split("\r")[-1]
    assert last.startswith("priors: 100%")
    assert "stored=2" in last
    assert "made=1" in last
    assert "left out=1" in last


def test_the_older_names_of_options_are_known_as_flags_and_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(*argv: str) -> MakerArguments:
        return parse_arguments((MakerArguments,), argv, prog="test")[0]

    assert parse("--engine", "ray", "--decode_workers", "5") == MakerArguments("ray", 5)
    assert parse("--decode-workers", "5") == MakerArguments("local", 5)
    config = tmp_path / "config.yaml"
    config.write_text("engine: ray\ndecode_workers: 5\nray_workers: 2\n")
    assert parse("--config", str(config)) == MakerArguments("ray", 5, ray_workers=2)
    assert parse("--config", str(config), "--decode_workers", "3") == MakerArguments("ray", 3, ray_workers=2)
    assert parse("--config", str(config), "--prior_workers", "3") == MakerArguments("ray", 3, ray_workers=2)
    for body, said in (
        ("engine: cluster\n", "prior_engine must be one of local, ray, got 'cluster'"),
        ("engine: ray\nprior_engine: local\n", "engine and prior_engine are two names of one option"),
        ("decode_worker: 3\n", "unknown field 'decode_worker' (did you mean 'decode_workers'?)"),
    ):
        config.write_text(body)
        with pytest.raises(SystemExit):
            parse("--config", str(config))
        assert said in capsys.readouterr().err
