import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, randn, strided

import mekernels
from mekernels import BackendError, backends, flash_attention, reference
from mekernels.flash_attention import composite, packages
from mekernels.flash_attention import kernels as module
from mekernels.flash_attention.call import Call

CPU_BACKENDS = ["cpu_flash", "torch"]


def case(
    seed=0, batch=2, heads=2, groups=2, queries=7, keys=7, width=8, value_width=None, dtype=torch.float64
):
    query = randn(batch, heads * groups, queries, width, seed=seed, dtype=dtype)
    key = randn(batch, heads, keys, width, seed=seed + 1, dtype=dtype)
    value = randn(batch, heads, keys, value_width or width, seed=seed + 2, dtype=dtype)
    return query, key, value


def gradients(result, inputs, seed=0):
    weights = randn(*result.shape, seed=seed).to(result.dtype)
    return torch.autograd.grad(result, inputs, weights)


@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    width=st.integers(1, 20),
    causal=st.booleans(),
    value_width=st.sampled_from([None, 3]),
)
def test_auto_against_the_reference(seed, batch, heads, groups, queries, keys, width, causal, value_width):
    inputs = case(seed, batch, heads, groups, queries, keys, width, value_width)
    inputs = [strided(tensor).requires_grad_() for tensor in inputs]
    out, lse = flash_attention(*inputs, causal=causal, softmax_scale=0.4)
    exact_out, exact_lse = reference.flash_attention(*inputs, causal=causal, softmax_scale=0.4)
    assert_exact(out, exact_out)
    seen = exact_lse != -math.inf
    assert torch.equal(lse != -math.inf, seen)
    assert_exact(lse[seen], exact_lse[seen])
    if seen.all():
        for actual, expected in zip(gradients(out, inputs), gradients(exact_out, inputs), strict=True):
            assert_exact(actual, expected, 1e-11)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_rule(backend, causal, dtype, seed):
    inputs = case(seed, queries=45, keys=45, width=32, dtype=dtype)
    runs = []
    for options, tensors in (
        ({"backend": backend}, [tensor.clone().requires_grad_() for tensor in inputs]),
        ({"backend": "reference"}, [tensor.double().requires_grad_() for tensor in inputs]),
        ({"backend": "reference"}, [tensor.clone().requires_grad_() for tensor in inputs]),
    ):
        out, lse = flash_attention(*tensors, causal=causal, **options)
        runs.append((out.detach(), *gradients(out, tensors, seed), lse))
    actual, exact, plain = runs
    assert actual[-1].dtype == torch.float32
    # The low-precision CPU kernel scores its logsumexp with a short exponential.
    assert_error_rule(actual[-1], exact[-1], plain[-1], rounding=dtype)
    assert_error_rule(actual[0], exact[0], plain[0])
    for index in range(1, 4):
        assert_error_rule(actual[index], exact[index], plain[index], factor=3.0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_logsumexp_is_the_natural_logarithm(backend):
    query, key, value = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8)
    _, lse = flash_attention(query, key, value, backend=backend)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), math.log(5)))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_logsumexp_and_output_together(backend, causal):
    inputs = [tensor.requires_grad_() for tensor in case(width=8)]
    found = []
    for name in (backend, "reference"):
        out, lse = flash_attention(*inputs, causal=causal, softmax_scale=0.4, backend=name)
        weights = randn(*out.shape, seed=5), randn(*lse.shape, seed=6)
        found.append(torch.autograd.grad((out, lse), inputs, weights))
        alone = torch.autograd.grad(flash_attention(*inputs, backend=name)[1], inputs[:2], weights[1])
        found[-1] += alone
    for actual, expected in zip(*found, strict=True):
        assert_exact(actual, expected, 1e-11)


def test_gradcheck_of_the_logsumexp():
    query, key, value = case(queries=5, keys=3, width=2)
    inputs = query.requires_grad_(), key.requires_grad_()
    # Two rows see nothing and have no logsumexp to differentiate.
    assert torch.autograd.gradcheck(
        lambda *pair: flash_attention(*pair, value, causal=True)[1][:, :, 2:], inputs
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_rule_of_the_gradient_of_logsumexp(dtype):
    inputs = case(3, queries=45, keys=45, width=32, dtype=dtype)
    runs = []
    for options, tensors in (
        ({}, [tensor.clone().requires_grad_() for tensor in inputs]),
        ({"backend": "reference"}, [tensor.double().requires_grad_() for tensor in inputs]),
        ({"backend": "reference"}, [tensor.clone().requires_grad_() for tensor in inputs]),
    ):
        _, lse = flash_attention(*tensors, causal=True, **options)
        runs.append(gradients(lse, tensors[:2]))
    for actual, exact, plain in zip(*runs, strict=True):
        assert_error_rule(actual, exact, plain, factor=3.0)


def test_logsumexp_needs_no_gradient_where_none_is_wanted():
    query, key, value = case()
    assert not flash_attention(query, key, value.requires_grad_())[1].requires_grad
    with torch.no_grad():
        assert not flash_attention(query.requires_grad_(), key, value)[1].requires_grad


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_expanded_and_sliced_inputs(backend):
    query = randn(1, 1, 9, 16).expand(2, 4, -1, -1)[..., 4:12]
    key, value = (randn(2, 9, 2, 8, seed=seed).transpose(1, 2) for seed in (1, 2))
    out, lse = flash_attention(query, key, value, backend=backend)
    exact = reference.flash_attention(query, key, value)
    assert_exact(out, exact[0])
    assert_exact(lse, exact[1])


def test_chunks_do_not_show(monkeypatch):
    """Sums over rows of another block are added in another order: equal up to rounding, not bit for bit."""
    inputs = [tensor.requires_grad_() for tensor in case(queries=11, keys=5)]
    whole, lse = flash_attention(*inputs, causal=True, backend="torch")
    wanted = gradients(whole, inputs)
    monkeypatch.setattr(composite, "CHUNK_ELEMENTS", 12)
    parts, parts_lse = flash_attention(*inputs, causal=True, backend="torch")
    assert_exact(parts, whole)
    seen = lse != -math.inf
    assert torch.equal(parts_lse != -math.inf, seen)
    assert_exact(parts_lse[seen], lse[seen])
    for actual, expected in zip(gradients(parts, inputs), wanted, strict=True):
        assert_exact(actual, expected)


def test_gradcheck_of_the_composite():
    inputs = [tensor.requires_grad_() for tensor in case(queries=5, keys=3, width=2, value_width=3)]
    assert torch.autograd.gradcheck(lambda *t: flash_attention(*t, causal=True, backend="torch")[0], inputs)


@pytest.mark.parametrize(
    ("window", "softcap", "causal"), [((3, -1), None, True), ((2, 1), 1.5, False), ((-1, 0), 0.7, False)]
)
def test_windows_and_soft_caps(monkeypatch, window, softcap, causal):
    """Of the composite, in blocks of two rows, with the gradients of output and logsumexp."""
    monkeypatch.setattr(composite, "CHUNK_ELEMENTS", 18)
    inputs = [tensor.requires_grad_() for tensor in case(queries=11, keys=9)]
    options = {"softmax_scale": 0.4, "causal": causal, "window": window, "softcap": softcap}
    runs = []
    for backend in ("auto", "reference"):
        out, lse = flash_attention(*inputs, **options, backend=backend)
        seen = lse.detach() != -math.inf
        weights = randn(*out.shape, seed=5), randn(*lse.shape, seed=6) * seen
        grads = torch.autograd.grad((out, lse), inputs, weights)
        runs.append((out.detach(), lse.detach()[seen], seen.double(), *grads))
    for actual, expected in zip(*runs, strict=True):
        assert_exact(actual, expected, 1e-11)


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_key_mask(backend, softcap):
    """Holes, no hidden key, and no visible key; with the gradients of output and logsumexp."""
    if backend == "cpu_flash" and softcap is not None:
        pytest.skip("cpu_flash has no soft cap")
    inputs = [tensor.requires_grad_() for tensor in case(batch=4, queries=5, keys=9)]
    key_mask = torch.ones(4, 9, dtype=torch.bool)
    key_mask[0, [0, 3, 8]], key_mask[1, 4:], key_mask[2] = False, False, False
    options = {"softmax_scale": 0.4, "key_mask": key_mask, "softcap": softcap}
    runs = []
    for name in (backend, "reference"):
        out, lse = flash_attention(*inputs, **options, backend=name)
        seen = lse.detach() != -math.inf
        weights = randn(*out.shape, seed=5), randn(*lse.shape, seed=6) * seen
        grads = torch.autograd.grad((out, lse), inputs, weights)
        runs.append((out.detach(), lse.detach()[seen], seen.double(), *grads))
    assert runs[0][2].reshape(4, -1).mean(1).tolist() == [1, 1, 0, 1]
    for actual, expected in zip(*runs, strict=True):
        assert_exact(actual, expected, 1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_key_mask_in_lower_precision(dtype):
    inputs = case(batch=2, queries=13, keys=17, width=16, dtype=dtype)
    key_mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    exact = reference.flash_attention(*(tensor.double() for tensor in inputs), key_mask=key_mask)
    plain = reference.flash_attention(*inputs, key_mask=key_mask)
    for ours, theirs, right in zip(flash_attention(*inputs, key_mask=key_mask), plain, exact, strict=True):
        assert_error_rule(ours, theirs, right)


def test_hidden_keys_may_be_non_finite_and_a_batch_empty():
    query, key, value = case()
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[:, 5:] = False
    expected = flash_attention(query, key[:, :, :5], value[:, :, :5])
    key[:, :, 5:], value[:, :, 5:] = math.nan, math.inf
    for actual, right in zip(flash_attention(query, key, value, key_mask=key_mask), expected, strict=True):
        assert_exact(actual, right, 1e-12)
    out, lse = flash_attention(query[:0], key[:0], value[:0], key_mask=key_mask[:0])
    assert out.shape == (0, 4, 7, 8)
    assert lse.shape == (0, 4, 7)


def test_a_window_without_keys_to_the_right_is_the_causal_mask():
    inputs = case()
    for actual, expected in zip(
        flash_attention(*inputs, window=(-1, 0), backend="cpu_flash"),
        flash_attention(*inputs, causal=True, backend="cpu_flash"),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_a_row_that_sees_nothing_is_zero():
    inputs = [tensor.requires_grad_() for tensor in case(queries=9, keys=4)]
    out, lse = flash_attention(*inputs, causal=True)
    assert (out[:, :, :5] == 0).all()
    assert (lse[:, :, :5] == -math.inf).all()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_empty(queries, keys):
    query, key, value = case(queries=queries, keys=keys)
    out, lse = flash_attention(query, key, value)
    assert out.shape == (2, 4, queries, 8)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_huge_logits(backend):
    query, key, value = (tensor * 300 for tensor in case(dtype=torch.float32))
    out, lse = flash_attention(query, key, value, backend=backend)
    exact = reference.flash_attention(query.double(), key.double(), value.double())
    plain = reference.flash_attention(query, key, value)
    assert_error_rule(out, exact[0], plain[0])
    assert_error_rule(lse, exact[1], plain[1])


def test_an_explicit_backend_lists_every_reason():
    query, key, value = case(queries=3, keys=4, value_width=5)
    with pytest.raises(BackendError) as caught:
        flash_attention(query, key, value, causal=True, backend="cpu_flash")
    text = str(caught.value)
    assert "value width 5 differs from query width 8" in text
    assert "causal attention with different numbers of queries and keys" in text
    assert flash_attention(query, key, value, causal=True)[0].shape == (2, 4, 3, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient"])
def test_cuda_backends_say_that_there_is_no_device(backend):
    with pytest.raises(BackendError, match=f"'{backend}' cannot run .*\n  - no CUDA device"):
        flash_attention(*case(), backend=backend)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient"])
def test_cuda_backends_refuse_what_they_cannot(backend):
    reasons = backends.table("flash_attention")[backend].reasons(
        Call(*case(width=7, value_width=7), 1.0, False)
    )
    assert any("runs on cuda" in reason for reason in reasons)
    assert (backend == "efficient") != any("needs float16 or bfloat16" in reason for reason in reasons)


def test_use_backend_holds_where_none_is_given():
    inputs = case()
    with mekernels.use_backend("native"), pytest.raises(BackendError, match="no such implementation"):
        flash_attention(*inputs)
    with mekernels.use_backend("native"):
        flash_attention(*inputs, backend="torch")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"value": torch.zeros(2, 2, 6, 8, dtype=torch.float64)},
            ValueError,
            r"value must have shape \(2, 2, 7",
        ),
        ({"value": torch.zeros(2, 2, 7, 8)}, TypeError, "value must have the dtype of query"),
        ({"value": None}, TypeError, "value must be a torch.Tensor, got NoneType"),
        (
            {"key": torch.zeros(2, 3, 7, 8, dtype=torch.float64)},
            ValueError,
            "key must have a number of heads",
        ),
        ({"backend": "fast"}, ValueError, "backend must be one of 'auto', 'reference', 'cpu_flash'"),
        ({"causal": "yes"}, TypeError, "causal must be a bool, got str"),
        ({"window": (-2, 0)}, ValueError, "window must hold -1"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and above 0"),
        (
            {"key_mask": torch.ones(2, 7)},
            TypeError,
            "key_mask must be a bool torch.Tensor, got torch.float32",
        ),
        ({"key_mask": torch.ones(2, 6) > 0}, ValueError, r"key_mask must have shape \(2, 7\)"),
        ({"key_mask": torch.ones(2, 7) > 0, "causal": True}, ValueError, "cannot be combined with causal"),
        ({"key_mask": torch.ones(2, 7) > 0, "window": (1, 1)}, ValueError, "cannot be combined with window"),
    ],
)
def test_bad_arguments(change, error, message):
    query, key, value = case()
    with pytest.raises(error, match=message):
        flash_attention(**({"query": query, "key": key, "value": value} | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [64, 77])
@pytest.mark.parametrize("groups", [1, 2])
def test_cuda_error_rule(backend, causal, queries, groups):
    inputs = [
        t.cuda() for t in case(groups=groups, queries=queries, keys=queries, width=64, dtype=torch.float16)
    ]
    reasons = backends.reasons_of(backends.table("flash_attention")[backend], Call(*inputs, 0.125, causal))
    if reasons:
        pytest.skip("; ".join(reasons))
    runs = []
    for name, tensors in (
        (backend, [tensor.clone().requires_grad_() for tensor in inputs]),
        ("reference", [tensor.double().requires_grad_() for tensor in inputs]),
        ("reference", [tensor.clone().requires_grad_() for tensor in inputs]),
    ):
        out, lse = flash_attention(*tensors, causal=causal, backend=name)
        weights = randn(*out.shape).to(out)
        runs.append((out.detach(), lse, *torch.autograd.grad(out, tensors, weights)))
    actual, exact, plain = runs
    assert actual[1].shape == exact[1].shape
    assert_error_rule(actual[0], exact[0], plain[0])
    assert_error_rule(actual[1], exact[1], plain[1])
    for index in range(2, 5):
        assert_error_rule(actual[index], exact[index], plain[index], factor=3.0)


@pytest.mark.parametrize(
    ("capability", "version", "flash_attn_3", "cudnn", "expected"),
    [
        ((9, 0), 91500, ["missing"], [], True),
        ((8, 0), 91500, ["missing"], [], False),
        ((9, 0), 91400, ["missing"], [], False),
        ((9, 0), None, ["missing"], [], False),
        ((9, 0), 91500, [], [], False),
        ((9, 0), 91500, ["missing"], ["width 256 is above 128"], False),
    ],
)
def test_cudnn_comes_first_on_hopper(monkeypatch, capability, version, flash_attn_3, cudnn, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    known = {"flash_attn_3": flash_attn_3, "cudnn": cudnn}
    monkeypatch.setattr(backends, "table", lambda op: {name: name for name in known})
    monkeypatch.setattr(backends, "reasons_of", lambda name, *args: known[name])
    query = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    assert module.prefers_cudnn(Call(query, query, query, 1.0, False)) == expected


def test_cudnn_is_no_matter_on_the_cpu():
    assert not module.prefers_cudnn(Call(*case(), 1.0, False))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scales_that_are_not_positive(scale, causal):
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))[:, :1]
    query, key, value = (t[None] if t.ndim == 3 else t for t in (query, key, value))
    out, lse = mekernels.flash_attention(query, key, value, softmax_scale=scale, causal=causal)
    scores = (query.double() @ key.double().transpose(-1, -2)) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ value.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_backend_does_not_round_its_maps(dtype):
    query, key, value = (
        torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(i)) * 4 for i in range(3)
    )
    half = [t.to(dtype) for t in (query, key, value)]
    with mekernels.use_backend("reference"):
        out, lse = mekernels.flash_attention(*half)
    wide = [t.double() for t in half]
    scores = wide[0] @ wide[1].transpose(-1, -2) * 0.25
    assert out.dtype == dtype
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        out.double(), scores.softmax(-1) @ wide[2], rtol=1e-2, atol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    ("queries", "heads", "window", "options"),
    [
        (77, 4, (16, -1), {"BACKEND": "TRITON"}),
        (64, 4, (16, -1), None),
        (77, 2, (16, -1), None),
        (77, 4, (-1, -1), None),
    ],
)
def test_flex_attention_of_few_queries_has_a_kernel(monkeypatch, queries, heads, window, options):
    """torch 2.11 finds none on a GPU if the queries of two heads exceed the 128 rows of a mask's block."""
    passed = {}

    def recorded(*tensors, **arguments):
        passed.update(arguments)
        return tensors[0], types.SimpleNamespace(lse=tensors[0][..., 0])

    monkeypatch.setattr(packages, "_flex", lambda device: recorded)
    query, key = torch.zeros(2, heads, queries, 8), torch.zeros(2, 2, queries, 8)
    with torch.no_grad():
        flash_attention(query, key, key, window=window, backend="flex_attention")
    assert passed["kernel_options"] == options
