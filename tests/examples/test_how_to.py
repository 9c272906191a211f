"""The how-to's code runs, from the first block to the last."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "attention_rows.md").read_text()


def test_its_code_runs():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/attention_rows.md", "exec"), names)
    assert names["query"].grad.abs().sum() > 0


def test_the_scripts_that_it_names_are_there():
    scripts = set(re.findall(r"`(examples/\S+?\.py)`", TEXT))
    assert len(scripts) == 3
    for script in scripts:
        assert (ROOT / script).is_file()
