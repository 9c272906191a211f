"""Every row of the tables of the toy's two pages of controls is in a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studies.toy.study_report import shown

ROOT = Path(__file__).parents[2]
NAMES = ("toy.md", "toy_controls.md")
PAGES = "\n\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in NAMES)
#: The arms with which a column of differences compares, by its name in a table's head.
AGAINST = {
    "plain": "plain",
    "the teacher's": "teacher",
    "MTTI only": "teacher, MTTI only",
    "inverted": "teacher, inverted",
    "inverted, MTTI only": "teacher, inverted, MTTI only",
}


FILES = sorted((ROOT / "benchmarks" / "results").glob("toy-motion-*.json"))
RECORDS = [json.loads(path.read_text(encoding="utf-8"))["arms"] for path in FILES]


def tables(page: str) -> list[list[dict[str, str]]]:
    """The tables of maps: each row's cells by the name of their column."""
    found: list[list[dict[str, str]]] = []
    head: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif cells[0] == "maps":
            head = cells
            found.append([])
        elif head and not cells[0].startswith("---"):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


def printed(column: str, row: dict[str, Any]) -> str:
    """What a cell of ``column`` shows of an arm's record."""
    if column == "seeds":
        return str(len(row["seeds"]))
    if column == "lift":
        return f"{row['lift']:.2f}" if "lift" in row else ""
    measure = "right" if column.startswith("both") else "direction"
    if " over " in column or column.startswith("over "):
        other = AGAINST[column.partition("over ")[2]]
        return shown(row.get(f"over {other}", {}).get(measure), "+")
    if column == "direction, %":
        return shown(row["direction"])
    return f"{row[{'both': 'right'}.get(column, column)]['mean']:.1f}"


@pytest.mark.parametrize("rows", tables(PAGES), ids=lambda rows: rows[-1]["maps"])
def test_every_row_is_in_a_results_file(rows: list[dict[str, str]]) -> None:
    """Each row equals the record of its arm in one file, in all columns."""
    for row in rows:
        cells = {column: cell for column, cell in row.items() if column != "maps"}
        held = [arms[row["maps"]] for arms in RECORDS if row["maps"] in arms]
        seen = [{column: printed(column, one) for column in cells} for one in held]
        assert cells in seen, (row["maps"], seen)


def test_the_tables_are_found() -> None:
    assert sum(len(rows) for rows in tables(PAGES)) > 50
