"""A file that was cut off is noticed by its own bytes; a header's count of frames is no evidence."""

import av
import numpy as np
import pytest

from motionenhancer.data import VideoError, check_video, read_frames

FRAMES = 60


def picture(rng):
    return rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def write(path, format, codec, options=None, sound=False, container_options=None):
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        speech = container.add_stream("aac", rate=16000) if sound else None
        for _ in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(rng), format="rgb24")))
            if speech is not None:
                noise = rng.normal(size=(1, 1600)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
                frame.sample_rate = 16000
                container.mux(speech.encode(frame))
        container.mux(stream.encode(None))
        if speech is not None:
            container.mux(speech.encode(None))
    return path.read_bytes()


#: In one thread: with more, each run makes another file, and the cuts fall elsewhere.
X264 = ("libx264", {"bf": "2", "g": "12", "threads": "1"})
KINDS = {
    "mp4": ("mp4", *X264, False, {"movflags": "faststart"}),
    "mp4 with sound": ("mp4", *X264, True, {"movflags": "faststart"}),
    "mp4, header last": ("mp4", *X264, True, {}),
    "mp4 in fragments": ("mp4", *X264, True, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "mkv": ("matroska", *X264, True, {}),
    "avi": ("avi", "mpeg4", {"g": "12"}, False, {}),
    "flv": ("flv", *X264, True, {}),
    "flv without duration": ("flv", *X264, True, {"flvflags": "no_duration_filesize"}),
    "ts": ("mpegts", *X264, False, {}),
    "ts with sound": ("mpegts", *X264, True, {}),
    "m2ts": ("mpegts", *X264, True, {"mpegts_m2ts_mode": "1"}),
    "wmv": ("asf", "wmv2", {"g": "12"}, False, {}),
    "h264": ("h264", *X264, False, {}),
    "nut": ("nut", *X264, True, {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {
        kind: (folder / str(i), write(folder / str(i), *made)) for i, (kind, made) in enumerate(KINDS.items())
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_whole(files, kind):
    path, _ = files[kind]
    assert check_video(path).frames == FRAMES
    assert len(read_frames(path, num_frames=7).frames) == 7


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"nut"}))
def test_a_file_cut_at_60_percent_is_noticed(files, tmp_path, kind):
    _, data = files[kind]
    (tmp_path / "cut").write_bytes(data[: int(0.6 * len(data))])
    for read in (
        check_video,
        lambda path: read_frames(path, num_frames=5),
        lambda path: read_frames(path, fps=1),
    ):
        with pytest.raises(VideoError, match=r"truncated|cannot be opened"):
            read(tmp_path / "cut")


#: A cut between two packets leaves no trace in formats that state no size.
TRACELESS = {"ts", "ts with sound", "m2ts", "h264", "mp4 in fragments", "flv without duration"}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"nut"}))
def test_any_cut_is_an_error_or_nearly_whole(files, tmp_path, kind):
    _, data = files[kind]
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    unnoticed = 0
    for cut in rng.integers(1, len(data), 25):
        (tmp_path / "cut").write_bytes(data[:cut])
        try:
            frames = check_video(tmp_path / "cut").frames
        except VideoError:
            continue
        unnoticed += frames < 0.95 * FRAMES
    assert unnoticed <= (2 if kind in TRACELESS else 0)


def test_the_reason_says_how_much_is_missing(files, tmp_path):
    _, data = files["mp4"]
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"truncated: \d\d% of it lies beyond the end of the file"):
        read_frames(tmp_path / "cut.mp4")
    _, data = files["ts"]
    (tmp_path / "cut.ts").write_bytes(data[: len(data) // 188 * 188 - 100])
    with pytest.raises(VideoError, match=r"truncated: the file ends in the middle of its data"):
        read_frames(tmp_path / "cut.ts")


@pytest.mark.parametrize("kind", ["mp4", "avi", "mkv", "wmv"])
def test_a_few_missing_frames_do_no_harm(files, tmp_path, kind):
    _, data = files[kind]
    missing = 0.03 if kind != "mp4" else 0.01
    (tmp_path / "cut").write_bytes(data[: int(len(data) * (1 - missing))])
    assert 0.9 * FRAMES < check_video(tmp_path / "cut").frames <= FRAMES


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_recording_that_states_no_size(files, tmp_path, size):
    _, data = files["avi"]
    (tmp_path / "clip.avi").write_bytes(data[:4] + size.to_bytes(4, "little") + data[8:])
    assert check_video(tmp_path / "clip.avi").frames == FRAMES


def test_streamed_matroska(tmp_path):
    write(tmp_path / "live.mkv", "matroska", *X264, False, {"live": "1"})
    assert check_video(tmp_path / "live.mkv").frames == FRAMES


def test_a_damaged_middle_is_no_cut(files, tmp_path):
    """Joined and recorded streams hold damaged packets; only the end tells of a cut."""
    _, data = files["ts"]
    middle = bytearray(data)
    at = len(data) // 188 // 2 * 188
    middle[at + 4 : at + 188] = bytes(184)
    (tmp_path / "scratched.ts").write_bytes(middle)
    assert check_video(tmp_path / "scratched.ts").frames >= 0.9 * FRAMES


def test_undecodable_content_is_reported(files, tmp_path):
    _, whole = files["mp4"]
    data = bytearray(whole)
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    (tmp_path / "blank.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="decode"):
        read_frames(tmp_path / "blank.mp4", num_frames=5)
