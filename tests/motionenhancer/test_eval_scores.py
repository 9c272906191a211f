"""Accuracies, intervals and the comparison of two runs, against plain computations."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from motionenhancer.evaluation.compare import compare_runs, mcnemar, read_results
from motionenhancer.evaluation.scores import Judged, score
from motionenhancer.evaluation.write import PAPER_ROWS, comparison_text, score_table
from motionenhancer.weights import student_digest


def rows(right: list[int], tasks: list[str], videos: list[str] | None = None) -> list[Judged]:
    names = videos or [f"v{i}" for i in range(len(right))]
    return [
        Judged(f"q{i}", tuple(t.split("+")), v, "x", "x" if r else "", "x", bool(r))
        for i, (r, t, v) in enumerate(zip(right, tasks, names, strict=True))
    ]


def random_rows(seed: int, n: int = 120) -> list[Judged]:
    rng = np.random.default_rng(seed)
    tasks = rng.choice(["AS", "CM", "NSM"], n, p=[0.6, 0.3, 0.1]).tolist()
    return rows(rng.integers(0, 2, n).tolist(), tasks, [f"v{i}" for i in rng.integers(0, 30, n)])


def naive(judged: list[Judged]) -> tuple[float, float]:
    tasks = sorted({t for j in judged for t in j.tasks})
    each = [[j.right for j in judged if t in j.tasks] for t in tasks]
    return (
        100 * sum(j.right for j in judged) / len(judged),
        sum(100 * sum(e) / len(e) for e in each) / len(each),
    )


def test_overall_and_average() -> None:
    result = score(rows([1, 1, 0, 0, 1], ["MR", "MR", "MR", "LM", "RC"]), ("RC", "MR", "LM"), samples=0)
    assert result["overall"] == pytest.approx(60)
    assert result["average"] == pytest.approx((200 / 3 + 0 + 100) / 3)
    assert list(result["tasks"]) == ["RC", "MR", "LM"]
    assert result["tasks"]["MR"] == {"accuracy": pytest.approx(200 / 3), "count": 3, "right": 2}
    assert result["count"] == 5
    assert "intervals" not in result


def test_a_question_of_two_tasks_counts_once_overall() -> None:
    result = score(rows([1, 0], ["MR+CM", "CM"]), samples=50)
    assert result["overall"] == 50
    assert result["average"] == 75
    assert result["tasks"]["CM"]["count"] == 2


def test_nothing_to_score() -> None:
    result = score([], ("MR",))
    assert (result["overall"], result["average"], result["tasks"], result["count"]) == (None, None, {}, 0)


@pytest.mark.parametrize("unit", ["question", "video"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intervals_agree_with_plain_resampling(seed: int, unit: str) -> None:
    judged = random_rows(seed)
    result = score(judged, samples=20_000, seed=seed, unit=unit)
    assert result == score(judged, samples=20_000, seed=seed, unit=unit), "seeded"
    groups = [[j for j in judged if (j.video if unit == "video" else j.id) == k] for k in _keys(judged, unit)]
    rng = np.random.default_rng(100 + seed)
    drawn = np.array(
        [
            naive(
                list(
                    itertools.chain.from_iterable(
                        groups[i] for i in rng.integers(0, len(groups), len(groups))
                    )
                )
            )
            for _ in range(3000)
        ]
    )
    for i, name in enumerate(("overall", "average")):
        expected = np.percentile(drawn[:, i], [2.5, 97.5])
        spread = drawn[:, i].std()
        # A tail quantile of 3,000 resamples is known to about 0.05 deviations; half of one is a wrong method.
        assert np.abs(np.array(result["intervals"][name]) - expected).max() < 0.25 * spread
    low, high = result["intervals"]["tasks"]["AS"]
    assert low < result["tasks"]["AS"]["accuracy"] < high


def _keys(judged: list[Judged], unit: str) -> list[str]:
    return sorted({j.video if unit == "video" else j.id for j in judged})


def test_intervals_cover_the_truth() -> None:
    """About 95 % of the intervals of 300 samples contain the known rate."""
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(300):
        low, high = score(rows(rng.binomial(1, 0.6, 80).tolist(), ["AS"] * 80), samples=400, seed=seed)[
            "intervals"
        ]["overall"]
        held += low <= 60 <= high
    assert 0.90 <= held / 300 <= 0.99


def test_mcnemar_by_enumeration() -> None:
    """The p-value is the share of all ways in which n answers can flip that are at least as unequal."""
    for n in range(9):
        ways = [sum(way) for way in itertools.product((0, 1), repeat=n)]
        for gained in range(n + 1):
            few = min(gained, n - gained)
            extreme = sum(w <= few or w >= n - few for w in ways) / len(ways)
            assert mcnemar(gained, n - gained) == pytest.approx(extreme)
    assert 0 < mcnemar(4000, 4200) < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_comparison_agrees_with_plain_resampling(seed: int) -> None:
    a = random_rows(seed)
    rng = np.random.default_rng(seed + 10)
    flips = rng.random(len(a)) < 0.3
    b = [Judged(**{**j.__dict__, "right": bool(j.right ^ f)}) for j, f in zip(a, flips, strict=True)]
    found = compare_runs(a, rng.permutation(np.array(b, object)).tolist(), samples=20_000, seed=seed)
    assert found.overall["difference"] == pytest.approx(naive(b)[0] - naive(a)[0])
    assert found.average["difference"] == pytest.approx(naive(b)[1] - naive(a)[1])
    drawn = []
    for _ in range(3000):
        chosen = rng.integers(0, len(a), len(a))
        first, second = naive([a[i] for i in chosen]), naive([b[i] for i in chosen])
        drawn.append([second[0] - first[0], second[1] - first[1]])
    for i, part in enumerate((found.overall, found.average)):
        values = np.array(drawn)[:, i]
        expected = np.percentile(values, [2.5, 97.5])
        assert np.abs(np.array(part["interval"]) - expected).max() < 0.25 * values.std()
    by_id = {j.id: j for j in b}
    assert {j.id for j in found.gained} == {j.id for j in a if not j.right and by_id[j.id].right}
    assert {j.id for j in found.lost} == {j.id for j in a if j.right and not by_id[j.id].right}
    assert found.p_value == mcnemar(len(found.gained), len(found.lost))


def test_pairing_tells_more_than_two_intervals() -> None:
    """The paired difference of two runs can be clear of zero although the two intervals overlap."""
    a = rows([i % 2 for i in range(200)], ["AS"] * 200)
    b = rows([1 if i < 24 else i % 2 for i in range(200)], ["AS"] * 200)
    assert score(a)["intervals"]["overall"][1] > score(b)["intervals"]["overall"][0]
    assert compare_runs(a, b).overall["interval"][0] > 0


def test_comparison_by_task_and_of_what_both_have() -> None:
    a = rows([1, 0, 0, 1], ["AS", "AS", "CM", "CM"])
    b = rows([1, 1, 1], ["AS", "AS", "CM"])
    found = compare_runs(a, b, samples=10)
    assert (found.questions, found.only) == (3, (1, 0))
    found = compare_runs(a, b, task="cm", samples=0)
    assert [j.id for j in found.gained] == ["q2"]
    assert "interval" not in found.overall
    assert math.isclose(found.p_value, 1.0)
    text = comparison_text(found, ("one", "two"), "cm")
    assert "1 gained, 0 lost" in text
    assert "q2 (CM)" in text
    with pytest.raises(ValueError, match=r"--task must be one of \['AS', 'CM'\], got 'MR'"):
        compare_runs(a, b, task="MR")
    with pytest.raises(ValueError, match="no question in common"):
        compare_runs(a[:1], b[1:])
    with pytest.raises(ValueError, match="disagree on the right answer to 'q0'"):
        compare_runs(a, [Judged("q0", ("AS",), "v", "y", "x", "x", True)])


def test_results_are_read_back(tmp_path: Path) -> None:
    judged = [
        Judged("q", ("AS",), "v", "x", None, "", False),
        Judged("r", ("CM",), "v", "x\u2028", "", "", True),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text(
        "".join(json.dumps(asdict(j), ensure_ascii=False) + "\n" for j in judged), encoding="utf-8"
    )
    assert read_results(tmp_path) == read_results(file) == judged
    row = asdict(judged[0])
    wrong = {"id": 3, "tasks": ["AS", 3], "right": "no", "output": 3, "video": None}
    changed = [json.dumps({**row, key: value}).encode() for key, value in wrong.items()]
    for other in (b'{"id": "q"}', b"\xff\xfe", b"[" * 99_999, *changed):
        file.write_bytes(json.dumps(row).encode() + b"\n" + other + b"\n")
        with pytest.raises(ValueError, match=r"results.jsonl, line 2: not a judged answer"):
            read_results(file)
    file.write_text('{"id": "q"}\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: not a judged answer"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match=r"none: no such folder"):
        read_results(tmp_path / "none")


def test_the_page_has_the_same_rows_of_the_paper() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    both = zip(*(PAPER_ROWS[name].items() for name in ("motionbench", "favor")), strict=True)
    for (model, motionbench), (_, favor) in both:
        said = (" / ".join(f"{mean:.2f}" for mean in means) for means in (motionbench, favor))
        assert f"| {' | '.join([model, *said])} |" in page


def test_table_stands_beside_the_papers_rows() -> None:
    judged = rows([1, 0, 1], ["AS", "AS", "NSM"])
    table = score_table("FAVOR-Bench", "mine", score(judged, samples=20), ("AS", "NSM"), "favor")
    lines = table.splitlines()
    assert lines[0].split() == ["FAVOR-Bench", "AS", "NSM", "Overall", "Average"]
    assert lines[1].split() == ["mine", "50.00", "100.00", "66.67", "75.00"]
    assert lines[3].split() == ["questions", "2", "1", "3"]
    assert "InternVL3-8B + MotionEnhancer 48.94 49.25" in [" ".join(line.split()) for line in lines]
    assert lines[-1].split() == ["7B,", "75", "%", "of", "the", "heads", "and", "tokens", "45.69"]
    table = score_table("Video-MME", "mine", score(judged, samples=0), ("AS", "NSM"), "videomme")
    assert table.splitlines()[-1].split() == ["base", "model", "+", "MotionEnhancer", "61.40"]
    assert "paper" not in score_table("toy", "mine", score(judged, samples=0), (), "toy")


def test_a_folder_of_adapters_finds_its_evaluation(tmp_path: Path) -> None:
    """The evaluation also names the base, which the folder of adapters does not."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    (tmp_path / "out" / "motion_report.json").write_text("{}")
    digest = student_digest(tmp_path / "out")
    for name, student in (("other", "0123+4567"), ("scores", f"{digest}+4567")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "motion_report.json").write_text(json.dumps({"identity": {"student": student}}))
        row = {"id": name, "video": "v", "tasks": ["MR"], "answer": "A"}
        row |= {"output": "A", "parsed": "A", "right": True}
        (tmp_path / name / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert [one.id for one in read_results(tmp_path / "out")] == ["scores"]
