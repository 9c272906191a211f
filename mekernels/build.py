"""``python -m mekernels.build``: rebuild the native libraries of a checkout in place."""

from __future__ import annotations

import argparse
import shutil
import sys

from .native.build import ROOT, BuildError, build


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mekernels.build", description="Rebuild the native libraries."
    )
    parser.add_argument("--clean", action="store_true", help="delete earlier objects first")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every command")
    options = parser.parse_args(arguments)
    if options.clean:
        shutil.rmtree(ROOT / "build" / "mekernels", ignore_errors=True)
    try:
        report = build(verbose=options.verbose)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if report["cpu"]["built"] else 1


if __name__ == "__main__":
    sys.exit(main())
