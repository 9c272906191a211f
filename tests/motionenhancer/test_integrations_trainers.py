"""The plug-ins in the real TRL, ms-swift and LLaMA-Factory; each is skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_world import World

from motionenhancer import extract
from motionenhancer.data import read_samples
from motionenhancer.students import load_student

STEPS = [(4, 1), (2, 2), (1, 4)]


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; docs/integrations.md says how to test with it")


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    folder = tmp_path_factory.mktemp("plugins") / "priors"
    assert extract.main(world.flags(student=None, prior_dir=folder, ddim_steps=1)) == 0
    return folder


def conversations(world: World) -> list[dict[str, Any]]:
    """The world as ms-swift and LLaMA-Factory write data."""
    found = []
    for sample in read_samples(world.data, world.videos):
        question, answer = (message["content"][-1]["text"] for message in sample.messages)
        turns = [("user", f"<video>{question}"), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        found.append({"messages": messages, "videos": [str(sample.videos[0])]})
    return found


def check(logs: list[list[dict[str, Any]]]) -> None:
    """Each run follows the priors, and runs of one global batch agree in their first step."""
    firsts = []
    for log in logs:
        names = ("loss", "loss_ar", "loss_align", "lambda", "words_mapped", "grad_norm")
        steps = [{name: float(entry[name]) for name in names} for entry in log if "loss" in entry]
        assert all(step["loss_align"] > 0 and step["words_mapped"] == 1 for step in steps)
        assert steps[0]["loss"] == pytest.approx(
            steps[0]["loss_ar"] + steps[0]["lambda"] * steps[0]["loss_align"], rel=2e-3
        )
        firsts.append([steps[0][name] for name in ("loss_ar", "loss_align", "grad_norm")])
    for first in firsts[1:]:
        assert first == pytest.approx(firsts[0], rel=2e-3)


# ---- TRL ----


def trl_log(world: World, out: Path, batch: int, accumulation: int, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    from motionenhancer.data import read_frames
    from motionenhancer.integrations.trl import AlignedSFTTrainer

    model, processor, _ = load_student(world.student, dtype=torch.float32)
    rows = [
        {"messages": s.messages, "videos": [str(s.videos[0])]} for s in read_samples(world.data, world.videos)
    ]

    def collate(rows: list[Any]) -> dict[str, Any]:
        clips = [torch.from_numpy(read_frames(row["videos"][0], num_frames=4).frames) for row in rows]
        texts = [processor.apply_chat_template(row["messages"]) for row in rows]
        made = processor(text=texts, videos=clips, padding=True, do_sample_frames=False, return_tensors="pt")
        return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    args = SFTConfig(
        str(out),
        bf16=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = AlignedSFTTrainer(
        model, args, collate, train_dataset=Dataset.from_list(rows), processing_class=processor, **options
    )
    trainer.train()
    return trainer.state.log_history


def test_trl(world: World, priors: Path, tmp_path: Path, capsys: Any) -> None:
    require("trl")
    check([trl_log(world, tmp_path, *sizes, prior_dir=priors) for sizes in STEPS])
    assert "8 of 8 samples aligned, " in capsys.readouterr().out


def test_trl_runs_the_model_once_a_step(world: World, priors: Path, tmp_path: Path) -> None:
    """The outputs that nobody wants would cost a second forward, and fail inside the capture."""
    require("trl")
    from motionenhancer.alignment.trainer import MotionTrainer

    asked: list[bool] = []
    original = MotionTrainer.compute_loss

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, *rest: Any, **more: Any
    ):
        asked.append(return_outputs)
        return original(self, model, inputs, return_outputs, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MotionTrainer, "compute_loss", compute_loss)
        log = trl_log(world, tmp_path, 2, 1, prior_dir=priors, aligner="identity", alignment_weight=0.5)
    assert asked == [False, False]
    assert log[0]["lambda"] == 0.5


def test_other_losses_of_trl_are_refused_by_name(priors: Path) -> None:
    require("trl")
    import trl

    from motionenhancer.integrations.aligned_trainer import AlignedTrainer

    code = "\n".join(file.read_text() for file in Path(trl.__file__).parent.rglob("*_trainer.py"))
    others = {*re.findall(r"^class ([A-Z]\w*Trainer)\(", code, re.MULTILINE)} - {"SFTTrainer"}
    assert {"DPOTrainer", "GRPOTrainer", "KTOTrainer", "RewardTrainer", "RLOOTrainer"} <= others
    for name in others:
        base = type(name, (), {})
        with pytest.raises(ValueError, match=f"{name}: alignment works with supervised fine-tuning only"):
            type("Mine", (AlignedTrainer, base), {})(prior_dir=priors)


def test_checkpoints_are_not_reentrant(priors: Path, tmp_path: Path) -> None:
    """Under the option that the installed transformers reads."""
    from transformers import Trainer, TrainingArguments

    from motionenhancer.integrations.aligned_trainer import AlignedTrainer

    args = TrainingArguments(str(tmp_path), gradient_checkpointing=True, use_cpu=True, report_to="none")
    read = "activation_checkpointing_kwargs"
    read = read if hasattr(args, read) else "gradient_checkpointing_kwargs"
    assert getattr(args, read) is None
    processor = SimpleNamespace(video_processor=None)
    mine = type("Mine", (AlignedTrainer, Trainer), {})
    trainer = mine(torch.nn.Linear(1, 1), args, prior_dir=priors, student_processor=processor)
    assert getattr(trainer.args, read) == {"use_reentrant": False}


def test_a_batch_without_labels_is_refused(priors: Path) -> None:
    from motionenhancer.integrations.aligned_trainer import AlignedTrainer

    bare = object.__new__(AlignedTrainer)
    with pytest.raises(ValueError, match="whose batches have labels; this batch has prompts"):
        bare.compute_loss(None, {"prompts": []})


def test_trl_needs_a_collator(priors: Path, world: World) -> None:
    require("trl")
    from motionenhancer.integrations.trl import AlignedSFTTrainer

    with pytest.raises(ValueError, match="data_collator: TRL has none for videos"):
        AlignedSFTTrainer(None, prior_dir=priors)


# ---- ms-swift and LLaMA-Factory: processes of their own, as they change what is global ----


def run(code: str, folder: Path, **environment: str) -> str:
    import os

    script = folder / "run.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    return f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}"


def swift(folder: Path, world: World, priors: Path, **options: Any) -> str:
    """One run of `swift sft` or of another swift command; the toy's tokens differ from Qwen's."""
    config = json.loads((world.student / "config.json").read_text())
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in conversations(world)))
    (folder / "plugin.py").write_text(
        f"""from swift.template.templates.qwen import Qwen2VLTemplate
from motionenhancer.integrations.ms_swift import register
Qwen2VLTemplate.image_token_id, Qwen2VLTemplate.video_token_id = {config["image_token_id"]}, {
            config["video_token_id"]
        }
register({str(priors)!r}, alignment_weight=0.5)
"""
    )
    flags = {
        "model": world.student,
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "dataset": data,
        "external_plugins": folder / "plugin.py",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "use_hf": "true",
        "check_model": "false",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "output_dir": folder / "out",
        **options,
    }
    command = "rlhf" if "rlhf_type" in options else "sft"
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    code = f"from swift.pipelines import {command}_main\n{command}_main({argv!r})"
    reader = "decord" if importlib.util.find_spec("decord") else "torchcodec"
    sizes = {"VIDEO_MIN_PIXELS": "3136", "VIDEO_MAX_PIXELS": "12544", "VIDEO_TOTAL_PIXELS": "200704"}
    return run(code, folder, FORCE_QWENVL_VIDEO_READER=reader, FPS_MIN_FRAMES="4", **sizes)


def test_ms_swift(world: World, priors: Path, tmp_path: Path) -> None:
    require("swift")
    logs = []
    for batch, accumulation in STEPS:
        folder = tmp_path / str(batch)
        folder.mkdir()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        said = swift(folder, world, priors, **sizes)
        assert "8 of 8 samples aligned, " in said, said[-3000:]
        (file,) = folder.glob("out/*/logging.jsonl")
        logs.append([json.loads(line) for line in file.read_text().splitlines()])
    check(logs)


@pytest.mark.parametrize("loss", ["dpo", "grpo"])
def test_other_losses_of_ms_swift_are_refused_by_name(
    world: World, priors: Path, tmp_path: Path, loss: str
) -> None:
    require("swift")
    said = swift(tmp_path, world, priors, rlhf_type=loss)
    assert f"ValueError: {loss}: alignment works with swift sft only" in said, said[-3000:]
    assert "exit code 1" in said


def test_packing_in_ms_swift_is_refused(world: World, priors: Path, tmp_path: Path) -> None:
    require("swift")
    said = swift(tmp_path, world, priors, streaming="true")
    assert "leave out --packing, " in said, said[-3000:]


def factory(folder: Path, world: World, priors: Path, **options: Any) -> str:
    (folder / "toy.json").write_text(json.dumps(conversations(world)))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {
        "file_name": "toy.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "videos": "videos"},
        "tags": tags,
    }
    (folder / "dataset_info.json").write_text(json.dumps({"toy": about}))
    settings = {
        "model_name_or_path": str(world.student),
        "template": "qwen2_vl",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "toy",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    code = f"""
    from llamafactory.train.tuner import run_exp
    from motionenhancer.integrations.llamafactory import register
    register({str(priors)!r}, alignment_weight=0.5)
    run_exp({settings!r})
    """
    return run(code, folder)


def test_llamafactory(world: World, priors: Path, tmp_path: Path) -> None:
    require("llamafactory")
    logs = []
    for batch, accumulation in STEPS:
        folder = tmp_path / str(batch)
        folder.mkdir()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        said = factory(folder, world, priors, **sizes)
        assert "8 of 8 samples aligned, " in said, said[-3000:]
        logs.append(json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"])
    check(logs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "dpo"}, "stage dpo: alignment works with sft only"),
        ({"stage": "kto"}, "stage kto: alignment works with sft only"),
        ({"packing": True}, "alignment does not work with packing"),
    ],
)
def test_what_llamafactory_cannot_align_is_refused(
    world: World, priors: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    require("llamafactory")
    said = factory(tmp_path, world, priors, **options)
    assert re.search(f"ValueError: {message}", said), said[-3000:]
    assert "Loading weights" not in said
