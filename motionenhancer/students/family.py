"""Student families. The processors of transformers share one interface, which does nearly all of the work.

A processor returns the text that stands for a video (``replace_video_token``) and makes the model's inputs. A
family adds the place of each of these tokens in the video, and the few things that differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..data.sample import Sample
from ..data.video import Video
from .chat import render
from .layout import Encoded
from .media import (
    Medium,
    assemble,
    check_media,
    frame_size,
    media_order,
    open_images,
)

Grid = tuple[int, int, int]
Places = Callable[[Any, Grid, Mapping[str, Any], int], tuple[Grid, torch.Tensor]]
"""(processor, (frames, height, width) of the video in pixels, output of its video processor, number of vision
tokens) → grid and (tokens,) int64: the place of each token in raster order t, h, w; -1 for a token without a
single place, such as a line break."""
Inputs = Callable[[Any, Video | None, dict[str, Any]], dict[str, Any]]

_TOWER = re.compile(r"\.(visual|vision_tower|vision_model|video_tower|image_tower)\.")
_PROJECTOR = re.compile(r"\.(merger|deepstack_merger_list)\.")


@dataclass(frozen=True)
class StudentFamily:
    """Models with the same kind of processor.

    Attributes:
        name: as in ``student_family(...).name``.
        model_types: the ``model_type`` of the configurations that it handles.
        places: places of a video's tokens; see :data:`Places`.
        num_frames: default number of frames of a clip; None if frames are taken at a rate.
        equal_frames: whether all videos of a batch must have the same number of frames.
        images_with_videos: whether a batch may hold both.
        pixels: unit of the processor's pixel limits: ``"frame"``: one frame; ``"clip"``: all frames;
            ``"most"``: all frames in the maximum and one in the minimum. None: limits do not set the size.
        shrink: (processor of videos or images, maximum pixels, (height, width) of a frame) → options of that
            processor that keep a frame within the maximum. None: no option of it sets the size.
        image_frames: number of frames that an image counts for in these limits.
        token_types: whether the model takes ``mm_token_type_ids``.
        image_options: default options that the processor passes to its image processor.
        images_together: whether an image is processed differently if a sample has several images.
        join: name of a vision input → dimension of its concatenation over media, if not 0.
        inputs: (processor, video or None, output of its processor) → inputs under the names of the model.
        shared_token: whether images and videos have one token.
        frame_tokens: processor → number of tokens of a frame, if it is the same for all videos.
        grid_input: name of the model's input that gives the grid of a video.
        untold: why token ids and `grid_input` do not show the layout; empty if they do.
        label: (processor, "video" or "image", n) → text before the n-th video or image of a sample.
        template: (processor, sample) → chat template, None for the folder's own.
        most_text: maximum number of text tokens of a model whose tokenizer gives none.
    """

    name: str
    model_types: tuple[str, ...]
    places: Places
    num_frames: int | None = None
    equal_frames: bool = False
    images_with_videos: bool = True
    pixels: str | None = None
    shrink: Callable[[Any, int, tuple[int, int]], dict[str, Any]] | None = None
    image_frames: int = 1
    token_types: bool = False
    image_options: Mapping[str, Any] = field(default_factory=dict)
    images_together: bool = False
    join: Mapping[str, int] = field(default_factory=dict)
    inputs: Callable[[Any, Video | None, dict[str, Any]], dict[str, Any]] = lambda processor, video, made: (
        made
    )
    shared_token: bool = False
    frame_tokens: Callable[[Any], int] | None = None
    grid_input: str = "video_grid_thw"
    untold: str = ""
    label: Callable[[Any, str, int], str] = lambda processor, kind, n: ""
    template: Callable[[Any, Sample], str | None] = lambda processor, sample: None
    most_text: int | None = None

    @property
    def sized(self) -> bool:
        """Whether a pixel limit can change the size of a frame."""
        return self.pixels is not None or self.shrink is not None

    def in_vision_tower(self, parameter: str) -> bool:
        """Whether the parameter of this name belongs to the vision tower, which has a lower learning rate.

        The projection of its output to the language model does not belong to it.
        """
        name = f".{parameter}"
        return bool(_TOWER.search(name)) and not _PROJECTOR.search(name)

    def length(self, video: Video, max_pixels: int | None = None) -> int:
        """A number that grows with the tokens of a clip, by the number and the size of its frames."""
        frames, height, width = video.frames.shape[:3]
        area = height * width if self.pixels is not None else 1
        return frames * min(area, max_pixels or area)

    def encode(
        self,
        processor: Any,
        sample: Sample,
        videos: Sequence[Video],
        images: Sequence[Any] | None = None,
        *,
        max_pixels: int | None = None,
        max_length: int | None = None,
    ) -> Encoded:
        """Render and tokenise one conversation with its decoded videos.

        Args:
            processor: the processor of the student's folder.
            sample: the conversation.
            videos: one for each video of the sample. Their frames keep their own time stamps.
            images: decoded images; None opens the sample's files.
            max_pixels: maximum pixels of a frame as the model sees it, if the family is ``sized``.
            max_length: maximum number of tokens; the text is cut, but vision tokens are never cut.

        Raises:
            ValueError: videos or images do not fit the conversation, a text contains a special token of the
                model, the text is too long for the model, ``max_length`` would cut vision tokens, or messages
                cannot be located in the template.
        """
        images = open_images(sample) if images is None else list(images)
        # Marks of turns in the text would become real turns.
        turns = {str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
        marks = turns | {v for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, str)}
        check_media(sample, videos, images, sorted(marks))
        self._check_batch([len(video.frames) for video in videos], len(images))
        rendered = render(processor, sample, self.template(processor, sample))
        tokens = {"video": processor.video_token, "image": processor.image_token}
        shown = {
            "video": self._videos(processor, sample, videos, max_pixels),
            "image": self._images(processor, images, max_pixels),
        }
        media = [next(shown[kind]) for kind in media_order(rendered.text, tokens)]
        inputs: dict[str, list[torch.Tensor]] = {}
        for medium in media:
            for name, value in medium.inputs.items():
                inputs.setdefault(name, []).append(value)
        return assemble(
            processor,
            sample,
            rendered,
            media,
            {name: _joined(values, self.join.get(name, 0)) for name, values in inputs.items()},
            token_types=self.token_types,
            max_length=max_length,
            most_text=self.most_text,
        )

    def collate(
        self,
        samples: Sequence[Encoded],
        *,
        pad_token_id: int,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Any]:
        """Pad token tensors to one length, concatenate vision tensors, and move the layouts along.

        Args:
            samples: at least one sample.
            pad_token_id: fills ``input_ids``; ``labels`` are filled with -100 and everything else with 0.
            padding_side: ``"right"`` or ``"left"``.
            pad_to_multiple_of: the length is rounded up to a multiple of this.

        Returns:
            The model's inputs: ``input_ids``, ``attention_mask``, ``labels`` and the samples' token inputs,
            (B, N) int64, and their vision inputs, concatenated. Also ``layouts``, a list of
            :class:`TokenLayout` in positions of the padded batch. The alignment uses it; take it out before
            the batch is given to the model.

        Raises:
            ValueError: there are no samples, the padding side is unknown, samples have different token
                inputs, or the model cannot take their videos and images in one batch.
        """
        videos = [
            video for sample in samples for video in sample.vision_inputs.get("pixel_values_videos", ())
        ]
        images = sum("pixel_values" in sample.vision_inputs for sample in samples)
        self._check_batch([len(video) for video in videos], images)
        if not samples:
            raise ValueError("samples must not be empty")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be positive, got {pad_to_multiple_of}")
        names = set(samples[0].token_inputs)
        if any(set(sample.token_inputs) != names for sample in samples):
            raise ValueError("all samples must have the same names in token_inputs")
        multiple = pad_to_multiple_of or 1
        length = -(-max(len(sample.input_ids) for sample in samples) // multiple) * multiple

        def padded(tensors: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
            batch = tensors[0].new_full((len(tensors), length), fill)
            for row, tensor in zip(batch, tensors, strict=True):
                row[length - len(tensor) if padding_side == "left" else 0 :][: len(tensor)] = tensor
            return batch

        batch: dict[str, Any] = {
            "input_ids": padded([sample.input_ids for sample in samples], pad_token_id),
            "attention_mask": padded([sample.attention_mask for sample in samples], 0),
            "labels": padded([sample.labels for sample in samples], -100),
        }
        for name in samples[0].token_inputs:
            batch[name] = padded([sample.token_inputs[name] for sample in samples], 0)
        for name in dict.fromkeys(name for sample in samples for name in sample.vision_inputs):
            given = [sample.vision_inputs[name] for sample in samples if name in sample.vision_inputs]
            batch[name] = _joined(given, self.join.get(name, 0))
        batch["layouts"] = [
            sample.layout.shifted(length - len(sample.input_ids) if padding_side == "left" else 0)
            for sample in samples
        ]
        return batch

    def _check_batch(self, frames: Sequence[int], images: int) -> None:
        """Refuse videos (by their numbers of frames) and images that the model cannot take in one batch."""
        if self.equal_frames and len(set(frames)) > 1:
            raise ValueError(
                f"videos must have the same number of frames, as {self.name} runs them as one tensor; got "
                f"{sorted(set(frames))}: sample a fixed number of frames"
            )
        if not self.images_with_videos and frames and images:
            raise ValueError(
                f"a batch must hold videos or images, as {self.name} uses one token for both; got both: "
                "leave out the samples with images"
            )

    def prepared(
        self, processor: Any, sample: Sample, video: Video, max_pixels: int | None
    ) -> tuple[Video, dict[str, Any]]:
        """The input of the video processor for one of a sample's videos, and the options of the processor.

        Args:
            max_pixels: as for :meth:`encode`.

        Returns:
            The video, with at least the number of frames of one token, and the options.

        Raises:
            ValueError: a limit is below the pixels of one token.
        """
        part = processor.video_processor
        video = _at_least(video, getattr(part, "temporal_patch_size", None) or 1)
        count, options = len(video.frames), {}
        if self.pixels is not None:
            counted = {"frame": (1, 1), "clip": (count, count), "most": (1, count)}[self.pixels]
            options = frame_size(part, max_pixels, sample.videos, counted)
        elif self.shrink is not None and max_pixels is not None:
            options = self.shrink(part, max_pixels, video.frames.shape[1:3])
        return video, {"do_sample_frames": False, **options}

    def _videos(
        self, processor: Any, sample: Sample, videos: Sequence[Video], max_pixels: int | None
    ) -> Iterator[Medium]:
        part = processor.video_processor
        for n, video in enumerate(videos):
            video, options = self.prepared(processor, sample, video, max_pixels)
            made = part(
                videos=[torch.from_numpy(np.ascontiguousarray(video.frames)).permute(0, 3, 1, 2)],
                video_metadata=[metadata(video)],
                return_metadata=True,
                return_tensors="pt",
                **options,
            )
            text = processor.replace_video_token(made, 0, video_token_divisor=_divisor(processor, "video"))
            yield Medium(
                "video",
                processor.video_token,
                self.label(processor, "video", n) + text,
                self._inputs(processor, video, made),
                partial(self.places, processor, video.frames.shape[:3], made),
            )

    def _images(self, processor: Any, images: Sequence[Any], max_pixels: int | None) -> Iterator[Medium]:
        part, n = processor.image_processor, 0
        options = dict(self.image_options)
        if self.pixels is not None:
            options |= frame_size(part, max_pixels, frames=(self.image_frames, self.image_frames))
        for group in [images] if self.images_together else [[image] for image in images]:
            if self.shrink is not None and max_pixels is not None and group:
                options = {**options, **self.shrink(part, max_pixels, group[0].size[::-1])}
            made = part(images=[list(group)], return_tensors="pt", **options) if group else {}
            for i in range(len(group)):
                text = processor.replace_image_token(
                    made, i, image_token_divisor=_divisor(processor, "image")
                )
                inputs = self._inputs(processor, None, made) if i == 0 else {}
                label = self.label(processor, "image", n)
                yield Medium("image", processor.image_token, label + text, inputs)
                n += 1

    def _inputs(self, processor: Any, video: Video | None, made: Any) -> dict[str, torch.Tensor]:
        unused = {*getattr(processor, "unused_input_names", ()), "video_metadata"}
        kept = {name: value for name, value in made.items() if name not in unused}
        return {name: torch.as_tensor(v) for name, v in self.inputs(processor, video, kept).items()}


def _joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate a vision input of several media.

    In a (images, tiles, channels, height, width) tensor, images with fewer tiles get empty tiles, which
    models ignore.

    Raises:
        ValueError: the tensors do not fit together.
    """
    if dim == 0 and tensors[0].dim() == 5:
        most = max(tensor.shape[1] for tensor in tensors)
        pads = [(0, 0) * 3 + (0, most - tensor.shape[1]) for tensor in tensors]
        tensors = [torch.nn.functional.pad(t, pad) for t, pad in zip(tensors, pads, strict=True)]
    try:
        return torch.cat(list(tensors), dim)
    except RuntimeError as error:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"videos or images of a batch must have the same shape, got {shapes}") from error


def metadata(video: Video) -> dict[str, Any]:
    """Metadata with the frames' own times, as fractional indices at one frame per second."""
    return {
        "total_num_frames": len(video.frames),
        "fps": 1.0,
        "frames_indices": video.timestamps.tolist(),
        "duration": video.duration,
    }


def _at_least(video: Video, count: int) -> Video:
    """Repeat the last frame of a clip with fewer frames than one token covers."""
    missing = count - len(video.frames)
    if missing <= 0:
        return video
    return replace(
        video,
        frames=np.concatenate([video.frames, np.repeat(video.frames[-1:], missing, 0)]),
        timestamps=np.concatenate([video.timestamps, np.repeat(video.timestamps[-1:], missing)]),
    )


def _divisor(processor: Any, kind: str) -> int | None:
    """Patches per token, for a processor that must be given its own number."""
    return getattr(processor, f"{kind}_token_divisor", None)
