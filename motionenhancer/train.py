"""Fine-tune a video VLM while its attention is pulled toward a motion prior.

`python -m motionenhancer.train` without arguments runs all steps on a small world of moving shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback

from .alignment.aligner import build_aligner, save_aligner
from .alignment.dataset import MotionCollator, MotionDataset
from .alignment.trainer import MotionTrainer
from .data import Sample, SkipLog
from .data.readers import load_samples
from .data.sampling import Frames
from .files import read_json
from .flags import parse_arguments, parse_options, values_of
from .hub import Upload
from .interrupts import on_interrupt
from .priors.arguments import PriorArguments
from .priors.engine import MakerArguments
from .priors.maker import DeadTeacher
from .priors.prior_settings import PriorSettings
from .priors.storage import PriorStore
from .processes import from_main
from .report.model_card import write_model_card
from .report.run_report import REPORT, RunReport
from .report.watch import Watch
from .settings import DataArguments, OnlineArguments, ReportArguments, StudentArguments
from .students import StudentFamily, load_student
from .students.load import check_config
from .toy.accuracy import accuracy, accuracy_table
from .toy.defaults import use_toy_defaults
from .toy.gaze import attention_on_objects
from .toy.world import ToyFolder
from .training.arguments import TrainArguments, ValidationArguments
from .training.lora import add_lora, plain_name
from .training.priors import RunPriors, open_priors, plan_memory
from .training.rehearsal import build_optimizer, rehearse
from .training.run_identity import aligned_before, checkpoint_to_resume, newest_checkpoint, run_identity
from .training.run_plan import (
    RunPlan,
    count_priors,
    engine_of,
    outline_student,
    plan_run,
    plan_steps,
    teacher_grid,
    vision_rate,
)
from .weights import refuse_weights, saving

PROG = "python -m motionenhancer.train"
TOY_RECIPE = Path(__file__).parent / "toy" / "recipe.yaml"


CLASSES = (
    StudentArguments,
    DataArguments,
    PriorArguments,
    PriorSettings,
    TrainArguments,
    ValidationArguments,
    OnlineArguments,
    MakerArguments,
    ReportArguments,
)


def train(**options: Any) -> RunReport:
    """Train from Python, like the command.

    Args:
        options: the command's flags, without dashes; `data` and `eval_data` may also be a `datasets.Dataset`.

    Returns:
        The report that is written beside the checkpoint, with its `folder`.

    Raises:
        ValueError, OSError, FloatingPointError: see `run`; a flag that does not exist is named.

    >>> train(student="Qwen2.5-VL-3B-Instruct", teacher="CogVideoX1.5-5B", data="a.jsonl")  # doctest: +SKIP
    """
    return _run(lambda **more: parse_options(CLASSES, options | more, prog=PROG, recipe=_recipe))


def _recipe(chosen: Any) -> Path | None:
    return TOY_RECIPE if chosen.student is None else None


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)

    def parse(**more: Any) -> tuple[Any, ...]:
        flags = [f"--{name}={value}" for name, value in more.items()]
        return parse_arguments(CLASSES, [*given, *flags], prog=PROG, recipe=_recipe)

    try:
        report = _run(parse)
    except (ValueError, OSError, FloatingPointError, SafetensorError, DeadTeacher) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "unaligned" in report.content:
        if PartialState().is_main_process:
            print(f"error: {report.content['unaligned']}", file=sys.stderr)
        return 1
    return 0


def _run(parse: Callable[..., tuple[Any, ...]]) -> RunReport:
    """Run what `parse` reads; the toy is first trained plainly as well, from the same start."""
    arguments = parse()
    student, data, prior, _, training, validation, online = arguments[:7]
    named = (student.student, data.data, data.video_root, prior.teacher, validation.eval_data)
    compared = student.aligned and not student.dry_run and training.resume_from_checkpoint is None
    if compared and all(one is None for one in named):
        # Wrong flags of the second run end the command before the first run.
        student.check(training.output_dir or "runs/train")
        online.check(student.prior_source)
        plain = _plain_folder(training)
        if PartialState().is_main_process:
            print(f"first without alignment, in {plain}; then with alignment")
        _, *others = parse(output_dir=plain, push_to_hub=False)
        unread = {name: getattr(StudentArguments, name) for name in _OF_ALIGNMENT}
        run(replace(student, alignment_weight=0.0, **unread), *others)
    return run(*arguments)


#: Options of the student that need an alignment.
_OF_ALIGNMENT = [
    "measure_alignment",
    "save_aligner",
    "alignment_layers",
    "alignment_heads",
    "alignment_reduce",
]


def _plain_folder(training: TrainArguments) -> Path:
    """Where the toy's run without alignment is."""
    return Path(f"{training.output_dir or 'runs/train'}_plain")


def _plain_results(training: TrainArguments) -> dict[str, Any]:
    """The toy's accuracy before and after plain training, if that run is finished."""
    try:
        report = read_json(_plain_folder(training) / REPORT)
        found = report["evaluation"] if report["status"] == "finished" else {}
        return {"before": found["before"], "plain": found["after"]} if found else {}
    except (OSError, ValueError, KeyError):
        return {}


def run(
    student: StudentArguments,
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    training: TrainArguments,
    validation: ValidationArguments,
    online: OnlineArguments,
    maker: MakerArguments,
    shown: ReportArguments,
) -> RunReport:
    """One training run, from data to checkpoint; returns the report it wrote beside the checkpoint.

    With `student.dry_run` it prints the plan and returns: no weight is read, no teacher runs and no file is
    written, except the toy world of a command without arguments.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong; nothing has been trained.
        FloatingPointError: the loss became NaN or infinite; the report names the samples.
    """
    folder, upload = Path(training.output_dir or "runs/train"), training.take_upload()
    student.check(folder)
    if student.sample_cache_mb and training.dataloader_num_workers:
        # New workers would begin with nothing kept.
        training.dataloader_persistent_workers = True
    online.check(student.prior_source)
    validation.check(training, data=data.data, aligned=student.aligned)
    prior.find(dry_run=student.dry_run, student=student.student)
    toy = use_toy_defaults(data, prior, student)
    assert student.student is not None
    if not Path(student.student).is_dir():
        raise ValueError(f"--student {student.student}: no such folder; give a transformers folder on disk")
    options: dict[str, Any] = {
        "store": PriorStore(Path(prior.prior_dir)),
        "source": prior.prompt_source,
        **student.frames(check_config(Path(student.student))),
    }
    engine = engine_of(training)
    whole = engine in ("plain", "DDP")  # each process has all weights
    rehearse(training, engine)
    if student.lora_merge and not whole:
        raise ValueError(f"--lora_merge does not work under {engine}; merge the saved adapter afterwards")
    if student.aligned:
        prior.check(settings, PartialState().device)
        online.check_teachers(student.prior_source, prior, maker)
        if not student.normalize_rows and prior.scaled:
            raise ValueError(
                "--normalize_rows false: rows of regions and of several teachers sum to one; leave it out"
            )
        options["store"] = prior.store(PartialState().device)
    checkpoint = checkpoint_to_resume(training)
    report = RunReport(folder, identity=run_identity(student, data, prior, settings, training, validation))
    training.flags = values_of(student, data, prior, settings, validation, online, maker, shown)
    # A data set in memory has a name only.
    training.flags |= {k: report.identity[k] for k in ("data", "eval_data") if k in report.identity}
    main_process = PartialState().is_main_process
    if main_process:
        report.check() if student.dry_run else report.claim()
    ended = report.finished() and any(folder.glob("*.safetensors")) and not student.dry_run
    if from_main(ended) and training.resume_from_checkpoint is None:
        report.status = "finished"
        if main_process:
            print(
                f"{folder}: this run is finished; nothing is done. For another run give another --output_dir"
            )
            _push(upload, folder)
        return report
    if upload is not None and not student.dry_run and (wrong := from_main(main_process and upload.open())):
        raise ValueError(wrong)
    skips = SkipLog()
    samples = load_samples(data.data or "", data.video_root, data.limit, skips)
    tested = _eval_samples(validation, skips)
    training.log_ten_times(plan_steps(len(samples), training).total)
    if main_process:
        if not student.dry_run:
            report.write("running")
            on_interrupt(lambda: _interrupted(report, training))
        if checkpoint is not None:
            print(f"continues from {checkpoint}")
        print(f"student {student.student}\ndata {report.identity['data']}, {len(samples)} samples")
        print(f"output {report.folder}")
        if tested:
            print(f"eval data {validation.eval_data}, {len(tested)} samples")
        if student.aligned:
            print(f"teacher {' '.join(prior.teachers)}\npriors {prior.prior_dir}")
    try:
        model, processor, family = _student(student, training)
        if training.optim_target_modules is not None:
            build_optimizer(training, model)
        frames = Frames(**student.frames(family))
        report.content["frames"] = asdict(frames)
        if main_process:
            plain = MotionDataset(samples, family, processor, keys={}, **options)
            plan = _plan(model, plain, tested, student, prior, settings, training)
            report.content["plan"] = plan.to_json()
            print(plan)
            costs = plan_memory(student, prior, settings, online, maker)
            for cost, place in costs:
                print(f"memory of the teacher, {place}: {cost}")
            if costs:
                described = [{**cost.to_json(), "place": place} for cost, place in costs]
                report.content["plan"]["teacher"] = described if len(described) > 1 else described[0]
        if student.dry_run:
            return report
        asked = toy if main_process and whole else None
        if asked is not None:
            known = _plain_results(training) if student.aligned else {}
            report.content["evaluation"] = known or {"before": _test(model, processor, family, asked, frames)}
        priors: AbstractContextManager[RunPriors] = nullcontext(RunPriors(samples))
        if student.aligned:
            priors = open_priors([*samples, *tested], student, prior, settings, skips, report, online, maker)
        rate = vision_rate(student, training)
        with priors as found:
            if checkpoint is not None:
                report.content["resumed_from"] = Path(checkpoint).name
                if found.online is not None:
                    found.online.settled = aligned_before(checkpoint)
            _refuse_metric(training, tested, found)
            options |= {"keys": found.keys, "requests": found.requests}
            trainer = MotionTrainer(
                model=model,
                args=training,
                train_dataset=MotionDataset(
                    samples, family, processor, cache_bytes=student.sample_cache_mb * 2**20, **options
                ),
                eval_dataset=MotionDataset(tested, family, processor, **options) if tested else None,
                callbacks=_early_stopping(validation),
                data_collator=MotionCollator(family, processor, source=prior.prompt_source),
                processing_class=processor,
                alignment_weight=student.schedule(),
                alignment_loss=student.alignment_loss,
                normalize_rows=student.normalize_rows,
                attention=student.attention(),
                aligner=_aligner(student, found.grids, training.seed),
                prior_temperature=student.prior_temperature,
                confidence_gate=student.confidence_gate,
                learning_rates=lambda name: rate if family.in_vision_tower(plain_name(name)) else None,
                measure_alignment=student.measure_alignment and found.any,
                online=found.online,
            )
            watched = shown.report_samples if main_process or not whole else 0
            watch = Watch(trainer, watched, whole=whole)
            watch.begin()
            result = trainer.train(resume_from_checkpoint=checkpoint)
            found.finish(report, skips, trainer.total_over_processes)
            _save(trainer, student)
            watch.keep(report.folder)
            if asked is not None:
                report.content["evaluation"]["after"] = _test(trainer.model, processor, family, asked, frames)
    except BaseException as error:
        report.fail(error)
        raise
    summary = trainer.summary()
    if checkpoint is not None:
        summary = f"since {Path(checkpoint).name}: {summary}"
    seen = gather_object([(trainer.counts, trainer.skipped)])
    total = {name: sum(c[name] for c, _ in seen) for name in trainer.counts}
    followed = checkpoint is not None and aligned_before(checkpoint)
    if student.alignment_weight != 0 and total["samples"] and not total["aligned_samples"] and not followed:
        report.content["unaligned"] = (
            f"--alignment_weight {student.alignment_weight}: no word of a prior was found in any of the "
            f"{total['samples']} samples, so this was plain fine-tuning. The teacher's text must stand in "
            "the conversation, after the video"
        )
    if main_process:
        for sample, reason in {k: v for _, skipped in seen for k, v in skipped.items()}.items():
            skips.add("unreadable while training", id=sample, detail=reason)
        report.content["alignment"] = total
        report.content["training"] = {"metrics": result.metrics, "log": trainer.state.log_history}
        report.content["skipped"] = skips.to_json()
        write_model_card(report.folder, report.content, report.identity)
        report.write("finished")
        if skips.total:
            print(skips.summary())
        if "evaluation" in report.content:
            print(accuracy_table(report.content["evaluation"]))
        watch.write(report.folder)
        print(f"checkpoint and {report.path.name} in {report.folder}")
        print(summary)
    on_interrupt(lambda: f"the run in {folder} had finished")
    if main_process and "unaligned" not in report.content:
        _push(upload, folder)
    return report


def _push(upload: Upload | None, folder: Path) -> None:
    if upload is not None:
        print(f"uploaded: {upload.push(folder, REPORT)}")


def _interrupted(report: RunReport, training: TrainArguments) -> str:
    """Write that the run was interrupted; return what is kept of it."""
    report.write("interrupted")
    newest = newest_checkpoint(report.folder)
    if newest is None:
        return "no checkpoint was saved yet; every finished prior is kept"
    return f"{Path(newest).name} is kept in {training.output_dir}, and every finished prior"


def _eval_samples(validation: ValidationArguments, skips: SkipLog) -> list[Sample]:
    """The samples of `--eval_data`, with ids that differ from all ids of `--data`."""
    if validation.eval_data is None:
        return []
    samples = load_samples(validation.eval_data, validation.eval_video_root, None, skips)
    return [replace(sample, id=f"eval/{sample.id}") for sample in samples]


def _refuse_metric(training: TrainArguments, tested: Sequence[Sample], found: RunPriors) -> None:
    if "loss_align" in (training.metric_for_best_model or "") and not any(
        sample.id in found.keys or sample.id in found.requests for sample in tested
    ):
        raise ValueError(
            f"--metric_for_best_model {training.metric_for_best_model}: no sample of --eval_data has a prior"
        )


def _early_stopping(validation: ValidationArguments) -> list[EarlyStoppingCallback]:
    patience = validation.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _test(
    model: Any, processor: Any, family: StudentFamily, toy: ToyFolder, frames: Frames
) -> dict[str, Any]:
    print(f"answering the questions of {toy.test} ...")
    was_training = model.training
    found = accuracy(model.eval(), processor, family, toy.root, frames=frames)
    found["gaze"] = attention_on_objects(model, processor, family, toy.root)
    model.train(was_training)
    return found


def _student(student: StudentArguments, training: TrainArguments) -> tuple[Any, Any, StudentFamily]:
    """The student to train, with its adapters; without weights for a dry run."""
    assert student.student is not None
    # Mixed precision trains float32 weights and casts them to compute; frozen ones can stay in 16 bits.
    dtype = torch.bfloat16 if student.lora_r and training.bf16 else torch.float32
    if student.dry_run:
        model, processor, family = outline_student(student.student, student.attn_implementation, dtype)
    else:
        model, processor, family = load_student(
            student.student, attn_implementation=student.attn_implementation, dtype=dtype
        )
        # Under ZeRO-3 transformers also keeps renamings that no weight needed and applies them when it saves.
        if kept := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [entry for entry in kept if entry.was_used()]
    if student.lora_r:
        model = add_lora(model, student, training.seed)
    return model, processor, family


def _plan(
    model: Any,
    dataset: MotionDataset,
    tested: Sequence[Sample],
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    training: TrainArguments,
) -> RunPlan:
    # A run counts its priors when it collects them, so that clips are read once.
    counts = student.aligned and student.dry_run and student.prior_source != "online"
    counted = count_priors([*dataset.samples, *tested], prior, settings) if counts else None
    try:
        tokens = len(dataset[0].encoded.input_ids)
    except ValueError:
        tokens = None
    return plan_run(
        model,
        dataset.family,
        student,
        training,
        samples=len(dataset),
        grid=teacher_grid(prior) if student.aligned else None,
        tokens=tokens,
        priors=counted,
    )


def _save(trainer: MotionTrainer, student: StudentArguments) -> None:
    """The run's result, in the family's own files."""
    if trainer.is_fsdp_enabled:
        # Checkpoints to resume from stay in shards; the final one is written whole.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    refuse_weights([trainer.model, trainer.aligner], trainer.state.global_step, trainer.args.world_size)
    if student.lora_merge:
        adapted: Any = trainer.model
        trainer.model = adapted.merge_and_unload()
    with saving(str(trainer.args.output_dir)):
        trainer.save_model()
    if student.save_aligner is not None and trainer.aligner is not None and trainer.args.should_save:
        save_aligner(trainer.aligner, student.save_aligner)


def _aligner(
    student: StudentArguments, grids: set[tuple[int, int, int]], seed: int
) -> torch.nn.Module | None:
    if student.alignment_weight == 0 or not grids:
        return None
    if len(grids) > 1 and student.aligner != "identity":
        listed = ", ".join("×".join(map(str, grid)) for grid in sorted(grids))
        raise ValueError(
            f"--aligner {student.aligner} needs priors of one grid, found {listed}; use identity"
        )
    return build_aligner(student.aligner, sorted(grids)[0], seed=seed)


if __name__ == "__main__":
    sys.exit(main())
