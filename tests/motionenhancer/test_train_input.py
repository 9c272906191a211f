"""What the training command refuses, skips and reports."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import World
from train_support import arguments, flags, parts, report_of, weights_of

from motionenhancer import extract, train
from motionenhancer.alignment.dataset import MotionDataset
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.data.encode import encode_video
from motionenhancer.priors.storage import PriorStore


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    assert train.main(flags(world, out, max_steps=1)) == 0
    return out


def test_nan_stops_the_run_and_names_the_samples(world: World, tmp_path: Path) -> None:
    model, dataset, collator = parts(world, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    trainer = MotionTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset, data_collator=collator
    )
    with pytest.raises(FloatingPointError, match=r"nan.*step 0.*train-0000"):
        trainer.train()


def test_another_runs_folder_is_refused(
    trained: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "model.safetensors").read_bytes()
    assert train.main(flags(world, trained, alignment_weight=0.5)) == 2
    assert "alignment_weight: 1.0 there, 0.5 now" in capsys.readouterr().err
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_folder_of_something_else_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert train.main(flags(world, tmp_path / "out")) == 2
    assert "thesis.tex" in capsys.readouterr().err


def test_an_unwritable_folder_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert train.main(flags(world, tmp_path / "file" / "out")) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student": "missing"}, "missing"),
        ({"teacher": "missing"}, "missing"),
        ({"data": None}, "needs --data, the file that names its clips"),
        ({"ddim_steps": 3}, "steps=3"),
        ({"prior_source": "store"}, "python -m motionenhancer.extract"),
    ],
)
def test_one_clear_error(
    world: World, tmp_path: Path, options: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_ratio": 0}, "--head_ratio must be above 0 and at most 1, got 0.0"),
        ({"data": "missing.jsonl"}, "--data must be a file that exists, got missing.jsonl"),
        ({"data": "."}, "--data must be a file that exists, got ."),
        ({"video_root": "missing"}, "--video_root must be a folder that exists, got missing"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_flag(
    world: World, tmp_path: Path, options: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(flags(world, tmp_path / "out", **options))
    assert stop.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err


def rows(world: World) -> list[dict]:
    return [json.loads(line) for line in world.data.read_text().splitlines()]


def test_bad_samples_are_counted_and_the_rest_is_trained(world: World, tmp_path: Path) -> None:
    good = rows(world)
    videos = tmp_path / "videos"
    videos.mkdir()
    for row in good:
        (videos / row["video"]).write_bytes((world.videos / row["video"]).read_bytes())
    body = (videos / good[0]["video"]).read_bytes()
    (videos / "truncated.mp4").write_bytes(body[: len(body) // 2])
    (videos / "garbage.mp4").write_bytes(bytes(range(256)) * 40)
    (videos / "empty.mp4").write_bytes(b"")
    one_frame(videos / "still.mp4")
    bad = [
        {**good[0], "id": name, "video": f"{name}.mp4"}
        for name in ("truncated", "garbage", "empty", "still", "absent")
    ]
    untagged = json.loads(json.dumps(good[0]).replace("<video>", "").replace('"id": "', '"id": "untagged-'))
    wordless = {**good[0], "id": "wordless", "conversations": [
        {"from": "human", "value": "<video>\n ?"}, {"from": "gpt", "value": ""}
    ]}  # fmt: skip
    lines = [json.dumps(row) for row in [*good[:3], *bad, untagged, wordless]] + ["{not json"]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    assert train.main(flags(world, out, data=data, video_root=videos)) == 0
    skipped = report_of(out)["skipped"]
    named = {entry["id"] for entry in skipped["entries"]}
    assert {"truncated", "garbage", "empty", "still", "absent", "wordless"} <= named
    assert any("untagged" in name for name in named)
    assert any(entry["line"] == len(lines) for entry in skipped["entries"])
    del skipped["counts"]["unreadable while training"]
    assert sum(skipped["counts"].values()) == 8
    assert {s["id"] for s in report_of(out)["samples"]} == {row["id"] for row in good[:3]}


def one_frame(path: Path) -> None:

    encode_video(path, np.full((1, 64, 64, 3), 90, np.uint8), fps=8)


def test_a_clip_that_breaks_later_gives_way_to_the_next(world: World, tmp_path: Path) -> None:
    _, dataset, collator = parts(world, tmp_path)
    missing = dataset.samples[1].videos[0]
    broken = tmp_path / "gone.mp4"
    object.__setattr__(dataset.samples[1], "videos", (broken,))
    items = [dataset[0], dataset[1]]
    assert items[1].id == dataset.samples[2].id
    batch = collator(items)
    assert list(batch["skipped"]) == [dataset.samples[1].id]
    assert "gone.mp4" in batch["skipped"][dataset.samples[1].id]
    object.__setattr__(dataset.samples[1], "videos", (missing,))


def test_a_prior_without_mappable_words_counts_and_costs_nothing(world: World, tmp_path: Path) -> None:

    _, dataset, collator = parts(world, tmp_path)
    items = [dataset[i] for i in range(2)]
    words = dataclasses.replace(items[0].words, rows=[], row_tokens=[])
    batch = collator([dataclasses.replace(items[0], words=words), items[1]])
    assert batch["alignment"].count == 1
    assert batch["alignment"].mapped == items[1].words.mapped
    assert batch["alignment"].words == items[0].words.count + items[1].words.count
    assert collator([dataclasses.replace(items[0], words=words)])["alignment"] is None


def test_damaged_priors_are_made_anew(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train.main(flags(world, out)) == 0
    store = PriorStore(tmp_path / "priors")
    keys = sorted(store)
    before = store.path(keys[0]).read_bytes()
    store.path(keys[0]).write_bytes(before[:100])
    assert train.main(flags(world, tmp_path / "again")) == 0
    assert store.path(keys[0]).read_bytes() == before
    assert report_of(tmp_path / "again")["skipped"]["notes"] == {"damaged priors made anew": 1}
    assert [s["made_now"] for s in report_of(tmp_path / "again")["samples"]].count(True) == 1


def test_extraction_alone_feeds_training_from_the_store(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    priors = tmp_path / "priors"
    chosen = world.flags(student=None, prior_dir=priors, ddim_steps=1)
    assert extract.main(chosen) == 0
    assert "8 samples have their prior" in capsys.readouterr().out
    assert train.main(flags(world, tmp_path / "out", prior_source="store")) == 0
    assert not any(sample["made_now"] for sample in report_of(tmp_path / "out")["samples"])
    assert extract.main([*chosen, "--ddim_steps", "3"]) == 2
    assert "steps=3" in capsys.readouterr().err


def test_samples_that_share_an_id_keep_their_own_priors(world: World, tmp_path: Path) -> None:
    lines = [json.dumps({**row, "id": "same"}) for row in rows(world)[:3]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    assert train.main(flags(world, out, data=data)) == 0
    report = report_of(out)
    assert [sample["id"] for sample in report["samples"]] == ["same", "same#2", "same#3"]
    assert len({sample["prompt"] for sample in report["samples"]}) == 3
    assert report["skipped"]["notes"] == {"repeated id, numbered": 2}


def test_real_clips_in_the_messages_format(world: World, tmp_path: Path, real_clips: dict[str, Path]) -> None:
    lines = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video"}, {"type": "text", "text": f"What moves in clip {i}?"}],
                },
                {"role": "assistant", "content": "Something moves to the left."},
            ],
            "videos": [str(path)],
        }
        for i, path in enumerate(real_clips.values())
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    out = tmp_path / "out"
    assert train.main(flags(world, out, data=data, video_root=tmp_path, max_frames=4, video_fps=1)) == 0
    report = report_of(out)
    assert len(report["samples"]) == len(lines)
    assert report["skipped"]["total"] == 0
    assert {tuple(sample["grid"]) for sample in report["samples"]} == {(5, 8, 8)}


def test_no_prior_at_all_is_an_error_and_not_plain_training(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    file = next((teacher / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    # Finite, so that it loads, and too large for the attention to be.
    next(v for k, v in weights.items() if "attn1.to_q.weight" in k)[0] = 3e38
    save_file(weights, file)
    assert train.main(flags(world, tmp_path / "out", teacher=teacher)) == 2
    assert "none of the 8 samples has a prior" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert train.main(flags(world, tmp_path / "plain", teacher=teacher, alignment_weight=0)) == 0


def test_any_change_of_the_recipe_is_another_run(
    trained: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, said in (
        ({"weight_decay": 0.9}, "weight_decay: 0.1 there, 0.9 now"),
        ({"gradient_accumulation_steps": 4}, "global_batch_size: 2 there, 8 now"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
    ):
        assert train.main(flags(world, trained, **{"max_steps": 1, **change})) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_failed_before_training_leaves_its_folder_free(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train.main(flags(world, out, ddim_steps=2, prior_source="store")) == 2
    assert report_of(out)["status"] == "failed"
    assert train.main(flags(world, out, ddim_steps=1)) == 0


def test_truncated_weights_of_the_student_are_one_clear_error(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student"
    shutil.copytree(world.student, student)
    file = student / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert train.main(flags(world, tmp_path / "out", student=student)) == 2
    assert "model.safetensors: cannot be read" in capsys.readouterr().err


def test_the_command_that_makes_missing_priors_can_be_pasted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"prior_dir": tmp_path / "the priors", "ddim_steps": 2, "memory": "false"}
    run = [*world.flags(**options), "--output_dir", str(tmp_path / "out"), "--prior_source", "store"]
    assert train.main(run) == 2
    (command,) = re.findall(
        r"^  (python -m motionenhancer\.extract .*)$", capsys.readouterr().err, re.MULTILINE
    )
    assert extract.main(shlex.split(command)[3:]) == 0
    assert train.main([*run, "--max_steps", "1"]) == 0


def test_samples_are_kept_up_to_the_size_of_the_cache(world: World, tmp_path: Path) -> None:
    _, read, _ = parts(world, tmp_path)

    def kept(size: int) -> list[bool]:
        options = {"keys": read.keys, "store": read.store, "fps": 4, "cache_bytes": size}
        dataset = MotionDataset(read.samples, read.family, read.processor, **options)
        first = [dataset[i] for i in range(3)]
        return [dataset[i] is first[i] for i in range(3)]

    def size(item: Any) -> int:
        tensors = (value for value in vars(item.encoded).values() if isinstance(value, torch.Tensor))
        parts = (item.encoded.token_inputs, item.encoded.vision_inputs)
        held = [item.prior.attention, *tensors, *(value for part in parts for value in part.values())]
        assert len(held) > 5
        return sum(value.numel() * value.element_size() for value in held)

    one, two = size(read[0]), size(read[1])
    assert kept(0) == [False] * 3
    assert not kept(one - 1)[0]
    assert kept(one) == [True, False, False]
    assert kept(one + two) == [True, True, False]
    assert kept(2**20) == [True] * 3


def test_an_unreadable_sample_is_not_kept(world: World, tmp_path: Path) -> None:
    """The next sample takes its place. It is tried again in every epoch, and read if it can be."""
    _, read, _ = parts(world, tmp_path, priors=False)
    gone = dataclasses.replace(read.samples[0], videos=(tmp_path / "gone.mp4",))
    samples = [gone, *read.samples[1:]]
    dataset = MotionDataset(
        samples, read.family, read.processor, keys={}, store=read.store, fps=4, cache_bytes=2**20
    )
    assert list(dataset[0].skipped) == [gone.id]
    assert not dataset[1].skipped
    shutil.copy(read.samples[0].videos[0], gone.videos[0])
    assert not dataset[0].skipped
    assert dataset[0] is dataset[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_kept_samples_change_no_weight(
    world: World, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    original = MotionDataset._read

    def counted(self: MotionDataset, index: int) -> Any:
        reads.append((self._left, index))
        return original(self, index)

    monkeypatch.setattr(MotionDataset, "_read", counted)
    common = {"max_steps": 10, "per_device_train_batch_size": 1, "dataloader_num_workers": workers}
    for name, size in (("read", 0), ("kept", 1)):
        options = {**common, "sample_cache_mb": size, "report_samples": 0}
        assert train.main(flags(world, tmp_path / name, **options)) == 0
    read, kept = weights_of(tmp_path / "read"), weights_of(tmp_path / "kept")
    assert all(torch.equal(kept[key], value) for key, value in read.items())
    if workers == 0:  # The reads of another process are not seen here.
        once = [index for left, index in reads if left]
        assert sorted(once) == list(range(8))
        assert sum(not left for left, _ in reads) > 10


def test_workers_that_keep_samples_live_longer_than_an_epoch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    original = MotionTrainer.__init__

    def init(self: MotionTrainer, *args: object, **options: object) -> None:
        original(self, *args, **options)
        seen.append(self.args.dataloader_persistent_workers)

    monkeypatch.setattr(MotionTrainer, "__init__", init)
    for size, workers in ((1, 1), (0, 1), (1, 0)):
        options = {"sample_cache_mb": size, "dataloader_num_workers": workers, "report_samples": 0}
        assert train.main(flags(world, tmp_path / f"{size}{workers}", max_steps=1, **options)) == 0
    assert seen == [True, False, False]
