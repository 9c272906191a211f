"""The how-tos' code runs, from the first block to the last."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "attention_rows.md").read_text()


@pytest.mark.parametrize(("page", "count"), [("attention_rows.md", 5), ("attention_readings.md", 12)])
def test_its_code_runs(page, count):
    names = {}
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)
    assert names["query"].grad.abs().sum() > 0


def test_the_scripts_that_it_names_are_there():
    scripts = set(re.findall(r"`(examples/\S+?\.py)`", TEXT))
    assert len(scripts) == 3
    for script in scripts:
        assert (ROOT / script).is_file()
