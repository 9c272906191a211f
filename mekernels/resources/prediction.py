"""The cost of a kernel on a GPU, predicted from its machine code. Nothing here is measured.

The time of each pipe is the number of its instructions over all warps of a launch, divided by the number that
all multiprocessors issue in a cycle (:mod:`mekernels.resources.turns` gives how often each runs). The time of
the memory is the minimum number of bytes that must be moved, divided by the bandwidth. The largest of these
times is the bound. Waiting for memory, barriers, bank conflicts and a last, partly filled wave come on top.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import TARGETS
from . import Gate, compiled, faults, gates, sass
from .turns import Region, Turns


class Machine(NamedTuple):
    """Assumptions about a GPU."""

    name: str
    processors: int
    """Multiprocessors."""
    clock: float
    """Cycles per second."""
    bandwidth: float
    """Bytes per second between memory and multiprocessors."""
    products: int
    """Half-precision multiply-adds per cycle of one multiprocessor."""
    mma_share: float
    """Share of ``products`` that HMMA reaches; HGMMA is assumed to reach all."""
    flash: float
    """Operations per second of half-precision flash attention; a multiply-add is two operations."""
    shared: int
    """Bytes of shared memory of one multiprocessor. Each block needs 1 KiB more than it asks for."""


MACHINES = {
    80: Machine("A100 80GB", TARGETS[80].processors, 1.41e9, 1.8e12, 1024, 1.0, 200e12, 164 << 10),
    90: Machine("H100 SXM", TARGETS[90].processors, 1.755e9, 3.0e12, 2048, 0.62, 490e12, 228 << 10),
}
RATES = {"issue": 4.0, "fp32": 4.0, "fp64": 2.0, "integer": 2.0, "mufu": 0.5, "uniform": 2.0}
"""Warp instructions per cycle of one multiprocessor."""
LANES = 128
"""Bytes per cycle of one multiprocessor, for shared memory and for its first cache."""
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
"""Limits of one multiprocessor."""


def occupancy(registers: int, shared: int, warps: int, machine: Machine) -> int:
    """Number of blocks that fit on one multiprocessor at a time."""
    each = -(-max(registers, 1) // 8) * 8 * 32
    by_registers = REGISTERS // (each * warps)
    by_shared = machine.shared // (-(-shared // 128) * 128 + 1024)
    return max(0, min(by_registers, by_shared, WARPS // warps, BLOCKS))


class Placed(NamedTuple):
    """An instruction, and how often the warps of all programs run it; None if unknown."""

    instruction: sass.Instruction
    runs: float | None


def _steps(region: Region) -> list[Region]:
    """A region and all regions that contain it, innermost first."""
    found = [region]
    while found[-1].parent is not None:
        found.append(found[-1].parent)
    return found


class Body(NamedTuple):
    """A loop of the machine code, and the loop of the source from which it was compiled."""

    loop: sass.Loop
    own: list[sass.Instruction]
    """Instructions of the loop, without inner loops."""
    source: Region | None
    unrolled: int
    """Iterations of the source loop in one iteration of this loop."""
    turns: float | None
    """Iterations in the whole launch, summed over all programs."""


def bodies(code: list[sass.Instruction], turns: Turns) -> list[Body]:
    """The loops of the machine code and their numbers of iterations."""
    found: list[Body] = []
    loops = sass.loops(code)
    sources = [region for region in turns.regions if region.kind in ("for", "while")]
    for loop in sorted(loops, key=lambda loop: -loop.depth):
        inner = [other for other in found if other.loop.addresses < loop.addresses]
        nested = {address for other in inner for address in other.loop.addresses}
        own = [item for item in code if item.address in loop.addresses - nested]
        # Loops around a loop in the machine code come from loops around its source.
        around = [
            region
            for region in sources
            if all(region in _steps(body.source)[1:] for body in inner if body.source is not None)
        ]
        source = _source(own, around)
        unrolled = 1
        if source is not None and source.step and loop.advance and loop.advance % source.step == 0:
            unrolled = _unrolled(loop.advance // source.step, own, source)
        runs = None if source is None or source.runs is None else source.runs / unrolled
        found.append(Body(loop, own, source, unrolled, runs))
    # An unrolled loop and its remainder loop: the remainder is less than one turn of the first.
    taken: dict[int, Body] = {}
    for body in sorted(found, key=lambda body: -body.unrolled):
        if body.source is not None and id(body.source) in taken and body.unrolled == 1:
            main = taken[id(body.source)]
            if main.unrolled > 1:
                found[found.index(body)] = body._replace(turns=0.0)
        elif body.source is not None:
            taken.setdefault(id(body.source), body)
    return sorted(found, key=lambda body: body.loop.head)


def _unrolled(factor: int, own: list[sass.Instruction], source: Region) -> int:
    """The factor if the loads, stores and products of the source's loop are as often in that of the code."""
    heavy = Counter(item.frames for item in own if item.frames in source.anchors and item.pipe != "integer")
    possible = factor in (2, 4, 8, 16) and all(count % factor == 0 for count in heavy.values())
    return factor if possible and heavy else 1


def _source(own: list[sass.Instruction], sources: list[Region]) -> Region | None:
    """The source loop: the outermost with anchors here, else the loop that most instructions come from."""
    frames = [item.frames for item in own if item.frames]
    pipes = ("load", "store", "tensor", "mufu", "shared")
    heavy = {item.frames for item in own if item.pipe in pipes}
    anchored = [region for region in sources if region.anchors & heavy]
    if anchored:
        return min(anchored, key=lambda region: region.depth)
    votes = [(sum(item in region.frames for item in frames), region.depth, region) for region in sources]
    best = max(votes, key=lambda vote: vote[:2], default=None)
    return best[2] if best and best[0] else None


def placed(code: list[sass.Instruction], turns: Turns, found: list[Body]) -> list[Placed]:
    """Every instruction and how often it runs."""
    around: dict[int, Body] = {}
    for body in found:
        for item in body.own:
            around[item.address] = body
    by_frames: dict[sass.Frames, list[Region]] = {}
    for region in turns.regions:
        for frames in region.frames:
            by_frames.setdefault(frames, []).append(region)
    return [Placed(item, _runs(item, around.get(item.address), turns, by_frames)) for item in code]


def _runs(
    item: sass.Instruction, body: Body | None, turns: Turns, by_frames: dict[sass.Frames, list[Region]]
) -> float | None:
    within = turns.root if body is None else body.source
    runs = turns.root.runs if body is None else body.turns
    if within is None or runs is None:
        return None
    sides = []
    for region in by_frames.get(item.frames, []):
        path = _steps(region)
        if within not in path:
            continue
        # Down from what is around it to the first loop, which was unrolled here if it is none of the code.
        share = 1.0
        for step in reversed(path[: path.index(within)]):
            if step.kind != "if" or step.runs is None:
                break
            parent = step.parent
            if parent is not None and parent.runs:
                share *= step.runs / parent.runs
        sides.append(share)
    return runs * (max(sides) if sides else 1.0)


def seconds(code: list[Placed], warps: int, moved: float, machine: Machine) -> dict[str, float | None]:
    """The time of each pipe, of issue and of memory; only of memory if the length of a loop is unknown."""
    if any(item.runs is None for item in code):
        return {"bytes": moved / machine.bandwidth}
    work = dict.fromkeys((*RATES, "tensor", "shared", "global"), 0.0)
    for item, runs in code:
        assert runs is not None
        count = runs * warps
        work["issue"] += count / RATES["issue"]
        if item.pipe in RATES:
            work[item.pipe] += count / RATES[item.pipe]
        if item.pipe == "tensor":
            grouped = item.base in ("HGMMA", "IGMMA", "QGMMA")
            # One matrix instruction of a warpgroup counts once for each of its four warps.
            products = item.products / (4 if grouped else 1)
            work["tensor"] += count * products / (machine.products * (1.0 if grouped else machine.mma_share))
        elif item.pipe in ("shared", "local") or item.base == "LDGSTS":
            work["shared"] += count * max(item.bytes * 32, LANES) / LANES
        elif item.pipe in ("load", "store"):
            work["global"] += count * max(item.bytes * 32, LANES) / LANES
    cycles = machine.processors * machine.clock
    return {**{name: value / cycles for name, value in work.items()}, "bytes": moved / machine.bandwidth}


def attention_seconds(query: Tensor, key: Tensor, machine: Machine) -> float | None:
    """The time of flash attention of these tensors; None for float32, which it does not support."""
    if query.dtype == torch.float32:
        return None
    batch, heads, queries, width = query.shape
    return 4.0 * batch * heads * queries * key.shape[2] * width / machine.flash


def rows_floor(query: Tensor, key: Tensor, rows: int, columns: int, machine: Machine) -> dict[str, float]:
    """The minimum time of attention_rows, forward and backward: the largest of three times.

    Bytes: keys twice, both gradients, and the result and its gradient. Products: scores and the read columns
    in the forward, scores and both gradients in the backward. Exponentials: of the scores, in both.
    """
    batch, heads, _, width = query.shape
    keys, size = key.shape[2], query.element_size()
    entries = batch * heads * rows * keys
    moved = (3 * key.numel() + query.numel()) * size + 2 * 4 * batch * rows * columns
    rate = machine.processors * machine.clock
    per_cycle = machine.products if query.dtype != torch.float32 else LANES
    found = {
        "bytes": moved / machine.bandwidth,
        "products": (4 * entries + batch * heads * rows * columns) * width / (per_cycle * rate),
        "exponentials": 2 * entries / (32 * RATES["mufu"] * rate),
    }
    return {**found, "floor": max(found.values())}


def beside(gate: Gate, machine: Machine) -> dict[str, Any]:
    """The time to compare a kernel with: the floor of attention_rows, else flash attention."""
    arguments = gate.launch.arguments
    query, key = arguments.get("query"), arguments.get("key")
    if gate.name.startswith("attention_rows"):
        shape = gate.name.split(" ", 2)[2]
        # A kernel may get less than the op: the others of the same call know the rest.
        # Shapes alone count here, which are those of every GPU.
        for other in _gates(90).values():
            given = other.launch.arguments
            if other.name.endswith(shape) and isinstance(given.get("query"), Tensor) and "rows" in given:
                query, key, rows = given["query"], given.get("key"), given["rows"]
                if isinstance(key, Tensor) and query.ndim == 4 and "width" in given:
                    floor = rows_floor(query, key, rows.shape[1], given["width"], machine)
                    return {"of": "floor of attention_rows, forward and backward", "seconds": floor}
        return {"of": "floor of attention_rows", "seconds": None}
    if isinstance(query, Tensor) and isinstance(key, Tensor) and query.ndim == 4:
        one = attention_seconds(query, key, machine)
        more = [
            len(value)
            for value in arguments.values()
            if isinstance(value, tuple)
            and value
            and all(isinstance(item, Tensor) and item.shape == query.shape for item in value)
        ]
        # A launch may take further maps; their queries are in a tuple.
        return {"of": "flash attention", "seconds": None if one is None else one * (1 + max(more, default=0))}
    return {"of": "flash attention", "seconds": None}


ASSUMED = {
    "machines": {f"sm_{capability}": machine._asdict() for capability, machine in MACHINES.items()},
    "warp instructions a cycle of one multiprocessor": RATES,
    "bytes a cycle of one multiprocessor, shared memory and first cache each": LANES,
    "limits read from memory": "shorten nothing; branches on such values are taken both ways",
    "bytes": "each byte of a tensor is read once and written once, and no more than is asked for",
    "left out": "waiting for memory and barriers, bank conflicts, a last wave that is not full",
}
"""The assumptions of the predictions."""


def describe(gate: Gate, capability: int) -> dict[str, Any]:
    """All results of one kernel at one shape on one architecture; times are predictions."""
    machine = MACHINES[capability]
    built = compiled(gate.launch, capability)
    turns = Turns(built.ir, gate.launch.grid, gate.launch.arguments)
    if all(len(item.frames) < 2 for item in built.code):
        turns.forget_calls()
    warps = gate.launch.options.get("num_warps", 4)
    found = bodies(built.code, turns)
    code = placed(built.code, turns, found)
    traffic = turns.moved()
    moved = sum(sum(part.values()) for part in traffic.values())
    used = built.resources
    blocks = occupancy(used.registers, used.shared, warps, machine)
    times = seconds(code, warps, moved, machine)
    bound = max(times, key=lambda name: times[name] or 0.0)
    against = beside(gate, machine)
    whole = against["seconds"]["floor"] if isinstance(against["seconds"], dict) else against["seconds"]
    known = all(item.runs is not None for item in code)
    executed = warps * sum(item.runs or 0.0 for item in code) if known else None
    return {
        "kernel": gate.name,
        "function": gate.launch.kernel.__name__,
        "architecture": f"sm_{capability}",
        "registers": used.registers,
        "spills": used.spills,
        "shared_bytes": used.shared,
        "faults": faults(gate, capability, used),
        "warps": warps,
        "grid": list(gate.launch.grid),
        "programs": turns.programs,
        "blocks_per_multiprocessor": blocks,
        "waves": turns.programs / (blocks * machine.processors) if blocks else None,
        "instructions": sass.counts(built.code),
        "matrix_instructions": used.matrix_instructions,
        "loops": [
            {
                "head": f"0x{body.loop.head:x}",
                "depth": body.loop.depth,
                "instructions": sass.counts(body.own),
                "instructions_times_warps": len(body.own) * warps,
                "unrolled": body.unrolled,
                "turns": body.turns,
                "turns_per_program": None if body.turns is None else body.turns / turns.programs,
                "line": max((line for item in body.own for _, line in item.frames[:1]), default=None),
            }
            for body in found
        ],
        "warp_instructions": executed,
        "bytes": {"total": moved, "by_argument": traffic},
        "predicted": {
            "gpu": machine.name,
            "seconds": times,
            "bound": bound,
            "bound_seconds": times[bound],
            "beside": against,
            "share": (times[bound] or 0.0) / whole if whole and known else None,
        },
    }


def inner(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The innermost loops of an entry: the loops that contain no other loop."""
    found = entry["loops"]
    return [
        loop
        for loop, after in zip_longest(found, found[1:])
        if after is None or after["depth"] <= loop["depth"]
    ]


@cache
def _gates(capability: int) -> dict[str, Gate]:
    return {gate.name: gate for gate in gates(capability)}


def _describe(name: str, capability: int) -> dict[str, Any]:
    return describe(_gates(capability)[name], capability)


def everything(parts: Sequence[str] = ("",), workers: int = 2) -> dict[str, Any]:
    """The report of all kernels.

    Args:
        parts: keep only kernels whose gate name contains one of these.
        workers: number of processes that compile.
    """
    import triton

    named = [name for name in _gates(90) if any(part in name for part in parts)]
    names, capabilities = zip(*product(named, MACHINES), strict=True) if named else ((), ())
    # A process forked off torch's threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        entries = list(pool.map(_describe, names, capabilities, chunksize=2))
    return {
        "note": "counts are read off the compiled code; all times and shares are predictions",
        "triton": triton.__version__,
        "assumed": ASSUMED,
        "kernels": entries,
    }


def microseconds(value: float | None) -> str:
    """A time with three digits."""
    return "-" if value is None else f"{1e6 * value:.3g}"


def waves(entry: dict[str, Any]) -> str:
    """Waves of an entry, one decimal."""
    return "-" if entry["waves"] is None or math.isinf(entry["waves"]) else f"{entry['waves']:.1f}"
