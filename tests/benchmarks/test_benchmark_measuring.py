"""Measurements of memory and time, and the machines on which they can run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from measure import device, shapes
from measure.memory import peak_bytes
from measure.plan import SIZES
from measure.sampler import Sampler, quantiles
from measure.student_model import VIDEO_STUDENTS
from measure.student_rows import chosen_rows, least
from measure.teacher_step import MODELS
from measure.work import Work

ROOT = Path(__file__).resolve().parents[2]
KIB = 1 << 10

WITHOUT = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if str(name).split(".")[0] in {"av", "diffusers"} else found(name, path, target)

PathFinder.find_spec = find_spec
"""


def rows(count):
    return torch.empty(count, KIB, dtype=torch.uint8, device=device.device())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the caching allocator rounds sizes up")
def test_peak_is_exact():
    def twice_and_release():
        first = rows(64)
        second = rows(16)
        del first
        third = rows(32)
        return second, third

    assert peak_bytes(twice_and_release) == 80 * KIB
    held = rows(100)
    assert peak_bytes(lambda: rows(8)) == 8 * KIB
    del held


@pytest.mark.skipif(torch.cuda.is_available(), reason="the caching allocator rounds sizes up")
def test_peak_sees_inside_operators():
    """The peak includes what a registered op allocates inside."""
    left = torch.randn(256, 256)

    def through_a_custom_op():
        from mekernels import MotionStatistics, VideoTokens

        video = VideoTokens(4, 4, 4)
        tokens = torch.randn(1, 1, video.length, 8)
        MotionStatistics(video, 1, sampled_rows=4).update(tokens, tokens, tokens[..., 0])

    sums = 4 * (64 * 4 + 4 * 64)
    assert peak_bytes(through_a_custom_op) > sums
    assert peak_bytes(lambda: (left @ left).softmax(-1).sum()) >= 2 * 4 * 256**2


def test_peak_of_a_backward():
    weight = torch.randn(64, 64, requires_grad=True, device=device.device())
    assert peak_bytes(lambda: (weight @ weight).sum().backward()) >= 2 * 4 * 64**2


def test_quantiles():
    assert quantiles([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}


def slowly(x):
    time.sleep(0.002)
    return x + 1


def work_of(size):
    return Work(
        "copying",
        "one",
        lambda seed: (torch.full((size,), float(seed)),),
        {"ours": lambda x: x + 1, "slow": slowly},
        lambda role, result, inputs: None,
        torch.float32,
        1,
    )


def test_inputs_outgrow_the_cache():
    small, large = work_of(device.cache_bytes() // 64), work_of(device.cache_bytes())
    total = sum(inputs[0].nbytes for inputs in small.inputs)
    assert total >= min(16 * small.inputs[0][0].nbytes, 2 * device.cache_bytes())
    assert len(large.inputs) == 2
    assert [int(inputs[0][0]) for inputs in large.inputs] == [0, 1]


def test_after_the_deadline_nothing_begins():
    skipped = []
    sampler = Sampler(1.0, time.monotonic() - 1, [], skipped)
    with pytest.raises(pytest.skip.Exception, match="the time budget was spent"):
        sampler.measure(None, work_of(8), "ours")
    assert skipped == [
        {"work": "copying", "case": "one", "role": "ours", "reason": "the time budget was spent"}
    ]


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_whole(size):
    for shape in shapes.TEACHERS[size]:
        assert shape.video.length == shape.text + shape.video.vision
        assert shape.words <= max(shape.text, shape.words)
    for shape in shapes.STUDENTS[size]:
        found = chosen_rows(shape)
        assert found.shape == (1, shape.rows)
        assert shape.columns.stop <= int(found.min()) <= int(found.max()) < shape.tokens
    for shape in VIDEO_STUDENTS[size]:
        assert shape.words // 2 >= shape.rows
    assert all(small.shape.fold == 2 for small in MODELS[size])


def test_grids_are_those_of_the_released_models():
    grids = {shape.case.split(",")[0]: shape for shape in shapes.TEACHERS["real"]}
    assert grids["CogVideoX-5B"].grid == (13, 30, 45)
    assert grids["CogVideoX-5B"].video.length == 226 + 17550
    assert grids["CogVideoX-1.5-5B"].video.vision == 44880
    assert grids["Wan-14B"].grid == (21, 480 // 16, 832 // 16)
    assert grids["HunyuanVideo"].grid == (33, 544 // 16, 960 // 16)


def test_collected_where_decoding_and_diffusers_are_missing(tmp_path):
    """Benchmarks of kernels and students are collected without the packages of teachers and of decoding."""
    (tmp_path / "without_some.py").write_text(WITHOUT)
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "--collect-only", "-q", "-rs"]
    command += ["--size", "tiny", "-p", "without_some", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    paths = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, text=True, capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_teacher_layer", "test_attention_rows", "test_student_step", "test_alignment"):
        assert name in done.stdout
    assert "test_teacher_step[" not in done.stdout
    assert "diffusers is not installed" in done.stdout


def test_students_step_without_them(tmp_path):
    program = WITHOUT + (
        "from measure import student_step\n"
        "from measure.sampler import verify\n"
        "work = student_step.plans('tiny')[0].build()\n"
        "assert [verify(work, role) for role in work.roles] == ['', '', '']\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


class Stand:
    """A stand-in for pytest-benchmark's fixture, with the parts that the sampler uses."""

    def __init__(self):
        self.extra_info, self.group = {}, None
        self.stats = type("Holder", (), {"stats": type("Stats", (), {"data": []})})

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for turn in range(warmup_rounds + rounds):
            setup()
            began = time.perf_counter()
            target()
            if turn >= warmup_rounds:
                self.stats.stats.data.append(time.perf_counter() - began)


def test_baselines_take_turns_with_ours():
    stand = Stand()
    Sampler(0.05, time.monotonic() + 60, [], []).measure(stand, work_of(8), "slow")
    info = stand.extra_info
    assert info["role"] == "slow"
    assert info["seconds"]["p50"] >= 0.002
    assert info["over_ours"]["p50"] > 5
    assert info["device_seconds"] is None or torch.cuda.is_available()


class Queue:
    """A stand-in for a GPU, on the host's clock: it sleeps first, then does the started work in order."""

    def __init__(self, monkeypatch, seconds_of=None, capacity=10**9):
        self.free, self.seconds_of, self.capacity, self.batches = 0.0, seconds_of or {}, capacity, []
        monkeypatch.setattr(device, "on_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles):
        self.batches.append(0)
        self.start(cycles / device.CYCLES_PER_SECOND)

    def start(self, seconds):
        self.free = max(self.free, time.perf_counter()) + seconds

    def wait(self):
        time.sleep(max(0.0, self.free - time.perf_counter()))


class Event:
    def __init__(self, queue):
        self.queue = queue

    def record(self):
        self.queue.batches[-1] += 1
        if self.queue.batches[-1] > self.queue.capacity:
            self.queue.wait()
        self.at = max(self.queue.free, time.perf_counter())

    def query(self):
        return time.perf_counter() >= self.at

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_the_least_work_of_rows():
    shape = shapes.Student("", tokens=96, heads=4, key_heads=2, width=8)
    work = least(shape, rows=5, itemsize=2)
    read, written = 2 * (4 * 5 + 2 * 96) * 8 * 2, (2 + 4) * 96 * 8 * 2
    assert work["moved"] == read + written + 2 * 5 * 60 * 4
    assert work["operations"] == 8 * 4 * 5 * 96 * 8
    assert work["exponentials"] == 2 * 4 * 5 * 96


def test_times_of_the_device_contain_no_time_of_the_host(monkeypatch):
    queue = Queue(monkeypatch)

    def short():
        time.sleep(0.003)
        queue.start(1e-5)

    def long():
        time.sleep(0.001)
        queue.start(5e-3)

    times = device.queued_seconds([short, long], 5)
    assert times.filled
    assert [len(samples) for samples in (*times.device, *times.host)] == [5] * 4
    assert times.device[0] == pytest.approx([1e-5] * 5)
    assert times.device[1] == pytest.approx([5e-3] * 5)
    assert min(times.host[0]) >= 0.003
    assert 0.001 <= min(times.host[1]) < 0.003


def test_a_full_queue_is_filled_less(monkeypatch):
    queue = Queue(monkeypatch, capacity=9)
    times = device.queued_seconds([lambda: queue.start(1e-4)], 16)
    assert times.filled
    assert times.device[0] == pytest.approx([1e-4] * 16)
    # A batch of 4 has 9 events, including the event after the wait.
    assert queue.batches == [17 + 16, 17, 9, 9, 9, 9]


def test_a_call_that_waits_for_the_device_is_said(monkeypatch):
    queue = Queue(monkeypatch)

    def waiting():
        queue.start(1e-3)
        queue.wait()
        queue.start(4e-3)

    times = device.queued_seconds([waiting], 3)
    assert not times.filled
    assert [len(samples) for samples in (*times.device, *times.host)] == [3] * 2
    # From an idle device to an idle device; the host's time contains no sleep of the device.
    assert min(times.device[0]) >= 5e-3
    assert 1e-3 <= min(times.host[0]) < 5e-3


def test_samples_of_a_gpu_are_between_events(monkeypatch):
    queue = Queue(monkeypatch)
    monkeypatch.setattr(device, "ceilings", lambda: {"bytes_per_second": 1e3, "float32_per_second": 1e6})
    monkeypatch.setattr("measure.sampler.peak_bytes", lambda call: 7)
    work = work_of(8)
    for role, seconds in (("ours", 1e-4), ("slow", 2e-3)):
        work.roles[role] = lambda x, seconds=seconds: (queue.start(seconds), x + 1)[1]
    work.moved, work.operations = 4.0, 8e3
    stand = Stand()
    Sampler(0.05, time.monotonic() + 60, [], []).measure(stand, work, "slow")
    info = stand.extra_info
    assert info["device_seconds"]["p50"] == pytest.approx(2e-3)
    assert info["over_ours"]["p50"] == pytest.approx(20)
    assert 0 < info["host_seconds"]["p50"] < 2e-3
    assert info["queue_filled"]
    assert info["floor_seconds"] == pytest.approx(8e-3)
    assert info["peak_bytes"] == 7
    rates = {"bytes_per_second": 1e3, "float32_per_second": 1e6, "exponentials_per_second": 1e2}
    monkeypatch.setattr(device, "ceilings", lambda: rates)
    work.exponentials = 5.0
    Sampler(0.05, time.monotonic() + 60, [], []).measure(stand, work, "slow")
    assert stand.extra_info["floor_seconds"] == pytest.approx(5e-2)
    work.beside = ("slow",)
    Sampler(0.05, time.monotonic() + 60, [], []).measure(stand, work, "slow")
    assert stand.extra_info["floor_seconds"] is None
