"""Render chat templates with a limit on their work: a model's folder may bring one that never ends.

transformers renders templates in Jinja's sandbox. The sandbox limits what a template may reach, but neither
its running time nor the length of its output. Here its environment also counts work: the nodes of each body
that runs, and the sizes of the values that are written, compared, passed to functions and returned. The count
does not depend on time, so a template fails at the same place on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

__all__ = ["EndlessTemplate", "apply_chat_template"]

_WORK = 10**6
"""Units of work of one rendering, besides `_SHARE` units for each character of the conversation.

Templates of the known families need a few thousand units for a message."""
_SHARE = 1000

_DIGITS = 10**4
"""Bits of the largest whole number that a template may compute."""

#: Functions and filters whose result may be as long as the product of what they are given.
_MULTIPLY = {"replace", "join", "ljust", "rjust", "center", "zfill", "expandtabs", "translate", "to_bytes"}
_MULTIPLY |= {"format", "format_map", "indent", "batch", "slice", "tojson"}
#: What takes more steps than the size of what it is given. No chat template needs it.
_SLOW_FILTERS = ("pprint", "striptags", "urlize", "wordwrap")
_SLOW_METHODS = {"encode", "decode"}
_SLOW_GLOBALS = ("lipsum",)


_ENTRIES: Any = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class EndlessTemplate(ValueError):
    """A chat template does more work than its conversation can need."""


class _Budget:
    """The work that is left to one rendering."""

    def __init__(self, messages: Any) -> None:
        self.left = _WORK**2  # While the conversation is measured.
        self.total = self.left = _WORK + _SHARE * self.size(messages)

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise EndlessTemplate(
                "does not end, or writes too much: it takes more than "
                f"{self.total} units of work (nodes and characters)"
            )

    def size(self, *values: Any) -> int:
        """The characters and entries of values, with what they hold, at most a little more than is left."""
        size, stack = 0, list(values)
        while stack:
            value = stack.pop()
            size += 1
            if isinstance(value, (str, bytes, range)):
                size += len(value)
            elif isinstance(value, int):
                size += value.bit_length() // 8
            elif isinstance(value, _ENTRIES):
                stack += value
            elif isinstance(value, dict):
                stack += value
                stack += value.values()
            elif isinstance(value, Namespace):
                stack.append(value._Namespace__attrs)
            if size > self.left:
                self.spend(size)
        return size

    def product(self, *values: Any) -> None:
        """Refuse a product of values that is longer than the whole rendering may be."""
        sizes = sorted(abs(value) if isinstance(value, int) else self.size(value) for value in values)
        if len(sizes) > 1 and sizes[-1] * sizes[-2] > self.total:
            self.spend(sizes[-1] * sizes[-2])

    def formatted(self, text: str, *values: Any) -> None:
        """Refuse a format whose widths or values make it too long."""
        widths = [int(number) for number in re.findall(r"\d{1,20}", text)]
        self.product(text, max([1, *widths]))
        for value in values:
            for entry in [*value] if isinstance(value, tuple | list) else [value]:
                self.product(text, entry)


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@pass_context
def _charged(context: Context, value: Any, work: int, deep: bool) -> Any:
    """Count work and the size of a value; return the value."""
    if (budget := _budget.get()) is not None:
        budget.spend(work + budget.size(value) if deep else work)
    return value


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that counts what it is given and returns."""

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if (budget := _budget.get()) is None:
            return function(*args, **kwargs)
        given = [*args, *kwargs.values()]
        budget.spend(budget.size(*given))
        if name in _MULTIPLY:
            budget.product(*given)
        if name == "format":
            budget.formatted(str(args[0]), *given[1:])
        result = function(*args, **kwargs)
        budget.spend(budget.size(result))
        return result

    return counted


class _Functions(dict[str, Any]):
    """Filters or tests of an environment: each counts."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        super().__init__()
        for name, function in functions.items():
            self[name] = function

    def __setitem__(self, name: str, function: Any) -> None:
        super().__setitem__(name, function if function is _charged else _counted(name, function))


class _Count(NodeTransformer):
    """Adds the counting to a parsed template."""

    def _charge(self, node: Any, work: int, deep: bool = True) -> nodes.Expr:
        given: list[nodes.Expr] = [nodes.Const(work), nodes.Const(deep)]
        charged = nodes.Filter(node, "_charged", given, [], None, None)
        charged.set_lineno(node.lineno)
        return charged

    def _body(self, node: Any) -> Any:
        parts = [part for child in node.body for part in (child, *child.find_all(nodes.Node))]
        texts = [getattr(part, "data", getattr(part, "value", "")) for part in parts]
        work = 1 + len(parts) + sum(len(text) for text in texts if isinstance(text, str))
        start = nodes.ExprStmt(self._charge(nodes.Const(None, lineno=node.lineno), work, deep=False))
        node = self.generic_visit(node)
        node.body.insert(0, start.set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self._body(node)
        node.iter = self._charge(node.iter, 1)
        if node.test is not None:
            work = 1 + sum(1 for _ in node.test.find_all(nodes.Node))
            node.test = nodes.And(self._charge(nodes.Const(True, lineno=node.lineno), work, False), node.test)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.nodes = [n if isinstance(n, nodes.TemplateData) else self._charge(n, 1) for n in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.nodes = [self._charge(n, 1) for n in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.expr = self._charge(node.expr, 1)
        for other in node.ops:
            other.expr = self._charge(other.expr, 1)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        return self._charge(node, 1) if isinstance(node.arg, nodes.Slice) else node


class _CountingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, which also counts work."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _Functions({k: v for k, v in self.filters.items() if k not in _SLOW_FILTERS})
        self.filters["_charged"] = _charged
        self.tests: dict[str, Any] = _Functions(self.tests)
        for name in _SLOW_GLOBALS:
            self.globals.pop(name, None)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Count().visit(source), *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        slow = isinstance(obj, str | bytes) and attr in _SLOW_METHODS
        return not slow and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> str:
            if (budget := _budget.get()) is not None:
                entries = [*args, *kwargs.values()]
                entries += [v for entry in entries if isinstance(entry, Mapping) for v in entry.values()]
                budget.formatted(value.__self__, *entries)
            return function(*args, **kwargs)

        return counted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if budget is None:
            return super().call_binop(context, operator, left, right)
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}
            if bits.get(operator, 0) > _DIGITS:
                budget.spend(budget.total + 1)
        elif operator == "%" and isinstance(left, str):
            budget.formatted(left, *([right.values()] if isinstance(right, Mapping) else [right]))
        elif operator == "*":
            budget.product(left, right)
        budget.spend(budget.size(left, right))
        result = super().call_binop(context, operator, left, right)
        budget.spend(budget.size(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if budget is None:
            return super().call(__context, __obj, *args, **kwargs)
        given = [*args, *kwargs.values()]
        own = getattr(__obj, "__self__", None)
        if isinstance(own, str | bytes | int | float | list | tuple | dict):
            given.append(own)
        budget.spend(budget.size(*given))
        if getattr(__obj, "__name__", "") in _MULTIPLY:
            budget.product(*given)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(budget.size(result))
        return result


# transformers makes its environment from this name when it compiles a template.
chat_template_utils.ImmutableSandboxedEnvironment = _CountingEnvironment  # type: ignore[misc]


def apply_chat_template(
    processor: Any, messages: Sequence[dict[str, Any]], *, prompt: bool = False, template: str | None = None
) -> str:
    """Render messages with the chat template of a processor or tokenizer, or with `template`.

    Args:
        processor: has `apply_chat_template` of transformers.
        messages: the conversation.
        prompt: whether the text ends with the beginning of an answer.
        template: replaces the processor's own template.

    Raises:
        EndlessTemplate: the template does more work than the conversation can need.
        ValueError: the template fails in another way. Both messages name the template's folder if it is
            known.

    >>> class Line:
    ...     def apply_chat_template(self, messages, **options):
    ...         return "".join(message["content"] for message in messages)
    >>> apply_chat_template(Line(), [{"role": "user", "content": "a"}])
    'a'
    """
    options = {} if template is None else {"chat_template": template}
    token = _budget.set(_Budget(messages))
    try:
        return processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **options
        )
    except Exception as error:
        # Any error of the model's own template, such as one of its sandbox.
        where = getattr(getattr(processor, "tokenizer", processor), "name_or_path", "")
        of = f" of {where}" if where else ""
        said = " ".join(str(error).split())
        if isinstance(error, EndlessTemplate):
            raise EndlessTemplate(f"the chat template{of} {said}") from None
        raise ValueError(f"the chat template{of} fails ({type(error).__name__}: {said})") from error
    finally:
        _budget.reset(token)
