"""Unsupported keys of rows, turns and parts that would change what is learnt, with the reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Whether an answer is trained on: ms-swift and XTuner; axolotl; OpenAI; slime.
TRAINED_KEYS = ("loss", "train", "training", "weight", "loss_mask", "loss_scale")

_TOOLS = "tools are not shown to the model"
_WEIGHT = "every sample has the same weight; repeat or remove samples instead"
_WHOLE = "an answer is trained on whole or not at all"
_SOUND = "sound is not shown to the model"
_BOXES = "boxes are not put into texts; write their numbers into the text"
_FILES = "put a turn's files beside the messages or into the parts of its content"
_THOUGHT = "hidden reasoning is not shown; write it into the content"
_UNWANTED = "marks an unwanted answer, which must not be learnt"
_SIZES = ("resized_height", "resized_width", "total_pixels")
_VIDEO = {
    **dict.fromkeys(_SIZES, "give min_pixels and max_pixels instead"),
    **dict.fromkeys(("start", "end"), "give video_start and video_end, in seconds"),
}

#: Where a key stands → key → why it cannot be honoured.
_REFUSED: dict[str, dict[str, str]] = {
    "row": {
        **dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_scale", "loss", "train"), _WEIGHT),
        **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
        **dict.fromkeys(("audio", "audios"), _SOUND),
        **dict.fromkeys(("label", "kto_tag"), _UNWANTED),
        "objects": _BOXES,
        "history": "put earlier turns into the conversation",
        **_VIDEO,
    },
    "turn": {
        **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call_id", "function_call"), _TOOLS),
        **dict.fromkeys(("image", "images", "video", "videos"), _FILES),
        **dict.fromkeys(("audio", "audios"), _SOUND),
        **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _THOUGHT),
        **dict.fromkeys(("train_detail", "training_detail"), _WHOLE),
    },
    "video": _VIDEO,
    "image": dict.fromkeys((*_SIZES, "min_pixels", "max_pixels"), "only the processor resizes images"),
    "text": dict.fromkeys(TRAINED_KEYS, _WHOLE),
}
#: Values of a refused key that change nothing.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    _WEIGHT: lambda value: value == 1,
    _WHOLE: lambda value: value == 1,
    _UNWANTED: lambda value: value is not False,  # any other label describes the clip, or wants the answer
    _SOUND: lambda value: isinstance(value, bool),  # says whether there is sound, and is no sound
    # Boxes as ms-swift gives them; a list of objects describes the clip.
    _BOXES: lambda value: not (isinstance(value, dict) and value.keys() & {"ref", "bbox"}),
}


def refusal(found: Mapping[str, Any], where: str) -> str:
    """Return why a row, turn or part must be refused; empty if it is fine.

    Args:
        found: its keys and values. None and empty values count as not given.
        where: "row", "turn", or a part: "video", "image" or "text".

    Example:
        >>> refusal({"weight": 2}, "row")
        "'weight': every sample has the same weight; repeat or remove samples instead"
        >>> refusal({"weight": 1, "tools": []}, "row")
        ''
    """
    for key, why in _REFUSED[where].items():
        value = found.get(key)
        given = value is not None and value not in ("", [], {})
        if given and not (why in _HARMLESS and _HARMLESS[why](value)):
            return f"{key!r}: {why}"
    return ""
