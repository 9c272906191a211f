"""``python -m mekernels.resources [part of a name] [--json | --dump DIR]``: the cost of every kernel."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from . import SHARED_LIMIT, Gate, compiled, gates, usage
from .prediction import MACHINES, everything, inner, microseconds, waves


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    head = f"{'kernel':58} {'gpu':6} {'warps':>5} {'regs':>5} {'shared':>7} {'spills':>6} {'mma':>5}"
    head += f" {'blocks':>6} {'waves':>6} {'inner loops':>14} {'MB':>7} {'µs':>7} {'bound':>8} {'share':>6}"
    lines = [head]
    for entry in report["kernels"]:
        predicted = entry["predicted"]
        share = "-" if predicted["share"] is None else f"{predicted['share']:.1%}"
        loops = "+".join(str(loop["instructions"]["total"]) for loop in inner(entry)) or "-"
        lines.append(
            f"{entry['kernel']:58} {entry['architecture']:6} {entry['warps']:5} {entry['registers']:5} "
            f"{entry['shared_bytes']:7} {entry['spills']:6} {entry['matrix_instructions']:5} "
            f"{entry['blocks_per_multiprocessor']:6} {waves(entry):>6} {loops:>14} "
            f"{entry['bytes']['total'] / 1e6:7.1f} {microseconds(predicted['bound_seconds']):>7} "
            f"{predicted['bound']:>8} {share:>6}"
        )
        lines += [f"  FAULT {fault}" for fault in entry["faults"]]
    for name, numbers in report["native"].items():
        lines.append(
            f"csrc {name:60} registers {numbers['REG']}, shared {numbers['SHARED']}, "
            f"spills {numbers['STACK'] + numbers['LOCAL']}"
        )
    machines = ", ".join(
        f"{machine.name} ({machine.processors} multiprocessors, {machine.clock / 1e9:g} GHz, "
        f"{machine.bandwidth / 1e12:g} TB/s)"
        for machine in MACHINES.values()
    )
    lines += [
        "",
        "blocks: at a time on one multiprocessor. waves: of programs. inner loops: instructions a turn.",
        "MB: minimum read and written. µs: PREDICTED time of the slowest pipe, which is the bound.",
        "share: PREDICTED share of flash attention; attention_rows: of the floor of forward and backward.",
        f"Predictions are for {machines}; --json names everything assumed.",
    ]
    return "\n".join(lines)


def native() -> dict[str, dict[str, int]]:
    """The resources of the CUDA kernels of csrc, if their library was built."""
    from ..native import library

    path = Path(library.__file__).parents[1] / "_native" / "libmek_cuda.so"
    return usage(path) if path.exists() else {}


def _meaning(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "strides": list(value.stride()), "dtype": str(value.dtype)[6:]}
    return [_meaning(item) for item in value] if isinstance(value, tuple) else value


def write(folder: Path, gate: Gate, capability: int) -> None:
    """Write a kernel's machine code, its disassembly, and how it is launched."""
    built = compiled(gate.launch, capability)
    stem = folder / f"{gate.name} sm_{capability}".replace(" ", "_").replace("/", "-")
    stem.with_name(stem.name + ".cubin").write_bytes(built.cubin)
    stem.with_name(stem.name + ".sass").write_text(built.sass, encoding="utf-8")
    launch = gate.launch
    content = {
        "kernel": gate.name,
        "function": launch.kernel.__name__,
        "architecture": f"sm_{capability}",
        "grid": list(launch.grid),
        "warps": launch.options.get("num_warps", 4),
        "options": launch.options,
        "arguments": {name: _meaning(value) for name, value in launch.arguments.items()},
        "constexpr": [item.name for item in launch.kernel.params if item.is_constexpr],
        "meaning": (launch.kernel.fn.__doc__ or "").strip(),
        "resources": built.resources._asdict(),
    }
    stem.with_name(stem.name + ".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Print or write the report."""
    parser = argparse.ArgumentParser(prog="python -m mekernels.resources", description=__doc__)
    parser.add_argument("part", nargs="*", help="only kernels whose name contains this text")
    parser.add_argument("--json", action="store_true", help="print everything as JSON; times are predictions")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write every cubin and its launch to DIR")
    options = parser.parse_args(argv)
    part = " ".join(options.part)
    if options.dump is not None:
        options.dump.mkdir(parents=True, exist_ok=True)
        for capability in SHARED_LIMIT:
            for gate in gates(capability):
                if part in gate.name:
                    write(options.dump, gate, capability)
        if not options.json:
            return
    report = everything([part]) | {"native": {} if part else native()}
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    main()
