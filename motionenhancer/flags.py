"""Parse the flags of the commands into the dataclasses that the code itself uses.

The `metadata` of a field holds its help text and the other arguments of `setting`.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import json
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field, fields
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .__main__ import COMMANDS

MAX_SEED = 2**32 - 1
"""numpy takes no larger seed."""

#: Metadata of a number's range → its words in an error, and its test.
_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
#: Metadata that argparse does not know.
_OURS = {"flag", "type", "positional", "off", "exists", *_BOUNDS}


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field of a dataclass with its help text.

    Args:
        default: value if the flag is not given.
        help: text of `--help`.
        metadata: `flag`, the flag's name if it differs from the field's; `aliases`, older names; `type`, the
            type of the command-line value; `metavar`, what `--help` shows for the value; `positional`,
            whether the value is given without its flag. These are checked by `check_fields`: `choices`;
            bounds of a number, `least`, `above`, `most` and `below`, with `off`, a value outside of the
            bounds that switches it off; `exists`, "file" or "folder".
    """
    return field(default=default, metadata={"help": help, **metadata})


def flag_of(one: Field[Any]) -> str:
    """Return the flag of a dataclass field, without the dashes."""
    return one.metadata.get("flag", one.name)


def values_of(*settings: Any) -> dict[str, Any]:
    """Return the flags of dataclasses, without the dashes, with their values."""
    return {flag_of(one): getattr(part, one.name) for part in settings for one in fields(part)}


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass against its `setting`; call it in `__post_init__`.

    Args:
        settings: the dataclass. Its `ranges`, field → metadata, declare bounds of fields that it inherits.

    Raises:
        ValueError: names the flag, what it must be and what it was.
    """
    inherited = getattr(settings, "ranges", {})
    for one in fields(settings):
        value, rules = getattr(settings, one.name), {**one.metadata, **inherited.get(one.name, {})}
        if value is not None and (wanted := _wanted(value, rules)):
            older = "".join(f" ({name})" for name in rules.get("aliases", ())[:1])
            raise ValueError(f"--{flag_of(one)}{older} must be {wanted}, got {value}")


class Settings:
    """Base class of flag dataclasses: checks the fields of a new object."""

    def __post_init__(self) -> None:
        check_fields(self)


def _wanted(value: Any, rules: Mapping[str, Any]) -> str:
    """Return the requirement that a value violates; empty if the value is right."""
    bounds = [(*_BOUNDS[name], rules[name]) for name in _BOUNDS if name in rules]
    if bounds and not isinstance(value, Real):
        return "a number"
    if bounds and value != rules.get("off"):
        finite = [] if math.isfinite(value) else ["finite"]
        if finite or not all(holds(value, bound) for _, holds, bound in bounds):
            off = f", or {rules['off']}" if "off" in rules else ""
            return " and ".join([*finite, *(f"{said} {bound}" for said, _, bound in bounds)]) + off
    if value not in rules.get("choices", (value,)):
        return f"one of {', '.join(map(str, rules['choices']))}"
    if "exists" in rules and not (
        Path(value).is_file() if rules["exists"] == "file" else Path(value).is_dir()
    ):
        return f"a {rules['exists']} that exists"
    return ""


class _Formatter(argparse.HelpFormatter):
    """Shows each flag under one name, with its default if it has one.

    Dashes in place of underscores, and `--no_NAME` for a flag that is on by default, work too.
    """

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if "-" not in name[2:])
        if action.nargs == 0:
            return names
        if isinstance(action.metavar, str):
            return f"{names} {action.metavar}"
        value = action.dest.rsplit("_", 1)[-1].upper()
        if action.choices is not None:
            value = "|".join(map(str, action.choices))
        elif action.const is True:
            value = "[true|false]"
        return f"{names} {value}{' ...' if action.nargs in ('+', '*') else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if default is None or default is argparse.SUPPRESS or "Default:" in said:
            return said
        return f"{said} (default: {str(default).lower() if isinstance(default, bool) else '%(default)s'})"


class _Parser(HfArgumentParser):
    """Shows our own groups under --help, and also transformers' groups under --help_all."""

    def __init__(self, classes: Sequence[Any], prog: str, in_python: bool) -> None:
        self.in_python = in_python
        #: every name that a yaml file may use, older ones too → the flag that it sets
        self.names: dict[str, str] = {}
        #: flags whose value may be a mapping
        self.mappings: set[str] = set()
        self.behind: list[Any] = []
        super().__init__(classes, prog=prog, allow_abbrev=False, add_help=False, formatter_class=_Formatter)
        what = COMMANDS.get(prog.removeprefix("python -m motionenhancer."))
        self.description = what and f"{what[0].upper()}{what[1:]}."
        # The list of all options is a page long and would hide an error.
        given = "".join(f" {action.metavar}" for action in self._actions if not action.option_strings)
        self.usage = f"%(prog)s{given} [--option value ...], with --help for all options"
        self.add_argument("--config", default=None, help="yaml file with these options; flags override it")
        self.add_argument("-h", "--help", action=_Help, help="show these options")
        if self.behind:
            self.add_argument("--help_all", action=_Help, help="show transformers' other options too")

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        hints = get_type_hints(dtype)
        own = self.add_argument_group((dtype.__doc__ or dtype.__name__).splitlines()[0].rstrip("."))
        theirs = None
        if issubclass(dtype, TrainingArguments):
            theirs = self.add_argument_group("transformers' own options that work here")
            self.behind.append(theirs)
        works = getattr(dtype, "works", None)
        for one in fields(dtype):
            if not one.init:
                continue
            mine = theirs is None or one.name in dtype.__annotations__
            shown = copy.copy(one)
            shown.name, shown.type = flag_of(one), one.metadata.get("type", hints[one.name])
            metadata = {name: value for name, value in one.metadata.items() if name not in _OURS}
            if "dict" in str(shown.type):
                self.mappings.add(shown.name)
            if works is not None and one.name not in works:
                metadata["help"] = argparse.SUPPRESS
            shown.metadata = MappingProxyType(metadata)
            for name in (shown.name, *metadata.get("aliases", ())):
                self.names[name.lstrip("-")] = shown.name
            group = own if mine or theirs is None else theirs
            if one.metadata.get("positional"):
                group.add_argument(shown.name, nargs="?", **metadata)
                continue
            self._parse_dataclass_field(cast(argparse.ArgumentParser, group), shown)

    def format_help(self, everything: bool = False) -> str:
        groups = self._action_groups
        try:
            if not everything:
                self._action_groups = [group for group in groups if group not in self.behind]
            return super().format_help()
        finally:
            self._action_groups = groups

    def error(self, message: str) -> NoReturn:
        if self.in_python:
            raise ValueError(message)
        start = "unrecognized arguments: "
        if message.startswith(start):
            known = [name for action in self._actions for name in action.option_strings]
            wrong = [part for part in message.removeprefix(start).split() if part.startswith("-")]
            hints = [near(part.partition("=")[0], known) for part in wrong]
            message += "".join(dict.fromkeys(hint for hint in hints if hint))
        super().error(message)


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        sys.stdout.write(parser.format_help(everything=option_string == "--help_all"))
        parser.exit()


def near(name: str, known: Sequence[str]) -> str:
    """Suggest the right name for a misspelt name, in brackets; empty if no name is similar."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def parse_arguments(
    classes: tuple[Any, ...],
    argv: Sequence[str] | None,
    *,
    prog: str,
    recipe: Callable[[argparse.Namespace], Path | None] = lambda chosen: None,
    held: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Read flags over `--config file.yaml` over a recipe over the dataclasses' own defaults.

    Args:
        classes: dataclasses, no two with a flag of the same name.
        argv: the command line without the program's name; None reads `sys.argv`.
        prog: shown in help and errors.
        recipe: function from the flags and the config to a yaml file of defaults, or None.
        held: in a call from Python, values that a command line cannot hold.

    Returns:
        One object for each class.

    Raises:
        SystemExit: a bad flag, a missing or malformed yaml file, or an unknown field in it, which is named;
            a ValueError in a call from Python.
    """
    parser = _Parser(classes, prog, held is not None)
    try:
        chosen = parser.parse_args(argv)
        config = {} if chosen.config is None else _read_config(Path(chosen.config), parser)
        parser.set_defaults(**config)
        base = recipe(parser.parse_args(argv))
        if base is not None:
            parser.set_defaults(**{**_read_config(base, parser), **config})
        values = {**vars(parser.parse_args(argv)), **(held or {})}
        return tuple(_build(cls, values) for cls in classes)
    except ValueError as error:
        parser.error(str(error))


def parse_options(
    classes: tuple[Any, ...],
    options: Mapping[str, Any],
    *,
    prog: str,
    recipe: Callable[[argparse.Namespace], Path | None] = lambda chosen: None,
) -> tuple[Any, ...]:
    """Read a command's flags from keyword arguments; None counts as not given.

    Args:
        classes, prog, recipe: see `parse_arguments`.
        options: flag without dashes → its value. A value that the command line cannot hold, such as a
            `datasets.Dataset`, goes to the field as it is.

    Raises:
        ValueError: a bad value, or a flag that does not exist, which is named.
    """
    known = [flag_of(one) for cls in classes for one in fields(cls) if one.init]
    for name in options:
        if name not in (*known, "config"):
            raise ValueError(f"no option {name!r}{near(name, known)}")
    argv, held = list[str](), dict[str, Any]()
    for name, value in options.items():
        if isinstance(value, list | tuple):
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv += [f"--{name}", json.dumps(value)]
        elif isinstance(value, str | int | float | Path):
            argv.append(f"--{name}={value}")
        elif value is not None:
            held[name] = value
    return parse_arguments(classes, argv, prog=prog, recipe=recipe, held=held)


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """Make a dataclass of the flags' values; an error that begins with a field's name names its flag."""
    flags = {one.name: flag_of(one) for one in fields(cls) if one.init}
    try:
        # An `InitVar` has the value of another class's flag.
        names = {name: flags.get(name, name) for name in inspect.signature(cls).parameters}
        return cls(**{name: values[flag] for name, flag in names.items()})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{flags[name]} {rest}" if name in flags else str(error)) from error


_MOST_PARTS = 10**5
_MANY = list | tuple | set


def _read_config(path: Path, parser: _Parser) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: not valid yaml ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"--config {path}: must be a mapping of options, got {type(given).__name__}")
    parts: list[Any] = [given]
    for _ in range(_MOST_PARTS):
        if not parts:
            break
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, _MANY) else ()
    else:
        raise ValueError(f"--config {path}: holds, or its aliases make, more than {_MOST_PARTS} values")
    names = parser.names
    unknown = [f"{str(key)!r}{near(str(key), list(names))}" for key in given if key not in names]
    if unknown:
        raise ValueError(f"--config {path}: unknown field {', '.join(unknown)}")
    keys: dict[str, str] = {}
    for key in given:
        if (other := keys.setdefault(names[key], key)) != key:
            raise ValueError(f"--config {path}: {other} and {key} are two names of one option; give one")
    actions = {action.dest: action for action in reversed(parser._actions)}
    return {
        name: _as_flag(actions[name], given[key], f"--config {path}: {name}", name in parser.mappings)
        for name, key in keys.items()
    }


def _as_flag(action: argparse.Action, value: Any, key: str, mapping: bool) -> Any:
    """Return the value in the form of the command line: argparse converts only such defaults."""
    if value is None and action.default is not None:
        raise ValueError(f"{key} must have a value")
    parts = [] if value is None else value if isinstance(value, list) and not mapping else [value]
    if not all(isinstance(part, str | int | float) or (mapping and isinstance(part, dict)) for part in parts):
        # A bare date in yaml, for example, is not a text.
        number, text = action.type in (int, float), "a mapping or a text" if mapping else "a text"
        raise ValueError(f"{key} must be {'a number' if number else text}, got {str(value)[:80]}")
    if isinstance(value, list) and action.nargs is None:
        value = ",".join(map(str, value))  # The flag takes several values in this form.
    if not isinstance(value, str | int | float):
        return value
    allowed = None if action.choices is None else [str(choice) for choice in action.choices]
    # A bare off in yaml is false.
    text = "off" if value is False and allowed is not None and "off" in allowed else str(value)
    if allowed is not None and text not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {text!r}")
    return text
