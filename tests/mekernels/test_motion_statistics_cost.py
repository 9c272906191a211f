"""What an update computes, and the memory it takes beside the attention it rides on."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mekernels import MotionStatistics, VideoTokens, backends
from mekernels.diagonal_attention.call import Call
from mekernels.motion_statistics.sums import Sums

BASE = {"frames": 3, "height": 2, "width": 4, "text": 5, "text_rows": 2, "sampled": 4, "heads": 2, "fold": 1}


def operations(frames, height, width, text, text_rows, sampled, heads, fold):
    """Multiplications and additions in matrix products of one update."""
    video = VideoTokens(frames, height, width, text=text)
    statistics = MotionStatistics(video, heads, text_rows=list(range(text_rows)), sampled_rows=sampled)
    query, key = torch.zeros(1, heads, video.length, 8), torch.zeros(1, heads, fold * video.length, 8)
    statistics.update(query[:1], key, torch.zeros(1, heads, video.length), fold=fold)
    sums = statistics.state_dict() | {"tokens": torch.arange(text_rows + sampled)}
    held = Sums(**{name: sums[name] for name in Sums._fields})
    call = Call.of(query, key, torch.zeros(1, heads, video.length), video, 1.0, fold)
    with FlopCounterMode(display=False) as counter:
        backends.table("motion_statistics_update")["torch"].run(held, call)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [None, *BASE])
@pytest.mark.parametrize("factor", [2, 5])
def test_operations_grow_as_tokens_times_frames_text_and_rows(name, factor):
    shape = dict(BASE)
    if name == "text_rows":
        shape["text_rows"] = factor
    elif name:
        shape[name] *= factor
    vision = shape["frames"] * shape["height"] * shape["width"]
    entries = vision * (shape["frames"] + shape["text_rows"] + shape["sampled"] + shape["text"])
    assert operations(**shape) == 2 * 8 * shape["heads"] * shape["fold"] * entries


PEAK = """
import torch, mekernels
torch.set_num_threads(1)
video = mekernels.VideoTokens(16, 16, 16, text=64)
query, key, value = torch.randn(3, 1, 8, video.length, 64)
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
def attend():
    return mekernels.flash_attention(query, key, value)
def update(video, tensors, lse):
    statistics = mekernels.MotionStatistics(video, 8)
    for step in range(2):
        statistics.update(*tensors, lse)
# What the first call ever loads and keeps is no memory of an update.
small = mekernels.VideoTokens(2, 4, 4, text=4)
update(small, torch.randn(2, 1, 8, small.length, 64), torch.zeros(1, 8, small.length))
out, lse = attend()
attend()
alone = peak()
update(video, (query, key), lse)
print(peak() - alone)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_a_twentieth_of_one_map_per_head():
    """4,096 video tokens, 8 heads of 64; the sums themselves included."""
    command = [sys.executable, "-c", PEAK]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    maps = 8 * 4160**2 * 4
    assert 0 < extra <= maps / 20
