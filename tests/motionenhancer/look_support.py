"""Views made by hand, for pages whose every number is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from test_store import make_prior

from motionenhancer.data.encode import encode_video
from motionenhancer.report.views import View

MARKUP = '</script><img src=x onerror="document.title=1"><!-- <b>bold</b>'


def moving_clip(path: Path, frames: int = 8, size: tuple[int, int] = (48, 64)) -> Path:
    """A white square that moves right over black, four frames a second."""
    pictures = np.zeros((frames, *size, 3), np.uint8)
    for i, picture in enumerate(pictures):
        picture[16:32, 4 * i : 4 * i + 16] = 255
    encode_video(path, pictures, fps=4)
    return path


def make_views(folder: Path) -> list[View]:
    """Three samples: one got better and right, one worse and wrong, one has no prior.

    The second one's texts hold markup. A word is missing among the student's tokens in the first.
    """
    clip = moving_clip(folder / "clip.mp4")
    # All attention of the teacher lies in the first cell of the first frame and in the last of the second.
    attention = torch.zeros(2, 24)
    attention[:, 0] = attention[:, 23] = 0.5
    prior = replace(make_prior(), attention=attention.half(), times=[0.0, 1.5])
    before = torch.full((1, 12), 1 / 12)
    after = torch.zeros(1, 12)
    after[0, 5] = 1
    views = []
    for i, (name, task, prompt) in enumerate((("good", "turn", prior.prompt), (MARKUP, "jump", MARKUP))):
        change = (-0.5, 0.25)[i]
        views.append(
            View.of_prior(
                replace(prior, prompt=prompt, confidence={**prior.confidence, "confidence": 0.2 + 0.6 * i}),
                id=name,
                video=clip,
                task=task,
                grid=(2, 2, 3),
                times=[0.25, 1.25],
                found=[1],
                maps={"before": before, "after": after},
                scores={
                    "before": {"loss_ar": 1.0, "loss_align": 0.5, "right": bool(i), "said": "it moves"},
                    "after": {"loss_ar": 1 + change, "loss_align": 0.25, "right": not i, "said": prompt},
                },
                answer=prompt,
            )
        )
    return [*views, View("plain", "It stands.", clip, spans=[(0, 2), (3, 10)])]


def shown(file: Path) -> dict:
    """The data in a page."""
    text = file.read_text()
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])
