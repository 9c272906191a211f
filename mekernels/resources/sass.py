"""Reads machine code as nvdisasm and cuobjdump print it: instructions, loops, and the work of each pipe.

A loop is a natural loop, as in compilers: the blocks from which control returns to the loop head without
leaving the loop. So nested loops, loops with several back edges, blocks that were moved out of line and
branches on uniform predicates are all found. Code that only stands between them is not counted.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

Frames = tuple[tuple[str, int], ...]
"""(file, line) of an instruction, the innermost function first, then the calls it was inlined at."""

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)(.*)')
_INLINED = re.compile(r'inlined at "([^"]*)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)|\b0x([0-9a-f]+)\s*$")

PIPES = {
    "tensor": "HMMA HGMMA IMMA IGMMA QMMA QGMMA BMMA DMMA",
    "mufu": "MUFU I2F F2I I2I F2F FRND F2FP64 POPC FLO BREV",
    "fp32": "FFMA FADD FMUL HFMA2 HADD2 HMUL2 FSWZADD",
    "fp64": "DFMA DADD DMUL DSETP",
    "integer": "IMAD IADD3 IADD IABS ISETP IMNMX VIMNMX VIADD VIADDMNMX LEA LOP3 LOP PLOP3 SHF SHL SHR PRMT "
    "SEL ISCADD BMSK SGXT P2R R2P MOV MOV32I CS2R FSEL FSETP FMNMX FCHK F2FP HSETP2 HSET2 HMNMX2 FSET IDP "
    "XMAD BFE BFI ICMP",
    "load": "LDG LDGSTS LD UBLKCP UTMALDG",
    "store": "STG ST RED REDG ATOM ATOMG UTMASTG",
    "shared": "LDS LDSM STS STSM ATOMS SHFL MOVM",
    "local": "LDL STL",
    "uniform": "LDC",
    "control": "BRA EXIT RET CALL BRX JMP BSSY BSYNC BREAK WARPSYNC YIELD NOP BAR DEPBAR LDGDEPBAR MEMBAR "
    "FENCE ERRBAR CCTL WARPGROUP SYNCS NANOSLEEP BMOV VOTE VOTEU S2R S2UR R2UR ARRIVES B2R ELECT ACQBULK",
}
"""The pipe of each instruction. Compares, selects, moves, and packing of halves use the integer pipe.
Conversions between integers and floating point use the MUFU pipe. The uniform datapath takes all other names
that begin with U, and reads of constants."""
_PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    predicate: str
    """Such as ``!P0`` or ``UP3``; empty if the instruction always runs."""
    name: str
    """Name with modifiers, such as ``LDG.E.128``."""
    operands: str
    target: int | None
    """Address of a branch target."""
    frames: Frames

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def pipe(self) -> str:
        """A key of :data:`PIPES`, ``uniform`` for the uniform datapath, ``other`` if it is not known."""
        known = _PIPE.get(self.base)
        return known or ("uniform" if self.base.startswith("U") else "other")

    @property
    def bytes(self) -> int:
        """Bytes that a load or store moves per thread; 0 for other instructions."""
        if self.base in ("LDSM", "STSM"):
            return 4 * max([int(count) for count in re.findall(r"\.(\d)(?=\.|$)", self.name)] or [1])
        if self.pipe not in ("load", "store", "shared", "local") or self.base in ("SHFL", "MOVM", "LDC"):
            return 0
        width = re.search(r"\.(?:[USF])?(8|16|32|64|128)(?=\.|$)", self.name)
        return int(width.group(1)) // 8 if width else 4

    @property
    def products(self) -> int:
        """Multiply-adds of one matrix instruction, per warp or (HGMMA) per warpgroup."""
        shape = re.search(r"\.(\d+)x(\d+)x(\d+)", self.name)
        if shape:
            return int(shape.group(1)) * int(shape.group(2)) * int(shape.group(3))
        shape = re.search(r"\.(16)(8)(4|8|16|32)(?=\.|$)", self.name)
        return int(shape.group(1)) * int(shape.group(2)) * int(shape.group(3)) if shape else 0


class Loop(NamedTuple):
    """One loop."""

    head: int
    """Address of its first instruction."""
    addresses: frozenset[int]
    """Addresses of all instructions, including inner loops."""
    depth: int
    """Nesting depth; 1 for an outermost loop."""
    advance: int | None
    """Step of the loop counter, which a back edge compares, in one iteration; None if it is not found."""


def parse(text: str) -> list[Instruction]:
    """The instructions of the first function in a disassembly, in the order of their addresses."""
    found: list[tuple[int, str, str, str, str | int | None, Frames]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    frames: Frames = ()
    fresh: list[tuple[str, int]] = []
    for line in text.splitlines():
        label, source, match = _LABEL.match(line), _LINE.match(line), _INSTRUCTION.match(line)
        if label:
            waiting.append(label.group(1))
        elif source:
            if not fresh:
                fresh.append((source.group(1), int(source.group(2))))
            call = _INLINED.search(source.group(3))
            if call:
                fresh.append((call.group(1), int(call.group(2))))
        elif match:
            address, negated, predicate, name, operands = match.groups()
            if found and int(address, 16) <= found[-1][0]:
                break
            if fresh:
                frames, fresh = tuple(fresh), []
            labels.update((item, int(address, 16)) for item in waiting)
            waiting = []
            target: str | int | None = None
            place = _TARGET.search(operands)
            if place and name.partition(".")[0] in ("BRA", "JMP", "CALL", "BRX"):
                target = place.group(1) or int(place.group(2), 16)
            guard = f"{negated}{predicate}" if predicate and predicate not in ("PT", "UPT") else ""
            found.append((int(address, 16), guard, name, operands.strip(), target, frames))
    return [
        Instruction(at, guard, name, operands, labels.get(to) if isinstance(to, str) else to, where)
        for at, guard, name, operands, to, where in found
    ]


def _conditional(item: Instruction) -> bool:
    """Whether a branch may fall through: by its guard, or by a predicate among its operands."""
    return bool(item.predicate) or bool(re.match(r"!?U?P\d", item.operands)) or ".DIV" in item.name


def _blocks(code: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Basic blocks by the address of their first instruction, and the successors of each."""
    heads = {code[0].address} if code else set()
    for place, item in enumerate(code):
        if item.target is not None:
            heads.add(item.target)
        if item.base in ("BRA", "JMP", "EXIT", "RET", "BRX", "CALL") and place + 1 < len(code):
            heads.add(code[place + 1].address)
    blocks: dict[int, list[Instruction]] = {}
    for item in code:
        if item.address in heads:
            current = blocks.setdefault(item.address, [])
        current.append(item)
    starts = list(blocks)
    following = dict(itertools.pairwise(starts))
    after: dict[int, list[int]] = {}
    for start, block in blocks.items():
        last = block[-1]
        after[start] = [last.target] if last.base in ("BRA", "JMP") and last.target in blocks else []
        ends = last.base in ("BRA", "JMP", "EXIT", "RET", "BRX") and not _conditional(last)
        if not ends and start in following:
            after[start].append(following[start])
    for start, block in blocks.items():
        target = block[-1].target
        # The compiler jumps out of loops by calls that never return.
        if block[-1].base == "CALL" and target in blocks and not _subroutine(target, blocks, after):
            after[start] = [*after[start], target] if block[-1].predicate else [target]
    return blocks, after


def _reached(start: int, after: dict[int, list[int]]) -> set[int]:
    seen, pending = {start}, [start]
    while pending:
        for way in after[pending.pop()]:
            if way not in seen:
                seen.add(way)
                pending.append(way)
    return seen


def _subroutine(start: int, blocks: dict[int, list[Instruction]], after: dict[int, list[int]]) -> set[int]:
    """The blocks of a called function; empty if it never returns."""
    found = _reached(start, after)
    return found if any(blocks[block][-1].base == "RET" for block in found) else set()


def loops(code: list[Instruction]) -> list[Loop]:
    """All reachable loops, in the order of their heads. Functions that a loop calls are part of it."""
    if not code:
        return []
    blocks, after = _blocks(code)
    entry = code[0].address
    reached = _reached(entry, after)
    before: dict[int, list[int]] = {start: [] for start in reached}
    for start in reached:
        for way in after[start]:
            before[way].append(start)
    # A block is dominated by the blocks on every path to it.
    dominators = {start: set(reached) for start in reached}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for start in sorted(reached - {entry}):
            common = set.intersection(*(dominators[way] for way in before[start])) | {start}
            if common != dominators[start]:
                dominators[start], changed = common, True
    bodies: dict[int, set[int]] = {}
    tails: dict[int, list[int]] = {}
    for tail in reached:
        for head in after[tail]:
            if head in dominators[tail]:
                body = bodies.setdefault(head, {head})
                tails.setdefault(head, []).append(tail)
                pending = [tail]
                while pending:
                    block = pending.pop()
                    if block not in body:
                        body.add(block)
                        pending += before[block]
    found = []
    for head, body in sorted(bodies.items()):
        within = [item for start in sorted(body) for item in blocks[start]]
        depth = sum(1 for other, more in bodies.items() if head in more and body <= more)
        # The counter is compared either to repeat the loop or to leave it.
        ends = [blocks[start][-1] for start in body if start in tails[head] or not set(after[start]) <= body]
        called = [
            blocks[start]
            for item in within
            if item.base == "CALL" and item.target in blocks
            for start in _subroutine(item.target, blocks, after)
        ]
        addresses = {item.address for item in within} | {item.address for block in called for item in block}
        found.append(Loop(head, frozenset(addresses), depth, _advance(within, ends)))
    return found


def _advance(body: list[Instruction], ends: list[Instruction]) -> int | None:
    """Find the counter: a register that a back edge compares and to which constants are added."""
    predicates = set()
    for end in ends:
        predicates |= set(re.findall(r"U?P\d", f"{end.predicate} {end.operands}"))
    grown: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for item in body:
        target = re.match(r"(U?R\d+)\b", item.operands)
        if target is None:
            continue
        written[target.group(1)] += 1
        match = re.match(
            r"(U?R\d+), (?:P\w+, )*(?:(U?R\d+)(?:\.reuse)?, )(?:0x1, )?(-?)0x([0-9a-f]+)\b", item.operands
        )
        adds = item.base in ("IADD3", "VIADD", "UIADD3", "IADD", "UIADD") or (
            item.name.startswith("IMAD.IADD") or (", 0x1, " in item.operands and item.base == "IMAD")
        )
        if match and adds and match.group(1) == match.group(2):
            step = int(match.group(4), 16)
            step -= (step >> 31) << 32
            grown[match.group(1)] += -step if match.group(3) else step
    for item in reversed(body):
        if item.base not in ("ISETP", "UISETP"):
            continue
        names = re.findall(r"\b(?:U?P\d|U?R\d+)\b", item.operands)
        if names and names[0] in predicates:
            for name in names[1:]:
                if grown.get(name):
                    return abs(grown[name])
    return None


def counts(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions by pipe, and their total."""
    found = Counter(item.pipe for item in code)
    return {"total": sum(found.values()), **dict(sorted(found.items()))}
