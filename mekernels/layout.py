"""Where text and video tokens lie in a token sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoTokens:
    """A sequence of text tokens and the tokens of one video, in raster order: frame, row, column.

    Args:
        frames: latent frames F, at least 1.
        height: token rows H of one frame, at least 1.
        width: token columns W of one frame, at least 1.
        text: number of text tokens, padding included, because padding takes part in the softmax.
        text_first: whether the text stands before the video (CogVideoX) or after it (HunyuanVideo).

    Raises:
        TypeError: a field is not an integer (``text_first`` not a bool).
        ValueError: a field is too small.

    Example:
        >>> video = VideoTokens(frames=13, height=30, width=45, text=226)
        >>> video.positions, video.vision, video.length
        (1350, 17550, 17776)
        >>> video.vision_slice
        slice(226, 17776, None)
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = True

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not isinstance(self.text_first, bool):
            raise TypeError(f"text_first must be a bool, got {type(self.text_first).__name__}")

    @property
    def positions(self) -> int:
        """Number of token positions of one frame, P = H * W."""
        return self.height * self.width

    @property
    def vision(self) -> int:
        """Number of video tokens, S = F * P."""
        return self.frames * self.positions

    @property
    def length(self) -> int:
        """Number of all tokens of the sequence."""
        return self.text + self.vision

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def vision_slice(self) -> slice:
        """Slice of the video tokens in the sequence."""
        start = self.text if self.text_first else 0
        return slice(start, start + self.vision)

    @property
    def text_slice(self) -> slice:
        """Slice of the text tokens in the sequence."""
        start = 0 if self.text_first else self.vision
        return slice(start, start + self.text)
