"""Pictures for the experiment trackers of `--report_to`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

__all__ = ["log_pictures"]

#: The trackers that take pictures, and their modules.
_MODULES = {
    TensorBoardCallback: "",
    WandbCallback: "wandb",
    TrackioCallback: "trackio",
    MLflowCallback: "mlflow",
}


def log_pictures(callbacks: Iterable[Any], pictures: Iterable[tuple[str, Image.Image]], step: int) -> None:
    """Send pictures to every open tracker that takes them; a tracker that fails is named and left out.

    Args:
        callbacks: the Trainer's callbacks, before the trackers close at the end of the training.
        pictures: names, which may repeat no other, and pictures. Only read if there is a tracker.
        step: the step at which they are shown.
    """
    trackers = [(c, module) for c in callbacks for kind, module in _MODULES.items() if isinstance(c, kind)]
    if not trackers:
        return
    named = {f"maps/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}": picture for name, picture in pictures}
    for callback, module in trackers:
        try:
            _log(callback, module, named, step)
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"{module or 'tensorboard'}: got no pictures ({said})")


def _log(callback: Any, module: str, pictures: dict[str, Image.Image], step: int) -> None:
    tracker = import_module(module) if module else None
    if tracker is None:
        for name, picture in pictures.items():
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif module == "mlflow":
        for name, picture in pictures.items():
            tracker.log_image(picture, f"{name}.png")
    else:
        shown = {name: tracker.Image(picture) for name, picture in pictures.items()}
        # The step counts of the Trainer are the axis of both.
        tracker.log({**shown, "train/global_step": step})
