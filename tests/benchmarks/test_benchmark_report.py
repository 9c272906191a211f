"""The report on results files made up here, whose every figure is known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from measure.plot import sweeps
from measure.results import ResultsError, read_results
from measure.table import seconds, size, times
from report import main

ROOT = Path(__file__).resolve().parents[2]


def entry(work="reading", case="big", role="ours", p50=0.002, length=100, memory=1 << 20, over=None, **more):
    spread = {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50}
    ratios = None if over is None else {"p20": 0.9 * over, "p50": over, "p80": 1.2 * over}
    info = {
        "work": work,
        "case": case,
        "role": role,
        "backend": "torch" if role == "ours" else None,
        "dtype": "float32",
        "length": length,
        "seconds": spread,
        "device_seconds": None,
        "over_ours": ratios,
        "peak_bytes": memory,
        "floor_seconds": None,
        **more,
    }
    return {"extra_info": info}


@pytest.fixture
def write(tmp_path):
    def make(name, *entries, device="A chip", ceilings=None, **more):
        machine = {"device": device, "versions": {"torch": "9.9"}, "ceilings": ceilings or {}}
        path = tmp_path / name
        path.write_text(json.dumps({"benchmarks": list(entries), "machine_info": machine, **more}))
        return str(path)

    return make


def test_ratios(write, capsys):
    path = write("a.json", entry(role="flash alone", p50=0.005, memory=3 << 20, over=2.5), entry())
    assert main([path]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    ours = next(line for line in lines if line[:1] == ["ours"])
    assert ours == ["ours", "(torch)", "2", "ms", "(1.8", "ms–2.2", "ms)", "1", "1", "MiB", "1"]
    flash = next(line for line in lines if line[:1] == ["flash"])
    assert flash[2:4] == ["5", "ms"]
    assert flash[7:] == ["2.5", "(2.25–3)", "3", "MiB", "3"]
    assert "A chip" in out
    assert "torch 9.9" in out
    assert "floor" not in out


def test_roofline(write, capsys):
    floor = {"floor_seconds": 0.0005, "device_seconds": {"p20": 0.0009, "p50": 0.001, "p80": 0.0011}}
    assert main([write("a.json", entry(**floor), ceilings={"bytes_per_second": 3e12})]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("    ours")]
    assert line.split()[2:4] == ["1", "ms"]
    assert line.split()[-3:] == ["500", "µs", "50%"]
    assert "bytes per second 3e+12" in out


def test_time_of_the_host_is_a_figure_of_its_own(write, capsys):
    host = {"host_seconds": {"p20": 1e-5, "p50": 2e-5, "p80": 3e-5}}
    assert main([write("a.json", entry(**host), entry(role="eager map", over=2.0))]) == 0
    out = capsys.readouterr().out
    ours, eager = (line for line in out.splitlines() if line.startswith(("    ours", "    eager")))
    assert ours.split()[-2:] == ["20", "µs"]
    assert eager.split()[-1] == "-"
    assert "host        time of the host" in out


def test_change(write, capsys):
    new = write("new.json", entry(), entry(case="other", p50=0.004), entry(case="third"))
    old = write("old.json", entry(p50=0.0021), entry(case="other", p50=0.001))
    assert main([new, old]) == 0
    lines = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "ours (torch)" in line]
    assert lines == ["=", "4×", "new"]


def test_another_device_is_pointed_out(write, capsys):
    assert main([write("new.json", entry()), write("old.json", entry(), device="B chip")]) == 0
    assert "ATTENTION" in capsys.readouterr().out


def test_what_was_refused_or_skipped_is_listed(write, capsys):
    refused = [{"work": "reading", "case": "big", "role": "ours", "reason": "3% wrong"}]
    skipped = [{"work": "reading", "case": "huge", "role": "eager map", "reason": "does not fit"}]
    path = write("a.json", entry(role="eager map", over=None), refused=refused, skipped=skipped)
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert out.index("REFUSED") < out.index("3% wrong") < out.index("not measured") < out.index("huge")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("not json", "is not a benchmark file, not even JSON"),
        ("[1, 2]", "it has no list of benchmarks"),
        ('{"benchmarks": 3}', "it has no list of benchmarks"),
        ('{"benchmarks": [{"stats": {}}], "machine_info": {}}', "of something else"),
        ('{"benchmarks": [{"extra_info": {"work": "x"}}]}', "of something else"),
        ('{"benchmarks": [], "machine_info": {"node": "x"}}', "of something else"),
    ],
)
def test_files_of_another_kind(tmp_path, capsys, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_runs_as_a_script_from_anywhere(write, tmp_path):
    script = ROOT / "benchmarks" / "report.py"
    command = [sys.executable, str(script), write("a.json", entry())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reading" in done.stdout


def test_sweeps_are_works_of_several_lengths(write):
    path = write(
        "a.json",
        entry(length=200, case="b"),
        entry(length=100, case="a"),
        entry(length=200, case="b, memory"),
        entry(work="one length"),
    )
    found = sweeps(read_results(Path(path)))
    assert {work: {role: [f.length for f in fs] for role, fs in r.items()} for work, r in found.items()} == {
        "reading": {"ours": [100, 200]}
    }


def test_plot(write, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    entries = [entry(length=n, case=str(n), role=r) for n in (64, 128, 512) for r in ("ours", "eager map")]
    assert main([write("a.json", *entries), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert main([write("b.json", entry()), "--plot", str(picture)]) == 2
    assert "nothing to plot" in capsys.readouterr().err


def test_plot_without_matplotlib_is_explained(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([write("a.json", entry()), "--plot", str(tmp_path / "p.png")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


def test_numbers_read_at_a_glance():
    assert [seconds(x) for x in (2.5, 0.1234, 4.2e-5)] == ["2.5 s", "123 ms", "42 µs"]
    assert [size(x) for x in (12, 2048, 3 << 20, 5 << 30)] == ["12 B", "2 KiB", "3 MiB", "5 GiB"]
    assert [times(x) for x in (0.987, 1.5, 123.4)] == ["0.99", "1.5", "123"]


def test_error_is_a_value_error(tmp_path):
    with pytest.raises(ResultsError, match="cannot be read"):
        read_results(tmp_path / "none.json")
