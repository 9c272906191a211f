"""Keys of rows, turns and parts that would change what is learnt: honoured, or refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from motionenhancer.data.clip import CLIP_KEYS

__all__ = ["is_trained", "refusal", "video_keys"]

#: Whether an answer is trained on: ms-swift and XTuner; axolotl; OpenAI; slime.
TRAINED_KEYS = ("loss", "train", "training", "weight", "loss_mask", "loss_scale")

_TOOLS = "tools are not shown to the model"
_WEIGHT = "every sample has the same weight; repeat or remove samples instead"
_SOUND = "sound is not shown to the model"
_BOXES = "boxes are not written into texts; write them out"
_FILES = "a turn's files belong beside the messages or into the parts of its content"
_THOUGHT = "hidden reasoning is not shown; write it into the content"
_FRAME_SIZE = "give min_pixels and max_pixels instead"
_SECONDS = "give video_start and video_end, in seconds"
_UNWANTED = "marks an unwanted answer, which must not be learnt"
_PIXELS = {"resized_height": _FRAME_SIZE, "resized_width": _FRAME_SIZE, "total_pixels": _FRAME_SIZE}
_SEGMENT = {"start": _SECONDS, "end": _SECONDS}

#: Where a key stands → key → why it cannot be honoured.
_REFUSED: dict[str, dict[str, str]] = {
    "row": {
        **dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_scale", "loss", "train"), _WEIGHT),
        **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
        **dict.fromkeys(("audio", "audios"), _SOUND),
        **dict.fromkeys(("label", "kto_tag"), _UNWANTED),
        "objects": _BOXES,
        "history": "earlier turns belong into the conversation",
        **_PIXELS,
        **_SEGMENT,
    },
    "turn": {
        **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call_id", "function_call"), _TOOLS),
        **dict.fromkeys(("image", "images", "video", "videos"), _FILES),
        **dict.fromkeys(("audio", "audios"), _SOUND),
        **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _THOUGHT),
        **dict.fromkeys(("train_detail", "training_detail"), "an answer is trained on whole or not at all"),
    },
    "video": {**_PIXELS, **_SEGMENT},
    "image": dict.fromkeys((*_PIXELS, "min_pixels", "max_pixels"), "only the processor resizes images"),
    "text": dict.fromkeys(TRAINED_KEYS, "an answer is trained on whole or not at all"),
}


def refusal(found: Mapping[str, Any], where: str) -> str:
    """Why a row, turn or part must be refused; empty where nothing speaks against it.

    Args:
        found: its keys and values. None and empty values count as not given.
        where: "row", "turn", "video", "image" or "text", the last three being parts.

    Example:
        >>> refusal({"weight": 2}, "row")
        "'weight': every sample has the same weight; repeat or remove samples instead"
        >>> refusal({"weight": 1, "tools": []}, "row")
        ''
    """
    for key, why in _REFUSED.get(where, {}).items():
        if not _changes_nothing(key, why, found.get(key)):
            return f"{key!r}: {why}"
    return ""


def _changes_nothing(key: str, why: str, value: Any) -> bool:
    if value is None or (isinstance(value, (str, list, dict)) and not value):
        return True
    if key in TRAINED_KEYS or why == _WEIGHT:
        return value == 1
    if why == _UNWANTED:
        return value is not False  # any other label describes the clip, or wants the answer
    if why == _SOUND:
        return isinstance(value, bool)  # says whether there is sound, and is no sound
    # Boxes as ms-swift gives them; a list of objects describes the clip.
    return why == _BOXES and not (isinstance(value, dict) and value.keys() & {"ref", "bbox"})


def is_trained(turn: Mapping[str, Any]) -> bool | None:
    """Whether a turn says that it is trained on; None where it says nothing.

    Raises:
        ValueError: it is to be trained on with another weight than 0 or 1, or two keys contradict each other.

    Example:
        >>> is_trained({"loss": False}), is_trained({"weight": 1}), is_trained({})
        (False, True, None)
    """
    said = {key: turn[key] for key in TRAINED_KEYS if turn.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise ValueError(f"{key!r} must be true or false, 1 or 0, got {value!r}")
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{' and '.join(map(repr, said))} contradict each other")
    return bool(next(iter(said.values()))) if said else None


def video_keys(found: Mapping[str, Any], *, row: bool = False) -> dict[str, Any]:
    """Of a video part, or of a row, the keys that say how a video is shown.

    A row's `fps` is not among them: data sets write the file's own frame rate there.
    """
    return {k: found[k] for k in CLIP_KEYS if found.get(k) is not None and not (row and k == "fps")}
