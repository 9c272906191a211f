"""The adapters of flash-attn and xformers: against the packages where they can run, else against stand-ins.

A stand-in is a module of the package's name with its documented signature, layout and results, in float64.
"""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from kernel_support import assert_error_rule, assert_exact, randn

from mekernels import BackendError, backends, flash_attention, reference
from mekernels.flash_attention import packages as flash_packages
from mekernels.flash_attention.call import Call

BACKENDS = list(flash_packages.PACKAGES)


def documented_attention(query, key, value, scale, causal):
    """(batch, tokens, heads, width) in and out; logsumexp (batch, heads, queries); ends aligned.

    flash-attn writes +inf as the logsumexp of a row that sees nothing.
    """
    out, lse = reference.flash_attention(
        *(item.transpose(1, 2) for item in (query, key, value)), softmax_scale=scale, causal=causal
    )
    return out.transpose(1, 2), lse.masked_fill(lse == -torch.inf, torch.inf)


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False
):
    out, lse = documented_attention(q, k, v, softmax_scale, causal)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(q, k, v, softmax_scale=None, causal=False, qv=None, return_attn_probs=False):
    out, lse = documented_attention(q, k, v, softmax_scale, causal)
    return (out, lse) if return_attn_probs else out


def flash_attn_3_early(q, k, v, softmax_scale=None, causal=False):
    return documented_attention(q, k, v, softmax_scale, causal)


class LowerTriangularMask:
    pass


def xformers_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert not torch.is_grad_enabled()
    out, lse = documented_attention(query, key, value, scale, isinstance(attn_bias, LowerTriangularMask))
    padding = lse.new_full((*lse.shape[:2], -lse.shape[2] % 32), torch.inf)
    return out, torch.cat([lse, padding], 2)


def xformers_backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert lse.shape[2] % 32 == 0, "the padded logsumexp must come back"
    with torch.enable_grad():
        inputs = [item.detach().requires_grad_() for item in (query, key, value)]
        out, _ = documented_attention(*inputs, scale, isinstance(attn_bias, LowerTriangularMask))
        return torch.autograd.grad(out, inputs, grad)


def install(monkeypatch, name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(params=["flash_attn", "flash_attn_3", "flash_attn_3 early", "xformers"])
def stand_in(request, monkeypatch):
    name = request.param
    if name == "flash_attn":
        install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_2)
    elif name == "xformers":
        fmha = types.SimpleNamespace(
            memory_efficient_attention_forward_requires_grad=xformers_forward,
            memory_efficient_attention_backward=xformers_backward,
        )
        ops = install(monkeypatch, "xformers.ops", fmha=fmha, LowerTriangularMask=LowerTriangularMask)
        install(monkeypatch, "xformers", ops=ops)
    else:
        function = flash_attn_3 if name == "flash_attn_3" else flash_attn_3_early
        install(monkeypatch, "flash_attn_interface", flash_attn_func=function)
    return getattr(flash_packages, name.split()[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_adapter_on_a_stand_in_for_the_package(stand_in, causal, groups):
    inputs = [randn(2, 2 * groups, 37, 8), randn(2, 2, 37, 8, seed=1), randn(2, 2, 37, 8, seed=2)]
    inputs = [item.requires_grad_() for item in inputs]
    out, lse = stand_in(Call(*inputs, 0.3, causal))
    exact, exact_lse = reference.flash_attention(*inputs, softmax_scale=0.3, causal=causal)
    assert_exact(out, exact)
    assert_exact(lse.detach(), exact_lse.detach())
    weights = randn(*out.shape, seed=3)
    wanted = torch.autograd.grad(exact, inputs, weights)
    for actual, expected in zip(torch.autograd.grad(out, inputs, weights), wanted, strict=True):
        assert_exact(actual, expected, 1e-11)


@pytest.mark.parametrize("keys", [53, 20])
def test_causal_masks_of_flash_attn_end_together(stand_in, keys):
    """If there are more queries than keys, the surplus rows see no key."""
    if stand_in is flash_packages.xformers:
        pytest.skip("its mask aligns the starts, and is refused")
    inputs = [randn(2, 2, 37, 8), randn(2, 2, keys, 8, seed=1), randn(2, 2, keys, 8, seed=2)]
    inputs = [item.requires_grad_() for item in inputs]
    out, lse = stand_in(Call(*inputs, 0.3, True))
    exact, exact_lse = reference.flash_attention(*inputs, softmax_scale=0.3, causal=True)
    assert_exact(out, exact)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    assert_exact(lse.detach()[:, :, max(0, 37 - keys) :], exact_lse.detach()[:, :, max(0, 37 - keys) :])
    weights = randn(*out.shape, seed=3)
    wanted = torch.autograd.grad(exact, inputs, weights)
    for actual, expected in zip(torch.autograd.grad(out, inputs, weights), wanted, strict=True):
        assert_exact(actual, expected, 1e-11)


@pytest.mark.parametrize(
    ("version", "allowed"),
    [
        ("2.0.9", False),
        ("2.1.0", True),
        ("2.1.2.post3", True),
        ("2.10", True),
        ("1.0.9", False),
        (None, False),
    ],
)
def test_causal_lengths_may_differ_from_flash_attn_2_1_on(monkeypatch, version, allowed):
    members = {} if version is None else {"__version__": version}
    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_2, **members)
    reasons = backends.table("flash_attention")["flash_attn"].reasons
    call = [randn(1, 1, 3, 8), randn(1, 1, 4, 8), randn(1, 1, 4, 8), 1.0]
    text = "; ".join(reasons(Call(*call, True)))
    assert ("needs flash-attn 2.1 or later" in text) is not allowed
    assert ("different numbers of queries and keys" in text) is not allowed
    assert "lengths" not in "; ".join(reasons(Call(*call, False)))


def test_an_error_inside_flash_attn_3_is_not_taken_for_an_early_release(monkeypatch):
    def broken(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        raise TypeError("query has a wrong type")

    install(monkeypatch, "flash_attn_interface", flash_attn_func=broken)
    with pytest.raises(TypeError, match="wrong type"):
        flash_packages.flash_attn_3(Call(*(randn(1, 1, 3, 8) for _ in range(3)), 1.0, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_is_the_reason(backend):
    name = flash_packages.PACKAGES[backend].partition(".")[0]
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(BackendError, match=f"the package {name} is not installed"):
        flash_attention(*(randn(1, 1, 3, 8) for _ in range(3)), backend=backend)


def test_a_package_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(flash_packages.PACKAGES, "flash_attn", "mekernels.no_such_module")
    flash_packages._missing.cache_clear()
    (reason,) = flash_packages.missing("flash_attn")
    assert reason.startswith("importing mekernels.no_such_module failed")
    flash_packages._missing.cache_clear()


def test_a_namespace_package_is_not_the_package(monkeypatch, tmp_path):
    """flash-attn 4 installs flash_attn/cute and no flash_attn/__init__.py."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("def flash_attn_func(): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        flash_packages._missing.cache_clear()
        (reason,) = flash_packages.missing("flash_attn")
        assert reason.startswith("the package flash_attn is not installed")
        assert str(tmp_path) in reason
        assert "flash-attn 4" in reason
    flash_packages._missing.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_package_without_what_is_called_is_a_reason(monkeypatch, backend):
    name = flash_packages.PACKAGES[backend]
    install(monkeypatch, name.partition(".")[0])
    install(monkeypatch, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash_packages._missing.cache_clear()
    reasons = flash_packages.missing(backend)
    assert reasons
    assert all(reason.startswith(f"{name} has no ") for reason in reasons)
    flash_packages._missing.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_looking_for_a_package_breaks_no_graph(backend):
    def count(tensor):
        return tensor + len(backends.table("flash_attention")[backend].machine())

    flash_packages._missing.cache_clear()
    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.zeros(2)), count(torch.zeros(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reasons_of_a_call(backend):
    reasons = backends.table("flash_attention")[backend].reasons
    wide = [randn(1, 1, 3, 264) for _ in range(3)]
    text = "; ".join(reasons(Call(*wide, 1.0, False)))
    for part in ("runs on cuda", "needs float16 or bfloat16", "width 264 is above 256"):
        assert part in text
    text = "; ".join(reasons(Call(randn(1, 1, 3, 8), *randn(2, 1, 1, 4, 8), 1.0, True)))
    assert ("different numbers of queries and keys" in text) is (backend != "flash_attn_3")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [64, 77])
@pytest.mark.parametrize("groups", [1, 2])
def test_error_rule_of_the_package(backend, causal, queries, groups):
    inputs = [
        randn(2, heads, queries, 64, seed=seed, dtype=torch.float16)
        for seed, heads in enumerate((2 * groups, 2, 2))
    ]
    if torch.cuda.is_available():
        inputs = [item.cuda() for item in inputs]
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
    for index, factor in enumerate((2.0, 2.0, 3.0, 3.0, 3.0)):
        assert_error_rule(actual[index], exact[index], plain[index], factor=factor)
