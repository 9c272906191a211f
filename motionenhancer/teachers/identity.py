"""An id of a teacher that changes whenever its weights or settings change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..data.digests import file_digest


def teacher_id(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    vae_tiling: bool = False,
) -> str:
    """Digest (32 hexadecimal digits) of a diffusers folder and of all options that change the arithmetic.

    All bytes of all files count. The digest of a large file is kept while its size and times stay the same
    (see `file_digest`), so that a folder of 20 GB is read once.

    Raises:
        FileNotFoundError: the folder does not exist or is empty.
    """
    folder = Path(path)
    files = sorted(_files(folder))
    if not files:
        raise FileNotFoundError(f"teacher {folder}: no such folder, or nothing in it")
    digest = hashlib.sha256(f"{dtype}\0{size}\0{frames}\0{vae_tiling}\0".encode())
    for file in files:
        length = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{length}\0".encode())
        digest.update(file_digest(file).encode())
    return digest.hexdigest()[:32]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, also through links to folders; each real folder once."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in sorted(folders) if os.path.realpath(Path(root, name)) not in seen]
        yield from (p for name in names if not name.startswith(".") and (p := Path(root, name)).is_file())
