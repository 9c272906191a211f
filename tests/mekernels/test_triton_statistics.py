"""The Triton kernels of the statistics against float64, in triton's interpreter or on a GPU.

Without either, ``test_triton_interpreter.py`` runs this file in a process of its own.
"""

import copy
import math

import pytest
import torch
from kernel_support import assert_error_rule, randn, strided

import mekernels
from mekernels import MotionStatistics, VideoTokens, backends, diagonal_attention, reference
from mekernels import launch as common

DEVICE = "cpu" if common.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if common.interpreted() else [torch.bfloat16])

pytestmark = pytest.mark.skipif(bool(common.machine()), reason="; ".join(common.machine()))


def case(video, seed=0, batch=1, heads=2, width=16, fold=1, dtype=torch.float32, scale=1.0):
    query = randn(batch, heads, video.length, width, seed=seed, dtype=dtype, scale=scale)
    key = randn(batch, heads, fold * video.length, width, seed=seed + 1, dtype=dtype, scale=scale)
    lse = reference.attention_lse(query.double(), key.double()).float()
    return [item.to(DEVICE) for item in (query, key, lse)]


def placed(tensor):
    """The same values behind another memory order and an offset."""
    return strided(tensor.cpu()).to(DEVICE) if DEVICE == "cpu" else tensor.mT.contiguous().mT


SHAPES = [
    # video, heads, width, fold
    (VideoTokens(1, 1, 1), 1, 32, 1),
    (VideoTokens(3, 2, 5, text=7), 2, 80, 1),
    (VideoTokens(13, 3, 3, text=70), 1, 64, 2),
    (VideoTokens(5, 1, 2, text=3, text_first=False), 3, 20, 3),
    (VideoTokens(17, 3, 1, text=1), 1, 96, 1),
    (VideoTokens(1, 4, 5, text=4), 1, 256, 2),
    (VideoTokens(33, 1, 2, text=2), 1, 33, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("video", "heads", "width", "fold"), SHAPES)
def test_diagonal_attention(video, heads, width, fold, dtype):
    query, key, lse = case(video, heads, 2, heads, width, fold, dtype)
    with mekernels.use_backend("triton"):
        actual = diagonal_attention(query, key, lse, video, fold=fold)
    exact = reference.diagonal_attention(query.double(), key.double(), lse.double(), video, fold=fold)
    plain = reference.diagonal_attention(query, key, lse.to(dtype), video, fold=fold)
    assert actual.dtype == torch.float32
    assert_error_rule(actual.cpu(), exact.cpu(), plain.cpu())


def pooled(backend, video, layers, fold, **options):
    statistics = MotionStatistics(video, layers[0][0].shape[1], **options)
    with mekernels.use_backend(backend):
        for query, key, lse in layers:
            statistics.update(query, key, lse, fold=fold)
    return statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("video", "heads", "width", "fold"), SHAPES)
def test_update(video, heads, width, fold, dtype):
    layers = [case(video, seed, 1, heads, width, fold, dtype) for seed in (0, 5)]
    doubles = [[item.double() for item in layer] for layer in layers]
    plains = [(query, key, lse.to(dtype)) for query, key, lse in layers]
    options = {
        "sampled_rows": 70,
        "text_rows": list(range(video.text_slice.start, video.text_slice.stop))[::-2],
    }
    actual = pooled("triton", video, layers, fold, **options).state_dict()
    exact = pooled("reference", video, doubles, fold, **options).state_dict()
    plain = pooled("reference", video, plains, fold, **options).state_dict()
    for name in ("diagonal", "rows", "vision_mass"):
        assert_error_rule(actual[name].cpu(), exact[name].cpu(), plain[name].cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_offsets(dtype):
    video = VideoTokens(3, 2, 3, text=4)
    query, key, lse = case(video, heads=3, width=24, fold=2, dtype=dtype)
    wide = torch.full((1, 3, video.length, 2), math.nan, device=DEVICE)
    wide[..., 1] = lse
    moved = placed(query), placed(key), wide[..., 1]
    with mekernels.use_backend("triton"):
        one = diagonal_attention(query, key, lse, video, fold=2)
        other = diagonal_attention(*moved, video, fold=2)
    assert torch.equal(one, other)
    first = pooled("triton", video, [(query, key, lse)], 2).state_dict()
    second = pooled("triton", video, [moved], 2).state_dict()
    for name in ("diagonal", "rows", "vision_mass"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_sums_of_any_strides(order):
    video = VideoTokens(3, 2, 3, text=4)
    query, key, lse = case(video, heads=2)
    frames, positions, vision = video.frames, video.positions, video.vision
    index = torch.tensor([1, 4, 20], device=DEVICE)

    def sums(order):
        size = (2, frames, frames, positions)
        diagonal = torch.zeros([size[axis] for axis in order], device=DEVICE)
        diagonal = diagonal.permute([order.index(axis) for axis in range(4)])
        rows = (
            torch.zeros(2, vision, 3, device=DEVICE).mT
            if order[0]
            else torch.zeros(2, 3, vision, device=DEVICE)
        )
        return diagonal, rows, torch.zeros(vision, 2, device=DEVICE).T

    held = sums(order)
    layout = (frames, positions, 4, 4, 0, 0.25, 1)
    torch.ops.mekernels.motion_statistics_update_triton(*held, index, query, key, lse, *layout)
    wanted = sums((0, 1, 2, 3))
    torch.ops.mekernels.motion_statistics_update_torch(*wanted, index, query, key, lse, *layout)
    for actual, expected in zip(held, wanted, strict=True):
        torch.testing.assert_close(actual, expected)


def test_repeated_updates_give_the_same_bits():
    video = VideoTokens(4, 3, 3, text=9)
    layers = [case(video, seed) for seed in (0, 2)]
    first, second = (pooled("triton", video, layers, 1).state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_huge_logits():
    video = VideoTokens(3, 2, 2, text=5)
    query, key, lse = case(video, scale=60.0)
    actual = pooled("triton", video, [(query, key, lse)], 1, sampled_rows="all").state_dict()
    exact = pooled(
        "reference", video, [[item.double() for item in (query, key, lse)]], 1, sampled_rows="all"
    ).state_dict()
    plain = pooled("reference", video, [(query, key, lse)], 1, sampled_rows="all").state_dict()
    for name in ("diagonal", "rows", "vision_mass"):
        assert_error_rule(actual[name].cpu(), exact[name].cpu(), plain[name].cpu())


@pytest.mark.parametrize("place", ["query", "key", "lse"])
def test_nan_is_reported(place):
    video = VideoTokens(2, 2, 2, text=1)
    inputs = dict(zip(("query", "key", "lse"), case(video), strict=True))
    inputs[place][0, 1, 4] = math.nan
    statistics = MotionStatistics(video, 2)
    with mekernels.use_backend("triton"):
        statistics.update(**inputs)
    with pytest.raises(ValueError, match="attention statistics must be finite"):
        statistics.scores()


def test_rows_that_see_nothing_of_the_text():
    video = VideoTokens(2, 2, 2, text=3)
    query, key, _ = case(video)
    # Text keys far below the video's: their weights are exactly zero.
    key[:, :, :3] = -1e4 * query[:, :, 3:4].sign()
    query[:, :, 3:] = query[:, :, 3:4]
    lse = reference.attention_lse(query.double(), key.double()).float()
    held = pooled("triton", video, [(query, key, lse)], 1).state_dict()
    assert (held["vision_mass"] == 1).all()


def test_per_layer_scores():
    video = VideoTokens(3, 2, 3, text=4)
    layers = [case(video, seed, heads=2, fold=2) for seed in (0, 2)]
    with mekernels.use_backend("triton"):
        statistics = MotionStatistics(video, 2, pooling="per_layer")
        for query, key, lse in layers:
            statistics.update(query, key, lse, fold=2)
    wanted = pooled("reference", video, layers, 2, pooling="per_layer").scores()
    with mekernels.use_backend("torch"):
        scores = statistics.scores()
    torch.testing.assert_close(scores.dfc, wanted.dfc)
    torch.testing.assert_close(scores.tcs, wanted.tcs)


def test_float64_is_refused_with_its_reason():
    video = VideoTokens(2, 2, 2)
    inputs = [item.double() for item in case(video)]
    statistics = MotionStatistics(video, 2)
    with mekernels.use_backend("triton"):
        with pytest.raises(backends.BackendError, match=r"got torch\.float64"):
            diagonal_attention(*inputs, video)
        with pytest.raises(backends.BackendError, match=r"got torch\.float64"):
            statistics.update(*inputs)
    assert statistics.updates == 0


def far_apart(tensor, gap, file):
    """The same values with tokens ``gap`` elements apart, in a file of which only the used pages exist."""
    heads, tokens, width = tensor.shape[1:]
    elements = heads * (gap + 64) + tokens * gap + width
    with open(file, "wb") as sparse:
        sparse.truncate(elements * tensor.element_size())
    base = torch.from_file(str(file), shared=True, size=elements, dtype=tensor.dtype)
    assert (tokens - 1) * gap > 2**31
    return base.as_strided(tensor.shape, (0, gap + 64, gap, 1)).copy_(tensor)


@pytest.mark.skipif(not common.interpreted(), reason="needs memory that is only reserved")
def test_offsets_beyond_32_bits(tmp_path):
    video = VideoTokens(3, 2, 3, text=2)
    query, key, lse = case(video, dtype=torch.float16)
    gap = 2**27 + 8
    moved = far_apart(query, gap, tmp_path / "query"), far_apart(key, gap, tmp_path / "key"), lse
    with mekernels.use_backend("triton"):
        assert torch.equal(diagonal_attention(query, key, lse, video), diagonal_attention(*moved, video))
    near = pooled("triton", video, [(query, key, lse)], 1).state_dict()
    far = pooled("triton", video, [moved], 1).state_dict()
    for name, tensor in near.items():
        assert torch.equal(tensor, far[name]), name


def test_keys_that_no_row_sees():
    """Scores of minus infinity are weights of zero, in video and in text."""
    video = VideoTokens(3, 2, 3, text=4)
    query, key, _ = case(video)
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, [1, 7, 21], 0] = -math.inf
    lse = reference.attention_lse(query.double(), key.double()).float()
    actual = pooled("triton", video, [(query, key, lse)], 1, sampled_rows="all").state_dict()
    exact = pooled("reference", video, [(query.double(), key.double(), lse.double())], 1, sampled_rows="all")
    plain = pooled("reference", video, [(query, key, lse)], 1, sampled_rows="all").state_dict()
    for name in ("diagonal", "rows", "vision_mass"):
        assert_error_rule(actual[name].cpu(), exact.state_dict()[name].cpu(), plain[name].cpu())
    assert (actual["rows"][:, :, 3] == 0).all()


@pytest.mark.parametrize("op", ["diagonal_attention", "motion_statistics_update"])
def test_opcheck(op):
    video = VideoTokens(2, 2, 2, text=3)
    inputs = case(video)
    if op == "diagonal_attention":
        arguments = (*inputs, 2, 4, 3, 3, 0, 0.25, 1)
    else:
        sizes = ((2, 2, 2, 4), (2, 5, 8), (2, 8))
        index = torch.tensor([0, 2, 4, 6, 9], device=DEVICE)
        sums = [torch.zeros(size, device=DEVICE) for size in sizes]
        arguments = (*sums, index, *inputs, 2, 4, 3, 3, 0, 0.25, 1)
    torch.library.opcheck(getattr(torch.ops.mekernels, f"{op}_triton").default, arguments)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 14),
    reason="before torch 2.14, torch.compile breaks the graph where an op looks up its backend",
)
def test_compiled_without_a_graph_break():
    video = VideoTokens(2, 2, 3, text=3)
    query, key, lse = case(video)

    def scaled(query, key, lse):
        return diagonal_attention(query * 1.0, key, lse, video) + 1

    with mekernels.use_backend("triton"):
        compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query, key, lse), scaled(query, key, lse))


KEPT = ("diagonal", "rows", "vision_mass")


def one_by_one(video, layers, fold=1, **options):
    return pooled("triton", video, layers, fold, pending_bytes=0, **options).state_dict()


@pytest.mark.parametrize("count", [2, 7, 8, 9])
@pytest.mark.parametrize("fold", [1, 2])
def test_several_maps_in_one_launch_are_those_one_by_one(count, fold):
    video = VideoTokens(3, 2, 3, text=4)
    layers = [case(video, 2 * seed, fold=fold) for seed in range(count)]
    with mekernels.use_backend("triton"):
        statistics = MotionStatistics(video, 2)
        for query, key, lse in layers:
            statistics.update(query, key, lse, fold=fold)
    assert statistics.updates == count
    assert statistics._pending.bytes == (count % 8) * sum(item.nbytes for item in layers[0])
    state, expected = statistics.state_dict(), one_by_one(video, layers, fold)
    assert statistics._pending.bytes == 0
    for name in KEPT:
        assert torch.equal(state[name], expected[name]), name


def launches(monkeypatch):
    from mekernels.motion_statistics import plan

    seen, run = [], plan.update

    def update(sums, call, more=()):
        seen.append(1 + len(more))
        run(sums, call, more)

    monkeypatch.setattr(plan, "update", update)
    return seen


@pytest.mark.parametrize(("kept", "expected"), [(0, [1] * 4), (1, [2, 2]), (2, [3, 1]), (3, [4]), (9, [4])])
def test_the_bound_counts_what_is_kept(monkeypatch, kept, expected):
    video = VideoTokens(2, 2, 2, text=3)
    layers = [case(video, seed) for seed in range(4)]
    size = sum(item.nbytes for item in layers[0])
    seen = launches(monkeypatch)
    pooled("triton", video, layers, 1, pending_bytes=kept * size).state_dict()
    assert seen == expected
    seen.clear()
    # With one byte less, one layer less is kept.
    pooled("triton", video, layers, 1, pending_bytes=max(0, kept * size - 1)).state_dict()
    assert seen == {0: [1] * 4, 1: [1] * 4, 2: [2, 2], 3: [3, 1], 9: [4]}[kept]


def test_a_view_counts_as_all_that_it_holds(monkeypatch):
    """A quarter of a buffer keeps the whole buffer; what several views share counts once."""
    video = VideoTokens(2, 2, 2, text=3)
    query, key, lse = case(video)
    wide = torch.zeros(4, *query.shape[1:], device=DEVICE)
    wide[1], wide[2] = query[0], key[0]
    with mekernels.use_backend("triton"):
        statistics = MotionStatistics(video, 2)
        statistics.update(wide[1:2], wide[2:3], lse)
        assert statistics._pending.bytes == wide.nbytes + lse.nbytes
        narrow = MotionStatistics(video, 2, pending_bytes=wide.nbytes)
        narrow.update(wide[1:2], wide[2:3], lse)
        assert narrow._pending.bytes == 0
    for name, tensor in one_by_one(video, [(query, key, lse)]).items():
        assert torch.equal(statistics.state_dict()[name], tensor), name


@pytest.mark.parametrize("change", ["scale", "fold", "strides", "dtype", "width", "lse"])
def test_another_layout_is_another_launch(monkeypatch, change):
    video = VideoTokens(2, 2, 2, text=3)
    first, second = case(video, 0), case(video, 2)
    options = {}
    if change == "scale":
        options["softmax_scale"] = 0.1
    elif change == "fold":
        second, options["fold"] = case(video, 2, fold=2), 2
    elif change == "strides":
        second[1] = placed(second[1])
    elif change == "dtype":
        second = case(video, 2, dtype=torch.float16)
    elif change == "width":
        second = case(video, 2, width=32)
    else:
        second[2] = second[2].double()
    expected = MotionStatistics(video, 2, pending_bytes=0)
    seen = launches(monkeypatch)
    statistics = MotionStatistics(video, 2)
    with mekernels.use_backend("triton"):
        for pool in (statistics, expected):
            pool.update(*first)
            pool.update(*second, **options)
    for name in KEPT:
        assert torch.equal(statistics.state_dict()[name], expected.state_dict()[name]), name
    assert seen == [1] * 4


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "read", ["update", "scores", "text_attention", "state_dict", "merge", "merged", "copy"]
)
def test_overwriting_what_is_kept_is_refused_by_name(place, read):
    video = VideoTokens(2, 2, 2, text=3)
    layers = [case(video, seed) for seed in (0, 2)]
    statistics, other = MotionStatistics(video, 2), MotionStatistics(video, 2)
    with mekernels.use_backend("triton"):
        for layer in layers:
            statistics.update(*layer)
        layers[0][place].mul_(1.0)
        reads = {
            "update": lambda: statistics.update(*case(video, 4)),
            "scores": statistics.scores,
            "text_attention": lambda: statistics.text_attention([0]),
            "state_dict": statistics.state_dict,
            "merge": lambda: statistics.merge(other),
            "merged": lambda: other.merge(statistics),
            "copy": lambda: copy.deepcopy(statistics),
        }
        name = ("query", "key", "lse")[place]
        with pytest.raises(
            RuntimeError, match=rf"{name} of an update \(2 updates ago\) was overwritten.*pending_bytes=0"
        ):
            reads[read]()
    assert statistics.updates == 2


def test_with_nothing_kept_tensors_may_be_overwritten():
    video = VideoTokens(2, 2, 2, text=3)
    layers = [case(video, seed) for seed in (0, 2)]
    expected = one_by_one(video, layers)
    buffers = [item.clone() for item in layers[0]]
    statistics = MotionStatistics(video, 2, pending_bytes=0)
    with mekernels.use_backend("triton"):
        for layer in layers:
            for buffer, item in zip(buffers, layer, strict=True):
                buffer.copy_(item)
            statistics.update(*buffers)
    for name in KEPT:
        assert torch.equal(statistics.state_dict()[name], expected[name]), name


def test_inference_tensors_are_not_kept():
    """Inference tensors have no version counter, so a change in place could not be detected."""
    video = VideoTokens(2, 2, 2, text=3)
    layer = case(video)
    with torch.inference_mode(), mekernels.use_backend("triton"):
        buffers = [item.clone() for item in layer]
        statistics = MotionStatistics(video, 2)
        statistics.update(*buffers)
        assert statistics._pending.bytes == 0
        for buffer in buffers:
            buffer.zero_()
        state = statistics.state_dict()
    for name, tensor in one_by_one(video, [layer]).items():
        assert torch.equal(state[name], tensor), name


def test_every_way_to_read_adds_what_waits():
    video = VideoTokens(2, 2, 2, text=3)
    layers = [case(video, seed) for seed in (0, 2)]
    done = one_by_one(video, layers)

    def waiting():
        return pooled("triton", video, layers, 1)

    assert torch.equal(
        waiting().scores().dfc, pooled("triton", video, layers, 1, pending_bytes=0).scores().dfc
    )
    rows = done["rows"][:, :3].mean(0) / 2
    torch.testing.assert_close(waiting().text_attention([0, 1]), rows)
    twice = waiting().merge(waiting()).state_dict()
    copied = copy.deepcopy(waiting()).state_dict()
    for name in KEPT:
        torch.testing.assert_close(twice[name], 2 * done[name])
        assert torch.equal(copied[name], done[name])
    # Pending layers belong to the replaced sums, so they are dropped.
    loaded = waiting()
    loaded.load_state_dict(done)
    for name in KEPT:
        assert torch.equal(loaded.state_dict()[name], done[name])
    assert loaded.updates == 2


def test_other_backends_add_what_waits_first():
    video = VideoTokens(2, 2, 2, text=3)
    layers = [case(video, seed) for seed in (0, 2)]
    statistics = MotionStatistics(video, 2)
    for backend, layer in zip(("triton", "torch"), layers, strict=True):
        with mekernels.use_backend(backend):
            statistics.update(*layer)
    assert statistics._pending.bytes == 0
    for name, tensor in one_by_one(video, layers).items():
        torch.testing.assert_close(statistics.state_dict()[name], tensor)


@pytest.mark.parametrize("extra", [0, 1, 64])
def test_only_padded_sums_are_written_beyond_the_video(extra):
    """If the sums have no room for whole blocks, the memory next to them is not changed."""
    video = VideoTokens(3, 2, 3, text=4)
    query, key, lse = case(video)
    index = torch.tensor([1, 4, 20], device=DEVICE)
    big = torch.full((2, 3, 18 + extra + 5), 7.0, device=DEVICE)
    rows = big[..., : 18 + extra]
    rows[..., :18] = 0
    held = torch.zeros(2, 3, 3, 6, device=DEVICE), rows, torch.zeros(2, 18, device=DEVICE)
    layout = (3, 6, 4, 4, 0, 0.25, 1)
    torch.ops.mekernels.motion_statistics_update_triton(*held, index, query, key, lse, *layout)
    wanted = torch.zeros_like(held[0]), torch.zeros(2, 3, 18, device=DEVICE), torch.zeros_like(held[2])
    torch.ops.mekernels.motion_statistics_update_torch(*wanted, index, query, key, lse, *layout)
    torch.testing.assert_close(rows[..., :18], wanted[1])
    assert (big[..., 18 + extra :] == 7).all()
