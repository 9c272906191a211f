"""The predicted memory of a teacher beside the student, against the measured memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import World
from train_support import flags

from motionenhancer import train
from motionenhancer.costs import TeacherCost, measured_memory, teacher_cost
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.pool import AttentionPool
from motionenhancer.priors.prior_settings import PriorSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from measure.memory import peak_bytes

TEXT = "the red square moves left"


def test_the_plan_is_a_lower_bound_of_what_is_measured(world: World, clip: np.ndarray) -> None:
    prior = PriorArguments(teacher=str(world.teacher))
    settings = PriorSettings(steps=1)
    teacher = prior.load("cpu")
    words = len(teacher.encode_text(TEXT).tokens)
    plan = teacher_cost(world.teacher, settings, words=words, **prior.cost_options("cpu"))
    pipeline = teacher.pipeline  # type: ignore[attr-defined]
    for part, size in plan.weights.items():
        assert size == sum(p.nbytes for p in getattr(pipeline, part).parameters()), part
    latents = teacher.encode_video(clip)
    pool = AttentionPool(latents.tokens, teacher.heads, words, settings, teacher.device)
    embeds = teacher.encode_text(TEXT).embeds

    def read() -> None:
        both = torch.cat([latents.latents] * 4), torch.cat([embeds] * 4)
        with teacher.reading(pool, memory=True, row=1):
            teacher.predict(*both, 500)

    # The pool's sums are subtracted, so that the bound is for the evaluation alone.
    sums = 4 * teacher.heads * latents.tokens.vision * (words + 64 + latents.tokens.frames)
    assert 0 < plan.reading - sums <= peak_bytes(read)
    assert 0 < plan.encoding <= peak_bytes(lambda: teacher.encode_video(clip))
    assert plan.total == sum(plan.weights.values()) + max(plan.reading, plan.encoding)


def test_what_need_not_be_there_is_not_counted(world: World, tmp_path: Path) -> None:
    prior, settings = PriorArguments(teacher=str(world.teacher)), PriorSettings()

    def cost(
        prior: PriorArguments, settings: PriorSettings, device: str, *, cached: bool = True
    ) -> TeacherCost:
        return teacher_cost(world.teacher, settings, **prior.cost_options(device, cached=cached))

    whole = cost(prior, settings, "cuda")
    encoder = whole.weights["text_encoder"]
    cached = replace(prior, text_cache=str(tmp_path))
    assert "text_encoder" not in cost(cached, settings, "cuda").weights
    assert cost(cached, settings, "cuda", cached=False).weights == whole.weights
    offloaded = cost(replace(prior, offload_text_encoder=True), settings, "cuda")
    assert (offloaded.host, "text_encoder" in offloaded.weights) == (encoder, False)
    assert cost(replace(prior, offload_text_encoder=True), settings, "cpu").host == 0
    single = cost(prior, replace(settings, mode="renoise"), "cuda")
    split = cost(replace(prior, split_batch=True), settings, "cuda")
    assert single.reading < split.reading < whole.reading
    assert cost(replace(prior, vae_tiling=True), settings, "cuda").encoding == whole.encoding // 4
    narrow = cost(prior, settings, "cuda").weights["transformer"]
    assert 2 * narrow == cost(prior, settings, "cpu").weights["transformer"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prior_source": "online"}, "beside the student: at least"),
        ({"prior_source": "hybrid", "priors_first": True}, "before the first step: at least"),
        ({"prior_source": "store"}, None),
        ({"prior_source": "online", "alignment_weight": 0}, None),
    ],
)
def test_a_dry_run_states_it(
    world: World, tmp_path: Path, options: dict, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(world, tmp_path / "out", dry_run=True, **options)) == 0
    start = "memory of the teacher, "
    said_lines = capsys.readouterr().out.splitlines()
    lines = [line.removeprefix(start) for line in said_lines if line.startswith(start)]
    assert all("encoding takes many times more" in line for line in lines)
    assert [said is not None and line.startswith(said) for line in lines] == [True] * (said is not None)


def test_this_process_has_held_something() -> None:
    before = measured_memory()
    assert before["peak_bytes"] > 50 << 20
    assert before["device"] == ("cpu" if not torch.cuda.is_initialized() else torch.cuda.get_device_name())
