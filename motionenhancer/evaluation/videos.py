"""Find a benchmark's clips, and sample their frames as the paper does for each family."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path

from motionenhancer.data.clip import Clip
from motionenhancer.data.question import video_stem
from motionenhancer.data.sampling import sample_frames
from motionenhancer.data.video import Video

__all__ = ["Frames", "VideoFolder", "default_frames", "sample_video"]


@dataclass(frozen=True)
class Frames:
    """How a clip is shown.

    num_frames: so many, evenly; takes the place of the rate.
    fps: frames a second, at least ``min_frames`` (as far as the clip holds them), at most ``max_frames``.
    max_pixels: most pixels of a frame as the model sees it; None leaves the processor's own limit.
    """

    num_frames: int | None = None
    fps: float = 1.0
    min_frames: int = 4
    max_frames: int = 768
    max_pixels: int | None = 360 * 420

    def __post_init__(self) -> None:
        for name in ("num_frames", "fps", "min_frames", "max_frames", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames must be at most max_frames ({self.max_frames}), got {self.min_frames}"
            )


def default_frames(num_frames: int | None, benchmark: str) -> Frames:
    """Return the sampling of MotionEnhancer's experiments: a family's own number of frames, or 1 a second.

    The pixel cap, and 4 and 768 as the fewest and most frames, are those of FAVOR-Bench's published script
    and of the sampler it calls. The toy world's clips last two seconds: there it is 8 frames a second.

    >>> default_frames(8, "favor").num_frames, default_frames(None, "favor").fps
    (8, 1.0)
    """
    frames = Frames(num_frames=num_frames)
    return replace(frames, fps=8.0) if benchmark == "toy" else frames


def sample_video(path: Path | Clip, frames: Frames) -> Video:
    """Decode a clip's frames; what its own row says of them comes first.

    Raises:
        VideoError: it cannot be read.
    """
    return sample_frames(
        path,
        num_frames=frames.num_frames,
        fps=frames.fps,
        min_frames=frames.min_frames,
        max_frames=frames.max_frames,
    )


class VideoFolder:
    """The clips of a folder by the names a benchmark gives them, with or without extension.

    A name is looked up as it stands below ``root`` and then ``folders``, then with any extension, and then
    anywhere below ``root`` by its last part, if there is only one of it.

    Raises:
        ValueError: ``root`` is not a folder.
    """

    def __init__(self, root: str | Path, folders: tuple[str, ...] = ()) -> None:
        self.root, self.folders = Path(root), folders
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise ValueError(f"--video_root must be a folder, {self.root} {what}")
        self._stems: dict[str, list[Path]] | None = None

    def find(self, name: str | Clip) -> Path | Clip | None:
        """Return the clip's file, shown as ``name`` says; None where there is none, or more than one."""
        if isinstance(name, Clip):
            found = self.find(fspath(name))
            return None if found is None else replace(name, path=Path(found))
        places = [self.root / name, *(self.root / folder / name for folder in self.folders)]
        exact = next((place for place in places if _is_file(place)), None)
        if exact is not None:
            return exact
        if self._stems is None:
            self._stems = defaultdict(list)
            for path in sorted(self.root.rglob("*")):
                if video_stem(path.name) != path.name:
                    self._stems[video_stem(path.name)].append(path)
        alike = self._stems.get(video_stem(Path(name).name), [])
        near = [path for path in alike if path.parent in {place.parent for place in places}]
        chosen = near or alike
        return chosen[0] if len(chosen) == 1 and _is_file(chosen[0]) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
