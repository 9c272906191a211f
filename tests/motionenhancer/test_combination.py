"""Several teachers: priors stored apart, combined when they are used."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extract_support import stored
from look_support import shown
from test_store import make_prior
from tiny_world import World
from train_support import flags, report_of, weights_of

from mekernels import resample_rows
from motionenhancer import agreement, extract, look, store, train
from motionenhancer.data import prompt_text, read_samples
from motionenhancer.data.video import VideoError
from motionenhancer.integrations import PriorLookup
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.combination import Combined, combine_priors, compare_words, word_rows
from motionenhancer.priors.confidence import prior_confidence
from motionenhancer.priors.extraction import ExtractionRecord
from motionenhancer.priors.prior import MotionPrior, PriorError
from motionenhancer.priors.requests import Made, PriorRequest
from motionenhancer.priors.storage import PriorStore
from motionenhancer.toy.world import write_world

TEXT = "the red square moves"


def prior_of(grid: tuple[int, int, int], *words: str, seed: int = 0, sure: float = 0.5) -> MotionPrior:
    """A prior of random rows for these pieces of the text."""
    size = grid[0] * grid[1] * grid[2]
    rows = torch.rand(len(words), size, generator=torch.Generator().manual_seed(seed)).half()
    spans = [(TEXT.index(word), TEXT.index(word) + len(word)) for word in words]
    known: dict[str, Any] = {"tokens": [*words], "spans": spans, "all_tokens": [*words], "all_spans": spans}
    known |= {"kept": [*range(len(words))], "token_scores": [1.0] * len(words), "prompt": TEXT, "grid": grid}
    sureness = {"concentration": sure, "variation": sure, "confidence": sure}
    return replace(make_prior(), attention=rows, confidence=sureness, times=[], **known)


def scaled(prior: MotionPrior, grid: tuple[int, int, int]) -> torch.Tensor:
    rows = prior.attention.float()
    return resample_rows(rows[None] / rows.sum(1)[None, :, None], prior.grid, grid)[0]


def test_one_prior_stays_as_it_is() -> None:
    prior = prior_of((2, 2, 2), "red", "moves")
    assert combine_priors([prior], (1.0,)) is prior
    assert combine_priors([None, prior], None) is prior
    other = combine_priors([None, prior], (1.0, 2.0), (4, 4, 4))
    assert (other.grid, other.tokens) == ((4, 4, 4), ["red", "moves"])
    torch.testing.assert_close(other.attention.float(), scaled(prior, (4, 4, 4)), atol=1e-4, rtol=1e-3)


def test_words_are_joined_and_rows_are_weighted() -> None:
    """Pieces of a word are one; a word that one dropped takes the other's row."""
    one = prior_of((2, 2, 2), "re", "d", "moves", seed=1)
    other = prior_of((3, 4, 4), "red", "square", seed=2)
    both = combine_priors([one, other], (1.0, 3.0))
    assert (both.tokens, both.grid, both.prompt) == (["red", "square", "moves"], (2, 2, 2), TEXT)
    mine, theirs = scaled(one, one.grid), scaled(other, one.grid)
    red = 0.25 * (mine[0] + mine[1]) / 2 + 0.75 * theirs[0]
    expected = torch.stack([red, theirs[1], mine[2]])
    torch.testing.assert_close(both.attention.float(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(both.attention.float().sum(1), torch.ones(3), atol=2e-3, rtol=0)
    assert both.confidence == prior_confidence(both.attention, both.grid)
    assert both.teacher == f"{one.teacher}+{other.teacher}"
    assert both.evaluations == one.evaluations + other.evaluations
    one, other = (
        replace(one, times=[0.0, 1.0], truncated=4, unknown=0),
        replace(other, truncated=2, unknown=3),
    )
    both, far = combine_priors([one, other], None), combine_priors([one, other], None, (4, 2, 2))
    assert (both.truncated, both.unknown) == (2, 0), "what none of them was told"
    assert (both.times, far.times) == ([0.0, 1.0], [])


@pytest.mark.parametrize(("sure", "share"), [((0.3, 0.1), 0.75), ((0.0, 0.2), 0.0), ((0.0, 0.0), 0.5)])
def test_confidence_is_a_weight(sure: tuple[float, float], share: float) -> None:
    one = prior_of((2, 2, 2), "red", seed=1, sure=sure[0])
    other = prior_of((2, 2, 2), "red", "moves", seed=2, sure=sure[1])
    both = combine_priors([one, other], None)
    expected = share * scaled(one, one.grid)[0] + (1 - share) * scaled(other, one.grid)[0]
    torch.testing.assert_close(both.attention[0].float(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(both.attention[1].float(), scaled(other, one.grid)[1], atol=1e-4, rtol=1e-3)


def test_priors_of_other_texts_are_not_combined() -> None:
    one, other = prior_of((2, 2, 2), "red"), replace(prior_of((2, 2, 2), "red"), prompt="the red circle")
    with pytest.raises(ValueError, match="must have the same prompt"):
        combine_priors([one, other], (1.0, 1.0))
    with pytest.raises(ValueError, match="at least one"):
        combine_priors([None, None], (1.0, 1.0))


def test_agreement_of_two_teachers() -> None:
    one = prior_of((2, 2, 2), "re", "d", "moves", seed=1)
    found = compare_words(one, one)
    assert found == {"words": 1.0, "cosine": pytest.approx(1.0)}
    other = prior_of((4, 4, 4), "red", "square", seed=2)
    found = compare_words(one, other)
    mine, theirs = word_rows(one, (2, 2, 2)), scaled(other, (2, 2, 2))
    assert found["words"] == 0.5
    assert found["cosine"] == pytest.approx(
        float(torch.cosine_similarity(mine[4, 7], theirs[0], dim=0)), abs=1e-4
    )
    assert compare_words(prior_of((2, 2, 2), "moves"), other)["words"] == 0


class Answers:
    """A maker that answers with what it is given."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.closed, self.capacity = list(answers), False, 2

    def submit(self, request: PriorRequest) -> Any:
        from concurrent.futures import Future

        future: Future[Made] = Future()
        answer = self.answers.pop(0)
        if answer is None:
            return future
        future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        return future

    def close(self) -> None:
        self.closed = True


def test_a_clip_that_one_teacher_cannot_read_takes_the_others(tmp_path: Path) -> None:
    one, other = prior_of((2, 2, 2), "red", seed=1), prior_of((2, 2, 2), "red", seed=2)
    part = PriorRequest(tmp_path, TEXT)
    asked = PriorRequest(tmp_path, TEXT, parts=(part, part))
    refused, broken = PriorError("no word"), RuntimeError("no memory")
    first = Answers(Made(one, seconds=1.0), refused, refused, broken, Made(one))
    second = Answers(
        Made(other, fresh=False, seconds=2.0), Made(other), VideoError(tmp_path, "gone"), Made(other)
    )
    first.capacity = 3
    maker = Combined([first, second], (1.0, 1.0), None)
    assert maker.capacity == 2
    made = maker.submit(asked).result(1)
    assert torch.equal(made.prior.attention, combine_priors([one, other], (1.0, 1.0)).attention)
    assert (made.fresh, made.seconds, made.left_out) == (True, 3.0, ())
    made = maker.submit(asked).result(1)
    assert made.prior is other
    assert made.left_out == (
        ("no prior: the teacher cannot read it; the other teachers' priors are used", "no word"),
    )
    with pytest.raises(PriorError, match="no word"):
        maker.submit(asked).result(1)
    with pytest.raises(RuntimeError, match="no memory"):
        maker.submit(asked).result(1)
    first.answers[:0] = [Made(one, left_out=(("a", "1"),))]
    second.answers[:0] = [Made(other, damaged="cut", lost="full", left_out=(("b", "2"),))]
    made = maker.submit(asked).result(1)
    assert (made.damaged, made.lost, made.left_out) == ("cut", "full", (("a", "1"), ("b", "2")))
    # A request with one part asks one teacher only.
    assert maker.submit(replace(asked, parts=(part, None))).result(1).prior is one
    maker.close()
    assert first.closed
    assert second.closed


def test_what_is_given_up_is_cancelled(tmp_path: Path) -> None:
    part = PriorRequest(tmp_path, TEXT)
    waits = Answers(None)
    asked: list[Any] = []
    submit = waits.submit
    waits.submit = lambda request: asked.append(submit(request)) or asked[-1]  # type: ignore[method-assign]
    maker = Combined([waits, Answers(Made(prior_of((2, 2, 2), "red")))], (1.0, 1.0), None)
    answer = maker.submit(PriorRequest(tmp_path, TEXT, parts=(part, part)))
    assert not answer.done()
    assert answer.cancel()
    assert asked[0].cancelled()


@pytest.fixture(scope="module")
def annotated(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a region in all rows but the last."""
    toy = write_world(tmp_path_factory.mktemp("annotated") / "world", clips=4, test_clips=1, progress=False)
    rows = [json.loads(line) for line in toy.train.read_text().splitlines()]
    for row in rows[:-1]:
        row["regions"] = [{"words": "the", "box": [0, 0, 16, 16]}]
    toy.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(toy.train, toy.videos, world.teacher, world.student)


def several(world: World, **options: object) -> list[str]:
    """Flags with the teacher and the regions; `--teacher` takes both."""
    given = world.flags(**{**options, "teacher": None})
    return [*given, "--teacher", str(world.teacher), "regions"]


def training(world: World, out: Path, *more: str, **options: object) -> list[str]:
    given = flags(world, out, **{**options, "teacher": None})
    return [*given, "--teacher", str(world.teacher), "regions", *more]


def test_priors_are_stored_apart_and_used_together(annotated: World, tmp_path: Path) -> None:
    """Made before, made while training, or extracted: the same priors and the same weights."""
    assert train.main(training(annotated, tmp_path / "first" / "out", priors_first=True)) == 0
    priors = tmp_path / "first" / "priors"
    report = report_of(tmp_path / "first" / "out")
    assert len(stored(priors)) == 7
    assert report["teacher"]["path"] == [str(annotated.teacher), "regions"]
    assert [len(report["samples"]), len(report["teacher"]["id"])] == [7, 2]
    assert report["skipped"]["counts"] == {"no prior: the sample has no regions": 1}
    assert report["alignment"]["samples"] == 4

    assert train.main(training(annotated, tmp_path / "while" / "out", prior_source="hybrid")) == 0
    beside = report_of(tmp_path / "while" / "out")
    assert beside["teacher"]["online"]["made"] == 4
    assert stored(tmp_path / "while" / "priors") == stored(priors)

    assert extract.main(several(annotated, student=None, prior_dir=tmp_path / "own", ddim_steps=1)) == 1
    assert stored(tmp_path / "own") == stored(priors)
    options = {"prior_source": "store", "prior_dir": tmp_path / "own"}
    assert train.main(training(annotated, tmp_path / "store" / "out", **options)) == 0
    online = {"prior_source": "online", "prior_dir": tmp_path / "none"}
    assert train.main(training(annotated, tmp_path / "online" / "out", **online)) == 0
    assert not (tmp_path / "none").exists()
    first = weights_of(tmp_path / "first" / "out")
    for name in ("while", "store", "online"):
        other = weights_of(tmp_path / name / "out")
        assert all(torch.equal(first[key], other[key]) for key in first), name

    # Other teacher weights give another run with other model weights.
    again = training(annotated, tmp_path / "weighted" / "out", "--teacher_weights", "1", "9", **options)
    assert train.main(again) == 0
    weighed = weights_of(tmp_path / "weighted" / "out")
    assert any(not torch.equal(first[key], weighed[key]) for key in first)
    by_confidence = training(
        annotated, tmp_path / "weighted" / "out", "--teacher_weights", "confidence", **options
    )
    assert train.main(by_confidence) == 2


def test_the_record_of_an_extraction_is_of_every_teacher(
    annotated: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plug-in, a page and a list combine the stored priors as a training does."""
    given = several(annotated, student=None, prior_dir=tmp_path, ddim_steps=1)
    assert extract.main([*given, "--teacher_weights", "1", "9"]) == 1
    record = tmp_path / extract.EXTRACTION
    report, names = json.loads(record.read_text()), [str(annotated.teacher), "regions"]
    assert (report["status"], report["teacher_weights"]) == ("finished", ["1", "9"])
    assert [one["teacher"]["path"] for one in report["teachers"]] == names
    assert [one["samples"] for one in report["teachers"]] == [4, 3]
    assert [len(one["skipped"]["entries"]) for one in report["teachers"]] == [0, 1]

    lookup, samples = PriorLookup(tmp_path, grid=True), list(read_samples(annotated.data, annotated.videos))
    assert lookup.teacher == " + ".join(names)
    whole = {(p.prompt, p.teacher): p for p in map(PriorStore(tmp_path).read, PriorStore(tmp_path))}
    ids = [one["teacher"]["id"] for one in report["teachers"]]
    for sample in samples:
        parts: list[MotionPrior | None] = [whole.get((prompt_text(sample)[0], id)) for id in ids]
        assert (parts[1] is None) == (sample is samples[-1])
        found = pickle.loads(pickle.dumps(lookup)).of(sample)
        assert found is not None
        assert torch.equal(found.attention, combine_priors(parts, (1.0, 9.0), lookup.grid).attention)

    def page(*more: str) -> list[dict[str, Any]]:
        assert look.main(["--prior_dir", str(tmp_path), *more]) == 0
        return shown(tmp_path / "look.html")["views"]

    capsys.readouterr()
    assert [view["id"] for view in page()] == [sample.id for sample in samples]
    assert f"priors of {lookup.teacher}, combined; --teacher shows those of one" in capsys.readouterr().out
    assert [view["id"] for view in page("--teacher", "regions")] == [sample.id for sample in samples[:-1]]
    assert "combined" not in capsys.readouterr().out
    both = page("--teacher", *names, "--ddim_steps", "1", "--teacher_weights", "1", "9")
    assert [view["words"] for view in both] == [view["words"] for view in page()]
    capsys.readouterr()
    assert store.main(["list", "--prior_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (printed.count(" by regions"), printed.count(f".mp4 by {annotated.teacher.name}")) == (3, 4)

    before = record.read_bytes()
    assert extract.main([*given, "--teacher_weights", "1", "9"]) == 1
    assert capsys.readouterr().out.count("this extraction is finished; nothing is done") == 2
    assert record.read_bytes() == before
    assert extract.main([*given, "--teacher_weights", "confidence"]) == 1
    assert json.loads(record.read_text()) == {**report, "teacher_weights": ["confidence"]}


def test_a_record_says_which_teacher_an_extraction_had_not_reached(tmp_path: Path) -> None:
    reports = [{"teacher": {"path": name, "id": name}, "settings": {}} for name in "ab"]
    record = ExtractionRecord(tmp_path, reports, {"teacher_weights": None})
    record.write(0, "interrupted", {})
    states = [("interrupted", ["interrupted", "waiting"])]
    record = ExtractionRecord(tmp_path, reports, {"teacher_weights": None})
    for place, status in ((0, "running"), (0, "finished"), (1, "failed"), (1, "finished")):
        record.write(place, status, {"made": 1})
        body = json.loads(record.path.read_text())
        states.append((body["status"], [one["status"] for one in body["teachers"]]))
    assert states[1:] == [
        ("running", ["running", "waiting"]),
        ("waiting", ["finished", "waiting"]),
        ("failed", ["finished", "failed"]),
        ("finished", ["finished", "finished"]),
    ]
    alone = ExtractionRecord(tmp_path, reports[1:], {})
    assert alone.finished == [{"status": "finished", **reports[1], "made": 1}]
    alone.save()
    assert json.loads(record.path.read_text()) == alone.finished[0]


def test_the_student_is_one_of_several(annotated: World, tmp_path: Path) -> None:
    """The student's maps are read before the training; all priors have the first teacher's grid."""
    given = flags(annotated, tmp_path / "out", prior_source="hybrid", teacher=None, ddim_steps=None)
    assert train.main([*given, "--teacher", "regions", "self", "--region_grid", "3x4x4"]) == 0
    report = report_of(tmp_path / "out")
    assert report["teacher"]["path"] == ["regions", str(annotated.student)]
    assert "online" not in report["teacher"]
    assert (len(report["samples"]), report["alignment"]["samples"]) == (7, 4)
    assert report["plan"].get("teacher") is None
    named = f"- teacher: `regions`, `{annotated.student}`; training pulled"
    assert named in (tmp_path / "out" / "README.md").read_text()


def test_one_teacher_is_as_without_several(world: World, tmp_path: Path) -> None:
    assert train.main(flags(world, tmp_path / "one" / "out")) == 0
    given = flags(world, tmp_path / "list" / "out", teacher=None)
    assert train.main([*given, "--teacher", str(world.teacher)]) == 0
    assert stored(tmp_path / "one" / "priors") == stored(tmp_path / "list" / "priors")
    one, other = (weights_of(tmp_path / name / "out") for name in ("one", "list"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_agreement_is_printed(annotated: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = annotated.flags(student=None, teacher=None, ddim_steps=1, report=tmp_path / "table.json")
    teachers = [str(annotated.teacher), str(annotated.student), "regions"]
    assert agreement.main([*given, "--teacher", *teachers]) == 0
    printed = capsys.readouterr().out
    assert f"Agreement with the priors of {annotated.teacher}" in printed
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["teacher"] for row in rows] == teachers[1:]
    assert [row["clips"] for row in rows] == [4, 3]
    assert all(0 <= row["words"] <= 1 for row in rows)
    assert agreement.main([*given, "--teacher", *teachers, "--noise_levels", "50"]) == 2
    assert "error: --noise_levels does nothing with several teachers" in capsys.readouterr().err


def test_a_clip_is_looked_at_with_several(annotated: World, tmp_path: Path) -> None:
    clip = next(annotated.videos.glob("*.mp4"))
    given = [
        "--video",
        str(clip),
        "--text",
        TEXT,
        "--ddim_steps",
        "1",
        "--output",
        str(tmp_path / "look.html"),
    ]
    teachers = ["--teacher", str(annotated.teacher), str(annotated.student)]
    assert look.main([*given, *teachers]) == 0
    assert (tmp_path / "look.html").is_file()


@pytest.mark.parametrize(
    ("teachers", "options", "says"),
    [
        (["regions"], {"teacher_weights": ["1"]}, "--teacher_weights needs several teachers"),
        (["regions", "regions"], {}, "--teacher must name different teachers"),
        (["a", "./a/"], {}, "--teacher must name different teachers, got a ./a/"),
        (["a", "b"], {"teacher_weights": ["1"]}, "must be 2 numbers above 0, or confidence"),
        (["a", "b"], {"teacher_weights": ["1", "0"]}, "got 1 0"),
        (["a", "b"], {"teacher_weights": ["1", "x"]}, "got 1 x"),
        (["a", "b"], {"teacher_weights": ["1", "inf"]}, "got 1 inf"),
        (["a", "b"], {"teacher_weights": ["1", "-1"]}, "got 1 -1"),
        (["a", "b"], {"teacher_weights": ["nan", "1"]}, "got nan 1"),
        (["a", "b"], {"teacher_weights": ["confidence", "1"]}, "got confidence 1"),
    ],
)  # fmt: skip
def test_teachers_and_weights_that_are_none(teachers: list[str], options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PriorArguments(teacher=teachers, **options)


@pytest.mark.parametrize(
    ("teachers", "options", "says"),
    [
        (["self", "{student}"], [], "--teacher must name different teachers, got {student} {student}"),
        (["regions", "self"], ["--ddim_steps", "9"], "--ddim_steps does nothing with --teacher regions"),
        (["regions", "self"], ["--vae_tiling", "true"], "--vae_tiling does nothing with --teacher regions"),
        (["{teacher}", "regions"], ["--prior_engine", "ray"], "--prior_source online: several teachers in"),
        (["regions", "self"], [], "--prior_source online: the maps of the student"),
    ],
)  # fmt: skip
def test_what_several_teachers_cannot_do_is_refused_before_any_work(
    world: World,
    tmp_path: Path,
    teachers: list[str],
    options: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = vars(world)
    given = flags(world, tmp_path / "out", teacher=None, prior_source="online", ddim_steps=None)
    named = [name.format(**names) for name in teachers]
    assert train.main([*given, "--teacher", *named, *options]) == 2
    assert f"error: {says.format(**names)}" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
