"""The card beside a checkpoint, from what a run's report holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from motionenhancer.report.model_card import write_model_card

CACHED = "/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/0a1b"
IDENTITY = {
    "student": CACHED,
    "teacher": ["t/a", "b"],
    "alignment_weight": 1.0,
    "lora_r": 0,
    "data": "d.jsonl",
}
COUNTS = {"samples": 40, "words": 80, "mapped_words": 70, "aligned_samples": 30}
REPORT: dict[str, Any] = {
    "alignment": COUNTS,
    "frames": {"num_frames": None, "fps": 2.0, "max_frames": 64},
    "training": {"log": []},
}


def card(folder: Path, report: dict[str, Any] | None = None, **identity: Any) -> tuple[dict[str, Any], str]:
    """The head as yaml, and the text."""
    write_model_card(folder, {**REPORT, **(report or {})}, {**IDENTITY, **identity})
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_aligned_run(tmp_path: Path) -> None:
    head, text = card(tmp_path, learning_rate=1e-5, aligner=None)
    assert head == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["motionenhancer"],
    }
    assert "# Qwen2.5-VL-3B-Instruct, fine-tuned with MotionEnhancer\n" in text
    assert "- teacher: `t/a`, `b`; training pulled" in text
    assert "- data: `d.jsonl`, 40 samples seen in training\n- frames: 2 a second, at most 64\n" in text
    assert "- 30 samples were aligned; 87.5 % of the prior's words found\n" in text
    assert "| `alignment_weight` | 1.0 |\n| `learning_rate` | 1e-05 |\n| `lora_r` | 0 |\n" in text
    assert "Accuracy" not in text
    assert "Losses" not in text


@pytest.mark.parametrize("change", [{"alignment_weight": 0.0}, {"teacher": None}])
def test_plain_fine_tuning(change: dict[str, Any], tmp_path: Path) -> None:
    report = {"alignment": {**COUNTS, "words": 0}, "frames": {**REPORT["frames"], "num_frames": 8}}
    _, text = card(tmp_path, report, **change)
    assert "- plain fine-tuning: no attention was aligned" in text
    assert "teacher" not in text
    assert "- frames: 8 of each clip, evenly\n" in text
    assert "were aligned" not in text


def test_what_was_measured(tmp_path: Path) -> None:
    found = {
        "evaluation": {"before": {"overall": 50.04}, "after": {"overall": 66.66}},
        "training": {
            "log": [{"eval_loss_ar": 9.0}, {"loss": 1.0}, {"eval_loss_ar": 0.5, "eval_loss_align": 0.25}]
        },
    }
    _, text = card(tmp_path, found, eval_data="e.jsonl")
    assert "| before | 50.0 % |\n| after | 66.7 % |\n" in text
    assert (
        "Losses of `e.jsonl` at the last evaluation: `eval_loss_ar` 0.5000, `eval_loss_align` 0.2500." in text
    )
    found["training"] = {"log": [{"eval_loss_ar": 9.0}]}
    assert "evaluation: `eval_loss_ar` 9.0000." in card(tmp_path, found, eval_data="e.jsonl")[1]


def test_adapters_and_a_model_that_is_not_on_the_hub(tmp_path: Path) -> None:
    merged, text = card(tmp_path, lora_r=4, student="/a/mine")
    assert merged["library_name"] == "transformers"
    assert "base_model" not in merged
    assert "- base model: `/a/mine`" in text
    (tmp_path / "adapter_config.json").touch()
    assert card(tmp_path, lora_r=4)[0]["library_name"] == "peft"
