"""A name for a teacher that changes whenever its weights or settings do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_WHOLE = 64 << 20
_PIECES = 64
_PIECE = 64 << 10


def teacher_id(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    vae_tiling: bool = False,
) -> str:
    """Digest (32 hexadecimal digits) of a diffusers folder and of every option that changes its arithmetic.

    Small files are read whole. A weight file over 64 MiB is read in 64 evenly spaced pieces of 64 KiB and its
    size, so that a 20 GB folder is named in well under a second; retrained weights differ everywhere and so
    in the pieces.

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
        with file.open("rb") as stream:
            if length <= _WHOLE:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
            else:
                for piece in range(_PIECES):
                    stream.seek((length - _PIECE) * piece // (_PIECES - 1))
                    digest.update(stream.read(_PIECE))
    return digest.hexdigest()[:32]


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, also through links to folders, each real folder once."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in sorted(folders) if os.path.realpath(Path(root, name)) not in seen]
        yield from (p for name in names if not name.startswith(".") and (p := Path(root, name)).is_file())
