import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fill every fresh tensor with NaN, so that an element no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
