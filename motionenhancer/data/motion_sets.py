"""Published motion data sets, converted to conversations."""

from __future__ import annotations

from typing import Any

from .llama_factory import alpaca_messages

CAPTION_QUESTION = "Describe the motion in this video in detail."
"""The question for data sets that have captions but no questions."""


_ALPACA_FORMS = (
    {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    {"prompt": "query", "response": "response", "history": "history"},
)


def as_conversation(row: dict[str, Any]) -> dict[str, Any] | None:
    """Convert a row of another form to ``conversations`` or ``messages``; None if the row has them already.

    - MotionBench-Train (MotionBench, arXiv 2501.02955; ``MotionBenchCaption-train/train.jsonl`` of its data
      set): ``{"video_path", "motion_caption"}``. It has no questions: ``CAPTION_QUESTION`` is asked.
    - MotionVid-QA (MotionSight, arXiv 2506.01674, and its repository): ``{"video", "question", "chosen",
      "rejected"}``, the preference part (only the chosen answer is kept), or ``{"video", "question",
      "answer"}``.
    - VideoChat2-IT (MVBench, arXiv 2311.17005, and ``it_dataset.py`` of its repository): ``{"video", "QA":
      [{"i", "q", "a"}], "start"?, "end"?}``. The first instruction "i" is the system text. For captions
      without a question, it is the question. Start and end are in seconds.
    - the alpaca form of LLaMA-Factory: ``{"instruction", "input"?, "output", "history"?}``; and of ms-swift:
      ``{"query", "response", "history"?}``.

    Values are not checked here; the reader of conversations checks them.

    >>> row = as_conversation({"video": "a.mp4", "question": "Who?", "chosen": "He.", "rejected": "She."})
    >>> [turn["value"] for turn in row["conversations"]]
    ['<video>\\nWho?', 'He.']
    """
    if row.get("conversations") is not None or row.get("messages") is not None:
        return None
    if "QA" in row:
        return _from_qa(row)
    for form in _ALPACA_FORMS:
        if form["prompt"] in row and form["response"] in row:
            rest = {key: value for key, value in row.items() if key not in form.values()}
            return {**rest, "messages": alpaca_messages(row, form)}
    if "motion_caption" in row:
        video, question, answer = "video_path", CAPTION_QUESTION, "motion_caption"
    elif "question" in row and ("chosen" in row or "answer" in row):
        video, question, answer = "video", row["question"], "chosen" if "chosen" in row else "answer"
    else:
        return None
    taken = {"video", video, answer, *(() if video == "video_path" else ("question", "rejected"))}
    turns = [
        {"from": "human", "value": tagged(question, "video")},
        {"from": "gpt", "value": row[answer]},
    ]
    rest = {key: value for key, value in row.items() if key not in taken}
    return {**rest, "video": row.get(video), "conversations": turns}


def tagged(question: Any, kind: str) -> Any:
    """A question with a leading <video> tag, added if it has none."""
    if not isinstance(question, str) or "<video>" in question or "<image>" in question:
        return question
    return f"<{kind}>\n{question}"


def _from_qa(row: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in row.items() if key not in ("QA", "start", "end")}
    rest |= {f"video_{key}": row[key] for key in ("start", "end") if key in row}
    kind = "image" if row.get("video") is None and row.get("image") is not None else "video"
    turns: list[Any] = []
    for i, pair in enumerate(row["QA"] if isinstance(row["QA"], list) else []):
        asked, told, answer = (pair.get(key) if isinstance(pair, dict) else None for key in "qia")
        if not asked and told:
            asked = told
        elif i == 0 and told:
            turns.append({"from": "system", "value": told})
        turns.append({"from": "human", "value": asked if i else tagged(asked, kind)})
        turns.append({"from": "gpt", "value": answer})
    return {**rest, "conversations": turns}
