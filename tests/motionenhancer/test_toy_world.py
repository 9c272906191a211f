"""The toy world: true sentences, true boxes, the same bytes every time, and runs that were cut off."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from motionenhancer.data import SkipLog, check_video, prompt_text, read_frames, read_samples
from motionenhancer.data.encode import encode_video
from motionenhancer.evaluation.benchmarks import BENCHMARKS
from motionenhancer.toy.__main__ import main
from motionenhancer.toy.language import caption, corpus, phrase, place, question, still_question
from motionenhancer.toy.render import FRAMES, render
from motionenhancer.toy.scene import COLOURS, SHAPES, TASKS, sample_scene
from motionenhancer.toy.world import WEIGHTS, build_toy, draw_clip, write_world

SCENES = {
    task: [sample_scene(np.random.default_rng([seed, i]), task) for seed in range(40)]
    for i, task in enumerate(TASKS)
}
EVERY = [scene for scenes in SCENES.values() for scene in scenes]


def files(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("toy") / "w", clips=6, test_clips=3, seed=5, progress=False)


def test_the_benchmark_scores_the_tasks_of_the_world():
    assert BENCHMARKS["toy"].tasks == (*TASKS, "other")


def test_objects_never_touch_or_leave():
    for scene in EVERY:
        assert len({o.shape for o in scene.objects}) == len({o.colour for o in scene.objects}) == 3
        assert not all(o.moving for o in scene.objects)
        clip = render(scene, height=64, width=64)
        assert (clip.masks.sum(0) <= 1 + 1e-5).all()
        assert (clip.masks.sum((2, 3)) > 25).all()
        for obj in scene.objects:
            way = obj.path(FRAMES) + scene.shift(FRAMES)
            assert (way - obj.radius > 0).all()
            assert (way + obj.radius < 1).all()


def centres(masks):
    y, x = np.mgrid[0 : masks.shape[1], 0 : masks.shape[2]]
    weight = masks.sum((1, 2))
    return np.stack([(masks * x).sum((1, 2)) / weight, (masks * y).sum((1, 2)) / weight], 1)


def heading(step):
    """The direction of a way (x, y), or "still"."""
    axis = int(abs(step[1]) > abs(step[0]))
    if abs(step[axis]) < 1:
        return "still"
    assert abs(step[1 - axis]) < 1
    return (("left", "right"), ("up", "down"))[axis][int(step[axis] > 0)]


def test_what_is_said_is_what_is_drawn():
    for task, scenes in SCENES.items():
        for scene in scenes:
            clip = render(scene, frames=61, height=64, width=64)
            for obj, masks in zip(scene.objects, clip.masks, strict=True):
                way = centres(masks)
                if task == "CM":
                    back = {"left": "right", "right": "left", "up": "down", "down": "up"}[
                        heading(way[-1] - way[0])
                    ]
                    assert back == scene.camera
                    continue
                if (masks == masks[0]).all():
                    seen = "stays still"
                elif obj.motion == "hop":
                    low = way[:, 1] > (way[:, 1].min() + 3 * way[:, 1].max()) / 4
                    hops = int((low[1:] & ~low[:-1]).sum()) + int(low[0] and not low[-1])
                    seen = f"hops {('one time', 'two times', 'three times')[hops - 1]}"
                elif obj.then:
                    seen = f"moves {heading(way[30] - way[0])} then {heading(way[60] - way[30])}"
                else:
                    seen = f"moves {heading(way[-1] - way[0])}"
                assert seen == phrase(obj)
                assert f"{obj.name} {seen}" in caption(scene).replace("The ", "the ")


def test_the_middle_frame_tells_nothing_of_the_motion():
    """The asked object's place at the middle has the same mean for every answer."""
    for task in ("MR", "AO", "RC"):
        places = {}
        for seed in range(300):
            scene = sample_scene(np.random.default_rng([7, seed]), task)
            obj = scene.objects[0]
            shown = centres(render(scene, frames=1).masks[:1, 0])[0]
            np.testing.assert_allclose(shown, obj.path(1)[0] * 32 - 0.5, atol=1.0)
            places.setdefault(phrase(obj), []).append(tuple(obj.path(1)[0]))
        assert len(places) == {"MR": 4, "AO": 8, "RC": 3}[task]
        pooled = np.concatenate([np.array(p) for p in places.values()])
        for name, found in places.items():
            error = pooled.std(0) / np.sqrt(len(found))
            assert (np.abs(np.mean(found, 0) - pooled.mean(0)) < 4.5 * error).all(), (task, name)


def test_train_and_test_share_words_but_no_pair():
    looks = {}
    for split in ("train", "test"):
        objects = [
            o for seed in range(300) for o in sample_scene(np.random.default_rng(seed), split=split).objects
        ]
        assert {o.colour for o in objects} == set(COLOURS)
        assert {o.shape for o in objects} == set(SHAPES)
        looks[split] = {o.name for o in objects}
    assert not looks["train"] & looks["test"]
    assert len(looks["train"]) + len(looks["test"]) == len(COLOURS) * len(SHAPES)


def test_boxes_hold_the_objects():
    for scene in EVERY[::9]:
        clip = render(scene)
        for boxes, masks in zip(clip.boxes, clip.masks, strict=True):
            for (x0, y0, x1, y1), mask in zip(boxes.astype(int), masks, strict=True):
                inside = np.zeros_like(mask, bool)
                inside[y0:y1, x0:x1] = True
                assert mask[~inside].max() < 0.5
                for line in (mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]):
                    assert line.max() >= 0.5


def test_answers_are_true_of_one_object_only():
    for task, scenes in SCENES.items():
        for scene in scenes:
            asked, answer = question(scene, task)
            first = scene.objects[0]
            if task == "CM":
                assert answer == f"The camera moves {scene.camera}."
            elif task == "LM":
                assert [phrase(o) in asked for o in scene.objects] == [True, False, False]
                side = answer.removesuffix(".").split()[-1]
                axis = 0 if side in ("left", "right") else 1
                place = first.middle[axis] - scene.objects[1].middle[axis]
                assert (place > 0) == (side in ("right", "bottom"))
            else:
                name = f"{first.colour} one" if task == "MO" else first.name
                assert answer == f"The {name} {phrase(first)}."
                assert sum(phrase(o) == phrase(first) for o in scene.objects) == 1
    with pytest.raises(ValueError, match="task must be"):
        question(EVERY[0], "sound")
    with pytest.raises(ValueError, match="task must be"):
        sample_scene(np.random.default_rng(0), "sound")


def test_still_questions_are_answered_by_one_frame():
    for seed, scene in enumerate(EVERY):
        asked, answer = still_question(scene, np.random.default_rng(seed))
        if asked.startswith("Which colour"):
            corner = asked.removesuffix("?").split()[-2:]
            there = [
                o
                for o in scene.objects
                if [
                    ("top", "bottom")[int(o.path(1)[0, 1] > 0.5)],
                    ("left", "right")[int(o.path(1)[0, 0] > 0.5)],
                ]
                == corner
            ]
            assert [f"The {o.colour} one is at the {' '.join(corner)}." for o in there] == [answer]
        elif asked.startswith("Where"):
            (obj,) = [o for o in scene.objects if o.name in asked]
            x, y = obj.path(1)[0]
            assert ("right" in answer, "bottom" in answer) == (x > 0.5, y > 0.5)
        elif asked.startswith("Which shape"):
            (obj,) = [o for o in scene.objects if o.colour in asked]
            assert answer == f"The {obj.colour} one is a {obj.shape}."
        else:
            parts = answer.removesuffix(".").lower().replace(" and ", ", ").split(", ")
            across = sorted(scene.objects, key=lambda o: o.path(1)[0, 0])
            assert [part.split(" is at ")[0] for part in parts] == [f"the {o.name}" for o in across]


def test_a_place_is_where_the_middle_frame_shows_it_in_the_air_too():
    high = 0
    for seed in range(60):
        scene = sample_scene(np.random.default_rng([11, seed]), "RC")
        hopping = scene.objects[0]
        shown = centres(render(scene, frames=1, height=64, width=64).masks[:1, 0])[0][1] + 0.5
        if abs(shown - 32) > 1:
            assert place(hopping, 1) == ("top", "bottom")[int(shown > 32)]
            high += shown < 32 < hopping.middle[1] * 64
    assert high > 3


def test_corpus_holds_every_word():
    known = {word.strip(".,?").lower() for line in corpus() for word in line.split()}
    for task, scenes in SCENES.items():
        for seed, scene in enumerate(scenes):
            still = still_question(scene, np.random.default_rng(seed))
            said = " ".join((*question(scene, task), *still, caption(scene)))
            assert {word.strip(".,?").lower() for word in said.split()} <= known


def test_files_are_real_and_readable(toy):
    log = SkipLog()
    train = list(read_samples(toy.train, toy.videos, log))
    test = list(read_samples(toy.test, toy.videos, log))
    assert (len(train), len(test), log.total, dict(log.notes)) == (6, 3, 0, {})
    assert [sample.id.split("-")[2] for sample in train] == list(TASKS)
    for i, sample in enumerate(train):
        info = check_video(sample.videos[0])
        assert (info.frames, info.height, info.width, info.fps) == (FRAMES, 32, 32, 8.0)
        video = read_frames(sample.videos[0], num_frames=FRAMES)
        drawn = draw_clip(5, "train", i)[1].frames
        # Files hold colour at half resolution, brightness at all of it.
        grey = np.array([0.299, 0.587, 0.114])
        assert np.abs(video.frames @ grey - drawn @ grey).mean() < 3
        prompt, segments = prompt_text(sample)
        assert len(segments) == 2
        assert prompt.endswith(".")


def test_sidecar(toy):
    rows = [json.loads(line) for line in toy.worlds.read_text().splitlines()]
    assert [row["video"] for row in rows] == [p.name for p in sorted(toy.videos.glob("train*"))] + [
        p.name for p in sorted(toy.videos.glob("test*"))
    ]
    for row in rows:
        index = int(row["video"].split("-")[1][:5])
        scene, clip = draw_clip(5, row["split"], index)
        assert row["caption"] == caption(scene)
        assert [o["name"] for o in row["objects"]] == [o.name for o in scene.objects]
        np.testing.assert_array_equal([o["boxes"] for o in row["objects"]], clip.boxes)


def test_same_seed_same_bytes_other_seed_other_world(toy, tmp_path):
    again = write_world(tmp_path / "again", clips=6, test_clips=3, seed=5, progress=False)
    assert files(again.root) == files(toy.root)
    other = write_world(tmp_path / "other", clips=6, test_clips=3, seed=6, progress=False)
    mine, theirs = files(toy.videos), files(other.videos)
    assert not set(mine.values()) & set(theirs.values())


def test_encoder_gives_the_same_bytes_every_time(tmp_path):
    for index in (9, 22, 29):
        frames = draw_clip(0, "train", index)[1].frames
        seen = set()
        for _ in range(40):
            encode_video(tmp_path / "a.mp4", frames, fps=8)
            seen.add((tmp_path / "a.mp4").read_bytes())
        assert len(seen) == 1


def test_train_and_test_differ():
    for seed in range(3):
        train = {draw_clip(seed, "train", i)[0] for i in range(30)}
        test = {draw_clip(seed, "test", i)[0] for i in range(30)}
        assert len(train) == len(test) == 30
        assert not train & test


def test_an_interrupted_run_is_completed(toy, tmp_path):
    root = tmp_path / "w"
    write_world(root, clips=6, test_clips=3, seed=5, progress=False)
    kept = root / "videos" / "train-00001.mp4"
    before = kept.stat().st_mtime_ns
    for name in ("train.jsonl", "worlds.jsonl", "videos/train-00003.mp4", "videos/test-00000.mp4"):
        (root / name).unlink()
    stale = root / "videos" / ".train-00003.mp4.1.tmp"
    stale.write_bytes(b"half a clip")
    os.utime(stale, (0, 0))
    write_world(root, clips=6, test_clips=3, seed=5, progress=False)
    assert files(root) == files(toy.root)
    assert kept.stat().st_mtime_ns == before


def test_a_finished_world_is_not_drawn_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("motionenhancer.toy.world.draw_clip", None)
    assert write_world(toy.root, clips=6, test_clips=3, seed=5, progress=False) == toy


def test_in_the_lesson_of_motion_one_object_moves(tmp_path):
    toy = build_toy(tmp_path / "w", clips=8, test_clips=2, lesson="motion", progress=False)
    scenes = {row["video"]: row for row in map(json.loads, toy.worlds.read_text().splitlines())}
    for path, turns in ((toy.train, 2), (toy.test, 1)):
        for line in map(json.loads, path.read_text().splitlines()):
            moving, *still = scenes[line["video"]]["objects"]
            assert [moving["moving"], *(one["moving"] for one in still)] == [True, False, False]
            name = moving["name"]
            said = [
                ("human", f"<video>\nWhat does the {name} do?"),
                ("gpt", f"The {name} moves {moving['motion']}."),
                ("human", "What is in the picture?"),
                ("gpt", f"The {still[0]['name']} stays still and the {still[1]['name']} stays still."),
            ]
            assert [(one["from"], one["value"]) for one in line["conversations"]] == said[: 2 * turns]
    with pytest.raises(ValueError, match="lesson must be one of tasks, motion, got 'music'"):
        write_world(tmp_path / "v", lesson="music", progress=False)
    weights = {one: load_file(one / "model.safetensors") for one in (toy.student, WEIGHTS / "student")}
    assert {len(one) for one in weights.values()} == {57, 69}, "another student than the trained one"


def test_killed_at_any_moment_and_run_again(tmp_path):
    code = (
        "import sys; from motionenhancer.toy.world import write_world;"
        "write_world(sys.argv[1], clips=30, test_clips=2)"
    )
    whole = write_world(tmp_path / "whole", clips=30, test_clips=2, progress=False)
    root = tmp_path / "killed"
    for wanted in (3, 17):
        run = subprocess.Popen([sys.executable, "-c", code, str(root)], stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 30
        while (
            len(list(root.glob("videos/*.mp4"))) < wanted and run.poll() is None and time.monotonic() < limit
        ):
            time.sleep(0.002)
        run.kill()
        run.wait()
        assert not (root / "worlds.jsonl").exists()
    for clip in root.glob("videos/*.mp4"):
        assert check_video(clip).frames == FRAMES
    write_world(root, clips=30, test_clips=2, progress=False)
    for left in root.glob("videos/.*.tmp"):
        left.unlink()
    assert files(root) == files(whole.root)


def test_build_makes_models_once(tmp_path):
    toy = build_toy(tmp_path / "w", clips=1, progress=False)
    first = files(toy.root)
    assert {"teacher/model_index.json", "student/config.json", "train.jsonl", "worlds.jsonl"} <= set(first)
    assert sum(len(data) for data in first.values()) < 10_000_000
    stamp = (toy.teacher / "model_index.json").stat().st_mtime_ns
    build_toy(tmp_path / "w", clips=1, progress=False)
    assert (toy.teacher / "model_index.json").stat().st_mtime_ns == stamp
    assert files(toy.root) == first


def test_output_dir_that_cannot_be_used(toy, tmp_path):
    with pytest.raises(ValueError, match=r"already holds a different toy world: seed=5 \(now 6\)"):
        write_world(toy.root, clips=6, test_clips=3, seed=6, progress=False)
    with pytest.raises(ValueError, match=r"clips=6 \(now 7\)"):
        write_world(toy.root, clips=7, test_clips=3, seed=5, progress=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder"):
        write_world(tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match="cannot be written"):
        write_world(tmp_path / "file" / "below", progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a toy world"):
        write_world(tmp_path / "other", progress=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "world.json").write_text("{")
    with pytest.raises(ValueError, match="not json"):
        write_world(tmp_path / "broken", progress=False)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"clips": 0}, "clips"),
        ({"clips": 2.0}, "clips"),
        ({"test_clips": 0}, "test_clips"),
        ({"seed": -1}, "seed"),
        ({"frames": 0}, "frames"),
        ({"size": 8}, "size"),
        ({"size": 65}, "size"),
        ({"fps": 0}, "fps"),
    ],
)
def test_bad_numbers_leave_nothing_behind(tmp_path, options, name):
    with pytest.raises(ValueError, match=name):
        write_world(tmp_path / "w", progress=False, **options)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((2, 15, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        [1],
    ],
)
def test_encoder_refuses(tmp_path, frames):
    with pytest.raises(ValueError, match="frames must"):
        encode_video(tmp_path / "a.mp4", frames)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("codec", [None, "mpeg4"])
def test_encoder_keeps_rate_and_picture(tmp_path, codec):
    frames = render(EVERY[0], frames=9, height=48, width=80).frames
    encode_video(tmp_path / "a.bin", frames, fps=29.97, codec=codec)
    video = read_frames(tmp_path / "a.bin")
    assert video.frames.shape == (9, 48, 80, 3)
    assert video.fps == pytest.approx(29.97, rel=1e-4)
    assert np.abs(video.frames.astype(int) - frames).mean() < 5


def run_cli(*arguments):
    command = [sys.executable, "-m", "motionenhancer.toy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_command_line(tmp_path):
    done = run_cli("--output_dir", str(tmp_path / "w"), "--clips", "2", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr
    names = {p.name for p in (tmp_path / "w").iterdir()}
    assert names == {
        "teacher",
        "student",
        "videos",
        "train.jsonl",
        "test.jsonl",
        "worlds.jsonl",
        "world.json",
    }


def test_command_line_errors(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        (["--output_dir", str(tmp_path / "w"), "--clips", "0"], "--clips must be at least 1, got 0"),
        (["--output_dir", str(tmp_path / "w"), "--clips", "many"], "invalid int value"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert message in capsys.readouterr().err
    assert main(["--output_dir", str(tmp_path / "file")]) == 2
    assert "must be a folder" in capsys.readouterr().err
