"""Flags of the commands, read from the dataclasses that the code itself uses.

A field's `metadata` holds its help text. Its flag is its name, or `metadata["flag"]` where two dataclasses
of one command have a field of the same name. `metadata["aliases"]` lists older names. A field with
`metadata["positional"]`, a text or None, is given without a flag.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

__all__ = ["flag_of", "parse_arguments", "setting"]


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field with its help text; see `flag_of` for `metadata`."""
    return field(default=default, metadata={"help": help, **metadata})


def flag_of(one: Field[Any]) -> str:
    """Return the flag of a dataclass field, without the dashes."""
    return one.metadata.get("flag", one.name)


@dataclass(frozen=True)
class _Flag:
    """A field as the parser sees it: under its flag's name."""

    name: str
    aliases: tuple[str, ...]


class _Parser(HfArgumentParser):
    """Shows our own groups under --help, and those of transformers too under --help_all."""

    def __init__(self, classes: Sequence[Any], prog: str) -> None:
        self.flags: list[_Flag] = []
        self.behind: list[Any] = []
        super().__init__(classes, prog=prog, allow_abbrev=False, add_help=False)
        # The list of all options is a page long: errors should not drown in it.
        self.usage = "%(prog)s [--option value ...], with --help for all options"
        self.add_argument("--config", default=None, help="yaml file of these same options; flags override it")
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
            shown.type, shown.name = hints[one.name], flag_of(one)
            metadata = {name: value for name, value in one.metadata.items() if name not in ("flag", "type")}
            if not mine and works is not None and one.name not in works:
                metadata["help"] = argparse.SUPPRESS
            shown.type = one.metadata.get("type", shown.type)
            shown.metadata = MappingProxyType(metadata)
            self.flags.append(_Flag(shown.name, tuple(a.lstrip("-") for a in metadata.get("aliases", ()))))
            group = own if mine or theirs is None else theirs
            if metadata.get("positional"):
                group.add_argument(shown.name, nargs="?", metavar=shown.name.upper(), help=metadata["help"])
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
        start = "unrecognized arguments: "
        if message.startswith(start):
            known = [name for action in self._actions for name in action.option_strings]
            wrong = [part for part in message.removeprefix(start).split() if part.startswith("-")]
            hints = [_near(part.partition("=")[0], known) for part in wrong]
            message += "".join(dict.fromkeys(hint for hint in hints if hint))
        super().error(message)

    def names(self) -> dict[str, str]:
        """Every name that a yaml file may use, older ones too, and the flag that it sets."""
        return {name: flag.name for flag in self.flags for name in (flag.name, *flag.aliases)}


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        sys.stdout.write(parser.format_help(everything=option_string == "--help_all"))
        parser.exit()


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def parse_arguments(
    classes: tuple[Any, ...],
    argv: Sequence[str] | None,
    *,
    prog: str,
    recipe: Callable[[argparse.Namespace], Path | None] = lambda chosen: None,
) -> tuple[Any, ...]:
    """Read flags over `--config file.yaml` over a recipe over the dataclasses' own defaults.

    Args:
        classes: dataclasses, no two with a flag of the same name.
        argv: the command line without the program's name; None reads `sys.argv`.
        prog: shown in help and errors.
        recipe: returns a yaml file of defaults, or None, from the flags and the config.

    Returns:
        One object a class.

    Raises:
        SystemExit: a bad flag, a missing or malformed yaml file, or an unknown field in it, which is named.
    """
    parser = _Parser(classes, prog)
    try:
        chosen = parser.parse_args(argv)
        config = {} if chosen.config is None else _read_config(Path(chosen.config), parser)
        parser.set_defaults(**config)
        base = recipe(parser.parse_args(argv))
        if base is not None:
            parser.set_defaults(**{**_read_config(base, parser), **config})
        values = vars(parser.parse_args(argv))
        return tuple(_build(cls, values) for cls in classes)
    except ValueError as error:
        parser.error(str(error))


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """Make a dataclass of the flags' values; an error that begins with a field's name names its flag."""
    settable = [one for one in fields(cls) if one.init]
    try:
        return cls(**{one.name: values[flag_of(one)] for one in settable})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        flags = {one.name: f"--{flag_of(one)} {rest}" for one in settable}
        raise ValueError(flags.get(name, str(error))) from error


def _read_config(path: Path, parser: _Parser) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid yaml ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"--config {path}: must be a mapping of options, got {type(given).__name__}")
    names = parser.names()
    unknown = [f"{str(key)!r}{_near(str(key), list(names))}" for key in given if key not in names]
    if unknown:
        raise ValueError(f"--config {path}: unknown field {', '.join(unknown)}")
    given_as: dict[str, str] = {}
    for key in given:
        if (other := given_as.setdefault(names[key], key)) != key:
            raise ValueError(f"--config {path}: {other} and {key} are two names of one option")
    values = {names[key]: value for key, value in given.items()}
    for action in parser._actions:
        if isinstance(value := values.get(action.dest), list) and action.nargs is None:
            values[action.dest] = ",".join(map(str, value))  # As the flag itself takes several.
        if isinstance(values.get(action.dest), str | int | float):
            values[action.dest] = _as_flag(action, values[action.dest], path)
    return values


def _as_flag(action: argparse.Action, value: str | int | float, path: Path) -> str:
    """Return the value as it would stand on the command line: argparse converts such defaults only."""
    text = str(value)
    allowed = None if action.choices is None else [str(choice) for choice in action.choices]
    if value is False and allowed is not None and "off" in allowed:
        text = "off"  # What a bare off means in yaml.
    if allowed is not None and text not in allowed:
        raise ValueError(f"--config {path}: {action.dest} must be one of {', '.join(allowed)}, got {text!r}")
    return text
