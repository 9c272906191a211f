"""Every Triton kernel, compiled for the GPUs it is written for and judged by its machine code."""

import importlib.util
import platform
import re

import ceilings
import pytest

from mekernels import launch as common
from mekernels import resources
from mekernels.resources import prediction

COMPILES = (
    importlib.util.find_spec("triton") is not None
    and platform.machine() == "x86_64"
    and not common.interpreted()
)
pytestmark = pytest.mark.skipif(not COMPILES, reason="needs triton, its compiler and not its interpreter")

GATES = resources.gates() if COMPILES else []


@pytest.fixture(scope="module")
def entries():
    """The report of every kernel on every architecture, compiled on two cores."""
    report = prediction.everything()
    return {(entry["kernel"], entry["architecture"]): entry for entry in report["kernels"]}


@pytest.fixture(scope="module")
def ceiling():
    import triton

    found = ceilings.read()
    if ceilings.version(triton.__version__) not in found:
        pytest.skip(f"no ceilings for triton {triton.__version__}; ceilings.py says how to add them")
    return found[ceilings.version(triton.__version__)]


@pytest.mark.parametrize("capability", list(resources.SHARED_LIMIT))
@pytest.mark.parametrize("gate", GATES, ids=[gate.name for gate in GATES])
def test_kernel_compiles_well(gate, capability, entries):
    entry = entries[gate.name, f"sm_{capability}"]
    wrong = entry["faults"]
    import triton

    known = ceilings.read().get(ceilings.version(triton.__version__), {}).get(ceilings.key(entry))
    if known and entry["spills"] <= (known["spills"] or 0):
        wrong = [fault for fault in wrong if "spills registers" not in fault]
    assert wrong == []


@pytest.mark.parametrize("capability", list(resources.SHARED_LIMIT))
@pytest.mark.parametrize("gate", GATES, ids=[gate.name for gate in GATES])
def test_kernel_costs_no_more_than_before(gate, capability, entries, ceiling):
    entry = entries[gate.name, f"sm_{capability}"]
    assert ceilings.key(entry) in ceiling, "a kernel without a ceiling; ceilings.py says how to add it"
    assert ceilings.above(ceilings.numbers(entry), ceiling[ceilings.key(entry)]) == []


def test_no_ceiling_is_of_a_kernel_that_is_gone(entries, ceiling):
    assert set(ceiling) == {ceilings.key(entry) for entry in entries.values()}


def test_every_kernel_has_a_gate():
    assert resources.ungated() == []
    assert GATES


@pytest.fixture
def gate():
    return next(gate for gate in GATES if gate.name.startswith("motion_statistics") and gate.matrix_shaped)


def test_a_kernel_that_spills_is_caught(gate):
    starved = gate.launch._replace(options=gate.launch.options | {"maxnreg": 32})
    (fault,) = resources.faults(gate, 80, resources.measure(starved, 80))
    assert "spills registers" in fault


def test_a_product_without_matrix_instructions_is_caught():
    exact = next(
        gate for gate in GATES if gate.name.startswith("motion_statistics") and "float32" in gate.name
    )
    (fault,) = resources.faults(exact._replace(matrix_shaped=True), 90, resources.measure(exact.launch, 90))
    assert "has no matrix instruction" in fault


@pytest.mark.parametrize(("capability", "limit"), [(80, 163), (90, 227)])
def test_too_much_shared_memory_is_caught(gate, capability, limit):
    found = resources.measure(gate.launch, capability)
    assert resources.faults(gate, capability, found._replace(shared=limit * 1024)) == []
    assert "shared memory" in resources.faults(gate, capability, found._replace(shared=limit * 1024 + 1))[0]


def test_a_kernel_without_a_gate_is_caught(monkeypatch):
    module = importlib.import_module("mekernels.motion_statistics.plan")
    monkeypatch.setattr(module, "gates", list)
    assert "mekernels.motion_statistics.triton.motion_statistics_kernel" in resources.ungated()


@pytest.mark.parametrize("name", ["diagonal_attention", "motion_statistics"])
def test_offsets_have_64_bits_where_a_model_is_large(name, monkeypatch):
    """90,000 tokens of 48 heads: all offsets but those into the list of rows are 64-bit."""
    monkeypatch.setattr(common, "SHAPES", {"large": common.Shape(48, 128, 25, 3600, 300)})
    for gate in importlib.import_module(f"mekernels.{name}.plan").gates():
        if " large" not in gate.name:
            continue
        values = gate.launch.arguments.values()
        tuples = [item for value in values if isinstance(value, tuple) for item in value]
        wide = [item for item in tuples if isinstance(item, int)]
        assert max(gate.launch.arguments["key"].numel(), *wide) > 2**29
        code = resources.compile_for(gate.launch, 90).asm["ttir"]
        offsets = re.findall(r"tt\.addptr .* : (\S+), (\S+) loc", code)
        assert len(offsets) >= 10
        narrow = {pointer for pointer, offset in offsets if "i64" not in offset}
        assert all("ptr<i64>" in pointer for pointer in narrow), narrow
