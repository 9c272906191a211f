"""The families of students, and the family of a model."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..data.sample import Sample
from ..data.video import Video
from .family import Grid, Places, StudentFamily
from .locate import unwrap_model


def _patches(processor: Any, shape: Grid, made: Mapping[str, Any], tokens: int) -> tuple[Grid, torch.Tensor]:
    """Patches merged to tokens. A compression mask, if any, says which tokens were kept."""
    frames, height, width = made["video_grid_thw"][0].tolist()
    merge = processor.video_processor.merge_size
    grid = (frames, height // merge, width // merge)
    kept = made.get("video_compression_mask")
    return grid, torch.arange(math.prod(grid)) if kept is None else kept.nonzero()[:, 0]


def _squares(before: int = 0, after: int = 0) -> Places:
    """A square of tokens for each frame, with ``before`` tokens before each square and ``after`` at the end.

    The cropped edges of a frame also have places, but no tokens.
    """

    def places(
        processor: Any, shape: Grid, made: Mapping[str, Any], tokens: int
    ) -> tuple[Grid, torch.Tensor]:
        (frames, *edges), part = shape, processor.video_processor
        side = math.isqrt((tokens - after) // frames - before)
        margins = [0, 0]
        if getattr(part, "do_center_crop", False):
            scale = part.size["shortest_edge"] / min(edges)
            crops = (part.crop_size["height"], part.crop_size["width"])
            lost = [(edge * scale - crop) / (2 * crop) for edge, crop in zip(edges, crops, strict=True)]
            margins = [max(0, round(share * side)) for share in lost]
        grid = (frames, side + 2 * margins[0], side + 2 * margins[1])
        shown = (
            torch.arange(math.prod(grid)).view(grid).narrow(1, margins[0], side).narrow(2, margins[1], side)
        )
        shown = torch.nn.functional.pad(shown.flatten(1), (before, 0), value=-1).flatten()
        return grid, torch.nn.functional.pad(shown, (0, after), value=-1)

    return places


def _pooled(processor: Any, shape: Grid, made: Mapping[str, Any], tokens: int) -> tuple[Grid, torch.Tensor]:
    """Gemma 4: patches have positions (x, y); ``pooling_kernel_size`` squared patches make a token."""
    positions = made["video_position_ids"]
    width, height = (positions.flatten(0, -2).amax(0) + 1) // processor.video_processor.pooling_kernel_size
    grid = (shape[0], int(height), int(width))
    return grid, torch.arange(math.prod(grid))


def _slices(processor: Any, shape: Grid, made: Mapping[str, Any], tokens: int) -> tuple[Grid, torch.Tensor]:
    """MiniCPM-V: a frame; or a small version of it (whose tokens are not read) and then its larger slices."""
    if processor.video_processor.stack_frames > 1:
        raise ValueError(
            f"stack_frames must be 1 for videos, got {processor.video_processor.stack_frames}: a stack of "
            "frames has no single time"
        )
    merge = math.isqrt(processor.video_token_divisor)
    rows, columns = made["grids_videos"][0].tolist()
    sizes = [(h // merge, w // merge) for h, w in made["target_sizes_videos"][:2].tolist()]
    frames = shape[0]
    if not rows * columns:
        grid = (frames, *sizes[0])
        return grid, torch.arange(math.prod(grid))
    height, width = sizes[1]
    grid = (frames, rows * height, columns * width)
    each = torch.arange(math.prod(grid)).view(frames, rows, height, columns, width).transpose(2, 3)
    each = torch.nn.functional.pad(each.reshape(frames, -1), (math.prod(sizes[0]), 0), value=-1)
    return grid, each.flatten()


#: Maximum tokens of a frame that Gemma 4's processors accept.
_GEMMA_TOKENS = (70, 140, 280, 560, 1120)


def _fewer_tokens(part: Any, most: int, size: tuple[int, int]) -> dict[str, Any]:
    """Gemma 4: a frame gets at most ``max_soft_tokens`` tokens, which must be one of a few numbers."""
    token = (part.pooling_kernel_size * part.patch_size) ** 2
    fitting = [n for n in _GEMMA_TOKENS if n * token <= most]
    if not fitting:
        least = _GEMMA_TOKENS[0]
        raise ValueError(f"max_pixels must be at least {least * token} ({least} tokens), got {most}")
    return {"max_soft_tokens": min(part.max_soft_tokens, fitting[-1])}


def _fewer_slices(part: Any, most: int, size: tuple[int, int]) -> dict[str, Any]:
    """MiniCPM-V: fewer slices of a frame, or a smaller frame."""
    own, token = part.scale_resolution, part.patch_size * 4
    options: dict[str, Any] = {"patch_size": part.patch_size, "allow_upscale": True}
    # transformers 5.16 and 5.17 round the size as for "16x" under either mode.
    if "downsample_mode" in inspect.signature(part.find_best_resize).parameters:
        options["downsample_mode"] = part.downsample_mode
        token = part.patch_size * (2 if part.downsample_mode == "4x" else 4)
    fewer = [(slices, own) for slices in range(part.max_slice_nums, 0, -1)]
    for slices, scale in [*fewer, *((1, smaller) for smaller in range(own - own % token, 0, -token))]:
        grid = part.get_sliced_grid(size, slices, scale) if part.slice_mode else None
        if grid is None:
            height, width = part.find_best_resize(size, scale, **options)
        else:
            height, width = part.get_refine_size(size, grid, scale, **options)
        if height * width <= most:
            return {"max_slice_nums": slices, "scale_resolution": scale}
    raise ValueError(f"max_pixels must be at least {height * width} for a frame of {size}, got {most}")


def _seconds(processor: Any, video: Video | None, made: dict[str, Any]) -> dict[str, Any]:
    """Qwen2.5-VL: the seconds between two token frames, from the frames' own time stamps."""
    import transformers
    from packaging.version import Version

    if video is None:
        return made
    seconds = processor.video_processor.temporal_patch_size * interval(video)
    if seconds != round(seconds) and Version(transformers.__version__) < Version("5.18"):
        warnings.warn(
            "transformers before 5.18 truncates the seconds between token frames to whole numbers: upgrade "
            "transformers, or sample frames so that token frames are whole seconds apart",
            stacklevel=3,
        )
    return {**made, "second_per_grid_ts": torch.tensor([seconds], dtype=torch.float32)}


def interval(video: Video) -> float:
    """Mean seconds between two frames; one second for a single frame, where it does not matter.

    The model rounds times down to its own grid, and a decoded frame is only the nearest one to its ideal
    time. So a value within 2 % of a whole number of frames per second, or of seconds per frame, is rounded to
    it.
    """
    stamps = video.timestamps
    if len(stamps) < 2 or stamps[-1] <= stamps[0]:
        return 1.0
    seconds = float(stamps[-1] - stamps[0]) / (len(stamps) - 1)
    whole = round(seconds) if seconds >= 1 else 1 / round(1 / seconds)
    return float(whole) if abs(seconds - whole) <= 0.02 * seconds else seconds


def _frames_as_images(processor: Any, video: Video | None, made: dict[str, Any]) -> dict[str, Any]:
    """InternVL: frames and the tiles of images are one tensor."""
    return {"pixel_values": made["pixel_values"] if video is None else made["pixel_values_videos"][0]}


def _local_id(processor: Any, kind: str, n: int) -> str:
    """MiniCPM-V: videos and images are numbered separately; since 4.7, images only."""
    images_only = type(processor).__name__ != "MiniCPMV4_6Processor"
    if not processor.default_use_image_id or (images_only and kind == "video"):
        return ""
    return f"{processor.image_id_start_token}{n}{processor.image_id_end_token}"


def _smolvlm_template(processor: Any, sample: Sample) -> str | None:
    """The template that SmolVLM's processor uses for a video, instead of the folder's."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    videos = any(part["type"] == "video" for message in sample.messages for part in message["content"])
    return DEFAULT_CHAT_TEMPLATE if videos else None


_QWEN: dict[str, Any] = {"places": _patches, "token_types": True}
_GLM: dict[str, Any] = {
    **_QWEN,
    "pixels": "clip",
    "image_frames": 2,
    "images_with_videos": False,
    "shared_token": True,
}
_MINICPM: dict[str, Any] = {
    "places": _slices,
    "join": {"pixel_values": -1, "pixel_values_videos": -1},
    "label": _local_id,
    "shrink": _fewer_slices,
    "untold": "only its processor knows in how many rows and columns it slices a frame",
}
_CROPPED = "how much it crops of a frame depends on the video's size"

_FAMILIES = (
    StudentFamily("qwen2_vl", ("qwen2_vl",), pixels="frame", **_QWEN),
    StudentFamily("qwen2_5_vl", ("qwen2_5_vl",), pixels="frame", inputs=_seconds, **_QWEN),
    StudentFamily("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), pixels="clip", **_QWEN),
    StudentFamily("qwen3_5", ("qwen3_5", "qwen3_5_moe"), pixels="clip", **_QWEN),
    StudentFamily("glm4v", ("glm4v", "glm4v_moe"), **_GLM),
    StudentFamily("glm46v", ("glm46v",), **_GLM),
    StudentFamily(
        "gemma4",
        ("gemma4",),
        _pooled,
        num_frames=32,
        token_types=True,
        shrink=_fewer_tokens,
        grid_input="video_position_ids",
    ),
    StudentFamily(
        "internvl",
        ("internvl",),
        _squares(),
        num_frames=8,
        image_options={"crop_to_patches": True},
        inputs=_frames_as_images,
        shared_token=True,
        frame_tokens=lambda processor: processor.image_seq_length,
    ),
    StudentFamily(
        "llava_onevision",
        ("llava_onevision",),
        _squares(after=1),
        num_frames=32,
        equal_frames=True,
        images_together=True,
        frame_tokens=lambda processor: math.ceil(math.isqrt(processor.num_image_tokens) / 2) ** 2,
    ),
    StudentFamily(
        "llava_next_video",
        ("llava_next_video",),
        _squares(),
        num_frames=8,
        equal_frames=True,
        untold=_CROPPED,
    ),
    StudentFamily(
        "video_llava",
        ("video_llava",),
        _squares(before=1),
        num_frames=8,
        equal_frames=True,
        untold=_CROPPED,
    ),
    StudentFamily("video_llama_3", ("video_llama_3",), _patches, pixels="most"),
    StudentFamily(
        "smolvlm",
        ("smolvlm",),
        _squares(),
        image_options={"return_row_col_info": True},
        join={"pixel_values": 1, "pixel_attention_mask": 1},
        template=_smolvlm_template,
        shared_token=True,
        frame_tokens=lambda processor: processor.image_seq_len,
    ),
    StudentFamily("minicpmv4_6", ("minicpmv4_6",), **_MINICPM),
    StudentFamily("minicpmv4_7", ("minicpmv4_7",), token_types=True, **_MINICPM),
)

_LATENT = "multi-head latent attention (MLA)"
_INDEXER = "attention to a few keys that an indexer chooses"
#: Video models of transformers whose attention cannot be read, and why.
_UNREAD = {
    "dots3_note": f"{_LATENT} and {_INDEXER}",
    "glm5_next": f"{_LATENT} and {_INDEXER}",
    "hy_v4_vl": f"{_LATENT}, {_INDEXER}, and attention sinks",
    "kimi_k25": _LATENT,
    "minimax_m3_vl": _INDEXER,
    "qwen4_exp": _INDEXER,
}


@functools.cache
def known_families() -> dict[str, StudentFamily]:
    """Return every family by ``model_type``."""
    return {model_type: family for family in _FAMILIES for model_type in family.model_types}


def processor_family(processor: Any) -> StudentFamily:
    """Return the family of a processor's class. Families with one class place their tokens in one way.

    Raises:
        ValueError: no family has processors of this class.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = type(processor).__name__
    for model_type, family in known_families().items():
        if PROCESSOR_MAPPING_NAMES.get(model_type) == name:
            return family
    raise ValueError(f"{name} is the processor of no supported student")


def student_family(model_or_config: Any) -> StudentFamily:
    """Return the family of a model, wrapped or not, of a configuration, or of a ``model_type``.

    Raises:
        ValueError: no family handles its ``model_type``; the message lists the known types.

    >>> student_family("qwen2_5_vl").name
    'qwen2_5_vl'
    """
    found: Any = model_or_config
    if isinstance(found, torch.nn.Module):
        found = getattr(unwrap_model(found), "config", None)
    model_type = found if isinstance(found, str) else getattr(found, "model_type", None)
    families = known_families()
    if model_type in _UNREAD:
        raise ValueError(
            f"model_type {model_type!r} is not supported: its language model has {_UNREAD[model_type]}, "
            "which cannot be read"
        )
    if model_type not in families:
        raise ValueError(f"model_type must be one of {sorted(families)}, got {model_type!r}")
    return families[model_type]
