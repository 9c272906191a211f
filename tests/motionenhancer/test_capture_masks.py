"""The mask argument of each attention implementation, against the map that the mask describes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from students_support import (
    eager_attention,
    gradients,
    make_batch,
    pick,
    random_rows,
    sharp_student,
)
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mekernels
from mekernels.attention_rows import composite
from mekernels.attention_rows.composite import layer_attention_rows
from motionenhancer.students import capture_attention
from motionenhancer.students.keys import AttentionCall, VisibleKeys, implementation_name, read_mask


def rows_of(visible: VisibleKeys, rows: torch.Tensor, length: int) -> torch.Tensor:
    """(B, H, R, N): which keys the rows see."""
    if visible.explicit is not None:
        explicit = visible.explicit
        return explicit if explicit.dtype == torch.bool else explicit > torch.finfo(explicit.dtype).min / 2
    position = torch.arange(length)
    allowed = torch.ones(*rows.shape, length, dtype=torch.bool)
    if visible.causal:
        allowed &= position <= rows[..., None]
    if visible.key_mask is not None:
        allowed &= visible.key_mask[:, None]
    if visible.key_range is not None:
        allowed &= (position >= visible.key_range[..., :1]) & (position < visible.key_range[..., 1:])
    return allowed[:, None]


def call(mask: Any, rows: torch.Tensor, length: int, **kwargs: Any) -> AttentionCall:
    return AttentionCall(torch.nn.Identity(), mask, kwargs, rows, heads=2, length=length, keys=length)


@st.composite
def padded(draw: Any) -> tuple[int, torch.Tensor, torch.Tensor]:
    """A length, a (B, N) mask of real tokens, on one side or anywhere, and rows."""
    length = draw(st.integers(2, 9))
    counts = draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    side = draw(st.sampled_from(["left", "right", "within"]))
    mask = torch.zeros(len(counts), length, dtype=torch.bool)
    for row, count in zip(mask, counts, strict=True):
        row[slice(length - count, None) if side == "left" else slice(count)] = True
        if side == "within":
            row[:] = row[torch.tensor(draw(st.permutations(range(length))))]
    rows = [[draw(st.integers(0, length - 1)) for _ in range(3)] for _ in counts]
    return length, mask, torch.tensor(rows)


@settings(max_examples=40, deadline=None)
@given(padded(), st.sampled_from(["sdpa", "eager"]), st.sampled_from(["bool", "float"]))
def test_dense_padding_masks_need_no_explicit_rows(case: Any, implementation: str, kind: str) -> None:
    length, padding, rows = case
    dense = (torch.ones(length, length, dtype=torch.bool).tril() & padding[:, None])[:, None]
    expected = torch.stack([d[0, r] for d, r in zip(dense, rows, strict=True)])[:, None]
    mask = dense if kind == "bool" else torch.zeros(dense.shape).masked_fill(~dense, float("-inf"))
    visible = read_mask(implementation, call(mask, rows, length))
    assert visible.explicit is None
    assert torch.equal(rows_of(visible, rows, length), expected)


@settings(max_examples=40, deadline=None)
@given(padded(), st.booleans(), st.one_of(st.none(), st.integers(1, 10)))
def test_flash_padding_and_windows(case: Any, causal: bool, window: int | None) -> None:
    """Flash attention takes the padding out first, so a window counts real tokens."""
    length, padding, rows = case
    given_mask = None if bool(padding.all()) else padding.long()
    options = {"is_causal": causal, "sliding_window": window}
    visible = read_mask("flash_attention_2", call(given_mask, rows, length, **options))
    for sample, (real, chosen) in enumerate(zip(padding, rows, strict=True)):
        tokens = real.nonzero()[:, 0].tolist()
        for i, row in enumerate(chosen.tolist()):
            if row not in tokens:
                continue
            at = tokens.index(row)
            expected = torch.zeros(length, dtype=torch.bool)
            for j, token in enumerate(tokens):
                near = window is None or length <= window or abs(at - j) < window
                expected[token] = near and (j <= at or not causal)
            assert visible.explicit is None
            assert torch.equal(rows_of(visible, rows, length)[sample, 0, i], expected)


@pytest.mark.parametrize("given_as", ["lengths", "positions"])
@pytest.mark.parametrize("window", [None, 3])
def test_flash_packing(given_as: str, window: int | None) -> None:
    lengths, rows = [4, 1, 6], torch.tensor([[0, 3, 4, 5, 10, 8]])
    total = sum(lengths)
    options: dict[str, Any] = {"sliding_window": window}
    if given_as == "lengths":
        starts = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
        options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
    else:
        options["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    visible = read_mask("flash_attention_2", call(None, rows, total, **options))
    dense = torch.block_diag(*[torch.ones(n, n).tril(0) for n in lengths]).bool()
    if window is not None:
        dense &= torch.ones(total, total).triu(1 - window).bool()
    assert visible.explicit is None
    assert torch.equal(rows_of(visible, rows, total)[0, 0], dense[rows[0]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 4])
def test_queries_after_keys_of_a_cache(implementation: str, window: int | None, queries: int) -> None:
    length, padding = 9, torch.ones(2, 9, dtype=torch.bool)
    padding[0, :2] = False
    own = torch.tensor([[0, queries - 1, 0], [queries - 1, queries // 2, -1]])
    rows = own + (length - queries)
    position = torch.arange(length)
    seen = (position <= position[:, None]) & (position > position[:, None] - (window or length))
    dense = (seen & padding[:, None])[:, None]
    options: dict[str, Any] = {"sliding_window": window}
    if implementation == "flash_attention_2":
        mask: Any = padding
    elif implementation == "flex_attention":

        def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
            return dense[b, 0, q + (length - queries), k]

        mask = create_block_mask(mask_mod, B=2, H=None, Q_LEN=queries, KV_LEN=length, device="cpu")
    else:
        mask = dense[:, :, length - queries :]
    case = AttentionCall(torch.nn.Identity(), mask, options, own, heads=2, length=queries, keys=length)
    visible = read_mask(implementation, case)
    for sample in range(2):
        real = own[sample] >= 0
        found = rows_of(visible, rows, length)[sample, 0][real]
        assert torch.equal(found, dense[sample, 0][rows[sample]][real])


@pytest.mark.parametrize("window", [None, 3])
def test_flash_reads_no_packing_after_keys_of_a_cache(window: int | None) -> None:
    """Positions that go on where the cache ends are those of one sequence."""
    own = torch.tensor([[0, 3, 2]])
    options = {"sliding_window": window, "position_ids": torch.arange(5, 9)[None]}
    case = AttentionCall(torch.nn.Identity(), None, options, own, heads=2, length=4, keys=9)
    position, rows = torch.arange(9), own + 5
    expected = (position <= rows[0][:, None]) & (position > rows[0][:, None] - (window or 9))
    assert torch.equal(rows_of(read_mask("flash_attention_2", case), rows, 9)[0, 0], expected)


def test_without_a_mask_queries_of_an_empty_static_cache_come_first() -> None:
    rows = torch.tensor([[0, 2, -1]])
    visible = read_mask("sdpa", AttentionCall(torch.nn.Identity(), None, {}, rows, heads=2, length=3, keys=8))
    expected = torch.arange(8) <= rows[0][:, None]
    assert torch.equal(rows_of(visible, rows, 8)[0, 0], expected)


def test_flash_refuses_what_it_cannot_read() -> None:
    rows = torch.tensor([[1]])
    with pytest.raises(ValueError, match=r"must be \(1, 5\), got \(1, 4\)"):
        read_mask("flash_attention_2", call(torch.ones(1, 4), rows, 5))
    starts, others = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 5])
    options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": others, "max_length_q": 3, "max_length_k": 3}
    with pytest.raises(ValueError, match="must equal cu_seq_lens_k"):
        read_mask("flash_attention_2", call(None, rows, 5, **options))


def test_a_bias_is_more_than_which_keys_are_seen() -> None:
    """A bias is kept as a mask also if it hides the same keys as a causal mask."""
    rows = torch.tensor([[1, 4]])
    bias = torch.randn(1, 1, 5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    visible = read_mask("eager", call(bias, rows, 5))
    assert visible.explicit is not None
    assert torch.equal(visible.explicit[0, 0], bias[0, 0, rows[0]])


def test_dense_refuses_other_shapes() -> None:
    rows = torch.tensor([[1]])
    for shape in ((1, 5, 5), (1, 1, 4, 5), (1, 1, 5, 4), (2, 1, 5, 5), (1, 3, 5, 5)):
        with pytest.raises(ValueError, match="attention_mask must"):
            read_mask("sdpa", call(torch.ones(shape, dtype=torch.bool), rows, 5))


@pytest.mark.parametrize("seed", [0, 1])
def test_flex_block_masks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, padding = 130, torch.ones(2, 130, dtype=torch.bool)
    padding[0, :17] = padding[1, 100:] = False
    documents = torch.randint(3, (2, length), generator=generator).sort().values
    rows = torch.randint(length, (2, 7), generator=generator)

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & padding[b, k]

    def packed(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (documents[b, q] == documents[b, k])

    def scattered(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & ((q - k) % 3 != 1)

    for mask_mod, explicit in ((causal, False), (packed, False), (scattered, True)):
        block = create_block_mask(mask_mod, B=2, H=None, Q_LEN=length, KV_LEN=length, device="cpu")
        visible = read_mask("flex_attention", call(block, rows, length))
        assert (visible.explicit is not None) == explicit
        b, k = torch.arange(2)[:, None, None], torch.arange(length)[None, None]
        expected = mask_mod(b, 0, rows[..., None], k).expand(2, 7, length)
        assert torch.equal(rows_of(visible, rows, length)[:, 0], expected)
    with pytest.raises(ValueError, match="BlockMask"):
        read_mask("flex_attention", call(SimpleNamespace(), rows, length))


def flash_stand_in(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """Flash attention's treatment of a (B, N) mask, in plain torch."""
    repeat = query.shape[1] // key.shape[1]
    allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()[None]
    allowed = allowed if mask is None else allowed & mask.bool()[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeat, 1),
        value.repeat_interleave(repeat, 1),
        attn_mask=(allowed | torch.eye(query.shape[2], dtype=torch.bool))[:, None],
        scale=options["scaling"],
    )
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def registered(name: str, function: Any) -> Iterator[None]:
    """Register an attention function and its masks as transformers does a kernel of the Hub."""
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    entries = (function, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    before = [registry._global_mapping.get(name) for registry in registries]
    for registry, entry in zip(registries, entries, strict=True):
        registry.register(name, entry)
    try:
        yield
    finally:
        for registry, entry in zip(registries, before, strict=True):
            registry._global_mapping.pop(name)
            if entry is not None:
                registry.register(name, entry)


KERNELS = [
    "kernels-community/flash-attn2",
    "kernels-community/vllm-flash-attn3",
    "kernels-community/flash-attn4@main",
    "kernels-community/flash-attn3 @ v1 : flash_attn_varlen_func",
    "kernels-community/flash-attn2:flash_attn_func",
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("prefix", ["", "paged|"])
def test_kernels_from_the_hub_are_flash_attention(name: str, prefix: str) -> None:
    assert implementation_name(prefix + name, flash_stand_in) == "flash_attention_2"


def test_any_kernel_inside_transformers_own_function_is_flash_attention() -> None:
    assert implementation_name("somebody/fast-attn@v3", flash_attention_forward) == "flash_attention_2"
    for name in ("flash_attention_3", "flash_attention_4", "sdpa", "flex_attention"):
        assert implementation_name(name, flash_stand_in) == name
        assert implementation_name(f"paged|{name}", flash_stand_in) == name
    for name in ("somebody/flash-attn2", "kernels-community/other:fn", "paged|eager_paged", "my_attention"):
        assert implementation_name(name, flash_stand_in) == name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["flash_attention_2", KERNELS[1], KERNELS[3]])
def test_model_under_flash_attention(side: str, name: str) -> None:
    """The kernel is a stand-in; registry, masks and capture are those of flash attention."""
    model, processor = sharp_student(layers=2, dtype=torch.float64)
    batch, _ = make_batch(processor, side=side, dtype=torch.float64)
    rows, columns = random_rows(batch, 5)
    expected, out = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum() + out.loss)
    model.config.text_config._attn_implementation_internal = name
    with registered(name, flash_stand_in), capture_attention(model, rows, columns) as captured:
        out = model(**batch)
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    found = gradients(model, captured.attention.square().sum() + out.loss)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13 * largest)


def flex_stand_in(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """Flex attention's treatment of a block mask, in plain torch; its own kernel has no gradient on a CPU."""
    repeat, length = query.shape[1] // key.shape[1], query.shape[2]
    b, n = torch.arange(len(query)), torch.arange(length)
    allowed = mask.mask_mod(b[:, None, None], torch.zeros((), dtype=torch.int64), n[:, None], n)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeat, 1),
        value.repeat_interleave(repeat, 1),
        attn_mask=(allowed | torch.eye(length, dtype=torch.bool))[:, None],
        scale=options["scaling"],
    )
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("side", ["left", "right"])
def test_model_under_flex_attention(side: str, capture_pending: None) -> None:
    """The kernel is a stand-in; registry, block masks and capture are those of flex attention."""
    model, processor = sharp_student(layers=3, dtype=torch.float64)
    batch, _ = make_batch(processor, side=side, dtype=torch.float64)
    rows, columns = random_rows(batch, 5)
    expected, out = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum() + out.loss)
    model.config.text_config._attn_implementation_internal = "flex_attention"
    ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_stand_in
    try:
        # transformers compiles the making of block masks: torch 2.14 cannot with ATEN_CPU_CAPABILITY=default
        with (
            torch.compiler.set_stance("force_eager"),
            capture_attention(model, rows, columns) as captured,
        ):
            out = model(**batch)
    finally:
        del ALL_ATTENTION_FUNCTIONS["flex_attention"]
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    found = gradients(model, captured.attention.square().sum() + out.loss)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13 * largest)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_rows_against_the_whole_map(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, groups, width, n, d = 2, 2, 1 + seed, 9, 6
    heads = groups * width
    query = torch.randn(batch, heads, n, d, dtype=torch.float64, generator=generator, requires_grad=True)
    key = torch.randn(batch, groups, n, d, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = torch.randint(-1, n, (batch, 4), generator=generator)
    columns = torch.randint(-1, n, (batch, 5), generator=generator)
    mask = torch.rand(batch, heads if seed % 2 else 1, 4, n, generator=generator) < 0.6
    mask[0, :, 0] = False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    if kind == "float":
        bias = bias + torch.randn(mask.shape, dtype=torch.float64, generator=generator)

    def whole(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        keys = key.repeat_interleave(width, 1)
        chosen = torch.stack([q[:, r.clamp(min=0)] for q, r in zip(query, rows, strict=True)])
        maps = (chosen @ keys.transpose(-1, -2) * 0.3 + bias).softmax(-1).nan_to_num(0.0).mean(1)
        every = torch.arange(4).masked_fill(rows < 0, -1)
        return pick(maps, every, columns)

    def read(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        given = mask if kind == "bool" else bias
        return layer_attention_rows([query], [key], rows, columns, mask=given, softmax_scale=0.3)

    torch.testing.assert_close(read(query, key), whole(query, key))
    assert torch.autograd.gradcheck(read, (query, key), fast_mode=True)


@pytest.mark.parametrize("room", [1, 30, 200, 1 << 18])
@pytest.mark.parametrize("heads_apart", [False, True])
def test_layers_together_are_the_layers_apart(
    monkeypatch: pytest.MonkeyPatch, room: int, heads_apart: bool
) -> None:
    """With any chunk size; some keys are seen by no row, and one row sees no key."""
    monkeypatch.setattr(composite, "CHUNK_ELEMENTS", room)
    generator = torch.Generator().manual_seed(room)
    batch, groups, width, n, d, layers = 2, 2, 2, 9, 4, 3
    heads = groups * width

    def drawn(count: int) -> list[torch.Tensor]:
        shape = (batch, n, count, d)
        made = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(layers)]
        return [tensor.transpose(1, 2).requires_grad_() for tensor in made]

    queries, keys = drawn(heads), drawn(groups)
    rows = torch.tensor([[3, 3, -1], [8, 0, 5]])
    mask = torch.rand(batch, heads if heads_apart else 1, 3, n, generator=generator) < 0.6
    mask[..., 0], mask[..., 7:] = False, False
    mask[1, :, 1] = False

    def whole(*tensors: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for query, key in zip(tensors[:layers], tensors[layers:], strict=True):
            chosen = torch.stack([q[:, r.clamp(min=0)] for q, r in zip(query, rows, strict=True)])
            scores = chosen @ key.repeat_interleave(width, 1).transpose(-1, -2) * d**-0.5
            scores = scores.masked_fill(~mask, float("-inf"))
            total = total + scores.softmax(-1).nan_to_num(0.0).mean(1) * (rows >= 0)[..., None]
        return total

    def read(*tensors: torch.Tensor) -> torch.Tensor:
        return layer_attention_rows(tensors[:layers], tensors[layers:], rows, mask=mask)

    given = (*queries, *keys)
    torch.testing.assert_close(read(*given), whole(*given))
    weight = torch.randn(batch, 3, n, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad((read(*given) * weight).sum(), given)
    expected = torch.autograd.grad((whole(*given) * weight).sum(), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad(read(*given).square().sum(), queries[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_rows_that_are_all_padding(capture_pending: None) -> None:
    model, processor = sharp_student(layers=3, dtype=torch.float64)
    batch, _ = make_batch(processor, dtype=torch.float64)
    with capture_attention(model, torch.full((2, 3), -1), slice(0, 5)) as captured:
        out = model(**batch)
    assert captured.attention.shape == (2, 3, 5)
    assert not captured.attention.any()
    plain = gradients(model, model(**batch).loss)
    for name, gradient in gradients(model, captured.attention.sum() + out.loss).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.fixture(params=[1, 1 << 21], ids=["one by one", "together"])
def capture_pending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are read one by one, or together."""
    monkeypatch.setattr("motionenhancer.students.entries.PENDING_NUMBERS", request.param)


def test_masked_rows_agree_with_the_kernel() -> None:
    query, key = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    rows, columns = torch.tensor([[3, 11], [0, -1]]), slice(2, 9)
    mask = (torch.arange(12) <= rows[..., None])[:, None]
    found = layer_attention_rows([query], [key], rows, columns, mask=mask)
    torch.testing.assert_close(found, mekernels.attention_rows(query, key, rows, columns, causal=True))
