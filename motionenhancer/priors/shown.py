"""A prior in one line, and as a table for notebooks."""

from __future__ import annotations

from dataclasses import fields
from html import escape
from textwrap import shorten
from typing import Any


def one_line(prior: Any) -> str:
    """The text, words, grid and teacher of a `MotionPrior`, and its non-default settings, in one line."""
    words = ", ".join(prior.prompt[slice(*span)] for span in prior.spans)
    given = [
        f"{one.name}={value}"
        for one in fields(prior.settings)
        if (value := getattr(prior.settings, one.name)) != one.default
    ]
    about = [
        shorten(repr(prior.prompt), 60, placeholder="..."),
        f"words: {shorten(words, 60, placeholder=' ...')}",
        f"grid {'×'.join(map(str, prior.grid))}",
        f"teacher {prior.teacher[:8]}",
        " ".join(given) or "default settings",
    ]
    return f"MotionPrior({', '.join(about)})"


def html_table(prior: Any) -> str:
    """A table of each word's share of attention on each frame; darker means more."""
    frames, high, wide = prior.grid
    rows = prior.attention.float().reshape(-1, frames, high * wide).sum(dim=2)
    shares = rows / rows.sum(dim=1, keepdim=True).clamp(min=1e-12)
    lines = [
        f"<tr><th>{escape(prior.prompt[slice(*span)])}</th>"
        + "".join(f'<td style="background:rgba(200,60,40,{s:.2f})">{s:.2f}</td>' for s in row)
        + "</tr>"
        for span, row in zip(prior.spans, shares.tolist(), strict=True)
    ]
    head = "".join(f"<th>{number}</th>" for number in range(frames))
    table = f"<table><tr><th>word, frame</th>{head}</tr>{''.join(lines)}</table>"
    return f"<p>{escape(one_line(prior))}</p>{table}"
