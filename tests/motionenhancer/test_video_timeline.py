"""Frames come out as a decoder shows them, whatever the file's time stamps, order and headers say."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from motionenhancer.data import VideoError, check_video, read_frames
from motionenhancer.data.encode import encode_video


def shade(index):
    """Return a picture whose grey level tells its index."""
    return np.full((48, 64, 3), 20 + 4 * index, np.uint8)


def indices(frames):
    return [round((float(frame.mean()) - 20) / 4) for frame in frames]


def write(path, count=40, codec="libx264", format=None, pts=None, rate=25, **options):
    """Encode ``count`` shades; ``pts`` in units of 1 / rate."""
    with av.open(str(path), "w", format=format) as container:
        quality = {"crf": "8"} if codec.startswith("libx26") else {"qscale": "2"}
        stream = container.add_stream(codec, rate=rate, options={**quality, **options})
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(shade(i), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source, path, change=lambda packets: packets, format=None):
    """Copy the packets of a clip into another file after ``change``."""
    with av.open(str(source)) as container, av.open(str(path), "w", format=format) as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in change([p for p in container.demux(stream) if p.size]):
            packet.stream = copy
            out.mux(packet)
    return path


def decoded(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def same_as_a_decoder(path, count):
    """Check a clip against a plain decode of it; return its frames' times."""
    expected = decoded(path)
    video = read_frames(path)
    assert len(expected) == count
    np.testing.assert_array_equal(video.frames, np.stack(expected))
    assert (np.diff(video.timestamps) > 0).all()
    assert video.timestamps[0] == 0
    assert check_video(path).frames == video.source_frames == count
    return video.timestamps


@pytest.mark.parametrize("options", [{}, {"bf": "1"}, {"bf": "0"}])
def test_avi_with_b_frames(tmp_path, options):
    path = write(tmp_path / "clip.avi", **options)
    times = same_as_a_decoder(path, 40)
    np.testing.assert_allclose(times, np.arange(40) / 25, atol=1e-6)
    assert indices(read_frames(path, fps=5).frames) == list(range(0, 40, 5))


def test_mp4_without_composition_offsets(tmp_path):
    data = bytearray(write(tmp_path / "full.mp4").read_bytes())
    at = data.index(b"ctts")
    data[at : at + 4] = b"skip"
    (tmp_path / "clip.mp4").write_bytes(data)
    expected = decoded(tmp_path / "clip.mp4")
    times = same_as_a_decoder(tmp_path / "clip.mp4", len(expected))
    shown = np.array(indices(expected))  # The edit list now trims other frames, in the middle too.
    np.testing.assert_allclose(times, (shown - shown[0]) / 25, atol=1e-6)


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_clip_of_too_many_frames_is_refused(tmp_path, monkeypatch, suffix):
    """A transport stream does not say how many it holds."""
    path = write(tmp_path / f"a.{suffix}", 8)
    monkeypatch.setenv("MOTIONENHANCER_CLIP_FRAMES", "8")
    assert len(read_frames(path).frames) == 8
    monkeypatch.setenv("MOTIONENHANCER_CLIP_FRAMES", "7")
    for read in (read_frames, check_video):
        with pytest.raises(VideoError, match="8 frames, more than 7; the environment variable") as caught:
            read(path)
        assert caught.value.passing


def test_joined_transport_streams(tmp_path):
    data = write(tmp_path / "one.ts", 25).read_bytes()
    (tmp_path / "two.ts").write_bytes(data + data)
    times = same_as_a_decoder(tmp_path / "two.ts", 50)
    np.testing.assert_allclose(times, np.arange(50) / 25, atol=1e-5)
    assert indices(read_frames(tmp_path / "two.ts", fps=5).frames) == [0, 5, 10, 15, 20] * 2


def test_stamps_that_wrap_at_33_bits(tmp_path):
    def late(packets):
        for packet in packets:
            ticks = 2**33 - 90_000 * Fraction(4, 5)
            for name in ("pts", "dts"):
                setattr(packet, name, getattr(packet, name) + int(ticks / 90_000 / packet.time_base))
        return packets

    write(tmp_path / "plain.mp4")
    remux(tmp_path / "plain.mp4", tmp_path / "late.ts", late)
    times = same_as_a_decoder(tmp_path / "late.ts", 40)
    np.testing.assert_allclose(times, np.arange(40) / 25, atol=1e-4)


def test_equal_stamps_are_spread(tmp_path):
    def pairs(packets):
        for i, packet in enumerate(packets):
            packet.pts = packet.dts = (i - i % 2) * int(Fraction(1, 25) / packet.time_base)
        return packets

    write(tmp_path / "plain.mkv", codec="mjpeg")
    remux(tmp_path / "plain.mkv", tmp_path / "pairs.mkv", pairs)
    times = same_as_a_decoder(tmp_path / "pairs.mkv", 40)
    np.testing.assert_allclose(times, np.arange(40) / 25, atol=1e-3)


def test_one_stamp_for_all(tmp_path):
    def still(packets):
        for packet in packets:
            packet.pts = packet.dts = 0
        return packets

    write(tmp_path / "plain.mkv", 6, codec="mjpeg")
    remux(tmp_path / "plain.mkv", tmp_path / "still.mkv", still)
    same_as_a_decoder(tmp_path / "still.mkv", 6)


def test_no_stamps_at_all(tmp_path):
    path = write(tmp_path / "clip.h264")
    times = same_as_a_decoder(path, 40)
    np.testing.assert_allclose(np.diff(times), 1 / 25, atol=1e-6)


# A transport stream of H.264 cut so has no parameter sets in front: nothing decodes it.
@pytest.mark.parametrize(
    ("codec", "kind"),
    [("libx264", "mkv"), ("libx264", "mp4"), ("libx265", "mkv"), ("libx265", "mp4"), ("libx265", "ts")],
)
def test_open_gop_cut_at_a_key_frame(tmp_path, kind, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    name = "x265-params" if codec == "libx265" else "x264-params"
    gop = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
    write(
        tmp_path / "full.mkv", codec=codec, **{name: gop + (":log-level=none" if codec == "libx265" else "")}
    )

    def from_the_second_key(packets):
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        return packets[keys[1] :]

    path = remux(tmp_path / "full.mkv", tmp_path / f"cut.{kind}", from_the_second_key)
    expected = decoded(path)
    with av.open(str(path)) as container:
        stored = sum(1 for packet in container.demux(video=0) if packet.size)
    assert stored > len(expected)  # Leading pictures never come out.
    times = same_as_a_decoder(path, len(expected))
    np.testing.assert_allclose(np.diff(times), 1 / 25, atol=2e-3)


@pytest.mark.parametrize(("trimmed", "shown"), [(10, 30), (0, 40)])
def test_edit_list_that_trims_the_start(tmp_path, trimmed, shown):
    data = bytearray(write(tmp_path / "full.mp4", bf="0").read_bytes())
    at = data.index(b"elst") + 12  # Behind version, flags and count: duration, then the media's time.
    with av.open(str(tmp_path / "full.mp4")) as container:
        tick = round(1 / 25 / container.streams.video[0].time_base)
    data[at + 4 : at + 8] = struct.pack(">i", trimmed * tick)
    (tmp_path / "cut.mp4").write_bytes(data)
    times = same_as_a_decoder(tmp_path / "cut.mp4", shown)
    np.testing.assert_allclose(times, np.arange(shown) / 25, atol=1e-6)


def test_edit_list_that_trims_the_end(tmp_path):
    data = bytearray(write(tmp_path / "full.mp4", bf="0").read_bytes())
    at = data.index(b"elst") + 12
    duration = struct.unpack(">i", data[at : at + 4])[0]
    data[at : at + 4] = struct.pack(">i", duration // 2)
    (tmp_path / "cut.mp4").write_bytes(data)
    expected = decoded(tmp_path / "cut.mp4")
    assert 19 <= len(expected) <= 21
    same_as_a_decoder(tmp_path / "cut.mp4", len(expected))


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_avi_with_null_chunks(tmp_path, codec):
    tenths = [0, 1, 2, 3, 4, 9, 10, 15, 16, 17, 18, 19, 20, 30]
    path = write(tmp_path / "null.avi", len(tenths), codec=codec, pts=tenths, rate=10)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 31
    times = same_as_a_decoder(path, len(tenths))
    np.testing.assert_allclose(times, np.array(tenths) / 10, atol=1e-6)


def test_packets_without_a_picture(tmp_path):
    """VP9 stores hidden reference frames."""
    if "libvpx-vp9" not in av.codecs_available:
        pytest.skip("this PyAV has no libvpx-vp9")
    path = write(tmp_path / "clip.webm", codec="libvpx-vp9", **{"auto-alt-ref": "1", "lag-in-frames": "16"})
    same_as_a_decoder(path, 40)


def test_a_segment_is_sampled_by_itself(tmp_path):
    path = write(tmp_path / "clip.mp4")  # 40 frames, 25 a second.
    whole = read_frames(path)
    part = read_frames(path, start=0.4, end=0.76)  # Both ends are shown, as in qwen-vl-utils.
    assert indices(part.frames) == list(range(10, 20))
    np.testing.assert_array_equal(part.timestamps, whole.timestamps[10:20])
    assert (part.source_frames, part.duration) == (10, pytest.approx(0.4))
    assert indices(read_frames(path, start=0.4, end=0.76, num_frames=2).frames) == [10, 19]
    assert indices(read_frames(path, start=0.4, end=0.76, fps=5).frames) == [10, 15]
    assert indices(read_frames(path, end=0.16).frames) == list(range(5))
    assert indices(read_frames(path, start=1.4).frames) == list(range(35, 40))
    assert indices(read_frames(path, start=0.39, end=9.0, fps=1).frames) == [10]
    with pytest.raises(VideoError, match="has 10 frames, needs at least 11"):
        read_frames(path, start=0.4, end=0.76, min_frames=11)


def test_a_segment_without_frames_is_refused(tmp_path):
    path = write(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match=r"has no frames from 2 s on until 3 s; it lasts 1.6 s"):
        read_frames(path, start=2, end=3)
    with pytest.raises(ValueError, match="end must be after start, got start 2 and end 1"):
        read_frames(path, start=2, end=1)
    with pytest.raises(ValueError, match="start must be positive"):
        read_frames(path, start=-1.0)


def with_matrix(path, a, b, c, d):
    """Write a clip whose display matrix is (a, b), (c, d), in units of 1 / 65536."""
    picture = (
        np.random.default_rng(0).integers(0, 256, (3, 4, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
    )
    plain = path.with_name("plain.mp4")
    with av.open(str(plain), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(plain.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return decoded(plain)[0]


@pytest.mark.parametrize("scale", [65536, 32768])
@pytest.mark.parametrize(
    "matrix",
    [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)],
)
def test_every_turn_and_mirror(tmp_path, matrix, scale):
    a, b, c, d = matrix
    path = tmp_path / "turned.mp4"
    stored = with_matrix(path, *(scale * entry for entry in matrix))
    height, width = stored.shape[:2]
    y, x = np.mgrid[:height, :width]
    # A pixel (x, y) is shown at (a x + c y, b x + d y), moved to where no coordinate is negative.
    to_x, to_y = a * x + c * y, b * x + d * y
    shown = np.empty((width, height, 3) if b else stored.shape, np.uint8)
    shown[to_y - to_y.min(), to_x - to_x.min()] = stored
    np.testing.assert_array_equal(read_frames(path).frames[0], shown)
    info = check_video(path)
    assert (info.height, info.width) == shown.shape[:2]
    assert read_frames(path, size=(10, 20)).frames.shape == (3, 10, 20, 3)


def test_a_slanted_picture_is_refused(tmp_path):
    turn = np.deg2rad(30)
    entries = (np.array([np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)]) * 65536).astype(int)
    with_matrix(tmp_path / "slanted.mp4", *entries.tolist())
    for read in (read_frames, check_video):
        with pytest.raises(VideoError, match="not a multiple of 90 degrees"):
            read(tmp_path / "slanted.mp4")


def with_preview(path, disposition):
    """Write a film as the second stream, behind a preview picture."""
    with av.open(str(path), "w") as container:
        preview = container.add_stream("mjpeg", rate=25)
        preview.width, preview.height, preview.pix_fmt = 320, 240, "yuvj420p"
        film = container.add_stream("libx264", rate=25, options={"crf": "8"})
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        preview.disposition = disposition
        film.disposition = av.stream.Disposition.default
        picture = np.full((240, 320, 3), 128, np.uint8)
        container.mux(preview.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(preview.encode(None))
        for i in range(20):
            container.mux(film.encode(av.VideoFrame.from_ndarray(shade(i), format="rgb24")))
        container.mux(film.encode(None))


@pytest.mark.parametrize("cover", [False, True])
def test_the_film_and_not_its_preview(tmp_path, cover):
    disposition = av.stream.Disposition.attached_pic if cover else av.stream.Disposition(0)
    with_preview(tmp_path / "film.mp4", disposition)
    video = read_frames(tmp_path / "film.mp4")
    assert video.frames.shape == (20, 48, 64, 3)
    assert indices(video.frames) == list(range(20))


def test_a_cover_alone_is_no_film(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(shade(0), format="rgb24")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(VideoError, match="has no video stream"):
        read_frames(tmp_path / "song.mp4")


@pytest.mark.parametrize(
    "name",
    ["00:12:30.mp4", "50%.mp4", "a%03d.mp4", "-i.mp4", "pipe:0", "http:a.mp4", "concat:a|b.mp4", "a?b#c.mp4"],
)
def test_a_path_is_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    encode_video(name, np.stack([shade(i) for i in range(5)]), fps=25)
    assert indices(read_frames(name).frames) == list(range(5))
    assert indices(read_frames(tmp_path / name).frames) == list(range(5))
    assert check_video(name).frames == 5


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nplain.ts\n#EXT-X-ENDLIST\n",
    "endless.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nplain.ts\n",
    "ffconcat": "ffconcat version 1.0\nfile plain.ts\n",
    "mpd": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet/></Period></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "nfo": "a page of text\n" * 80,
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_that_names_others_is_refused(tmp_path, kind):
    write(tmp_path / "plain.ts", 5)
    (tmp_path / f"list.{kind}").write_text(PLAYLISTS[kind])
    with pytest.raises(VideoError, match="cannot be opened"):
        read_frames(tmp_path / f"list.{kind}")


def test_a_pattern_of_pictures_is_no_clip(tmp_path):
    for i, name in enumerate(["seq%d.png", "seq1.png", "seq2.png"]):
        frame = av.VideoFrame.from_ndarray(shade(i), format="rgb24")
        frame.to_image().save(tmp_path / name)
    with pytest.raises(VideoError, match="cannot be opened"):
        read_frames(tmp_path / "seq%d.png")
    assert indices(read_frames(tmp_path / "seq1.png").frames) == [1]
    with pytest.raises(VideoError, match="has 1 frame, needs at least 2"):
        read_frames(tmp_path / "seq2.png", min_frames=2)


def test_one_converter_and_one_thread_a_clip(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    made, threads = [], []

    class Counted:
        def __init__(self):
            self.converter = real()
            made.append(self)

        def reformat(self, frame, **options):
            threads.append(options["threads"])
            return self.converter.reformat(frame, **options)

    real = av.video.reformatter.VideoReformatter
    monkeypatch.setattr(av.video.reformatter, "VideoReformatter", Counted)
    read_frames(path)
    assert len(made) == 1
    assert threads == [1] * 40


def test_a_decoder_takes_one_thread(tmp_path):
    from motionenhancer.data.decode import opened

    with opened(write(tmp_path / "clip.mp4", 3)) as (_, stream):
        assert stream.codec_context.thread_count == 1
