"""Each option of transformers' TrainingArguments works, or is refused before anything is read."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import World
from train_support import FAST, flags, report_of, shared_priors
from transformers import TrainingArguments

from motionenhancer import train
from motionenhancer.flags import parse_arguments
from motionenhancer.options import REFUSED, WORKS, refuse_options
from motionenhancer.training.arguments import TrainArguments
from motionenhancer.training.rehearsal import rehearse

PLAIN = {k: v for k, v in FAST.items() if k not in ("ddim_steps", "video_fps")}
WHOLLY_REFUSED = {name: reason for name, reason in REFUSED.items() if isinstance(reason, str)}
REFUSED_VALUES = [
    (name, value, reason)
    for name, reasons in REFUSED.items()
    if not isinstance(reasons, str)
    for value, reason in reasons.items()
]


def another_value(name: str) -> Any:
    """A value that the field can have and that is not its default."""
    given = {"include_for_metrics": ["loss"]}
    default = next(one.default for one in fields(TrainArguments) if one.name == name)
    if name in given:
        return given[name]
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else "x"


def test_every_field_is_in_one_table() -> None:
    """A later transformers has other fields: put them into the table after trying them."""
    names = {one.name for one in fields(TrainingArguments)}
    assert names <= WORKS | WHOLLY_REFUSED.keys()
    assert not WORKS & WHOLLY_REFUSED.keys()
    assert REFUSED.keys() - WHOLLY_REFUSED.keys() <= WORKS


def test_the_page_lists_every_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = page.split("### Options of transformers", 1)[1].split("\n## ")[0]
    listed = {name for code in re.findall(r"`--([a-z0-9_ -]+)`", section) for name in code.split(" --")}
    assert WORKS | REFUSED.keys() <= listed
    for name, value, _ in REFUSED_VALUES:
        assert f"`{value}`" in section, name


@pytest.mark.parametrize("name", sorted(WHOLLY_REFUSED.keys() & {one.name for one in fields(TrainArguments)}))
def test_what_no_run_can_use_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(WHOLLY_REFUSED[name])) as raised:
        TrainArguments(output_dir=str(tmp_path), **{**PLAIN, name: another_value(name)})
    assert str(raised.value).startswith(f"--{name} must ")
    assert TrainArguments(output_dir=str(tmp_path), **PLAIN).given.keys() <= {*PLAIN, "output_dir"}


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED_VALUES)
def test_what_no_run_can_use_is_refused_by_value(name: str, value: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--{name} {value}: {reason}")):
        TrainArguments(output_dir=str(tmp_path), **{**PLAIN, name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("lr_scheduler_kwargs", "{", "Expecting property name"), ("accelerator_config", "1", "No such file")],
)
def test_an_option_whose_text_is_no_mapping_is_named(
    name: str, value: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^--{name} {re.escape(value)}: .*{said}"):
        TrainArguments(output_dir=str(tmp_path), **{**PLAIN, name: value})


def test_only_an_option_of_mappings_takes_one_from_yaml(tmp_path: Path) -> None:
    def read(body: str) -> TrainArguments:
        (tmp_path / "a.yaml").write_text(f"{body}\nuse_cpu: true\n")
        flags, held = ["--config", str(tmp_path / "a.yaml")], {"dry_run": False}
        return parse_arguments((TrainArguments,), flags, prog="test", held=held)[0]

    assert read("lr_scheduler_kwargs: {min_lr: 0.5}").lr_scheduler_kwargs == {"min_lr": 0.5}
    with pytest.raises(ValueError, match=r"accelerator_config must be a mapping or a text, got \[1\]"):
        read("accelerator_config: [1]")


def test_an_option_that_no_table_knows_is_refused_if_it_is_changed() -> None:
    @dataclass
    class Later(TrainingArguments):
        warp_factor: int = field(default=1)

        def __post_init__(self) -> None:
            refuse_options(self)

    Later(learning_rate=1e-4)
    unknown = "--warp_factor must stay 1: it is not known whether this option works"
    with pytest.raises(ValueError, match=unknown):
        Later(warp_factor=9)


def refused(world: World, out: Path, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    """The one error line of a run with these options, before any data is read."""
    try:
        code = train.main(flags(world, out, **options))
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    assert not out.exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1
    return said[0]


#: module → options that need it, and the package's name
NEEDED = [
    ("galore_torch", {"optim": "galore_adamw"}, "galore_torch"),
    ("apollo_torch", {"optim": "apollo_adamw"}, "apollo_torch"),
    ("bitsandbytes", {"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
    ("bitsandbytes", {"optim": "paged_lion_32bit"}, "bitsandbytes"),
    ("grokadamw", {"optim": "grokadamw"}, "grokadamw"),
    ("optimi", {"optim": "stable_adamw"}, "torch-optimi"),
    ("torchao", {"optim": "adamw_torch_4bit"}, "torchao"),
    ("liger_kernel", {"use_liger_kernel": True}, "liger-kernel"),
    ("wandb", {"report_to": "wandb"}, "wandb"),
]


@pytest.mark.parametrize(("module", "options", "package"), NEEDED, ids=str)
def test_a_missing_package_is_named_before_anything_is_read(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    options: dict[str, object],
    package: str,
) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{package} is installed")
    monkeypatch.setattr("motionenhancer.train.load_samples", lambda *_: pytest.fail("went on to the data"))
    said = refused(world, tmp_path / "out", capsys, **options)
    ((name, value),) = options.items()
    assert f"--{name} {value}" in said
    assert package in said


@pytest.mark.parametrize(
    ("options", "named", "reason"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "--lr_scheduler_type", "num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type", "min_lr"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"foo": 1}'},
            "--lr_scheduler_kwargs",
            "'foo'",
        ),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "--optim_args momentum=much", "'much'"),
        ({"optim_args": "momentum"}, "--optim_args momentum", ""),
        ({"optim_target_modules": "all-linear"}, "--optim_target_modules all-linear", "galore and apollo"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers", "num_workers > 0"),
        ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor", "--dataloader_num_workers > 0"),
        ({"torch_compile_backend": "nonsense"}, "--torch_compile_backend nonsense", "NONSENSE"),
        ({"report_to": "nonsense"}, "--report_to nonsense", "tensorboard"),
        ({"fp16": True}, "--fp16", "needs a GPU"),
        ({"bf16": True, "fp16": True}, "--bf16 True, --fp16 True", "At most one"),
        ({"fsdp": "full_shard"}, "--fsdp full_shard", "distributed"),
        ({"fsdp": "full_shard", "fsdp_config": "no/file.json"}, "--fsdp_config no/file.json", "No such file"),
        ({"deepspeed": "no/file.json"}, "--deepspeed no/file.json", ""),
        ({"accelerator_config": "no/file.json"}, "--accelerator_config no/file.json", "No such file"),
        ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config", "split_batches"),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "--accelerator_config", "dispatch_batches"),
        ({"accelerator_config": '{"nonsense": true}'}, "--accelerator_config", "nonsense"),
        ({"ddp_backend": "mpi"}, "--ddp_backend mpi", ""),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere", "not the folder"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"nonsense": true}'},
            "--gradient_checkpointing_kwargs",
            "unknown nonsense",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_here_is_refused_before_anything_is_read(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    named: str,
    reason: str,
) -> None:
    monkeypatch.setattr("motionenhancer.train.load_samples", lambda *_: pytest.fail("went on to the data"))
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "")  # which transformers would set for good
        monkeypatch.delenv(name)
    said = refused(world, tmp_path / "out", capsys, **options)
    assert named in said
    assert reason in said


def test_memory_is_pinned_for_a_gpu_only(tmp_path: Path) -> None:
    """Without one, torch would warn in each run."""
    options = {**PLAIN, "use_cpu": False}
    assert (
        TrainArguments(output_dir=str(tmp_path), **options).dataloader_pin_memory == torch.cuda.is_available()
    )


def test_tf32_is_refused_where_the_machine_has_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU may have it")
    with pytest.raises(ValueError, match="--tf32"):
        TrainArguments(output_dir=str(tmp_path), **PLAIN, tf32=True)


def test_a_rehearsal_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "report_to": "tensorboard"}
    training = TrainArguments(output_dir="out", **{**PLAIN, **options}, dataloader_num_workers=2)
    before = replace(training)
    rehearse(training, "plain")
    assert training == before
    assert list(tmp_path.iterdir()) == []
    assert "train_runtime" not in capfd.readouterr().out


#: Options that change how a run computes and not what it learns.
SAME = [
    {"activation_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"offload": true}'},
    {"torch_compile": True, "torch_compile_backend": "eager"},
    {"use_cache": True, "torch_empty_cache_steps": 1},
    {"full_determinism": True},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
    {"include_num_input_tokens_seen": True, "logging_first_step": True},
    {"report_to": "tensorboard"},
    {"eval_data": "DATA", "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    {"eval_data": "DATA", "per_device_eval_batch_size": 3, "eval_delay": 1},
    {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "enable_jit_checkpoint": True},
]
#: Options that do change it.
OTHER = [
    {"optim": "adafactor"},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"optim": "adagrad"},
    {"optim": "rmsprop"},
    {"lr_scheduler_type": "inverse_sqrt"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
    {"neftune_noise_alpha": 5},
    {"bf16": True},
    {"train_sampling_strategy": "sequential"},
    {"data_seed": 5},
    {"accelerator_config": '{"use_seedable_sampler": false}'},
    {"max_grad_norm": 0},
    {"average_tokens_across_devices": False},
]


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return losses(world, tmp_path_factory.mktemp("plain") / "out", {})


def losses(world: World, out: Path, options: dict[str, object]) -> list[dict[str, float]]:
    """Both terms of the loss at each of two steps."""
    if "eval_data" in options:
        options = {**options, "eval_data": world.data, "eval_video_root": world.videos}
    assert train.main(flags(world, out, prior_dir=shared_priors(world), **options)) == 0
    log = [entry for entry in report_of(out)["training"]["log"] if "loss_ar" in entry]
    return [{name: entry[name] for name in ("loss_ar", "loss_align")} for entry in log]


@pytest.mark.parametrize("options", SAME, ids=str)
def test_options_that_change_nothing(
    world: World, tmp_path: Path, plain: list[dict[str, float]], options: dict[str, object]
) -> None:
    found = losses(world, tmp_path / "out", options)
    torch.use_deterministic_algorithms(False)
    assert len(found) == len(plain) == 2
    for mine, theirs in zip(found, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("options", OTHER, ids=str)
def test_options_that_work_and_change_the_run(
    world: World, tmp_path: Path, options: dict[str, object]
) -> None:
    found = losses(world, tmp_path / "out", options)
    assert len(found) == 2
    assert all(0 < entry[name] < float("inf") for entry in found for name in entry)
