"""A judge model behind an OpenAI-compatible address, played by a server of this test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motionenhancer import eval as evaluate
from motionenhancer.evaluation import judge_model

QUESTIONS = {
    "1": {
        "action": [
            {"question": f"What is {i}?\nA. dunking\nB. dribbling", "answer": "A. dunking"} for i in range(4)
        ]
    }
}
OUTPUTS = {"1#action#0": "A", "1#action#1": "he dunks", "1#action#2": "dribbling </s>", "1#action#3": "B"}


class Judge(ThreadingHTTPServer):
    """Answers from `replies`, then "Incorrect"; a number is a status, a dict a body, bytes all it sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Any] = []
        self.asked: list[tuple[str, Any, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        reply = self.server.replies.pop(0) if self.server.replies else "Incorrect"
        if isinstance(reply, int):
            self.send_error(reply, "sorry")
            return
        if isinstance(reply, bytes):
            self.wfile.write(reply)
            return
        if callable(reply):
            reply()
            return
        said = reply if isinstance(reply, dict) else {"choices": [{"message": {"content": reply}}]}
        content = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setattr(judge_model, "_PAUSES", (0, 0))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(folder: Path, *more: str, outputs: dict[str, str] = OUTPUTS) -> int:
    (folder / "multi-choice.json").write_text(json.dumps(QUESTIONS))
    (folder / "given.json").write_text(json.dumps(outputs))
    flags = ["--benchmark", "tempcompass_multi_choice", "--data", str(folder / "multi-choice.json")]
    flags += ["--predictions", str(folder / "given.json"), "--output_dir", str(folder / "out")]
    return evaluate.main([*flags, "--bootstrap_samples", "0", *more])


def asking(judge: Judge) -> tuple[str, ...]:
    return "--judge_url", judge.url, "--judge_model", "wise"


def scores(folder: Path) -> Any:
    return json.loads((folder / "out" / "scores.json").read_text())


def kept(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "out" / "judgements.jsonl").read_text().splitlines()]


def test_only_what_no_rule_reads_is_judged(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge.replies = [" Correct. He does."]
    assert run(tmp_path, *asking(judge)) == 0
    assert (scores(tmp_path)["overall"], scores(tmp_path)["judged_by_model"]) == (50, 2)
    (path, body, key), (_, second, _) = judge.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"]) == ("wise", 128)
    assert body["messages"][1]["content"] == (
        "\nYou will receive a multi-choice question, the ground-truth answer and the prediction from a "
        "question answering (QA) model. Your task is to determine whether QA model prediction is correct, "
        'based on the question and ground-truth answer. If the prediction is correct, respond "Correct". If '
        'the prediction is incorrect, respond "Incorrect".\n\n'
        "Multi-Choice Question:\nWhat is 1?\nA. dunking\nB. dribbling\n"
        "Ground-Truth Answer: A. dunking\nModel Prediction: he dunks"
    )
    assert second["messages"][1]["content"].endswith("Model Prediction: dribbling")
    assert [(row["id"], row["right"], row["reply"]) for row in kept(tmp_path)] == [
        ("1#action#1", True, "Correct. He does."),
        ("1#action#2", False, "Incorrect"),
    ]
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "out").iterdir())


def test_no_judge_is_asked_unless_it_is_named(judge: Judge, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert judge.asked == []
    assert (scores(tmp_path)["overall"], scores(tmp_path)["judged_by_model"]) == (25, 0)
    assert run(tmp_path, *asking(judge)) == 0, "the same answers, now with a judge"
    assert len(judge.asked) == 2


def test_a_judgement_is_asked_for_once(judge: Judge, tmp_path: Path, capsys: Any) -> None:
    judge.replies = ["Correct", 401]
    assert run(tmp_path, *asking(judge)) == 2
    assert "/v1/chat/completions refused: 401" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.json").exists()
    file = tmp_path / "out" / "judgements.jsonl"
    with file.open("a") as half:
        half.write('{"id": "1#action#2", "mod')
    judge.asked.clear()
    assert run(tmp_path, *asking(judge)) == 0
    assert len(judge.asked) == 1, "the first judgement is kept, half a line is none"
    assert len(kept(tmp_path)) == 2, "nor is anything left of it"
    assert scores(tmp_path)["overall"] == 50
    assert run(tmp_path, *asking(judge)[:3], "wiser") == 0
    assert len(judge.asked) == 3, "another model judges anew"


def test_replies_without_a_verdict_and_a_server_that_comes_back(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(judge_model, "_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(judge_model.time, "sleep", slept.append)
    judge.replies = [503, 429, "Hm.", "It is Incorrect, not Correct", "Correct, so not Incorrect"]
    assert run(tmp_path, "--judge_url", f"{judge.url}/", "--judge_model", "wise") == 0
    assert [row["right"] for row in kept(tmp_path)] == [False, True]
    assert [path for path, *_ in judge.asked] == ["/v1/chat/completions"] * 5
    assert slept == [0.01, 0.02]


def test_a_judge_that_never_decides_is_wrong(judge: Judge, tmp_path: Path) -> None:
    judge.replies = ["Hm."] * 22
    assert run(tmp_path, *asking(judge)) == 0
    assert [row["right"] for row in kept(tmp_path)] == [False, False]
    assert len(judge.asked) == 2 * 11


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.0 {status}", *headers, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ({"error": "x"}, 'must answer with a chat completion, got b\'{"error": "x"}\''),
        ({"choices": []}, "must answer with a chat completion"),
        ({"choices": [{"message": {"content": None}}]}, "must answer with a chat completion"),
        (
            {"choices": [{"message": {"content": [{"text": "Correct"}]}}]},
            "must answer with a chat completion",
        ),
        ({"choices": {"0": "Correct"}}, "must answer with a chat completion"),
        (http(b"<html>Correct</html>"), "must answer with a chat completion, got b'<html>Correct</html>'"),
        (http(b"[" * 99_999), "must answer with a chat completion, got b'[[["),
        (http(b"\xff\xfe"), "must answer with a chat completion"),
        (
            http(b'{"choices": [{"message": {"content": "' + b"Correct " * 2**18 + b'"}}]}'),
            "must answer with",
        ),
        (500, "refused: 500"),
        (http(b"", "302 Found", "Location: http://127.0.0.1:9/v1"), "refused: 302 Found"),
        (b"", "cannot be reached (Remote end closed connection without response)"),
        (b"Correct\r\n", "cannot be reached (Correct"),
        (http(b"{", "200 OK", "Content-Length: 99"), "must answer with a chat completion, got b'{'"),
        (http(b"5\r\n{", "200 OK", "Transfer-Encoding: chunked"), "cannot be reached (IncompleteRead("),
        (lambda: time.sleep(0.5), "cannot be reached (timed out)"),
    ],
)
def test_a_server_of_another_kind_is_refused(
    reply: Any,
    why: str,
    judge: Judge,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a server ends the run with one error, and none of its replies is a verdict."""
    monkeypatch.setattr(judge_model, "_PATIENCE", 0.2)
    judge.replies = [reply] * 9
    assert run(tmp_path, *asking(judge)) == 2
    said = capsys.readouterr().err
    assert f"--judge_url {judge.url}/chat/completions {why}" in said
    assert said.count("error: ") == 1
    assert len(said) < 1500
    assert not (tmp_path / "out" / "judgements.jsonl").exists()


def test_a_server_that_never_comes_to_an_end(
    judge: Judge, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends a byte now and then is never silent for long."""
    end = threading.Event()
    monkeypatch.setattr(judge_model, "_WHOLE", 0.2)
    monkeypatch.setattr(judge_model, "_OPENER", SimpleNamespace(open=lambda *_, timeout: end.wait()))
    assert run(tmp_path, *asking(judge)) == 2
    end.set()
    said = capsys.readouterr().err
    assert f"--judge_url {judge.url}/chat/completions cannot be reached (no whole reply in 0.2 s)" in said


def test_a_server_that_is_not_there(judge: Judge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m") == 2
    assert "--judge_url http://127.0.0.1:9/v1/chat/completions cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--judge_url", "http://a/v1"], "--judge_url and --judge_model go together"),
        (["--judge_model", "m"], "--judge_url and --judge_model go together"),
        (["--judge_url", "a/v1", "--judge_model", "m"], "must start with http:// or https://, got a/v1"),
        (
            ["--judge_url", "http://a/v1", "--judge_model", "m", "--benchmark", "favor"],
            "got favor; FAVOR-Bench's open-ended part is not supported: its authors' code has no prompt",
        ),
        (["--judge_url", "http://a/v1", "--judge_model", "m", "--benchmark", "videomme"], "got videomme"),
    ],
)
def test_contradicting_flags_are_refused(
    flags: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
