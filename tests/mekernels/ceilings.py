"""The maximum cost of each compiled kernel, and the comparison of a report with it.

``python -m mekernels.resources --json > REPORT.json`` writes a report, ``python tests/mekernels/ceilings.py
REPORT.json`` prints every difference to ``ceilings.json``, increases first. ``--write`` replaces the numbers
of the report's version of Triton. No new kernel may spill; a kernel that spills at present may not spill
more, and ``--write`` never raises this ceiling.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("ceilings.json")
FIELDS = ("inner_loops", "executed", "registers", "spills", "shared_bytes")
"""Instructions x warps of all innermost loops, and of the whole launch in thousands (null where the length of
a loop depends on data); registers a thread; spills; bytes of shared memory."""
Numbers = dict[str, float | None]


def version(triton: str) -> str:
    """The part of Triton's version that compiled code depends on, such as ``3.6``."""
    return ".".join(triton.split(".")[:2])


def key(entry: dict[str, Any]) -> str:
    """Kernel, shape and architecture."""
    return f"{entry['kernel']} {entry['architecture']}"


def numbers(entry: dict[str, Any]) -> Numbers:
    """The numbers of one kernel in a report."""
    from mekernels.resources.prediction import inner

    executed = entry["warp_instructions"]
    return {
        "inner_loops": sum(loop["instructions_times_warps"] for loop in inner(entry)),
        "executed": None if executed is None else round(executed / 1000),
        **{name: entry[name] for name in FIELDS[2:]},
    }


def read() -> dict[str, dict[str, Numbers]]:
    """All ceilings, by version of Triton and kernel."""
    found = json.loads(PATH.read_text(encoding="utf-8"))
    return {
        triton: {name: dict(zip(FIELDS, values, strict=True)) for name, values in kernels.items()}
        for triton, kernels in found.items()
    }


def write(ceilings: dict[str, dict[str, Numbers]]) -> None:
    """Write one line for each kernel."""
    parts = []
    for triton, kernels in sorted(ceilings.items()):
        lines = [
            f"    {json.dumps(name)}: {json.dumps(list(value.values()))}" for name, value in kernels.items()
        ]
        parts.append(f"  {json.dumps(triton)}: {{\n" + ",\n".join(lines) + "\n  }")
    PATH.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def above(found: Numbers, ceiling: Numbers) -> list[str]:
    """The costs that are above their ceilings."""
    wrong = []
    for name in FIELDS:
        value, most = found[name], ceiling[name]
        if most is not None and (value is None or value > most):
            wrong.append(f"{name} {value}, at most {most}")
    return wrong


def _spills(found: Numbers) -> float:
    return found["spills"] or 0


def main(argv: list[str] | None = None) -> int:
    """Print what changed; 1 where something grew or is new."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="written by python -m mekernels.resources --json")
    parser.add_argument("--write", action="store_true", help="make the report's numbers the ceilings")
    options = parser.parse_args(argv)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    ceilings, triton = (read() if PATH.exists() else {}), version(report["triton"])
    before, now = ceilings.get(triton, {}), {key(entry): numbers(entry) for entry in report["kernels"]}
    grown = 0
    for name, found in now.items():
        wrong = above(found, before[name]) if name in before else ["new"]
        grown += bool(wrong)
        if wrong:
            print(f"ABOVE {name}: {'; '.join(wrong)}")
    for name, found in now.items():
        if name in before and found != before[name] and not above(found, before[name]):
            less = [f"{field} {before[name][field]} -> {found[field]}" for field in FIELDS]
            print(f"less  {name}: {'; '.join(less)}")
    for name in before.keys() - now.keys():
        print(f"gone  {name}")
    if options.write:
        spilled = [
            name
            for name in now
            if name in before and (now[name]["spills"] or 0) > (before[name]["spills"] or 0)
        ]
        if spilled:
            print(f"not written, these spill more than before: {', '.join(spilled)}", file=sys.stderr)
            return 1
        write({**ceilings, triton: now})
    return int(bool(grown) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
