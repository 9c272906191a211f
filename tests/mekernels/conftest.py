import os
from pathlib import Path

# Matrix products on a GPU are reproducible only with a workspace of fixed size, which cuBLAS reads once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests of the Triton kernels, which run on the GPU if there is one."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fill every new tensor with NaN, so that elements that no kernel writes are detected."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
