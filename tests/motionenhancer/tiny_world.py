"""Paths of a tiny world and the flags that name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    data: Path
    videos: Path
    teacher: Path
    student: Path

    def link(self, folder: Path) -> None:
        """Make the folder one of the toy's, as the pages have it."""
        folder.mkdir()
        for target in (self.data, self.data.with_name("test.jsonl"), self.videos):
            (folder / target.name).symlink_to(target)
        (folder / "teacher").symlink_to(self.teacher)
        (folder / "student").symlink_to(self.student)

    def flags(self, **options: object) -> list[str]:
        """Command-line flags of this world; `options` are added, None leaves a flag out."""
        chosen = {
            "student": self.student,
            "teacher": self.teacher,
            "data": self.data,
            "video_root": self.videos,
            **options,
        }
        return [str(part) for k, v in chosen.items() if v is not None for part in (f"--{k}", v)]
