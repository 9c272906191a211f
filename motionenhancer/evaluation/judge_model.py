"""A language model behind an OpenAI-compatible address judges the answers that no rule can read."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.question import Question
from ..threads import Threads
from .answers import append_answers, mend_answers, read_lines
from .benchmarks import Benchmark, Rules

JUDGEMENTS = "judgements.jsonl"
TRIES = 11
"""Maximum number of requests for one answer if no reply holds a verdict, as in the code of TempCompass's
authors."""
_PAUSES = (1, 4, 16)
"""Seconds before a request that failed is sent again."""
_PATIENCE = 300
"""Seconds that a server may be silent."""
_WHOLE = 900
"""Seconds that a whole reply may take. A server that sends single bytes is never silent."""
_LONGEST = 2**20
"""Maximum bytes of a reply; a longer reply is not a judgement."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address would be sent the key, and no question."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def judge_doubts(
    benchmark: Benchmark,
    questions: Sequence[Question],
    outputs: dict[str, str],
    rules: Rules,
    folder: Path,
    *,
    url: str,
    model: str,
) -> dict[str, bool]:
    """Ask a model about every answer that the benchmark's rule cannot read; return the verdicts by id.

    Each judgement is on the disk before the next is asked for. A judgement of the same request by the same
    model is not asked for again.

    Args:
        benchmark, rules: the benchmark has a ``doubt``.
        questions: with public answers, as all of TempCompass have.
        outputs: question id to output.
        folder: holds the judgements.
        url: address of the server up to ``/v1``. The key is taken from OPENAI_API_KEY.
        model: its name on the server.

    Raises:
        ValueError: the server cannot be reached, refuses, or does not answer as the protocol says.
    """
    assert benchmark.doubt is not None
    file = folder / JUDGEMENTS
    mend_answers(file)
    kept = {(row.get("model"), row.get("request")): row.get("right") for row in read_lines(file)}
    answered = [q for q in questions if q.id in outputs]
    requests = [(q.id, benchmark.doubt(q, outputs[q.id], rules)) for q in answered]
    verdicts: dict[str, bool] = {}
    for id, request in tqdm([pair for pair in requests if pair[1]], desc="judge", unit="answer"):
        right = kept.get((model, request))
        if not isinstance(right, bool):
            right, reply = _judge(url, model, request)
            row = {"id": id, "model": model, "request": request, "reply": reply, "right": right}
            append_answers(file, [row])
        verdicts[id] = right
    return verdicts


def _judge(url: str, model: str, request: str) -> tuple[bool, str]:
    """The model's verdict and its reply; wrong where no reply holds one."""
    reply = ""
    for _ in range(TRIES):
        reply = _chat(url, model, request)
        if reply.startswith("Correct") or ("Correct" in reply and "Incorrect" not in reply):
            return True, reply
        if "Incorrect" in reply:
            return False, reply
    return False, reply


def _chat(url: str, model: str, request: str) -> str:
    """One reply, with the settings of TempCompass's authors."""
    content = {
        "model": model,
        "max_tokens": 128,
        "temperature": 1.0,
        "top_p": 1,
        "presence_penalty": 1,
        "messages": [
            {"role": "system", "content": "You are an AI assistant for question answering."},
            {"role": "user", "content": request},
        ],
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    place = f"{url.rstrip('/')}/chat/completions"
    sent = urllib.request.Request(place, json.dumps(content).encode(), headers)
    for pause in (*_PAUSES, None):
        try:
            thread = Threads(1, "judge")
            try:
                refusal, body = thread.submit(_fetch, sent).result(_WHOLE)
            finally:
                thread.close(wait=False)
        except (OSError, http.client.HTTPException) as error:
            if pause is None:
                late = f"no whole reply in {_WHOLE:g} s" if isinstance(error, TimeoutError) else ""
                why = str(error) or late or type(error).__name__
                raise ValueError(f"--judge_url {place} cannot be reached ({why})") from None
        else:
            if refusal is None:
                return _reply(place, body)
            if pause is None or (refusal.code != 429 and refusal.code < 500):
                said = f"{refusal.code} {refusal.reason}: {body.decode(errors='replace')}"
                raise ValueError(f"--judge_url {place} refused: {said}")
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _fetch(sent: urllib.request.Request) -> tuple[urllib.error.HTTPError | None, bytes]:
    """The refusal of a request, if it was refused, and the beginning of the body."""
    try:
        with _OPENER.open(sent, timeout=_PATIENCE) as answer:
            return None, answer.read(_LONGEST + 1)
    except urllib.error.HTTPError as error:
        return error, error.read(300)


def _reply(place: str, body: bytes) -> str:
    try:
        said: Any = json.loads(body[:_LONGEST])["choices"][0]["message"]["content"]
        return said.strip()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"--judge_url {place} must answer with a chat completion, got {body[:200]!r}"
        ) from None
