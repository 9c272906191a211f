import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, rand

from mekernels import VideoTokens, reference, token_motion_scores, use_backend


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(0, 4),
    grid=st.tuples(*[st.integers(1, 5)] * 3),
    backend=st.sampled_from(["torch", "reference"]),
)
def test_against_the_reference(seed, tokens, grid, backend):
    video = VideoTokens(*grid, text=9)
    text = rand(tokens, video.vision, seed=seed)
    with use_backend(backend):
        assert_exact(
            token_motion_scores(text.T.contiguous().T, video), reference.token_motion_scores(text, video)
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_rule(dtype, seed):
    video = VideoTokens(5, 7, 9)
    text = rand(6, video.vision, seed=seed, dtype=dtype)
    actual = token_motion_scores(text, video)
    assert actual.dtype == torch.float32
    exact = reference.token_motion_scores(text.double(), video)
    assert_error_rule(actual, exact, reference.token_motion_scores(text, video))


def test_by_hand():
    text = torch.tensor([[1.0, 3, 0, 0, 4, 4], [1, 1, 1, 1, 1, 1]])
    assert token_motion_scores(text, VideoTokens(3, 1, 2)).tolist() == [5, 1]
    assert token_motion_scores(text, VideoTokens(1, 2, 3)).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("text", "video", "error", "message"),
    [
        (torch.zeros(2, 5), VideoTokens(3, 1, 2), ValueError, r"text_attention must have shape \(2, 6\)"),
        (torch.zeros(6), VideoTokens(3, 1, 2), ValueError, "text_attention must have 2 dimensions"),
        (torch.zeros(2, 6), (3, 1, 2), TypeError, "video must be a mekernels.VideoTokens, got tuple"),
        (None, VideoTokens(3, 1, 2), TypeError, "text_attention must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_arguments(text, video, error, message):
    with pytest.raises(error, match=message):
        token_motion_scores(text, video)
