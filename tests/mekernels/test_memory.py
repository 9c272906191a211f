"""No composite makes a tensor the size of an attention map."""

import pytest
import torch
from kernel_support import rand, randn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mekernels
from mekernels import VideoTokens, backends
from mekernels.attention_entries import composite as entries_composite
from mekernels.attention_entries.call import Call as EntriesCall
from mekernels.attention_entries.call import Diagonals
from mekernels.attention_rows import composite as rows_composite
from mekernels.attention_rows.call import Call
from mekernels.diagonal_attention.call import Call as SideCall
from mekernels.flash_attention import composite as flash_attention
from mekernels.motion_statistics import composite as statistics_update
from mekernels.motion_statistics import statistics as motion_statistics
from mekernels.motion_statistics.sums import Sums

VIDEO = VideoTokens(8, 16, 16, text=16)
HEADS, WIDTH = 2, 8
MAP = VIDEO.vision**2


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage any op below autograd hands out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.largest = max(self.largest, size)
        return result


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (rows_composite, entries_composite, flash_attention, motion_statistics, statistics_update):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", MAP // 64)


def largest(function, *args):
    with torch.no_grad(), LargestTensor() as mode:
        function(*args)
    return mode.largest


def query_key(heads=HEADS, fold=1):
    length = VIDEO.length
    return [randn(1, heads, fold * length, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1)]


def run(op, *args):
    return backends.table(op)["torch"].run(*args)


def test_the_mode_sees_a_map():
    query, key = query_key()
    assert largest(lambda: query @ key.mT) == HEADS * VIDEO.length**2
    assert largest(mekernels.reference.attention_map, query, key) >= MAP


@pytest.mark.parametrize("fold", [1, 2])
def test_statistics(fold):
    query, key = query_key()[0], query_key(fold=fold)[1]
    lse = torch.full(query.shape[:3], 10.0)
    statistics = mekernels.MotionStatistics(VIDEO, HEADS, text_rows=[1, 2], sampled_rows=16)
    statistics.update(query, key[:, :, : VIDEO.length], lse)
    sums = Sums(**{name: statistics._sums[name] for name in Sums._fields})
    bound = HEADS * VIDEO.vision * (VIDEO.frames + 2 + 16)
    assert bound < MAP
    call = SideCall.of(query, key, lse, VIDEO, 0.3, fold)
    assert largest(run, "motion_statistics_update", sums, call) <= bound
    assert largest(statistics.scores) <= bound
    assert largest(statistics.text_attention, [0, 1]) <= bound


def test_sums_are_as_promised():
    statistics = mekernels.MotionStatistics(VIDEO, HEADS, text_rows=[1, 2], sampled_rows=16)
    statistics.update(*query_key(), torch.full((1, HEADS, VIDEO.length), 10.0))
    held = sum(tensor.numel() for tensor in statistics.state_dict().values())
    assert held == HEADS * VIDEO.vision * (VIDEO.frames + 2 + 16 + 1) + 1


def test_diagonal_attention():
    query, key = query_key()
    lse = torch.full(query.shape[:3], 10.0)
    bound = HEADS * VIDEO.vision * max(VIDEO.frames, WIDTH) * 2
    call = SideCall.of(query, key, lse, VIDEO, 0.3, 1)
    assert largest(run, "diagonal_attention", call) <= bound < MAP


@pytest.mark.parametrize("mean", [False, True])
def test_attention_rows_forward_and_backward(mean):
    query, key = query_key(heads=4)[0], query_key()[1]
    rows, columns = torch.arange(12)[None], torch.arange(20)[None]
    call = Call(query, key, rows, columns, None, None, 0, 0, 0.3, True, 1, mean)
    bound = 4 * 12 * VIDEO.length
    bound = max(bound, query.numel())
    assert bound < MAP
    assert largest(run, "attention_rows", call) <= bound
    out, *row_sums = run("attention_rows", call)
    grad = rand(*out.shape, dtype=torch.float32)
    assert largest(run, "attention_rows_backward", grad, *row_sums, call, False) <= bound


def test_all_rows_of_a_few_columns_are_swept():
    query, key = query_key()
    rows = torch.arange(VIDEO.length)[None]
    call = Call(query, key, rows, None, None, None, 0, 3, 0.3, False, 1, True)
    assert largest(run, "attention_rows", call) <= MAP // 32
    out, *row_sums = run("attention_rows", call)
    grad = rand(*out.shape, dtype=torch.float32)
    assert largest(run, "attention_rows_backward", grad, *row_sums, call, False) <= MAP // 32
    biased = call._replace(bias=torch.zeros(1, 1, 1, VIDEO.length))
    assert largest(run, "attention_rows_backward", grad, *row_sums, biased, True) <= MAP // 32


@pytest.mark.parametrize("tokens", [256, 512, 1024])
def test_readings_of_a_whole_map_take_memory_as_tokens_not_as_the_map(tokens, monkeypatch):
    """With every option that changes scores, forward and backward."""
    chunk = 1 << 12
    for module in (rows_composite, entries_composite):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    query, key = (randn(1, HEADS, tokens, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    bias, lse = torch.zeros(1, HEADS, 1, tokens), torch.full((1, HEADS, tokens), 10.0)
    bound = max(chunk, HEADS * tokens * WIDTH)
    assert HEADS * bound <= HEADS * tokens**2 / 8
    ranges = torch.tensor([0, tokens], dtype=torch.int32).expand(1, tokens, 2)
    call = EntriesCall(query, key, lse, None, bias, ranges, 0, 0, 0.3, tokens // 2, 0, 3.0)
    diagonals = Diagonals(0, tokens, 16, 1)
    assert largest(run, "attention_row_statistics", call, diagonals, 1) <= bound
    few = call._replace(key=key[:, :, :4], bias=bias[..., :4])
    assert largest(run, "attention_columns", few, False) <= bound
    for over_rows in (False, True):
        assert largest(run, "attention_sums", call, over_rows, False) <= bound
        given = lse[:, :, None] if over_rows else lse[..., None]
        assert largest(run, "attention_entries_backward", given.expand(call.map_shape), call) <= bound
    rows = torch.arange(tokens)[None]
    whole = Call(query, key, rows, None, None, None, 0, 1, 0.3, True, 1, True, 3.0, None, bias)
    # A bias per head is added for all heads at once.
    assert largest(run, "attention_rows", whole) <= HEADS * bound


def test_flash_attention():
    query, key = query_key()
    forward = flash_attention.flash_attention_op._init_fn
    options = 0.3, True, 9, -1, 2.0
    assert largest(forward, query, key, key, *options) <= MAP // 32
    out, lse = forward(query, key, key, *options)
    backward = flash_attention.flash_attention_backward_op._init_fn
    assert largest(backward, out, query, key, key, out, lse, *options) <= MAP // 32


def test_rows_save_little_for_the_backward():
    query, key = (tensor.requires_grad_() for tensor in query_key())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mekernels.attention_rows(query, key, torch.arange(12)[None], slice(16, None))
    extra = [t for t in saved if t.data_ptr() not in (query.data_ptr(), key.data_ptr())]
    assert sum(t.numel() for t in extra) <= 12 + 2 * HEADS * 12
