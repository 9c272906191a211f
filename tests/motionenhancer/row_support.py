"""Rows of data whose keys change what is learnt or shown, and the clips that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from motionenhancer.data import Sample, SkipLog, read_samples
from motionenhancer.data.encode import encode_video


def make_clips(folder: Path) -> Path:
    """Write two clips of 16 frames, 8 a second, whose frame i has grey level 10 + 15 i."""
    folder.mkdir()
    frames = np.broadcast_to((10 + 15 * np.arange(16))[:, None, None, None], (16, 64, 64, 3)).astype(np.uint8)
    for name in ("a.mp4", "b c%.mp4"):
        encode_video(str(folder / name), frames, fps=8)
    (folder / "i.png").write_bytes(b"x")
    return folder


def read(root: Path, *rows: dict[str, Any]) -> tuple[list[Sample], SkipLog]:
    file, log = root.parent / "rows.jsonl", SkipLog(shout=0)
    good = {"id": "good", "video": "a.mp4", "conversations": turns("<video>x", "y")}
    file.write_text("\n".join(map(json.dumps, [*rows, good])))
    *samples, last = read_samples(file, root, log)
    assert last.id == "good"
    return samples, log


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def part(**keys: Any) -> dict[str, Any]:
    """A row whose video is a part with these keys."""
    content = [{"type": "video", "video": "a.mp4", **keys}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "It stops."}]}


LLAVA = {"video": "a.mp4", "conversations": turns("<video>x", "y")}
