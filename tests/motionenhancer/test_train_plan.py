"""What a run says before it starts, and where a dry run stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_world import World
from train_support import arguments, flags, parts, report_of, shared_priors
from transformers import Trainer

from motionenhancer import train
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.costs import student_cost
from motionenhancer.settings import StudentArguments
from motionenhancer.toy.world import build_toy
from motionenhancer.training.run_plan import outline_student, plan_run, plan_steps


def test_a_dry_run_says_it_all_and_touches_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of student and teacher are garbage: they are not read."""
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for source, target in ((world.student, student), (world.teacher, teacher)):
        for file in source.rglob("*"):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                header = file.suffix == ".safetensors" and source == world.student
                copy.write_bytes(b"no weights" if header else file.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    options = {"student": student, "teacher": teacher, "alignment_schedule": "linear", "dry_run": True}
    options |= {"alignment_warmup": 1, "alignment_weight": 2.0, "max_steps": 5, "vision_learning_rate": 3e-4}
    assert train.main(flags(world, out, prior_dir=tmp_path / "priors", **options)) == 0
    said = capsys.readouterr().out
    lines = {line.split("   ")[0].strip(): line for line in said.splitlines()}
    assert lines["vision tower"].endswith("learning rate 0.0003")
    assert lines["language model"].endswith("learning rate 0.001")
    assert "priors: 0 stored, 8 missing" in said
    assert "steps: 5 of 2 samples (4 per pass over 8 samples); 1 process, plain" in said
    assert "λ: 2, linear to 0, rising over the first 1 steps" in said
    assert "memory per device: about" in said
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    assert train.main(flags(world, out, student=student, prior_dir=shared_priors(world))) == 2
    assert "model.safetensors: cannot be read" in capsys.readouterr().err


def test_the_page_shows_the_plan_of_the_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test has 16 clips, the page is of the toy's 1,000."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    shown = page[page.index("what is trained:") :].split("\n```")[0]
    toy = build_toy(tmp_path / "toy", clips=16, test_clips=1, lesson="motion", progress=False)
    monkeypatch.setattr("motionenhancer.toy.defaults.default_toy", lambda lesson: toy)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry_run"]) == 0
    said = capsys.readouterr().out
    said = said[said.index("what is trained:") : said.index("\nmemory of the teacher, beside the student")]
    small = (
        shown.replace("stored, 1000", "stored, 16")
        .replace("1,000 samples", "16 samples")
        .replace("(63 per pass", "(1 per pass")
    )
    assert said.splitlines() == small.splitlines()


def test_a_dry_run_refuses_what_a_run_would(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert train.main(flags(world, out, dry_run=True)) == 2
    assert "holds thesis.txt" in capsys.readouterr().err
    for options, named in (
        ({"save_aligner": tmp_path / "free" / "a.safetensors"}, "outside --output_dir"),
        ({"save_aligner": tmp_path / "a.bin"}, "must be a .safetensors file"),
        ({"save_aligner": tmp_path / "a.safetensors", "aligner": "identity"}, "nothing is trained"),
        ({"lora_merge": True}, "--lora_merge needs --lora_r"),
        ({"lora_r": 2, "lora_target": "nothing_of_it"}, "--lora_target nothing_of_it"),
    ):
        assert train.main(flags(world, tmp_path / "free", dry_run=True, **options)) == 2, options
        assert named in capsys.readouterr().err


def test_a_run_says_it_too_and_reports_it(world: World, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert train.main(flags(world, out, prior_dir=shared_priors(world))) == 0
    said = capsys.readouterr().out
    assert said.index("what is trained:") < said.index("'loss_align'")
    assert "priors stored" in said
    plan = report_of(out)["plan"]
    assert [part["name"] for part in plan["parts"]] == [
        "vision tower",
        "merger",
        "language model",
        "output head",
        "aligner",
    ]
    assert all(part["trained"] == part["parameters"] > 0 for part in plan["parts"])
    assert plan["steps"]["total"] == len(report_of(out)["training"]["log"]) - 1 == 2


@pytest.mark.parametrize("count", [1, 7, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("options", [{"num_train_epochs": 2.5}, {"dataloader_drop_last": True}], ids=str)
def test_steps_are_counted_as_the_trainer_does(
    tmp_path: Path, count: int, accumulation: int, options: dict
) -> None:
    settings = arguments(tmp_path, max_steps=-1, gradient_accumulation_steps=accumulation, **options)
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model=model, args=settings, train_dataset=list(range(count)))
    if count // 2 == 0 and settings.dataloader_drop_last:
        pytest.skip("the Trainer refuses an empty pass")
    loader = trainer.get_train_dataloader()
    _, an_epoch, _, _, _, _, total = trainer.set_initial_training_values(settings, loader)
    steps = plan_steps(count, settings)
    assert (steps.an_epoch, steps.total) == (an_epoch, total)


def test_memory_of_weights_and_optimizer_is_what_a_run_holds(world: World, tmp_path: Path) -> None:
    model, dataset, collator = parts(world, tmp_path)
    outline, _, family = outline_student(world.student, "sdpa", torch.float32)
    assert all(p.is_meta for p in outline.parameters())
    settings = arguments(tmp_path, max_steps=1)
    plan = plan_run(outline, family, StudentArguments(), settings, samples=8, grid=(5, 8, 8), tokens=300)
    trainer = MotionTrainer(model=model, args=settings, train_dataset=dataset, data_collator=collator)
    trainer.train()
    state = trainer.optimizer.state_dict()["state"].values()
    held = sum(v.nbytes for entry in state for k, v in entry.items() if k != "step")
    weights = sum(p.nbytes for p in model.parameters())
    aligner = next(part.parameters for part in plan.parts if part.name == "aligner")
    assert aligner == 2 * 320 * 256 + 256 * 256 + 2 * 256 + 320
    assert plan.memory.weights == plan.memory.gradients == weights + 4 * aligner
    assert plan.memory.optimizer == held + 8 * aligner
    assert plan.memory.activations > 0


def test_engines_share_memory_as_they_do(world: World, tmp_path: Path) -> None:
    model, _, _ = outline_student(world.student, "sdpa", torch.float32)
    count = sum(p.numel() for p in model.parameters())
    settings = arguments(tmp_path)

    def memory(engine: str) -> list[float]:
        found = student_cost(model, settings, engine=engine, processes=4, tokens=None)
        assert found.activations is None
        return [round(size / count, 1) for size in (found.weights, found.gradients, found.optimizer)]

    assert memory("DDP") == [4, 4, 8]
    assert memory("FSDP") == [1, 1, 2]
    assert memory("ZeRO-2") == [4, 1, 3]
    assert memory("ZeRO-3") == [1, 1, 3]
