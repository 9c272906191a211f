"""The README's Python code: what a reader can paste runs, and every name that it imports exists."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
MISSING = [name for name in ("av", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_kernels_code_runs_as_it_stands() -> None:
    (block,) = (block for block in BLOCKS if "mekernels" in block)
    names: dict[str, torch.Tensor] = {}
    exec(block, names)
    assert names["attention"].shape == (1, 2, 256)
    score = names["query"].detach() @ names["key"].detach().transpose(-1, -2) / 8
    score = score.masked_fill(~torch.ones(512, 512, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(names["attention"].detach(), score.softmax(-1).mean(1)[:, [400, 511], :256])
    for name in ("query", "key"):
        gradient = names[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 0


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_imported_name_exists(block: str) -> None:
    compile(block, str(README), "exec")
    imports = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
    assert imports
    exec("\n".join(imports), {})
