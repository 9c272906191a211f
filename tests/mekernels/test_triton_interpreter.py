"""Runs the tests of the Triton kernels under triton's interpreter, where there is no GPU to run them on."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mekernels import launch as common

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_triton_*.py") if path.name != Path(__file__).name)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(not common.machine(), reason="the tests of the kernels run by themselves")
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout[-2000:]
