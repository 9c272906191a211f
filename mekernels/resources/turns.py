"""How often each part of a kernel runs in one launch, and what it reads and writes, from Triton's own IR.

This code evaluates the scalars of a kernel that depend on program ids and arguments, for all programs of the
grid at once. From them, the loops and branches of the IR give how often their bodies run. Values read from
memory are unknown: a loop limit that depends on one is assumed not to shorten the loop, and a branch that
depends on one is taken both ways. So the counts are upper bounds if they depend on data, and exact otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .sass import Frames

Value = Any
"""An array over all programs, a number, or None if unknown."""


@dataclass(eq=False)
class Region:
    """The kernel, a loop, or one side of a branch."""

    kind: str
    """``kernel``, ``for``, ``while`` or ``if``."""
    parent: Region | None
    runs: float | None
    """How often its body runs in the whole launch; None if unknown."""
    per_program: Value
    """How often its body runs in each program."""
    step: int | None = None
    """Step of the loop counter."""
    condition: Value = None
    """Condition of a branch."""
    frames: set[Frames] = field(default_factory=set)
    """Source locations of the operations directly in it."""
    anchors: set[Frames] = field(default_factory=set)
    """Source locations of loads, stores, products, sums, exponentials, which compilers do not duplicate."""

    @property
    def depth(self) -> int:
        """Number of loops around it, including itself."""
        own = self.kind in ("for", "while")
        return own + (self.parent.depth if self.parent else 0)


@dataclass
class Access:
    """One load or store of the IR."""

    argument: str
    """The tensor."""
    store: bool
    elements: float
    """Number of elements in the whole launch, including masked elements."""
    lists: frozenset[str] = frozenset()
    """Arguments that list the accessed places, if the access uses such lists."""


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "minsi": np.minimum,
    "minui": np.minimum,
    "maxsi": np.maximum,
    "maxui": np.maximum,
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": lambda a, b: np.trunc(np.divide(a, b)).astype(np.int64),
    "divui": np.floor_divide,
    "ceildivsi": lambda a, b: -(-a // b),
    "remsi": np.fmod,
    "remui": np.fmod,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
}
_COMPARE = {"slt": np.less, "sle": np.less_equal, "sgt": np.greater, "sge": np.greater_equal}
_COMPARE |= {"eq": np.equal, "ne": np.not_equal}
_COMPARE |= {f"u{name[1:]}": item for name, item in _COMPARE.items() if name[0] == "s"}
_ANCHORS = ("tt.load", "tt.store", "tt.dot", "tt.reduce", "tt.atomic_rmw")
_DEFINITION = re.compile(r"^\s*(?:(%[\w.$-]+)(?::\d+)? = )?\"?([\w]+(?:\.\w+)*)\"?(.*)$")
_NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")


class Turns:
    """The regions and accesses of one launch.

    Args:
        ir: text of the kernel's ``ttir``.
        grid: programs along each axis.
        arguments: name → argument of the launch: tensors, numbers and tuples of these.
    """

    def __init__(self, ir: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        grid = (*grid, 1, 1, 1)[:3]
        self.grid, self.programs = grid, int(np.prod(grid))
        numbers = np.arange(self.programs)
        self._ids = {
            "x": numbers % grid[0],
            "y": numbers // grid[0] % grid[1],
            "z": numbers // (grid[0] * grid[1]),
        }
        self._values: dict[str, Value] = {}
        self._source: dict[str, tuple[str, ...]] = {}
        self._lists: dict[str, frozenset[str]] = {}
        self._arguments: dict[str, Value] = {}
        self._flatten("%", arguments)
        self.root = Region("kernel", None, float(self.programs), np.ones(self.programs))
        self.regions = [self.root]
        self.accesses: list[Access] = []
        self._places = _Places(ir)
        self._read(ir)

    def _flatten(self, prefix: str, items: dict[str, Any]) -> None:
        for name, value in items.items():
            if isinstance(value, tuple):
                self._flatten(f"{prefix}{name}.", {str(place): item for place, item in enumerate(value)})
            else:
                self._arguments[prefix + name] = value
                if isinstance(value, bool | int):
                    self._values[prefix + name] = int(value)

    def _read(self, ir: str) -> None:
        stack: list[tuple[Region, str, str | None]] = []
        inside = False
        region = self.root
        for line in ir.splitlines():
            text = line.strip()
            if text.startswith("tt.func"):
                inside = " public " in text or not inside
                continue
            if not inside or text.startswith("#"):
                continue
            if text.startswith("} else"):
                region = self._other_side(region)
                continue
            if text.startswith("} do"):
                continue
            if text.startswith("}"):
                if not stack:
                    inside = False
                    continue
                if text.startswith("})") or text.startswith("} :") or stack[-1][1] == "other":
                    stack.pop()
                    continue
                region = stack.pop()[0]
                continue
            match = _DEFINITION.match(text)
            if match is None:
                continue
            name, operation, rest = match.groups()
            place = self._places.of(text)
            if place:
                region.frames.add(place)
            if operation in ("scf.for", "scf.if", "scf.while"):
                stack.append((region, operation, name))
                region = self._enter(operation, name, rest, region)
            elif text.endswith("{") or text.endswith("({"):
                stack.append((region, "other", None))
            elif operation == "scf.yield" and stack and stack[-1][1] == "scf.if":
                self._yield(stack[-1][2], rest)
            else:
                self._define(name, operation, rest, region, place)

    def _enter(self, operation: str, name: str | None, rest: str, parent: Region) -> Region:
        if operation == "scf.if":
            condition = self._value(_NAME.findall(rest)[0])
            share = np.ones(self.programs) if condition is None else np.broadcast_to(condition, self.programs)
            found = self._region("if", parent, share.astype(float))
            found.condition = condition
        elif operation == "scf.while":
            found = Region("while", parent, None, None)
            self.regions.append(found)
        else:
            head = rest.split(" iter_args(")[0].split(" -> ")[0]
            counter, low, high, step = _NAME.findall(head)[:4]
            lower, upper, by = (self._value(item) for item in (low, high, step))
            turns = None
            if lower is not None and upper is not None and by is not None:
                count = np.maximum(0, -(-(np.asarray(upper) - lower) // by))
                turns = np.broadcast_to(count, self.programs)
            found = self._region("for", parent, turns)
            found.step = int(by) if by is not None and np.ndim(by) == 0 else None
            self._values[counter] = lower
            kept = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", rest.partition(" iter_args(")[2])
            for place, (held, given) in enumerate(kept):
                for alias in (held, f"{name}#{place}", name if len(kept) == 1 else held):
                    if alias:
                        self._source[alias] = (given,)
                        self._lists[alias] = self._lists.get(given, frozenset())
                        self._values.pop(alias, None)
        return found

    def _yield(self, name: str | None, rest: str) -> None:
        """Merge the results of both sides of a branch: its pointer may point into either tensor."""
        given = _NAME.findall(rest.split(" : ")[0])
        for place, item in enumerate(given):
            for alias in (f"{name}#{place}", name if len(given) == 1 else None):
                if alias:
                    self._source[alias] = (*self._source.get(alias, ()), item)
                    self._values.pop(alias, None)

    def _region(self, kind: str, parent: Region, share: Value) -> Region:
        known = share is not None and parent.per_program is not None
        each: Value = parent.per_program * share if known else None
        found = Region(kind, parent, None if each is None else float(np.sum(each)), each)
        self.regions.append(found)
        return found

    def _other_side(self, region: Region) -> Region:
        parent, condition = region.parent, region.condition
        assert parent is not None
        share = np.ones(self.programs)
        if condition is not None:
            share = 1.0 - np.broadcast_to(condition, self.programs).astype(float)
        return self._region("if", parent, share)

    def _value(self, name: str) -> Value:
        return self._values.get(name)

    def _define(
        self, name: str | None, operation: str, rest: str, region: Region, place: Frames | None
    ) -> None:
        operands = _NAME.findall(rest.split(" loc(")[0].split(" : ")[0])
        if place and (operation in _ANCHORS or operation.startswith("math.")):
            region.anchors.add(place)
        if operation in ("tt.load", "tt.store", "tt.atomic_rmw"):
            shape = re.search(r"tensor<((?:\d+x)+)!", rest)
            size = np.prod([int(part) for part in shape.group(1).split("x")[:-1]]) if shape else 1
            elements = float(size * (region.runs if region.runs is not None else self.programs))
            lists = self._lists.get(operands[0], frozenset())
            found = self._bases(operands[0])
            for argument in found:
                share = elements / len(found)
                self.accesses.append(Access(argument, operation != "tt.load", share, lists))
                if operation == "tt.atomic_rmw":
                    self.accesses.append(Access(argument, False, share, lists))
        if name is None:
            return
        if operands:
            self._source[name] = tuple(operands[1:3] if operation == "arith.select" else operands[:1])
        self._lists[name] = frozenset().union(*(self._lists.get(item, frozenset()) for item in operands))
        if operation == "tt.load" and self._lists_of(operands[0]):
            self._lists[name] |= self._lists_of(operands[0])
        self._values.pop(name, None)
        if "tensor<" not in rest:
            self._values[name] = self._scalar(operation, rest, [self._value(item) for item in operands])

    def _scalar(self, operation: str, rest: str, given: list[Value]) -> Value:
        dialect, _, short = operation.partition(".")
        if operation == "arith.constant":
            text = rest.strip().split(" ")[0]
            return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
        if operation == "tt.get_program_id":
            return self._ids[rest.strip()[0]]
        if operation == "tt.get_num_programs":
            return self.grid["xyz".index(rest.strip()[0])]
        if dialect != "arith":
            return None
        known = [item for item in given if item is not None]
        if short in ("minsi", "minui", "maxsi", "maxui") and len(known) < 2:
            return known[0] if known else None
        if short in ("extsi", "extui", "trunci", "index_cast"):
            return given[0]
        if any(item is None for item in given):
            return None
        if short == "select":
            return np.where(*given)
        if short == "cmpi":
            return _COMPARE[rest.strip().split(",")[0].split(" ")[0]](*given)
        # With a divisor of 0 the result is not used: the loop that would use it makes no turn.
        with np.errstate(divide="ignore", invalid="ignore"):
            return _OPERATIONS[short](*given) if short in _OPERATIONS else None

    def _lists_of(self, pointer: str) -> frozenset[str]:
        """The arguments from which a pointer is computed and that are lists of places."""
        return frozenset(
            name for name in self._bases(pointer) if not self._arguments["%" + name].is_floating_point()
        )

    def _bases(self, name: str) -> list[str]:
        """The tensors a pointer may point into."""
        found, seen, pending = [], set(), [name]
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            if isinstance(self._arguments.get(name), Tensor):
                found.append(name[1:])
            else:
                pending += self._source.get(name, ())
        return found

    def forget_calls(self) -> None:
        """Keep only the innermost function of each source location, as some versions of Triton write it.

        Then the call site of a helper that several loops call is unknown, so its loads are not anchors.
        """
        for region in self.regions:
            region.frames = {frames[:1] for frames in region.frames}
            region.anchors = {frames[:1] for frames in region.anchors}
        shared = Counter(frames for region in self.regions for frames in region.anchors)
        for region in self.regions:
            region.anchors = {frames for frames in region.anchors if shared[frames] == 1}

    def moved(self) -> dict[str, dict[str, float]]:
        """Bytes read and written of each tensor: each byte once, and at most the requested number of bytes.

        If a list picks the tokens of a tensor (its third axis), at most the tokens of the list count.
        """
        asked: dict[tuple[str, bool], float] = {}
        for access in self.accesses:
            key, tensor = (access.argument, access.store), self._arguments["%" + access.argument]
            most = float(tensor.numel())
            if access.lists and tensor.ndim > 2:
                picked = sum(self._arguments["%" + name].numel() for name in access.lists)
                most *= min(1.0, picked / max(1, tensor.shape[2]))
            asked[key] = asked.get(key, 0.0) + min(access.elements, most)
        found: dict[str, dict[str, float]] = {}
        for (name, store), elements in asked.items():
            tensor = self._arguments["%" + name]
            size = min(elements, tensor.numel()) * tensor.element_size()
            found.setdefault(name, {"read": 0.0, "written": 0.0})["written" if store else "read"] = size
        return found


class _Places:
    """The source location of an operation of the IR, from its ``loc``."""

    def __init__(self, ir: str) -> None:
        self._aliases = dict(re.findall(r"^(#loc\d*) = (.*)$", ir, flags=re.MULTILINE))
        self._known: dict[str, Frames] = {}

    def of(self, line: str) -> Frames | None:
        match = re.search(r"loc\((#loc\d*)\)\s*$", line)
        return self._frames(match.group(1)) or None if match else None

    def _frames(self, alias: str) -> Frames:
        if alias not in self._known:
            text = self._aliases.get(alias, "")
            parts = re.findall(r"#loc\d*", text)
            place = re.match(r'loc\("([^"]*)":(\d+):', text)
            if place:
                self._known[alias] = ((place.group(1), int(place.group(2))),)
            elif parts:
                # callsite(inner at outer), or a name for another place.
                self._known[alias] = tuple(frame for part in parts for frame in self._frames(part))
            else:
                self._known[alias] = ()
        return self._known[alias]
