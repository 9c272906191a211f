"""Counting what is left out."""

import json
import logging

from motionenhancer.data import Skip, SkipLog


def test_empty():
    log = SkipLog()
    assert log.total == 0
    assert log.summary() == "nothing skipped"
    assert log.to_json() == {"total": 0, "counts": {}, "notes": {}, "entries": [], "entries_left_out": 0}


def test_counts_entries_and_summary():
    log = SkipLog()
    log.add("empty text", id="a", line=3)
    log.add("missing video file", id="b", line=5, detail="/v/b.mp4")
    log.add("empty text", line=9)
    log.add("empty text")
    assert log.total == 4
    assert log.entries[1] == Skip("b", 5, "missing video file", "/v/b.mp4")
    assert log.summary() == (
        "4 skipped: 3 empty text (line 3, id a; line 9), 1 missing video file (line 5, id b: /v/b.mp4)"
    )
    assert log.summary(examples=0) == "4 skipped: 3 empty text, 1 missing video file"


def test_memory_is_bounded_but_the_count_is_not():
    log = SkipLog(keep=5)
    for i in range(1000):
        log.add("bad", line=i + 1)
    assert log.total == 1000
    assert [entry.line for entry in log.entries] == [1, 2, 3, 4, 5]
    assert log.to_json()["entries_left_out"] == 995


def test_notes_are_bounded_too():
    log = SkipLog(keep=5)
    for i in range(1000):
        log.note(f"odd {i}")
    assert len(log.notes) == 6
    assert sum(log.notes.values()) == 1000


def test_json_round_trip():
    log = SkipLog()
    log.add("bad", id="x", line=2, detail="why")
    log.note("odd")
    data = json.loads(json.dumps(log.to_json()))
    assert data["entries"] == [{"id": "x", "line": 2, "reason": "bad", "detail": "why"}]
    assert data["counts"] == {"bad": 1}
    assert data["notes"] == {"odd": 1}


def test_only_the_first_of_a_reason_are_printed(caplog):
    log = SkipLog(shout=2)
    with caplog.at_level(logging.WARNING, logger="motionenhancer"):
        for i in range(5):
            log.add("bad", line=i + 1)
            log.note("odd", id=f"sample {i}")
    shown = [record.getMessage() for record in caplog.records]
    assert [text for text in shown if "bad" in text] == [
        "skipped line 1: bad",
        "skipped line 2: bad (more of these are counted, not printed)",
    ]
    assert [text for text in shown if "odd" in text] == [
        "sample 0: odd (more of these are counted, not printed)"
    ]


def test_merge():
    logs = [SkipLog(), SkipLog()]
    for i, log in enumerate(logs):
        log.add("bad", line=i + 1)
        log.note("odd")
    total = SkipLog(keep=1)
    total.merge(logs)
    assert total.total == 2
    assert total.notes["odd"] == 2
    assert [entry.line for entry in total.entries] == [1]
