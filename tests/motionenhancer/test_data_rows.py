"""Rows of data files as a stream: every form, any window, and each row read again from its place."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motionenhancer.data import rows
from motionenhancer.data.rows import stream_rows

LEAVES = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3))
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=6)
FORMS = st.sampled_from(["lines", "array", "indented", "loose"])


def written(values: list[Any], form: str, ascii: bool) -> bytes:
    if form == "lines":
        return "".join(json.dumps(v, ensure_ascii=ascii) + "\n" for v in values).encode()
    if form == "loose":
        texts = (json.dumps(v, ensure_ascii=ascii, indent=1) for v in values)
        return (" [\n" + "\n ,\r\n\t".join(texts) + "\n ]\n\n").encode()
    return json.dumps(values, ensure_ascii=ascii, indent=2 if form == "indented" else None).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OBJECTS, FORMS, st.booleans(), st.sampled_from([1, 2, 3, 7, 50, 1 << 20]), st.booleans())
def test_rows_come_back_with_any_window_and_again_from_their_place(
    tmp_path: Path, values: list[Any], form: str, ascii: bool, piece: int, mark: bool
) -> None:
    try:
        body = (b"\xef\xbb\xbf" if mark else b"") + written(values, form, ascii)
    except UnicodeEncodeError:
        return  # half a surrogate pair cannot stand in a utf-8 file
    path = tmp_path / "d.json"
    path.write_bytes(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows._Text.__init__, "__defaults__", (piece,))
        found = list(stream_rows(path))
    assert [row.problem for row in found] == [""] * len(values)
    assert [row.value for row in found] == values
    for row in found:
        assert row.line == body.count(b"\n", 0, row.offset) + 1
        assert json.JSONDecoder().raw_decode(body[row.offset :].decode())[0] == row.value


def test_an_array_on_one_line_is_never_held_whole(tmp_path: Path) -> None:
    path, row = tmp_path / "d.json", {"id": "a", "text": "ä" * 1000}
    with path.open("w") as file:
        file.write("[" + json.dumps(row))
        for _ in range(6000):
            file.write(", " + json.dumps(row))
        file.write("]")
    assert path.stat().st_size > 30 << 20
    tracemalloc.start()
    count = sum(row.value["id"] == "a" for row in stream_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6001
    assert peak < 8 << 20


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_bytes_that_are_no_text_end_an_array_where_they_stand(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "d.json"
    body = '[{"a": "é"},\n{"b": 1},\n{"c": "'.encode() + b'\xff"}, {"d": 2}]'
    path.write_bytes(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows._Text.__init__, "__defaults__", (piece,))
        *good, bad = stream_rows(path)
    assert [row.value for row in good] == [{"a": "é"}, {"b": 1}]
    assert bad.line == 3
    place = body.index(b"\xff")
    assert bad.problem == f"not utf-8 at byte {place}; the rest of the array is lost"


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_a_number_goes_on_behind_the_edge_of_the_window(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "d.json"
    path.write_text("[12345, 67, {}]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows._Text.__init__, "__defaults__", (piece,))
        assert [row.value for row in stream_rows(path)] == [12345, 67, {}]
