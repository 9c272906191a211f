"""Find a benchmark's clips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from os import fspath
from pathlib import Path

from ..data.clip import Clip, is_file
from ..data.question import video_stem


class VideoFolder:
    """The clips of a folder by the names that a benchmark gives them, with or without extension.

    A name is first looked up unchanged, below ``root`` and below each of ``folders``, then with any
    extension. At last, its last part is looked up anywhere below ``root``; exactly one file may fit.

    With ``renamed``, the last search uses the whole name, and then the name with its folder renamed. Then a
    folder whose name ends with ``_segment`` holds clips that are already cut.
    """

    def __init__(
        self, root: str | Path, folders: tuple[str, ...] = (), renamed: Mapping[str, str] | None = None
    ) -> None:
        self.root, self.folders, self.renamed = Path(root), folders, renamed
        self._stems: dict[str, list[Path]] | None = None

    def find(self, name: str | Clip) -> Path | Clip | None:
        """Return the file of the clip ``name``; None if no file fits, or more than one."""
        if isinstance(name, Clip):
            found = self.find(fspath(name))
            if found is None or (self.renamed and Path(found).parent.name.endswith("_segment")):
                return found
            return replace(name, path=Path(found))
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
        if self.renamed is not None:
            folder, last = Path(name).parent, video_stem(Path(name).name)
            for wanted in (folder / last, Path(self.renamed.get(str(folder), folder), last)):
                whole = [
                    p for p in alike if Path(video_stem(str(p))).parts[-len(wanted.parts) :] == wanted.parts
                ]
                if whole:
                    return whole[0] if len(whole) == 1 and is_file(whole[0]) else None
            return None
        near = [path for path in alike if path.parent in {place.parent for place in places}]
        chosen = near or alike
        return chosen[0] if len(chosen) == 1 and is_file(chosen[0]) else None
