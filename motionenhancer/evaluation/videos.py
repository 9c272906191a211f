"""Find a benchmark's clips."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from os import fspath
from pathlib import Path

from motionenhancer.data.clip import Clip, is_file
from motionenhancer.data.question import video_stem


class VideoFolder:
    """The clips of a folder by the names a benchmark gives them, with or without extension.

    A name is looked up as it stands below ``root`` and then ``folders``, then with any extension, and then
    anywhere below ``root`` by its last part, if there is only one of it.
    """

    def __init__(self, root: str | Path, folders: tuple[str, ...] = ()) -> None:
        self.root, self.folders = Path(root), folders
        self._stems: dict[str, list[Path]] | None = None

    def find(self, name: str | Clip) -> Path | Clip | None:
        """Return the file of the clip ``name``; None if no file fits, or more than one."""
        if isinstance(name, Clip):
            found = self.find(fspath(name))
            return None if found is None else replace(name, path=Path(found))
        places = [self.root / name, *(self.root / folder / name for folder in self.folders)]
        for place in places:
            if is_file(place):
                return place
        if self._stems is None:
            self._stems = defaultdict(list)
            for path in sorted(self.root.rglob("*")):
                if video_stem(path.name) != path.name:
                    self._stems[video_stem(path.name)].append(path)
        alike = self._stems.get(video_stem(Path(name).name), [])
        near = [path for path in alike if path.parent in {place.parent for place in places}]
        chosen = near or alike
        return chosen[0] if len(chosen) == 1 and is_file(chosen[0]) else None
