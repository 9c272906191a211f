"""The adapters of flash-attn, xformers and torch.nn.attention: against the packages where they can run,
else against stand-ins.

A stand-in is a module of the package's name with its documented signature, layout and results, in float64.
"""

import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
from typing import NamedTuple

import pytest
import torch
import torch.nn.attention.varlen
from kernel_support import assert_error_rule, assert_exact, randn

from mekernels import BackendError, backends, flash_attention, reference
from mekernels.flash_attention import packages as flash_packages
from mekernels.flash_attention.call import Call

BACKENDS = [name for name in flash_packages.PACKAGES if name != "flex_attention"]
"""Those that need a CUDA device."""


def documented_attention(query, key, value, scale, causal, window=(-1, -1), softcap=0.0, blind=torch.inf):
    """(batch, tokens, heads, width) in and out; logsumexp (batch, heads, queries); ends aligned.

    flash-attn writes +inf as the logsumexp of a row that sees nothing.
    """
    options = {"softmax_scale": scale, "causal": causal, "window": window, "softcap": softcap}
    out, lse = reference.flash_attention(*(item.transpose(1, 2) for item in (query, key, value)), **options)
    return out.transpose(1, 2), lse.masked_fill(lse == -torch.inf, blind)


def flash_attn_2(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    return_attn_probs=False,
):
    out, lse = documented_attention(q, k, v, softmax_scale, causal, window_size, softcap)
    return (out, lse.detach(), None) if return_attn_probs else out


def flash_attn_3(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    window_size=(-1, -1),
    softcap=0.0,
    return_attn_probs=False,
):
    out, lse = documented_attention(q, k, v, softmax_scale, causal, window_size, softcap)
    return (out, lse.detach()) if return_attn_probs else out


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    score_mod=None,
    return_lse=False,
):
    """No limit is None; the logsumexp has a gradient, and is -inf where a row sees nothing."""
    assert -1 not in window_size
    window = tuple(-1 if size is None else size for size in window_size)
    out, lse = documented_attention(q, k, v, softmax_scale, causal, window, softcap, -torch.inf)
    # As results of one function: each seems to depend on all inputs.
    return out, lse + 0 * v.sum() if return_lse else None


class AuxRequest(NamedTuple):
    lse: bool = False


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """Packed sequences. Without a window torch may take cuDNN, whose logsumexp is (tokens, heads, 1)."""
    assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert return_aux.lse
    sizes = [starts.diff().tolist() for starts in (cu_seq_q, cu_seq_k, cu_seq_k)]
    assert (max(sizes[0]), max(sizes[1])) == (max_q, max_k)
    parts = [item.split(size) for item, size in zip((query, key, value), sizes, strict=True)]
    found = [
        documented_attention(*(item[None] for item in part), scale, False, window_size)
        for part in zip(*parts, strict=True)
    ]
    lse = torch.cat([lse[0] for _, lse in found], 1).detach()
    return torch.cat([out[0] for out, _ in found]), lse.T[..., None] if window_size == (-1, -1) else lse


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


@pytest.fixture(
    params=["flash_attn", "flash_attn_3", "flash_attn_3 early", "flash_attn_4", "varlen_attn", "xformers"]
)
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
    elif name == "flash_attn_4":
        install(monkeypatch, "flash_attn")
        install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_4)
    elif name == "varlen_attn":
        module = "torch.nn.attention.varlen"
        install(monkeypatch, module, varlen_attn=varlen_attn, AuxRequest=AuxRequest)
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


LIMITS = [((3, -1), 0.0), ((2, 5), 0.0), ((-1, 2), 0.0), ((4, 0), 1.5), ((-1, -1), 0.7), ((-1, -1), 0.0)]
"""Windows and soft caps."""


def limited(inputs, window, softcap, causal=False):
    """The call with these limits, and the reference's output and logsumexp."""
    options = {"causal": causal, "window": window, "softcap": softcap or None}
    call = Call(*inputs, 0.3, causal or window[1] == 0, *window, softcap)
    return call, reference.flash_attention(*inputs, softmax_scale=0.3, **options)


def assert_like_reference(found, wanted, inputs, lse_gradient):
    """Output, logsumexp and gradients; a row that sees nothing has no gradient of its logsumexp."""
    (out, lse), (exact, exact_lse) = found, wanted
    seen = exact_lse.detach() != -torch.inf
    assert torch.equal(lse.detach() != -torch.inf, seen)
    assert_exact(out.detach(), exact.detach())
    assert_exact(lse.detach()[seen], exact_lse.detach()[seen])
    weights = [randn(*out.shape, seed=3), randn(*lse.shape, seed=4) * seen]
    pairs = ((out, lse), (exact, exact_lse)) if lse_gradient else ((out,), (exact,))
    grads = [torch.autograd.grad(pair, inputs, weights[: len(pair)], retain_graph=True) for pair in pairs]
    for actual, expected in zip(*grads, strict=True):
        assert_exact(actual, expected, 1e-11)


@pytest.mark.parametrize(("window", "softcap"), LIMITS)
@pytest.mark.parametrize("keys", [9, 17])
def test_windows_and_soft_caps_of_the_stand_ins(stand_in, request, window, softcap, keys):
    inputs = [randn(2, 4, 13, 8), randn(2, 2, keys, 8, seed=1), randn(2, 2, keys, 8, seed=2)]
    inputs = [item.requires_grad_() for item in inputs]
    call, wanted = limited(inputs, window, softcap)
    name = stand_in.__name__
    lacks = {"xformers": (True, True), "varlen_attn": (False, True), "flash_attn_3 early": (True, True)}
    no_window, no_softcap = lacks.get(request.node.callspec.params["stand_in"], (False, False))
    refused = [no_window and call.slides, no_softcap and softcap > 0]
    text = "; ".join(backends.table("flash_attention")[name].reasons(call))
    assert refused == [
        bool(re.search(words, text)) for words in ("sliding windows|window_size", "soft ?caps?")
    ]
    if any(refused):
        return
    assert_like_reference(stand_in(call), wanted, inputs, name == "flash_attn_4")


def test_releases_without_an_argument_are_refused_by_name(monkeypatch):
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash_attn_3_early)
    reasons = backends.table("flash_attention")["flash_attn_3"].reasons
    inputs = [randn(1, 1, 3, 8) for _ in range(3)]
    text = "; ".join(reasons(Call(*inputs, 1.0, False, 2, -1, 3.0)))
    assert "has no argument window_size: another release" in text
    assert "has no argument softcap: another release" in text
    assert "has no argument" not in "; ".join(reasons(Call(*inputs, 1.0, True)))
    install(monkeypatch, "flash_attn")
    install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash_packages._missing.cache_clear()
    assert any("has no argument return_lse" in reason for reason in flash_packages.missing("flash_attn_4"))
    flash_packages._missing.cache_clear()


@pytest.mark.parametrize(
    ("capability", "width", "softcap", "reason"),
    [
        ((8, 0), 64, 0.0, "9.0 or later"),
        ((9, 0), 256, 2.0, None),
        ((10, 0), 256, 0.0, "above 128"),
        ((10, 0), 128, 2.0, None),
        ((12, 0), 64, 2.0, "soft caps"),
    ],
)
def test_what_flash_attn_4_needs(monkeypatch, capability, width, softcap, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = types.SimpleNamespace(
        device=types.SimpleNamespace(type="cuda"), dtype=torch.float16, shape=(1, 1, 3, width)
    )
    query.stride, query.numel = (lambda axis: 1), (lambda: 3 * width)
    reasons = backends.table("flash_attention")["flash_attn_4"].reasons(
        Call(query, query, query, 1.0, False, -1, -1, softcap)
    )
    assert [reason in found for found in reasons] == ([True] if reason else [])


def test_the_installed_torch_takes_what_the_adapters_pass(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash_packages._missing.cache_clear()
    for backend in ("varlen_attn", "flex_attention"):
        call = Call(*(randn(1, 1, 3, 8) for _ in range(3)), 1.0, False, 2)
        assert flash_packages.missing(backend) == flash_packages.no_window(backend) == ()
        assert not any("argument" in r for r in backends.table("flash_attention")[backend].reasons(call))
    given = inspect.signature(varlen_attn).parameters
    real = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert [(name, real[name].kind) for name in given] == [(name, item.kind) for name, item in given.items()]
    flash_packages._missing.cache_clear()


@pytest.mark.parametrize("own", [True, False])
def test_a_logsumexp_with_a_gradient_of_its_own_keeps_it(monkeypatch, own):
    """Any other is made differentiable, with the window and the soft cap of the call."""
    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_2)
    install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_4)
    adapter = flash_packages.flash_attn_4 if own else flash_packages.flash_attn
    choose = backends.choose
    monkeypatch.setattr(
        backends, "choose", lambda op, *call: adapter if op == "flash_attention" else choose(op, *call)
    )
    if own:
        monkeypatch.setattr(sys.modules["mekernels.flash_attention.op"], "differentiable_lse", None)
    inputs = [randn(1, 2, 7, 8, seed=seed).requires_grad_() for seed in range(3)]
    _, wanted = limited(inputs, (2, 1), 1.5)
    found = flash_attention(*inputs, softmax_scale=0.3, window=(2, 1), softcap=1.5)
    assert_like_reference(found, wanted, inputs, True)
    assert not flash_attention(*(item.detach() for item in inputs[:2]), inputs[2])[1].requires_grad


def test_flex_attention_itself():
    """More windows and caps than torch compiles anew: the numbers are tensors. auto never takes it."""
    for case in range(12):
        keys, window, softcap = 9 + case, (case, case % 3 - 1), 0.5 * case
        inputs = [randn(2, 4, 13, 8), randn(2, 2, keys, 8, seed=1), randn(2, 2, keys, 3, seed=2)]
        _, (exact, exact_lse) = limited(inputs, window, softcap)
        out, lse = flash_attention(
            *inputs, softmax_scale=0.3, window=window, softcap=softcap or None, backend="flex_attention"
        )
        assert_exact(out, exact)
        seen = exact_lse != -torch.inf
        assert torch.equal(lse != -torch.inf, seen)
        assert_exact(lse[seen], exact_lse[seen])
    names = list(backends.table("flash_attention"))
    assert names.index("flex_attention") > names.index("torch")


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_flex_attention(monkeypatch, causal):
    """Of output and logsumexp. torch has the gradient on the CPU, but lets nobody ask for it there."""
    inputs = [randn(2, 4, 13, 8), randn(2, 2, 9, 8, seed=1), randn(2, 2, 9, 8, seed=2)]
    inputs = [item.requires_grad_() for item in inputs]
    with pytest.raises(BackendError, match="has no gradient on cpu"):
        flash_attention(*inputs, backend="flex_attention")
    with torch.no_grad():
        assert flash_attention(*inputs, backend="flex_attention")[0].shape == inputs[0].shape
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    call, wanted = limited(inputs, (3, -1), 1.5, causal)
    assert_like_reference(flash_packages.flex_attention(call), wanted, inputs, True)


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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "varlen_attn"])
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
    # The same folder is flash-attn 4; this one has a function with too few arguments.
    assert "has no argument return_lse" in flash_packages.missing("flash_attn_4")[0]
    flash_packages._missing.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_package_without_what_is_called_is_a_reason(monkeypatch, backend):
    name = flash_packages.PACKAGES[backend]
    if backend != "varlen_attn":
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
    assert ("different numbers of queries and keys" in text) is (backend in ("flash_attn", "xformers"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", flash_packages.PACKAGES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [64, 77])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limits", [(None, None), ((16, -1), None), (None, 8.0)], ids=str)
def test_error_rule_of_the_package(backend, causal, queries, groups, limits):
    inputs = [
        randn(2, heads, queries, 64, seed=seed, dtype=torch.float16)
        for seed, heads in enumerate((2 * groups, 2, 2))
    ]
    if torch.cuda.is_available():
        inputs = [item.cuda() for item in inputs]
    window, softcap = limits
    call = Call(
        *(item.requires_grad_() for item in inputs), 0.125, causal, *window or (-1, -1), softcap or 0.0
    )
    reasons = backends.reasons_of(backends.table("flash_attention")[backend], call)
    if reasons:
        pytest.skip("; ".join(reasons))
    runs = []
    for name, tensors in (
        (backend, [tensor.detach().clone().requires_grad_() for tensor in inputs]),
        ("reference", [tensor.detach().double().requires_grad_() for tensor in inputs]),
        ("reference", [tensor.detach().clone().requires_grad_() for tensor in inputs]),
    ):
        options = {"causal": causal, "window": window, "softcap": softcap}
        out, lse = flash_attention(*tensors, **options, backend=name)
        weights = randn(*out.shape).to(out), randn(*lse.shape, seed=1).to(lse)
        runs.append((out.detach(), lse.detach(), *torch.autograd.grad((out, lse), tensors, weights)))
    actual, exact, plain = runs
    assert actual[1].shape == exact[1].shape
    for index, factor in enumerate((2.0, 2.0, 3.0, 3.0, 3.0)):
        assert_error_rule(actual[index], exact[index], plain[index], factor=factor)
