"""Ratios at a glance: ``python benchmarks/report.py FILE.json [OLD.json] [--plot FILE.png]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure.plot import draw
from measure.results import ResultsError, read_results
from measure.table import render


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 where a benchmark refused to report, 2 on a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python benchmarks/report.py", description=__doc__)
    parser.add_argument("file", type=Path, help="written by pytest benchmarks/ --benchmark-json=FILE")
    parser.add_argument("older", type=Path, nargs="?", help="an older file to compare with")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw cost against length")
    options = parser.parse_args(argv)
    try:
        results = read_results(options.file)
        print(render(results, read_results(options.older) if options.older else None))
        if options.plot:
            draw(results, options.plot)
            print(f"\ndrawn to {options.plot}")
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if results.refused else 0


if __name__ == "__main__":
    sys.exit(main())
