"""Every Triton kernel, compiled for the GPUs it is written for and judged by its machine code."""

import importlib.util
import platform

import pytest

from mekernels import resources
from mekernels.kernels import common

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="needs triton and the compiler it brings",
)

GATES = resources.gates() if importlib.util.find_spec("triton") and not common.interpreted() else []


@pytest.mark.parametrize("capability", list(resources.SHARED_LIMIT))
@pytest.mark.parametrize("gate", GATES, ids=[gate.name for gate in GATES])
def test_kernel_compiles_well(gate, capability):
    assert resources.faults(gate, capability, resources.measure(gate.launch, capability)) == []


def test_every_kernel_has_a_gate():
    assert resources.ungated() == []
    assert GATES
