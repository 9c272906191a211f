"""The registered ops under torch's own checks, and compiled."""

import pytest
import torch
from kernel_support import rand, randn
from torch.autograd import forward_ad

import mekernels
from mekernels import VideoTokens, backends, reference

VIDEO = VideoTokens(2, 2, 2, text=3)


def query_key(dtype=torch.float32, grad=False, keys=8):
    return [
        tensor.requires_grad_(grad)
        for tensor in (randn(2, 4, 8, 6, dtype=dtype), randn(2, 2, keys, 6, seed=1, dtype=dtype))
    ]


def rows_arguments(dtype, grad, index):
    rows = torch.tensor([[1, 7, -1], [0, 3, 3]])
    columns = torch.tensor([[1, 3], [0, -1]]) if index else None
    mask = torch.ones(2, 8, dtype=torch.bool) if index else None
    fold = 2 if index else 1
    return (
        *query_key(dtype, grad),
        rows,
        columns,
        mask,
        None,
        0,
        0 if index else 5,
        0.4,
        True,
        fold,
        index,
        2.0,
        randn(4, seed=2, dtype=dtype).requires_grad_(grad) if index else None,
        randn(1, 4, 1, 8, seed=3, dtype=dtype).requires_grad_(grad) if index else None,
    )


def entries_arguments(dtype, grad=False):
    query, key = query_key(dtype)
    lse = reference.attention_lse(query.double(), key.double()).to(mekernels.checks.accumulate_dtype(dtype))
    places = torch.tensor([[0, 1, -1, 3, 4, 5, 6, 7]]).expand(2, -1).contiguous()
    bias = randn(1, 4, 1, 8, seed=3, dtype=dtype)
    tensors = (*(item.requires_grad_(grad) for item in (query, key, lse)), places, bias)
    ranges = torch.tensor([[0, 8], [2, 5]] * 4, dtype=torch.int32).expand(2, -1, -1).contiguous()
    return *tensors, ranges, 0, 0, 0.4, 3, 0, 2.0


def statistics_arguments(dtype):
    query, key = randn(1, 2, 11, 6, dtype=dtype), randn(1, 2, 11, 6, seed=1, dtype=dtype)
    wide = mekernels.checks.accumulate_dtype(dtype)
    lse = reference.attention_lse(query.double(), key.double()).to(wide)
    sums = [torch.zeros(size, dtype=wide) for size in ((2, 2, 2, 4), (2, 5, 8), (2, 8))]
    return (*sums, torch.tensor([0, 2, 4, 6, 9]), query, key, lse, 2, 4, 3, 3, 0, 0.4, 1)


def cases(dtype):
    wide = mekernels.checks.accumulate_dtype(dtype)
    query, key = query_key(dtype)
    lse = reference.attention_lse(query.double(), key.double()).to(wide)
    out, total = torch.ops.mekernels.flash_attention(query, key, key, 0.4, True)
    chosen = rows_arguments(dtype, False, True)
    row_sums = torch.ops.mekernels.attention_rows(*chosen)[1:]
    maps, target = rand(2, 3, 8, dtype=dtype), rand(2, 3, 12, dtype=wide)
    mask = torch.tensor([[True, False, True], [False] * 3])
    sums = rand(2, 3, dtype=wide)
    return {
        "flash_attention": (*(t.clone().requires_grad_() for t in (query, key, key)), 0.4, True),
        "flash_attention_backward": (torch.ones_like(out), query, key, key, out, total, 0.4, True),
        "attention_rows": rows_arguments(dtype, True, True),
        "attention_rows_backward": (rand(2, 3, 2, dtype=wide), *row_sums, *chosen, True),
        "attention_columns": (*entries_arguments(dtype, True), True),
        "attention_sums": (*entries_arguments(dtype, True), True, False),
        "attention_lse": entries_arguments(dtype, True),
        "attention_row_statistics": (*entries_arguments(dtype), 1, 7, 2, 0, 1),
        "attention_entries_backward": (
            rand(2, 4, 1, 8, dtype=wide).expand(-1, -1, 8, -1),
            *entries_arguments(dtype),
        ),
        "diagonal_attention": (query, torch.cat([key, key], 1), lse, 2, 4, 0, 0, 0, 0.4, 1),
        "motion_statistics_update": statistics_arguments(dtype),
        "motion_scores": (rand(2, 3, 3, 5, dtype=dtype), *rand(2, 2, dtype=dtype)),
        "token_motion_scores": (rand(3, 8, dtype=dtype), 2),
        "resample_rows": (maps.requires_grad_(), [2, 2, 2], [3, 2, 2], True),
        "resample_rows_backward": (target, maps.detach(), sums, [2, 2, 2], [3, 2, 2], True),
        "row_l2_loss": (maps, rand(2, 3, 8, seed=1, dtype=dtype).requires_grad_(), mask),
        "row_l2_loss_backward": (wide_one(wide), maps.detach(), maps.detach(), sums, sums),
        "align_rows": (maps, rand(2, 3, 12, dtype=dtype), mask, [2, 2, 2], [3, 2, 2], True),
        "align_rows_backward": (wide_one(wide), sums, rand(2, 3, 8, dtype=wide)),
    }


def wide_one(dtype):
    return torch.ones((), dtype=dtype)


TWINS = ("", "_torch", "_native", "_triton")


@pytest.mark.parametrize("name", list(cases(torch.float32)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.mekernels, name).default, cases(dtype)[name])


def test_every_registered_op_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "mekernels::" in name
    }
    flash = {"flash_attention", "flash_attention_backward"}
    names = set(cases(torch.float32)) - flash
    assert registered == flash | {name + twin for name in names for twin in TWINS}


@pytest.mark.parametrize("name", [name for name in cases(torch.float32) if "flash" not in name])
def test_the_backend_is_no_argument(name):
    schemas = {str(getattr(torch.ops.mekernels, name + twin).default._schema) for twin in TWINS}
    assert len({schema.partition("(")[2] for schema in schemas}) == 1
    assert not any("backend" in schema or "str " in schema for schema in schemas)
    torch.library.opcheck(getattr(torch.ops.mekernels, f"{name}_torch").default, cases(torch.float32)[name])


def test_a_compiled_backward_keeps_the_backend_of_the_forward(monkeypatch):
    used = []
    original = backends.dispatch
    monkeypatch.setattr(
        backends, "dispatch", lambda op, name, *args: used.append((op, name)) or original(op, name, *args)
    )
    compiled = torch.compile(mekernels.row_l2_loss, fullgraph=True, backend="aot_eager")
    student = rand(1, 2, 8, dtype=torch.float32).requires_grad_()
    with mekernels.use_backend("torch"):
        result = compiled(student, torch.zeros(1, 2, 8))
    result.backward()
    assert used[-2:] == [("row_l2_loss", "torch"), ("row_l2_loss_backward", "torch")]


@pytest.mark.parametrize("index", [False, True])
def test_opcheck_of_slices_and_columns(index):
    torch.library.opcheck(
        torch.ops.mekernels.attention_rows.default, rows_arguments(torch.float32, True, index)
    )


def loss(query, key, rows, teacher):
    student = mekernels.attention_rows(query, key, rows, slice(0, 8), causal=True)
    student = mekernels.resample_rows(student, (2, 2, 2), (3, 2, 2))
    return mekernels.row_l2_loss(student, teacher, rows >= 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_ops_compile_in_one_graph(dynamic):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (3, 5):
        rows = torch.arange(count).expand(2, -1) - 1
        teacher = rand(2, count, 12, dtype=torch.float32)
        inputs = query_key(grad=True)
        expected = loss(*inputs, rows, teacher)
        actual = compiled(*inputs, rows, teacher)
        torch.testing.assert_close(actual, expected)
        for one, other in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(one, other)


def read(query, key, value):
    out, lse = mekernels.flash_attention(query, key, value)
    diagonal = mekernels.diagonal_attention(query, key, lse, VIDEO)
    scores = mekernels.motion_scores(diagonal[0], diagonal[0].mean((1, 2, 3)), torch.full((2,), 9.0))
    return out, scores.dfc, scores.tcs, scores.dsr


def test_reading_ops_compile_in_one_graph():
    inputs = [randn(1, 2, 11, 8, seed=seed, dtype=torch.float32) for seed in range(3)]
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs), read(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_composite_of_flash_attention_compiles():
    def attend(query, key):
        return mekernels.flash_attention(query, key, key, causal=True)[0]

    query, key = randn(1, 4, 5, 6).requires_grad_(), randn(1, 2, 9, 6).requires_grad_()
    actual = torch.compile(attend, fullgraph=True, backend="aot_eager")(query, key)
    expected = attend(query, key)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual.sum(), (query, key)),
        torch.autograd.grad(expected.sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_compiled_function_follows_use_backend():
    student, teacher = rand(1, 2, 8, dtype=torch.float32).requires_grad_(), torch.zeros(1, 2, 8)
    compiled = torch.compile(mekernels.row_l2_loss, fullgraph=True, backend="aot_eager")
    compiled(student, teacher)
    with mekernels.use_backend("triton"), pytest.raises(mekernels.BackendError, match="'triton' cannot run"):
        compiled(student, teacher)
    compiled(student, teacher).backward()
    assert student.grad.isfinite().all()


FORWARD = {
    "attention_rows": lambda x: mekernels.attention_rows(x, x, torch.tensor([[1, 2]]), slice(0, 4)),
    "flash_attention": lambda x: mekernels.flash_attention(x, x, x)[0],
    "resample_rows": lambda x: mekernels.resample_rows(x[0], (2, 2, 2), (2, 2, 1)),
    "row_l2_loss": lambda x: mekernels.row_l2_loss(x[0], x[0] + 1),
    "align_rows": lambda x: mekernels.align_rows(x[0], x[0] + 1, (2, 2, 2), (2, 2, 2)),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("op", FORWARD)
def test_forward_mode_derivatives_are_refused(op, backend, grad):
    """Where no gradient is recorded, torch would silently drop the tangents."""
    query = torch.rand(1, 2, 6, 8)
    with forward_ad.dual_level(), mekernels.use_backend(backend), torch.set_grad_enabled(grad):
        assert torch.isfinite(FORWARD[op](query)).all(), "a tensor without a tangent is taken"
        dual = forward_ad.make_dual(query, torch.rand_like(query))
        with pytest.raises(RuntimeError, match=f"mekernels.{op} does not support forward-mode derivatives"):
            FORWARD[op](dual)


READINGS = {
    "rows": lambda q, k, lse, chosen, ends: mekernels.attention_rows(q, k, chosen, chosen, cu_seqlens=ends),
    "columns": lambda q, k, lse, chosen, ends: mekernels.attention_columns(q, k, lse, chosen),
    "sums": lambda q, k, lse, chosen, ends: mekernels.attention_sums(q, k, lse, over="rows", cu_seqlens=ends),
    "lse": lambda q, k, lse, chosen, ends: mekernels.attention_lse(q, k, cu_seqlens=ends),
    "heads": lambda q, k, lse, chosen, ends: mekernels.head_statistics(q, k, lse, sinks=chosen).sink,
}


@pytest.mark.parametrize("name", list(READINGS))
def test_positions_are_not_read_on_the_meta_device_and_while_compiling(name):
    query, key = randn(1, 4, 8, 6), randn(1, 2, 8, 6, seed=1)
    arguments = (
        query,
        key,
        mekernels.attention_lse(query, key),
        torch.tensor([[5, 5, -1]]),
        torch.tensor([0, 3, 8]),
    )
    expected = READINGS[name](*arguments)
    compiled = torch.compile(READINGS[name], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), expected)
    shape = READINGS[name](*(item.to("meta") for item in arguments)).shape
    assert shape == expected.shape
