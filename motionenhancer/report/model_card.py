"""The model card of a trained checkpoint: its sources, settings and measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text

_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")
#: Settings of a run that the card lists, where they are known.
_SETTINGS = str.split("""
    alignment_weight alignment_schedule alignment_loss aligner prior_temperature confidence_gate prompt_source
    learning_rate vision_learning_rate num_train_epochs max_steps global_batch_size weight_decay warmup_steps
    lr_scheduler_type optim seed lora_r
""")


def write_model_card(folder: Path, report: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write `README.md` into a checkpoint's folder.

    Args:
        folder: folder of the checkpoint.
        report: report of the run, with `alignment`, `training` and, if accuracies were measured,
            `evaluation`.
        identity: see `run_identity`.
    """
    base, teacher = _hub_name(identity["student"]), identity.get("teacher")
    counts, frames = report["alignment"], report["frames"]
    aligned = bool(identity["alignment_weight"])
    adapters = identity["lora_r"] and (folder / "adapter_config.json").is_file()
    head = {
        # The Hub refuses a card whose base model is a path.
        **({"base_model": base} if _CACHED.search(identity["student"]) else {}),
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["motionenhancer"],
    }
    # json is yaml, and quotes all characters that a path may hold.
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", ""]
    lines += [f"# {Path(base).name}, fine-tuned with MotionEnhancer", ""]
    lines += [f"- base model: `{base}`"]
    if aligned and teacher is not None:
        named = [teacher] if isinstance(teacher, str) else teacher
        listed = ", ".join(f"`{_hub_name(one)}`" for one in named)
        lines.append(f"- teacher: {listed}; training pulled the words' attention toward the teacher's maps")
    else:
        lines.append("- plain fine-tuning: no attention was aligned (λ = 0)")
    lines.append(f"- data: `{identity['data']}`, {counts['samples']} samples seen in training")
    if frames["num_frames"] is not None:
        lines.append(f"- frames: {frames['num_frames']} of each clip, evenly")
    else:
        lines.append(f"- frames: {frames['fps']:g} a second, at most {frames['max_frames']}")
    if counts["words"]:
        share = 100 * counts["mapped_words"] / counts["words"]
        lines.append(
            f"- {counts['aligned_samples']} samples were aligned; {share:.1f} % of the prior's words found"
        )
    lines += ["", "| setting | value |", "| --- | --- |"]
    lines += [f"| `{name}` | {identity[name]} |" for name in _SETTINGS if identity.get(name) is not None]
    if found := report.get("evaluation"):
        lines += ["", "Accuracy on the toy world's test questions:", "", "| | overall |", "| --- | --- |"]
        lines += [f"| {name} | {one['overall']:.1f} % |" for name, one in found.items()]
    losses = [entry for entry in report["training"]["log"] if "eval_loss_ar" in entry]
    if losses:
        names = [name for name in ("eval_loss_ar", "eval_loss_align") if name in losses[-1]]
        said = ", ".join(f"`{name}` {losses[-1][name]:.4f}" for name in names)
        lines += ["", f"Losses of `{identity['eval_data']}` at the last evaluation: {said}."]
    lines += ["", "`motion_report.json` of the run has all settings, versions and logs.", ""]
    write_text(folder / "README.md", "\n".join(lines))


def _hub_name(path: str) -> str:
    """The id of a model in the Hugging Face cache; any other path is returned unchanged.

    >>> _hub_name("/home/me/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/0a1b")
    'Qwen/Qwen2.5-VL-3B-Instruct'
    """
    found = _CACHED.search(path)
    return path if found is None else "/".join(found.groups())
