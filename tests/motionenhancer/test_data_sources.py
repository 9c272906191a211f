"""Tables, data sets of the Hub and other trainers' forms give the samples that json lines give."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World
from train_support import flags, report_of, shared_priors, weights_of

from motionenhancer import train
from motionenhancer.data import Sample, SkipLog, read_samples
from motionenhancer.data.sources import check_source, open_source

TURNS = [
    {"role": "system", "content": "Look."},
    {"role": "user", "content": "<video>What moves?"},
    {"role": "assistant", "content": "A ring."},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def rows_of(root: Path) -> list[dict[str, Any]]:
    """Two rows, each with keys that the other does not have."""
    return [
        {"id": "x", "messages": TURNS, "videos": ["a.mp4"], "task": "MR"},
        {"id": "y", "messages": TURNS[1:], "videos": ["b.mp4"], "video_start": 0.5},
    ]


def table_of(root: Path) -> list[dict[str, Any]]:
    """The same with every key in every row, as in a table."""
    keys = {key: None for row in rows_of(root) for key in row}
    return [{**keys, **row} for row in rows_of(root)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(samples: Any) -> list[tuple[Any, ...]]:
    return [(s.id, s.messages, s.videos, s.task) for s in samples]


def read(data: Any, root: Path) -> tuple[list[Sample], SkipLog]:
    log = SkipLog(shout=0)
    return list(read_samples(data, root, log)), log


@pytest.mark.parametrize("kind", ["parquet", "dataset", "hub"])
def test_a_table_gives_the_samples_of_json_lines(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    expected, log = read(write(root / "rows.jsonl", rows_of(root)), root)
    table = datasets.Dataset.from_list(table_of(root))
    data: Any = table
    if kind == "parquet":
        data = root / "rows.parquet"
        table.to_parquet(data)
    elif kind == "hub":
        asked = []

        def load(*args: Any, **options: Any) -> Any:
            asked.append((args, options))
            return table

        monkeypatch.setattr(datasets, "load_dataset", load)
        data = "someone/moving-things@main:test"
    found, notes = read(data, root)
    assert plain(found) == plain(expected)
    assert len(found) == 2
    assert notes.notes == log.notes == {}, "what is null in a table is no unknown key"
    if kind == "hub":
        assert asked == [(("someone/moving-things",), {"revision": "main", "split": "test"})]
    assert open_source(data).digest() == open_source(data).digest()
    other = datasets.Dataset.from_list(table_of(root)[:1])
    assert open_source(other).digest() != open_source(table).digest()
    assert open_source(table.select_columns(table.column_names[::-1])).digest() == open_source(table).digest()


def test_rows_of_tables_have_numbers_and_no_nulls(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    rows = [{"a": 1, "b": [{"c": None, "d": 2}]}, {"a": None, "b": [{"c": 3, "d": None}]}]
    table, asked = datasets.Dataset.from_list(rows), []
    table.to_parquet(root / "rows.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: asked.append(options) or table)
    given = [(1, {"a": 1, "b": [{"d": 2}]}), (2, {"b": [{"c": 3}]})]
    for data in (table, root / "rows.parquet", "someone/things"):
        assert [(row.line, row.value) for row in open_source(data).rows()] == given
    assert asked == [{"revision": None, "split": "train"}], "where none is named"


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(root: Path) -> None:
    for name in ("m", "z", "a", "k"):
        write(root / f"{name}.json", [{"id": name}])
    (root / "b.txt").write_text("no rows")
    check_source(root, "--data", folder=True)
    rows = list(open_source(root, folder=True).rows())
    assert [row.value for row in rows] == [{"id": name} for name in "akmz"]


@pytest.mark.parametrize("kind", ["Audio", "Image", "Video"])
def test_files_in_a_column_are_not_decoded(kind: str, root: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    file = str(root / "a.mp4")
    table = datasets.Dataset.from_list([{"x": file}]).cast_column("x", getattr(datasets, kind)())
    assert [row.value for row in open_source(table).rows()] == [{"x": {"path": file}}]


@pytest.mark.parametrize(
    ("data", "package"), [("rows.parquet", "pyarrow"), ("someone/moving-things", "datasets")]
)
def test_a_missing_package_is_named(
    data: str, package: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "rows.parquet").touch()
    monkeypatch.chdir(root)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ValueError, match=f"--data {data} needs {package}: pip install {package}"):
        check_source(data, "--data")
    with pytest.raises(ValueError, match=f"path {data} needs {package}"):
        open_source(data)


def test_what_is_no_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("clips/none.jsonl", "none", ".", "clips/none.parquet", "none/dataset_info.json:a"):
        with pytest.raises(ValueError, match="--data must be a file that exists, got"):
            check_source(wrong, "--data")
    broken = root / "broken.parquet"
    broken.write_bytes(b"no table")
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a readable parquet file"):
        open_source(broken)
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    with pytest.raises(ValueError, match=r"must be one datasets\.Dataset, got DatasetDict"):
        check_source(datasets.DatasetDict({}), "--data")
    with pytest.raises(ValueError, match=r"must be one datasets\.Dataset, got DatasetDict"):
        open_source(datasets.DatasetDict({}))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **o: (_ for _ in ()).throw(OSError("off\nline " * 99))
    )
    with pytest.raises(ValueError, match=r"no/where: no such file, .*\((off line ){33}off\)"):
        open_source("no/where")


# ---- LLaMA-Factory and ms-swift ----

ALPACA = {"instruction": "<video>What", "input": "moves?", "output": "A ring.", "videos": ["a.mp4"]}
OWN = {"q": "<video>What\nmoves?", "a": "A ring.", "clip": ["a.mp4"], "unused": 1}
SHARED = {
    "messages": [{"from": "human", "value": "<video>What\nmoves?"}, {"from": "gpt", "value": "A ring."}],
    "videos": ["a.mp4"],
}
TAGGED = {
    "talk": [{"who": "U", "says": "<video>What\nmoves?"}, {"who": "A", "says": "A ring."}],
    "v": "a.mp4",
}
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "videos": "videos"}},
        ALPACA,
    ),
    "own": ({"columns": {"prompt": "q", "response": "a", "videos": "clip"}}, OWN),
    "shared": ({"formatting": "sharegpt", "columns": {"messages": "messages", "videos": "videos"}}, SHARED),
    "tagged": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "videos": "v"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A"},
        },
        TAGGED,
    ),
}


def conversation(sample: Sample) -> list[tuple[str, list[dict[str, str]]]]:
    return [(message["role"], message["content"]) for message in sample.messages]


EXPECTED = [
    ("user", [{"type": "video"}, {"type": "text", "text": "What\nmoves?"}]),
    ("assistant", [{"type": "text", "text": "A ring."}]),
]


@pytest.mark.parametrize("name", list(ENTRIES))
def test_an_entry_of_llama_factorys_list(name: str, root: Path) -> None:
    info = {}
    for key, (entry, row) in ENTRIES.items():
        write(root / f"{key}.jsonl", [row])
        info[key] = {**entry, "file_name": f"{key}.jsonl"}
    (root / "dataset_info.json").write_text(json.dumps(info))
    log = SkipLog(shout=0)
    (sample,) = read_samples(f"{root}/dataset_info.json:{name}", on_skip=log)
    assert conversation(sample) == EXPECTED
    assert sample.videos == (root / "a.mp4",)
    assert not log.notes


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"ranking": True}, "ranking must not be true: training on preferences"),
        ({"num_samples": 5, "script_url": "x.py"}, "not supported: num_samples, script_url"),
        ({"columns": {"chosen": "c"}}, r"not supported: columns\.chosen"),
        ({"formatting": "openai"}, "formatting must be alpaca or sharegpt, got 'openai'"),
        ({"file_name": None}, "must have file_name or hf_hub_url"),
    ],
)
def test_an_entry_with_what_is_not_understood_is_refused(
    entry: dict[str, Any], error: str, root: Path
) -> None:
    write(root / "rows.jsonl", [ALPACA])
    (root / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "rows.jsonl", **entry}}))
    with pytest.raises(ValueError, match=error):
        open_source(f"{root}/dataset_info.json")
    with pytest.raises(ValueError, match=r"give dataset_info\.json:NAME, where NAME is one of a"):
        open_source(f"{root}/dataset_info.json:b")


@pytest.mark.parametrize(
    "row",
    [
        ALPACA,
        {"query": "<video>What\nmoves?", "response": "A ring.", "videos": ["a.mp4"]},
        {"messages": TURNS[1:], "videos": [{"path": "a.mp4"}]},
    ],
    ids=["alpaca", "query and response", "ms-swift"],
)
def test_rows_without_a_list(row: dict[str, Any], root: Path) -> None:
    (sample,), log = read(write(root / "rows.jsonl", [row]), root)
    assert [role for role, _ in conversation(sample)] == ["user", "assistant"]
    assert conversation(sample)[0][1][0] == {"type": "video"}
    assert sample.videos == (root / "a.mp4",)
    assert not log.notes


def test_earlier_turns_of_the_alpaca_form(root: Path) -> None:
    row = {**ALPACA, "instruction": "And then?", "input": "", "history": [["<video>What moves?", "A ring."]]}
    (sample,), _ = read(write(root / "rows.jsonl", [row]), root)
    said = [content[-1]["text"] for _, content in conversation(sample)]
    assert said == ["What moves?", "A ring.", "And then?", "A ring."]
    for wrong in ("earlier", [["only a question"]], [7]):
        bad = write(root / "bad.jsonl", [{**row, "history": wrong}, ALPACA])
        _, log = read(bad, root)
        assert log.counts == {"missing fields": 1}, wrong


def test_a_run_on_a_table_learns_what_one_on_json_lines_does(world: World, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    table = tmp_path / "train.parquet"
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(table)
    weights = []
    for data in (table, world.data):
        out = tmp_path / data.suffix
        options = {"data": data, "prior_dir": shared_priors(world), "max_steps": 1}
        assert train.main(flags(world, out, **options)) == 0
        weights.append(weights_of(out))
    assert all((weights[0][name] == value).all() for name, value in weights[1].items())
    assert report_of(tmp_path / ".parquet")["identity"]["data"] == str(table)
