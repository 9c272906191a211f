"""Motion data sets as published, brought into the form of a conversation."""

from __future__ import annotations

from typing import Any

__all__ = ["CAPTION_QUESTION", "as_conversation"]

CAPTION_QUESTION = "Describe the motion in this video in detail."
"""What is asked where a data set has captions and no questions."""

_ANSWERS = ("chosen", "answer")


def as_conversation(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of MotionBench-Train or MotionVid-QA as a row with ``conversations``; None if it is neither.

    - MotionBench-Train (MotionBench, arXiv 2501.02955; ``MotionBenchCaption-train/train.jsonl`` of its data
      set): ``{"video_path", "motion_caption"}``. It has no questions: ``CAPTION_QUESTION`` is asked.
    - MotionVid-QA (MotionSight, arXiv 2506.01674, and its repository): ``{"video", "question", "chosen",
      "rejected"}``, the preference part, of which the chosen answer is kept, or ``{"video", "question",
      "answer"}``.

    Values are passed on as they are: whether they are usable is for the reader of conversations to say.

    >>> row = as_conversation({"video": "a.mp4", "question": "Who?", "chosen": "He.", "rejected": "She."})
    >>> [turn["value"] for turn in row["conversations"]]
    ['<video>\\nWho?', 'He.']
    """
    if row.get("conversations") is not None or row.get("messages") is not None:
        return None
    if "motion_caption" in row:
        taken, video, question, answer = {"video_path"}, "video_path", CAPTION_QUESTION, "motion_caption"
    elif "question" in row and (held := [name for name in _ANSWERS if name in row]):
        taken, video, question, answer = {"question", "rejected"}, "video", row["question"], held[0]
    else:
        return None
    rest = {key: value for key, value in row.items() if key not in {*taken, answer, "video"}}
    asked = question
    if isinstance(question, str) and "<video>" not in question:
        asked = f"<video>\n{question}"
    return {
        **rest,
        "video": row.get(video),
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": row[answer]}],
    }
