"""Every figure in docs/performance.md is in a committed results file."""

import re
from pathlib import Path

import pytest
from measure.results import read_results
from measure.table import render

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- report of (\S+) -->\n```\n(.*?)\n```\n", PAGE, flags=re.DOTALL)


def test_there_are_reports():
    assert BLOCKS
    assert len(BLOCKS) == PAGE.count("<!-- report of")


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_reports_are_those_of_their_files(name, block):
    assert name.startswith("benchmarks/results/")
    assert block == render(read_results(ROOT / name))


def test_no_figures_besides():
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"\d\s*(?:ms|µs|GiB|MiB|TFLOP|TB/s|times faster|%)(?!\w)", prose)


def test_outputs_are_those_of_their_files():
    blocks = re.findall(r"<!-- output of (\S+) -->\n```\n(.*?)```\n", PAGE, flags=re.DOTALL)
    assert len(blocks) == PAGE.count("<!-- output of") > 0
    for name, block in blocks:
        assert name.startswith("benchmarks/results/")
        assert block == (ROOT / name).read_text(encoding="utf-8")
