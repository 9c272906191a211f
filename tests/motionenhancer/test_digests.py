"""Digests kept from one run to the next: never of another content, whatever happens to files or cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from motionenhancer.data import VideoError, content_digest, digests
from motionenhancer.data.digests import RECORD, REST, DigestCache


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five clips that have rested, as far as the cache can tell."""
    found = [tmp_path / f"{i}.mp4" for i in range(5)]
    for i, path in enumerate(found):
        path.write_bytes(bytes([i]) * 1000)
    later(monkeypatch)
    return found


NOW = time.time_ns


def later(monkeypatch: pytest.MonkeyPatch, by: int = 2 * REST) -> None:
    monkeypatch.setattr(digests.time, "time_ns", lambda: NOW() + by)


def test_a_large_file_is_read_once_for_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights, seen = tmp_path / "model.safetensors", []
    real = digests.content_digest
    monkeypatch.setattr(digests, "content_digest", lambda path: (seen.append(path), real(path))[1])
    weights.write_bytes(b"a" * digests.LARGE)
    found = [digests.file_digest(weights), digests.file_digest(weights)]
    assert len(seen) == 2, "too young to be kept at all: it may change within a tick of its clock"
    later(monkeypatch)
    for _ in range(3):
        found.append(digests.file_digest(weights))
        digests._remembered.cache_clear()  # as in the next run
    assert len(seen) == 3
    assert found == [real(weights)] * 5
    weights.write_bytes(b"b" * digests.LARGE)
    assert digests.file_digest(weights) == real(weights) != found[0]
    with pytest.raises(OSError, match="none"):
        digests.file_digest(tmp_path / "none")


def read(cache: DigestCache, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The files that a cache reads for their digests; checks the digests."""
    seen: set[Path] = set()

    def digest(path: Path) -> str:
        seen.add(path)
        return content_digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(digests, "content_digest", digest)
        assert [cache.digest(path) for path in paths] == [content_digest(path) for path in paths]
    return seen


def run(folder: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    with DigestCache(folder) as cache:
        return read(cache, paths, monkeypatch)


def test_a_file_is_read_once(tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, clips[:3], monkeypatch) == set(clips[:3])
    assert run(tmp_path, clips, monkeypatch) == set(clips[3:]), "a second run adds to the first"
    assert run(tmp_path, clips, monkeypatch) == set()
    assert len(list(tmp_path.glob(".digests/*"))) == 2, "a run with nothing new writes nothing"
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, [Path("0.mp4")], monkeypatch) == set()


@pytest.mark.parametrize("what", ["content", "size", "moved", "time"])
def test_a_file_that_changed_is_read_again(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run(tmp_path, clips, monkeypatch)
    before = clips[0].stat()
    if what == "content":
        clips[0].write_bytes(b"x" * 1000)
        # as a tool that also copies the times
        os.utime(clips[0], ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (clips[0].stat().st_size, clips[0].stat().st_mtime_ns) == (1000, before.st_mtime_ns)
    elif what == "size":
        with clips[0].open("ab") as file:
            file.write(b"more")
    elif what == "moved":
        os.replace(clips[1], clips[0])
    else:
        os.utime(clips[0], ns=(1, 1))
    left = [path for path in clips if path.exists()]
    assert run(tmp_path, left, monkeypatch) == {clips[0]}


def test_what_was_just_written_or_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        later(patch, -REST)
        os.utime(clips[0], ns=(1, 1))  # utime does not make the time of the last change (ctime) older
        assert run(tmp_path, clips[:1], patch) == {clips[0]}
    assert not (tmp_path / ".digests").exists()

    def change(path: Path) -> str:
        found = content_digest(path)
        path.write_bytes(b"other")
        return found

    with monkeypatch.context() as patch, DigestCache(tmp_path) as cache:
        patch.setattr(digests, "content_digest", change)
        cache.digest(clips[1])
    assert not (tmp_path / ".digests").exists()
    assert run(tmp_path, clips[:2], monkeypatch) == set(clips[:2])


def test_a_record_cut_short_or_altered_counts_as_none(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, clips, monkeypatch)
    (file,) = tmp_path.glob(".digests/*")
    whole = file.read_bytes()
    assert len(whole) == 5 * RECORD.itemsize
    for cut in (0, 1, RECORD.itemsize - 1, 3 * RECORD.itemsize + 20):
        file.write_bytes(whole[:cut])
        known = cut // RECORD.itemsize
        with DigestCache(tmp_path, writes=False) as cache:
            assert len(read(cache, clips, monkeypatch)) == 5 - known
    for at in (3, 20, 50):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with DigestCache(tmp_path, writes=False) as cache:
            assert len(read(cache, clips, monkeypatch)) == 1
    assert len(list(tmp_path.glob(".digests/*"))) == 1, "told to only read, it writes nothing"


def test_a_folder_that_cannot_be_written_and_a_file_that_is_not_there(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with DigestCache(tmp_path / "file") as cache:
        assert read(cache, clips, monkeypatch) == set(clips)
        with pytest.raises(VideoError, match="gone"):
            cache.digest(tmp_path / "gone.mp4")
