import pytest

from mekernels import VideoTokens


def test_text_first():
    video = VideoTokens(frames=13, height=30, width=45, text=226)
    assert (video.positions, video.vision, video.length) == (1350, 17550, 17776)
    assert video.text_slice == slice(0, 226)
    assert video.vision_slice == slice(226, 17776)
    assert video.grid == (13, 30, 45)


def test_text_last():
    video = VideoTokens(2, 1, 3, text=4, text_first=False)
    assert video.vision_slice == slice(0, 6)
    assert video.text_slice == slice(6, 10)


def test_no_text():
    video = VideoTokens(1, 1, 1)
    assert video.length == 1
    assert video.text_slice == slice(0, 0)


@pytest.mark.parametrize("field", ["frames", "height", "width"])
def test_too_small(field):
    sizes = {"frames": 1, "height": 1, "width": 1, field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        VideoTokens(**sizes)


def test_wrong_types():
    with pytest.raises(TypeError, match="frames must be an int, got float"):
        VideoTokens(2.0, 1, 1)
    with pytest.raises(ValueError, match="text must be at least 0, got -1"):
        VideoTokens(2, 1, 1, text=-1)
    with pytest.raises(TypeError, match="text_first must be a bool, got int"):
        VideoTokens(2, 1, 1, text_first=1)


def test_frozen_and_hashable():
    video = VideoTokens(2, 1, 1)
    assert hash(video) == hash(VideoTokens(2, 1, 1))
    with pytest.raises(AttributeError):
        video.frames = 3
