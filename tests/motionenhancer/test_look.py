"""What a training keeps for its page, and `motionenhancer look`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from look_support import moving_clip, shown
from PIL import Image
from test_store import make_prior
from tiny_world import World
from train_support import flags, shared_priors

from motionenhancer import extract, look, train
from motionenhancer.alignment.dataset import MotionDataset
from motionenhancer.data import SkipLog, check_video, read_samples
from motionenhancer.data.encode import encode_video
from motionenhancer.priors.storage import PriorStore
from motionenhancer.report import page as page_module
from motionenhancer.report import watch
from motionenhancer.report.page import write_page, write_run_page
from motionenhancer.report.picture import contact_sheet, draw_prior
from motionenhancer.report.run_report import REPORT
from motionenhancer.report.views import SOURCES, View, load_views
from motionenhancer.report.watch import read_student, task_of
from motionenhancer.students import load_student


def learn(world: World, out: Path, **options: object) -> Path:
    chosen = {"prior_dir": shared_priors(world), "report_samples": 3, **options}
    assert train.main(flags(world, out, **chosen)) == 0
    return out


#: A training that depends on the random numbers drawn before it.
NOISE = {"neftune_noise_alpha": 5.0}


def drawing(*given: object) -> watch.StudentReading:
    """Reads the student, and draws a random number, as a model might in its forward."""
    torch.rand(1)
    return read_student(*given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "read_student", drawing)
        yield learn(world, tmp_path_factory.mktemp("shown") / "run", **NOISE)


def test_a_run_keeps_what_its_page_needs(run: Path, world: World) -> None:
    views = load_views(run)
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    assert [view.id for view in views] == [rows[i]["id"] for i in (0, 4, 7)], "spread over the data"
    for view, row in zip(views, (rows[0], rows[4], rows[7]), strict=True):
        assert view.prior is not None
        assert view.video == world.videos / row["video"]
        assert view.answer == row["conversations"][1]["value"]
        assert view.task == row["id"].rpartition("-")[2]
        assert len(view.prior.times) == view.prior.grid[0]
        assert view.prior.times == sorted(view.prior.times)
        assert view.grid is not None
        assert len(view.times) == view.grid[0]
        sources = view.sources(1.0)
        assert list(sources) == list(SOURCES)
        for maps in sources.values():
            assert {len(values) for values in maps.rows.values()} == {int(np.prod(maps.grid))}
        assert not torch.equal(view.maps["before"], view.maps["after"]), "it has learnt something"
        for scores in view.scores.values():
            assert set(scores) == {"loss_ar", "loss_align", "right", "said"}


def test_before_is_the_student_as_it_was_given(run: Path, world: World) -> None:
    """The view has the untrained student's loss on its labels, and its eager attention of one word."""
    view = load_views(run)[0]
    model, processor, family = load_student(world.student, attn_implementation="eager")
    samples = [s for s in read_samples(world.data, world.videos, SkipLog()) if s.id == view.id]
    dataset = MotionDataset(samples, family, processor, keys={}, store=PriorStore(run), fps=4)
    encoded = dataset[0].encoded
    batch = family.collate([encoded], pad_token_id=processor.tokenizer.pad_token_id)
    layout = batch.pop("layouts")[0]
    with torch.no_grad():
        out = model(**batch, output_attentions=True)
    assert view.scores["before"]["loss_ar"] == pytest.approx(float(out.loss), rel=1e-5)
    start, end = view.spans[view.found[0]]
    word = view.prompt[start:end].strip()
    first = layout.text.index(word, int(layout.offsets[int(layout.videos[0].positions[-1])][1]))
    rows = [i for i, (a, b) in enumerate(layout.offsets.tolist()) if a < first + len(word) and b > first]
    mean = torch.stack([layer[0].mean(0) for layer in out.attentions]).mean(0)
    expected = mean[rows][:, layout.videos[0].positions].mean(0)
    torch.testing.assert_close(view.maps["before"][0].float(), expected, rtol=2e-3, atol=1e-6)


def test_the_page_is_written_and_changes_nothing_of_the_training(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = learn(world, tmp_path / "plain", report_samples=0, **NOISE)
    assert "page of the run" not in capsys.readouterr().out
    assert not (plain / "report.html").exists()
    assert not (plain / "report").exists()
    assert (plain / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    logs = [json.loads((folder / REPORT).read_text())["training"]["log"] for folder in (plain, run)]
    for name in ("loss", "loss_ar", "loss_align", "grad_norm"):
        assert [e[name] for e in logs[0] if name in e] == [e[name] for e in logs[1] if name in e]
    body = shown(run / "report.html")
    assert [view["id"] for view in body["views"]] == [view.id for view in load_views(run)]
    assert len(body["run"]["curves"]["loss_align"]) == 2
    assert ["identity.alignment_weight", "1.0"] in body["run"]["settings"]


def test_a_page_that_fails_is_one_line_and_the_checkpoint_stands(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no space\nleft")

    monkeypatch.setattr("motionenhancer.report.watch.write_run_page", fail)
    out = learn(world, tmp_path / "out", prior_source="online", prior_dir=tmp_path / "none")
    assert "page of the run not written: no space left\n" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
    assert json.loads((out / REPORT).read_text())["status"] == "finished"
    assert all(view.prior is not None for view in load_views(out)), "made anew: online keeps none"


def test_a_run_without_priors_shows_its_student(world: World, tmp_path: Path) -> None:
    out = learn(world, tmp_path / "out", alignment_weight=0)
    view = load_views(out)[0]
    assert view.prior is None
    assert view.found == list(range(len(view.spans))), "all its words"
    assert set(shown(out / "report.html")["views"][0]["maps"]["sources"]) == {"before", "after"}


def test_look_at_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert look.main([str(run)]) == 0
    assert (run / "report.html").read_text() == before, "the same page again"
    chosen = load_views(run)[1]
    word = next(piece["text"] for piece in chosen.words() if piece.get("row") is not None)
    files = [tmp_path / name for name in ("page.html", "sheet.png", "clip.mp4")]
    options = ["--output", str(files[0]), "--png", str(files[1]), "--mp4", str(files[2])]
    assert look.main([str(run), *options, "--id", chosen.id, "--word", word]) == 0
    assert [view["id"] for view in shown(files[0])["views"]] == [chosen.id]
    with Image.open(files[1]) as sheet:
        assert sheet.height == 4 * 124, "the clip and three sources of a word"
    with av.open(str(files[2])) as container:
        stream = container.streams.video[0]
        assert stream.width == 3 * stream.height, "teacher, before and after of a square clip"
        assert sum(1 for _ in container.decode(video=0)) == check_video(chosen.video).frames
    capsys.readouterr()
    assert look.main([str(run), "--id", "none"]) == 2
    assert f"error: --id none: not in {run / 'report'}" in capsys.readouterr().err
    assert look.main([str(run), "--png", str(files[1]), "--word", "zebra"]) == 2
    assert " has maps of " in capsys.readouterr().err
    assert look.main([str(tmp_path)]) == 2
    assert f"error: {tmp_path}: not the folder of a training run" in capsys.readouterr().err


def test_look_at_a_folder_of_priors(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    priors = tmp_path / "priors"
    options = world.flags(student=None, prior_dir=priors, limit=3, ddim_steps=1)
    assert extract.main(options) == 0
    assert look.main(["--prior_dir", str(priors)]) == 0
    ids = [json.loads(line)["id"] for line in world.data.read_text().splitlines()]
    views = shown(priors / "look.html")["views"]
    assert [view["id"] for view in views] == ids[:3]
    assert all(len(view["frames"]) == check_video(view["video"]).frames for view in views)
    assert look.main(["--prior_dir", str(priors), "--id", ids[2]]) == 0
    assert [view["id"] for view in shown(priors / "look.html")["views"]] == [ids[2]]
    # Without the extraction's record, a prior is named by its key only.
    (priors / "extraction.json").unlink()
    key = sorted(PriorStore(priors))[1]
    assert look.main(["--prior_dir", str(priors), "--id", key[:6]]) == 0
    view = shown(priors / "look.html")["views"][0]
    assert (view["id"], view["frames"]) == (key[:16], [])
    capsys.readouterr()
    assert look.main(["--prior_dir", str(priors), "--id", "zz"]) == 2
    assert "holds no prior of --id" in capsys.readouterr().err
    assert look.main(["--prior_dir", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        look.main([str(world.videos / "train-00000.mp4")])
    assert "to show one clip, give --video FILE --text TEXT" in capsys.readouterr().err


def test_look_at_one_clip(world: World, tmp_path: Path) -> None:
    clip = world.videos / json.loads(world.data.read_text().splitlines()[0])["video"]
    out = tmp_path / "one.html"
    options = ["--video", str(clip), "--text", "a red square moves", "--output", str(out)]
    both = ["--teacher", str(world.teacher), "--student", str(world.student), "--num_frames", "4"]
    assert look.main([*options, *both, "--ddim_steps", "1"]) == 0
    body = shown(out)
    assert body["names"] == {"teacher": "teacher", "after": "student"}
    assert set(body["views"][0]["maps"]["sources"]) == {"teacher", "after"}
    assert look.main([*options, *both[2:]]) == 0
    assert set(shown(out)["views"][0]["maps"]["sources"]) == {"after"}
    words = shown(out)["views"][0]["words"]
    assert [piece["text"] for piece in words if "row" in piece] == ["a", "red", "square", "moves"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run", "--video", "a.mp4", "--text", "it"], "give RUN or --video, not both"),
        (["--video", "a.mp4"], "--video needs --text"),
        (["--student", "s"], "--student needs --video"),
        (["--word", "it"], "--word needs --png or --mp4"),
        (["--report_samples", "-1"], "--report_samples must be at least 0, got -1"),
    ],
)
def test_flags_that_do_nothing_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        look.main(options)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"id": "a-1", "task": "turn"}, "turn"),
        ({"id": "a-1-MR", "question_type": "camera"}, "camera"),
        ({"id": "a-1-MR", "task": 3}, "MR"),
        ({"id": "a-1"}, ""),
        ({"id": "MR"}, ""),
    ],
)
def test_what_a_sample_is_counted_under(row: dict, task: str, world: World, tmp_path: Path) -> None:
    given = json.loads(world.data.read_text().splitlines()[0])
    (tmp_path / "data.jsonl").write_text(json.dumps({**given, **row}) + "\n")
    skips = SkipLog()
    (sample,) = read_samples(tmp_path / "data.jsonl", world.videos, skips)
    assert task_of(sample) == task
    assert not skips.notes, "no unknown key"


def test_a_notebook_shows_a_prior(tmp_path: Path) -> None:
    prior = replace(make_prior(), times=[])
    sheet = draw_prior(prior, moving_clip(tmp_path / "clip.mp4"), ["moves"], frames=4)
    assert isinstance(sheet, Image.Image)
    assert sheet.height == 2 * 124
    assert draw_prior(prior).height == 3 * 124, "two words over black"
    with pytest.raises(ValueError, match="does not exist"):
        draw_prior(prior, tmp_path / "none.mp4")
    smooth = contact_sheet(View.of_prior(prior), ["moves"], smooth=True)
    assert smooth.tobytes() != contact_sheet(View.of_prior(prior), ["moves"]).tobytes()


def test_a_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are drawn smaller and maps coarser until both fit."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    encode_video(tmp_path / "noise.mp4", noise)
    prior = replace(
        make_prior(), attention=torch.rand(2, 4 * 32 * 32).half(), grid=(4, 32, 32), times=[0, 1, 2, 3]
    )
    views = [View.of_prior(prior, id=str(i), video=tmp_path / "noise.mp4") for i in range(5)]
    monkeypatch.setattr(page_module, "CLIP_BYTES", 100_000)
    monkeypatch.setattr(page_module, "MAP_BYTES", 20_000)
    write_page(tmp_path / "page.html", views, "small")
    body = shown(tmp_path / "page.html")
    assert sum(len(frame) for view in body["views"] for frame in view["frames"]) <= 100_000 * 4 / 3 + 4 * 60
    packed = [view["maps"]["sources"]["teacher"] for view in body["views"]]
    assert sum(len(one["data"]) for one in packed) <= 20_000 * 4 / 3
    assert packed[0]["grid"] == [4, 16, 16]


def test_a_page_of_8_clips_of_noise_is_under_15_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame of 49, with a 49th of each limit: noise of 480 x 720, and 20 words with maps of noise."""
    rng = np.random.default_rng(0)
    encode_video(tmp_path / "noise.mp4", rng.integers(0, 256, (1, 480, 720, 3), dtype=np.uint8))
    maps, spans = torch.from_numpy(rng.random((20, 30 * 45), np.float32)), [(i, i + 1) for i in range(20)]
    prior = replace(make_prior(), attention=maps.half(), spans=spans, grid=(1, 30, 45), times=[0])
    views = [View.of_prior(prior, id=str(i), video=tmp_path / "noise.mp4") for i in range(8)]
    write_page(tmp_path / "empty.html", [], "no clips")
    for name in ("CLIP_BYTES", "MAP_BYTES"):
        monkeypatch.setattr(page_module, name, getattr(page_module, name) // 49)
    write_page(tmp_path / "page.html", views, "noise")
    size = (tmp_path / "page.html").stat().st_size - (tmp_path / "empty.html").stat().st_size
    assert size < 15e6 / 49


def test_scores_that_json_does_not_know(tmp_path: Path) -> None:
    """A head with attention along time only has an infinite DFC."""
    prior = make_prior()
    prior.head_scores["dfc"] = [float("inf"), 0.5]
    write_page(tmp_path / "page.html", [View.of_prior(prior)], "a prior")
    assert shown(tmp_path / "page.html")["views"][0]["heads"]["scores"]["dfc"] == [None, 0.5]


def test_a_failed_run_has_a_page_too(tmp_path: Path) -> None:
    report = {"status": "failed", "error": "the loss is nan", "identity": {}}
    (tmp_path / REPORT).write_text(json.dumps(report))
    assert write_run_page(tmp_path) == tmp_path / "report.html"
    assert ["error", "the loss is nan"] in shown(tmp_path / "report.html")["run"]["settings"]
    for wrong in ({"training": []}, {"training": {"log": [5]}}, {"training": {"log": 5}}, {"identity": None}):
        (tmp_path / REPORT).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="not a run's report"):
            write_run_page(tmp_path)
