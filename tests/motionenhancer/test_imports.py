"""Which module may import which: commands and the toy are leaves, and no imports form a circle."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {f"motionenhancer.{name}" for name in ("agreement", "eval", "extract", "look", "store", "train")}
ENTRANCES = {"motionenhancer", "motionenhancer.__main__"}

Uses = dict[str, set[str]]


def imported(source: str, package: str) -> Iterator[str]:
    """Yield all names that a source imports when it runs, in a function too.

    A name that ``from a import b`` takes is given as ``a`` and as ``a.b``, as it may be a module.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def examples(source: str) -> str:
    """The code of the examples in all docstrings of a source."""
    texts = (
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    parsed = (doctest.DocTestParser().get_examples(text) for text in texts if text)
    return "".join(example.source for found in parsed for example in found)


def modules(folder: Path) -> dict[str, tuple[str, str]]:
    """Each module's name, its package and its source."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = (".".join(parts[:-1]), path.read_text(encoding="utf-8"))
    return found


MODULES = modules(ROOT / "motionenhancer")
USES: Uses = {
    name: {use for use in imported(source, package) if use in MODULES and use != name}
    for name, (package, source) in MODULES.items()
}


def circles(uses: Uses) -> set[frozenset[str]]:
    """The sets of names that use one another, directly or by way of others."""
    reached: Uses = {}
    for name in uses:
        reached[name], waiting = set(), [name]
        while waiting:
            new = uses.get(waiting.pop(), set()) - reached[name]
            reached[name] |= new
            waiting += new
    return {
        frozenset(other for other in reached if other in reached[name] and name in reached[other])
        for name in reached
        if name in reached[name]
    }


def by_package(uses: Uses) -> Uses:
    """Fold modules into the folders and files directly below the package, which is itself left out."""
    folded: Uses = {}
    for name, used in uses.items():
        own, others = _part(name), {_part(use) for use in used}
        if own:
            folded.setdefault(own, set()).update(other for other in others if other and other != own)
    return folded


def _part(name: str) -> str:
    return ".".join(name.split(".")[:2]) if "." in name else ""


def in_toy(name: str) -> bool:
    return name == "motionenhancer.toy" or name.startswith("motionenhancer.toy.")


def in_package() -> Iterable[str]:
    """All modules but the commands, what runs them, and the toy."""
    return (name for name in MODULES if name not in COMMANDS | ENTRANCES and not in_toy(name))


def test_the_modules_are_found() -> None:
    assert {"motionenhancer", "motionenhancer.extract", "motionenhancer.toy.world"} <= set(MODULES)
    assert "motionenhancer.toy.defaults" in USES["motionenhancer.extract"]


def test_only_commands_import_the_toy() -> None:
    for name in in_package():
        assert not [use for use in USES[name] if in_toy(use)], name


def test_no_example_in_a_docstring_needs_the_toy() -> None:
    for name in in_package():
        assert not [use for use in imported(examples(MODULES[name][1]), "") if in_toy(use)], name


def test_nothing_imports_a_command() -> None:
    found = {(name, use) for name in MODULES if name not in ENTRANCES for use in USES[name] & COMMANDS}
    assert not found


def test_no_imports_form_a_circle() -> None:
    assert not circles(USES)
    assert not circles(by_package(USES))


@pytest.mark.parametrize("folder", ["mekernels", "motionenhancer", "studies"])
def test_what_is_below_imports_nothing_above(folder: str) -> None:
    """mekernels does not import motionenhancer, and neither imports the studies or the tests."""
    order = ["mekernels", "motionenhancer", "studies", "benchmarks", "tests"]
    above = set(order[order.index(folder) + 1 :])
    found = modules(ROOT / folder)
    assert found
    for name, (package, source) in found.items():
        for code in (source, examples(source)):
            assert not above & {use.split(".")[0] for use in imported(code, package)}, name


SOURCE = '''
"""Says something.

>>> from c import d
"""
import typing
if typing.TYPE_CHECKING:
    import hidden
else:
    import shown
def late():
    from . import near
    from ..above import thing
    from .beside.deep import other
    import a.b as short
'''


def test_imports_are_read_wherever_they_stand() -> None:
    assert set(imported(SOURCE, "top.middle")) == {
        *("typing", "shown", "top.middle", "top.middle.near", "top.above", "top.above.thing"),
        *("top.middle.beside.deep", "top.middle.beside.deep.other", "a.b"),
    }
    assert set(imported(examples(SOURCE), "")) == {"c", "c.d"}


def test_circles_are_found() -> None:
    uses = {"p.a.x": {"p.b.x"}, "p.b.x": {"p.c"}, "p.b.y": {"p.a.x"}, "p": {"p.c"}}
    uses |= {"p.c": {"p.d"}, "p.d": {"p.c"}}
    assert circles(uses) == {frozenset({"p.c", "p.d"})}
    assert circles(by_package(uses)) == {frozenset({"p.c", "p.d"}), frozenset({"p.a", "p.b"})}
