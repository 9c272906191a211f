"""How many versions of the statistics' kernels varying videos compile."""

import importlib.util
import random

import pytest
import torch
from kernel_support import compiled_variants

from mekernels import launch

if importlib.util.find_spec("triton") is None or launch.interpreted():
    pytest.skip("needs triton, and not its interpreter", allow_module_level=True)

from mekernels.diagonal_attention import plan as diagonal
from mekernels.diagonal_attention.call import Call
from mekernels.motion_statistics import plan as statistics
from mekernels.motion_statistics.sums import MAPS, Sums, padded


def empty(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def tokens(shape, heads_first, parts=1):
    """A tensor (1, H, N, D), contiguous or with heads next to the width in memory."""
    heads, length, width = shape
    size = (1, heads, parts * length, width) if heads_first else (1, parts * length, heads, width)
    made = empty(*size, dtype=torch.bfloat16)
    return made if heads_first else made.transpose(1, 2)


def random_call(choose, fold, heads_first):
    frames, positions = choose.randint(1, 33), choose.randint(1, 1500)
    text = choose.choice([0, 1, choose.randint(2, 300)])
    shape = choose.choice([1, 12, 30, 48]), frames * positions + text, 64
    query, key = tokens(shape, heads_first), tokens(shape, heads_first, fold)
    start = choose.choice([0, text])
    layout = frames, positions, start, text, 0 if start else frames * positions
    return Call(query, key, empty(*query.shape[:3]), *layout, 0.125, fold)


def random_plans(choose, fold, heads_first):
    call = random_call(choose, fold, heads_first)
    heads, frames, positions, vision = call.query.shape[1], call.frames, call.positions, call.vision
    yield diagonal.plan(empty(1, heads, frames, frames, positions), call)
    rows = choose.randint(1, 300)
    sums = Sums(
        empty(heads, positions, frames, frames).permute(0, 2, 3, 1),
        empty(heads, rows, padded(vision)),
        empty(heads, vision),
        empty(rows, dtype=torch.int64),
    )
    yield statistics.plan(sums, call, [call] * choose.choice([0, choose.randint(1, MAPS - 1)]))


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("heads_first", [True, False])
def test_a_thousand_videos_compile_few_versions(fold, heads_first):
    choose = random.Random(0)
    plans = [plan for _ in range(1000) for plan in random_plans(choose, fold, heads_first)]
    counts = {name: len(found) for name, found in compiled_variants(plans).items()}
    assert set(counts) == {"diagonal_attention_kernel", "motion_statistics_kernel"}
    assert max(counts.values()) <= 8, counts


def test_what_is_compiled_is_told_apart():
    """The count distinguishes a stride that 16 does not divide, and calls of one and of several maps."""
    choose = random.Random(0)
    call = random_call(choose, 1, True)._replace(frames=2, positions=5)
    odd = call._replace(key=empty(*call.key.shape[:3], 72, dtype=torch.bfloat16)[..., :64])
    outs = [diagonal.plan(empty(1, call.query.shape[1], 2, 2, 5), one) for one in (call, odd, call)]
    assert len(compiled_variants(outs)["diagonal_attention_kernel"]) == 2
