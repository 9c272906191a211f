import subprocess
import sys
import threading
from contextvars import copy_context

import pytest
import torch

import mekernels
from mekernels import BackendError, backends, use_backend
from mekernels.__main__ import report
from mekernels.flash_attention import abilities
from mekernels.native import library


@pytest.fixture
def pretend():
    """An op with two backends of which the first refuses negative input."""

    def refuse(value):
        return ["the value is negative", "and that is not allowed"] if value < 0 else []

    backends.register("pretend", "native", lambda value: ("native", value), reasons=refuse)
    backends.register("pretend", "torch", lambda value: ("torch", value))
    backends.register("hopeless", "triton", lambda value: value, machine=lambda: ["no GPU"])
    yield
    del backends._table["pretend"], backends._table["hopeless"]


def run(op, name, value):
    return backends.choose(op, name, value)(value)


def test_auto_takes_the_first_that_can(pretend):
    assert run("pretend", "auto", 1) == ("native", 1)
    assert run("pretend", "auto", -1) == ("torch", -1)
    assert run("pretend", "torch", 1) == ("torch", 1)


def test_an_explicit_backend_lists_every_reason(pretend):
    with pytest.raises(BackendError) as caught:
        run("pretend", "native", -1)
    assert str(caught.value) == (
        "backend 'native' cannot run mekernels.pretend:\n"
        "  - the value is negative\n  - and that is not allowed"
    )
    with pytest.raises(BackendError, match="no such implementation, only native, torch and reference"):
        run("pretend", "triton", 1)


def test_auto_lists_the_reasons_of_all(pretend):
    with pytest.raises(BackendError, match=r"'auto' cannot run mekernels\.hopeless:\n  - triton: no GPU"):
        run("hopeless", "auto", 1)


def test_use_backend_nests_and_restores():
    assert backends.active() == "auto"
    with use_backend("torch"):
        with use_backend("reference"):
            assert backends.active() == "reference"
        assert backends.active() == "torch"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert backends.active() == "torch"
    assert backends.active() == "auto"


def test_unknown_backends_are_refused_at_once():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'reference', .* got 'cuda'"):
        use_backend("cuda")


def test_use_backend_belongs_to_one_thread():
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backends.active()))
        thread.start()
        thread.join()
        copied = copy_context()
    assert seen == ["auto"]
    assert copied.run(backends.active) == "torch"


def test_the_table_of_attention_backends_says_what_they_do():
    found = abilities.missing()
    assert set(found) == set(backends.table("flash_attention"))
    assert not any(found["torch"].values())
    assert any("grouped-query heads" in reason for reason in found["cudnn"]["grouped heads"])
    assert any("needs float16" in reason for reason in found["flash"]["float32"])
    lines = {line.split()[0]: line for line in abilities.report() if line.strip()}
    for name, gradient in (("cpu_flash", "ours"), ("torch", "ours"), ("flex_attention", "own")):
        cells = iter(lines[name].split()[1:])
        for ability, shape in abilities.ABILITIES.items():
            try:
                options = {
                    "causal": shape.causal,
                    "window": (shape.left, -1),
                    "softcap": shape.softcap or None,
                }
                mekernels.flash_attention(*shape.call()[:3], **options, backend=name)
                able = "yes"
            except BackendError:
                able = "no"
            assert next(cells) == able, (name, ability)
        assert next(cells) == gradient
    assert all(line in report() for line in abilities.report())


def test_reference_is_used_for_every_op(monkeypatch):
    called = []
    for name in (
        "flash_attention",
        "attention_rows",
        "diagonal_attention",
        "motion_scores",
        "token_motion_scores",
        "resample_rows",
        "row_l2_loss",
    ):
        original = getattr(mekernels.reference, name)

        def spy(*args, name=name, original=original, **options):
            called.append(name)
            return original(*args, **options)

        monkeypatch.setattr(mekernels.reference, name, spy)
    video = mekernels.VideoTokens(2, 1, 2, text=1)
    query = torch.randn(1, 2, 5, 4)
    with use_backend("reference"):
        _, lse = mekernels.flash_attention(query, query, query)
        mekernels.attention_rows(query, query, torch.tensor([[0]]), slice(1, 5))
        diagonal = mekernels.diagonal_attention(query, query, lse, video)[0]
        mekernels.motion_scores(diagonal, torch.ones(2), torch.ones(2))
        mekernels.token_motion_scores(torch.ones(1, 4), video)
        mekernels.resample_rows(torch.ones(1, 1, 4), (2, 1, 2), (1, 1, 2))
        mekernels.row_l2_loss(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    assert sorted(called) == sorted(set(called))
    assert len(called) == 7


@pytest.mark.parametrize("name", ["native", "triton"])
def test_explicit_backends_never_fall_back(name):
    with use_backend(name), pytest.raises(BackendError, match=f"backend '{name}' cannot run"):
        mekernels.token_motion_scores(torch.ones(1, 4, dtype=torch.float64), mekernels.VideoTokens(2, 1, 2))


def test_backward_keeps_the_backend_of_the_forward(monkeypatch):
    used = []
    original = backends.dispatch
    monkeypatch.setattr(
        backends, "dispatch", lambda op, name, *args: used.append((op, name)) or original(op, name, *args)
    )
    student = torch.ones(1, 1, 4, requires_grad=True)
    with use_backend("torch"):
        loss = mekernels.row_l2_loss(student, torch.zeros(1, 1, 4))
    loss.backward()
    assert used == [("row_l2_loss", "torch"), ("row_l2_loss_backward", "torch")]


def test_a_missing_native_library_has_a_reason(monkeypatch):
    monkeypatch.setattr(library, "_cpu", lambda: "cannot be loaded: gone")
    monkeypatch.setattr(library, "_cuda", lambda: "cannot be loaded: gone, too")
    assert library.machine() == [
        "cpu library: cannot be loaded: gone",
        "cuda library: cannot be loaded: gone, too",
    ]
    inputs = torch.rand(2, 3, 3, 4), torch.rand(2), torch.full((2,), 99.0)
    with use_backend("native"), pytest.raises(BackendError, match="cannot be loaded: gone"):
        mekernels.motion_scores(*inputs)
    assert mekernels.motion_scores(*inputs).dfc.shape == (2,)


def test_report_names_every_op_backend_and_variable():
    text = report()
    for op in backends.ops():
        assert f"\n  {op}\n" in text
    for variable in backends.ENVIRONMENT:
        assert f"{variable}=" in text
    for word in ("mekernels", "python", "torch", "triton", "Devices", "reference: yes"):
        assert word in text
    if not torch.cuda.is_available():
        assert "flash: no: no CUDA device" in text


def test_command_prints_the_report():
    result = subprocess.run([sys.executable, "-m", "mekernels"], capture_output=True, text=True, check=True)
    assert "Backends of each op" in result.stdout
