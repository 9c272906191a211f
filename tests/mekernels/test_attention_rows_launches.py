"""How the kernels of ``attention_rows`` are launched: how many are compiled, and how the device is filled."""

import importlib.util
import platform
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mekernels
from mekernels import launch, resources
from mekernels.resources import sass

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
COMPILES = HAS_TRITON and platform.machine() == "x86_64" and not launch.interpreted()
compiles = pytest.mark.skipif(not COMPILES, reason="needs triton's compiler and not its interpreter")

if HAS_TRITON:
    from mekernels.attention_rows import plan
    from mekernels.attention_rows.call import Call


def meta_call(keys, rows, columns, listed=False, heads=(28, 4), width=128, dtype=torch.bfloat16, start=15):
    """A call on the meta device, its queries and keys lying as those of a model."""

    def tokens(count):
        return torch.empty(1, keys, count, width, dtype=dtype, device="meta").transpose(1, 2)

    index = torch.empty(1, columns, dtype=torch.int64, device="meta") if listed else None
    places = (0, 0) if listed else (start, start + columns)
    chosen = torch.empty(1, rows, dtype=torch.int64, device="meta")
    pair = tokens(heads[0]), tokens(heads[1])
    return Call(*pair, chosen, index, None, None, *places, width**-0.5, True, 1, True)


def launches(call):
    forward, *results = plan.plan_forward(call)
    return [*forward, *plan.plan_backward(*results, call)[0]]


def version(item):
    """The key of the version of a kernel that triton compiles, on an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    if item.kernel not in _binders:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        _binders[item.kernel] = create_function_from_signature(
            item.kernel.signature, item.kernel.params, backend
        )
    _, specialization, _ = _binders[item.kernel](**item.arguments)
    return str(specialization), tuple(item.options.items())


_binders = {}


@compiles
@pytest.mark.parametrize("listed", [False, True])
def test_lengths_compile_few_versions(listed):
    chance, versions = random.Random(0), defaultdict(set)
    for _ in range(1000):
        vision = chance.choice([4, 6, 8, 10, 12]) * chance.randint(8, 20) * chance.randint(8, 26)
        keys = vision + 15 + chance.randint(1, 400)
        call = meta_call(keys, chance.randint(1, 60), vision, listed, start=chance.randint(0, 15))
        for item in launches(call):
            versions[item.kernel.__name__].add(version(item))
    assert len(versions) >= 9
    assert {name: len(found) for name, found in versions.items() if len(found) > 8} == {}


@compiles
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", launch.DTYPES if COMPILES else [])
def test_kernels_of_few_rows_compile(rows, dtype):
    for item in launches(meta_call(600, rows, 300, rows == 5, heads=(4, 2), width=80, dtype=dtype)):
        resources.compile_for(item, 90)


def held(found, warps, capability):
    """Programs that a multiprocessor holds, by registers, shared memory and warps."""
    shared = {80: 164, 90: 228}[capability] * 1024
    registers = -(-found.registers // 8) * 8 * 32 * warps
    return min(65536 // registers, shared // (found.shared + 1024), 64 // warps)


@compiles
@pytest.mark.parametrize("capability", [90, 80])
def test_multiprocessors_hold_what_the_cuts_are_made_for(capability):
    with launch.planned_for(capability):
        gates = plan.gates()
    for gate in gates:
        name = gate.launch.kernel.__name__
        if name not in plan._RESIDENT:
            continue
        tensors = [item for item in gate.launch.arguments.values() if isinstance(item, torch.Tensor)]
        dtype = next(item.dtype for item in tensors if item.dtype in launch.DTYPES)
        width = gate.launch.arguments["WIDTH"]
        kind = SimpleNamespace(query=(0, 0, 0, width), half=dtype != torch.float32)
        place = 1 if gate.launch.arguments["BLOCK_M"] > 64 else plan._class(kind)
        expected = plan._RESIDENT[name][place][0 if capability == 90 else 1]
        if gate.launch.arguments["bias"] is not None:
            expected = 1
        found = resources.measure(gate.launch, capability)
        assert held(found, gate.launch.options["num_warps"], capability) >= expected, gate.name


@pytest.mark.parametrize("capability", [90, 80])
def test_a_narrow_head_that_many_rows_share_has_fewer_programs_at_a_time(capability):
    with launch.planned_for(capability):
        kinds = [plan.Kind.of(meta_call(8192, 64, 9, heads=(heads, 8), width=64)) for heads in (8, 32)]
    for place, kind in enumerate(kinds):
        held = plan._RESIDENT["row_lse"][place][0 if capability == 90 else 1]
        assert plan.slots("row_lse", kind) == held * launch.TARGETS[capability].processors


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_a_width_that_no_gate_has_spills_nothing(monkeypatch, dtype):
    """With the tiles of kernels without a bias at this width, too few registers would be left."""
    monkeypatch.setattr(plan, "SHAPES", {plan.SINKS: (28, 4, 128, 8192, dtype)})
    with launch.planned_for(90):
        gates = plan.gates()
    spilled = {gate.name: resources.measure(gate.launch, 90).spills for gate in gates}
    assert len(spilled) > 4
    assert not any(spilled.values()), spilled


@compiles
@pytest.mark.parametrize("keys", [2048, 8192, 32768])
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("capability", [80, 90])
def test_cuts_fill_whole_waves(keys, rows, capability):
    with launch.planned_for(capability):
        call = meta_call(keys, rows, 3 * keys // 4)
        kind, planned = plan.Kind.of(call), launches(call)
    assert kind.target == launch.TARGETS[capability]
    for item in planned:
        name = item.kernel.__name__
        if name in plan._RESIDENT:
            programs, slots = torch.Size(item.grid).numel(), plan.slots(name, kind)
            waves = launch.cdiv(programs, slots)
            # A last wave that lacks a few programs counts as full: the number need not divide evenly.
            assert waves == 1 or programs >= 0.9 * waves * slots, (name, programs, slots)


def longest_inner_loop(code):
    """Instructions of the longest loop without another in it."""
    found = sass.loops(code)
    inner = [one for one in found if not any(other.addresses < one.addresses for other in found)]
    return max(len(one.addresses) for one in inner)


@compiles
@pytest.mark.parametrize("listed", [False, True])
def test_the_pass_by_keys_is_short_and_three_programs_fit(listed):
    """With tiles of 32 rows and 64 keys, in bfloat16, at the shape of Qwen2.5-VL-7B."""
    call = meta_call(8192, 64, 6132, listed)
    (item,) = [item for item in launches(call) if item.kernel.__name__ == "key_gradient"]
    assert (item.arguments["BLOCK_M"], item.arguments["BLOCK_N"]) == (32, 64)
    assert item.options["num_warps"] == 4
    built = resources.compiled(item, 90)
    assert longest_inner_loop(built.code) <= 420
    assert held(built.resources, 4, 90) >= 3


@compiles
def test_programs_of_columns_are_split_by_key_head():
    call = meta_call(8192, 64, 6132)
    (item,) = [item for item in launches(call) if item.kernel.__name__ == "row_columns"]
    assert item.grid[1] == 4
    assert torch.Size(item.grid).numel() >= 2 * 132
    assert not any("split" in name for name in item.kernel.arg_names)


def test_later_calls_start_what_the_first_compiled():
    compiled, started = [], []
    program = SimpleNamespace(function="f", packed_metadata="m", run=lambda *args: started.append(args))

    class Kernel:
        arg_names = ("out", "size")

        def __getitem__(self, grid):
            return lambda **arguments: compiled.append((grid, arguments)) or program

    step = launch.Launch(Kernel(), (3, 2), {"size": 7, "out": launch.Place("out")}, {"num_warps": 4})
    plan_ = launch.Plan([step], {"out": ((5,), torch.float32)})
    device = torch.device("cpu")
    for number in range(3):
        tensors = plan_.tensors(device, {})
        assert tensors["out"].shape == (5,)
        plan_.run(device, tensors)
        assert len(compiled) == 1
        if number:
            assert started[-1] == (3, 2, 1, 0, "f", "m", None, None, None, tensors["out"], 7)
    assert len(started) == 2
    ((grid, arguments),) = compiled
    assert grid == (3, 2)
    assert set(arguments) == {"size", "out", "num_warps"}


def test_scratch_is_one_allocation_of_pieces_apart(monkeypatch):
    started, allocated = [], []
    program = SimpleNamespace(function="f", packed_metadata="m", run=lambda *args: started.append(args[9:]))

    class Kernel:
        arg_names = ("one", "two", "out")

        def __getitem__(self, grid):
            return lambda **arguments: started.append(arguments) or program

    step = launch.Launch(Kernel(), (1,), {name: launch.Place(name) for name in Kernel.arg_names}, {})
    scratch = {"one": ((3, 5), torch.float32), "two": ((7,), torch.int64)}
    plan_ = launch.Plan([step], {"out": ((5,), torch.float32)}, scratch)
    device, empty = torch.device("cpu"), torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **options: allocated.append(empty(*args, **options)) or allocated[-1]
    )
    for _ in range(2):
        plan_.run(device, plan_.tensors(device, {}))
    first, later = started
    assert [(first[name].shape, first[name].dtype) for name in scratch] == [*scratch.values()]
    for out, held, one, two in (
        (first["out"], allocated[1], first["one"].data_ptr(), first["two"].data_ptr()),
        (later[2], allocated[3], *later[:2]),
    ):
        assert isinstance(out, torch.Tensor)
        begin, end = held.data_ptr(), held.data_ptr() + held.numel()
        assert begin <= one < one + 3 * 5 * 4 <= two < two + 7 * 8 <= end
        assert (one - begin) % 16 == (two - begin) % 16 == 0, "what the first call was compiled for"
    assert len(allocated) == 4


def test_profilers_hear_of_launches():
    from triton import knobs

    assert not launch._hooked()
    with knobs.runtime.scope():
        knobs.runtime.launch_enter_hook.add(print)
        try:
            assert launch._hooked()
        finally:
            knobs.runtime.launch_enter_hook.remove(print)


def test_columns_are_ordered_once_for_all_layers(monkeypatch):
    sorts = []
    original = torch.Tensor.sort
    monkeypatch.setattr(
        torch.Tensor,
        "sort",
        lambda self, *args, **options: sorts.append(1) or original(self, *args, **options),
    )
    columns = torch.tensor([[4, 1, -1, 1, 9], [0, 0, 3, 2, 2]])
    order, begins = plan.ordered_columns(columns, 5)
    assert order.tolist() == [[1, 3, 0, 2, 4], [0, 1, 3, 4, 2]]
    assert begins.tolist() == [[0, 0, 2, 2, 2, 3], [0, 2, 2, 4, 5, 5]]
    for _ in range(3):
        # The layers' saved tensors need not be the same object.
        assert plan.ordered_columns(columns.detach(), 5)[0] is order
    assert len(sorts) == 1
    columns[0, 0] = 0
    assert plan.ordered_columns(columns, 5)[0].tolist() == [[0, 1, 3, 2, 4], [0, 1, 3, 4, 2]]
    assert plan.ordered_columns(columns.clone(), 5)[0] is not order
    assert plan.ordered_columns(columns, 4)[1].shape == (2, 5)
    assert len(sorts) == 4


def test_a_dispatch_mode_sees_the_op():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    with Watch():
        out = mekernels.attention_rows(query, query, torch.tensor([[1]]), slice(0, 3))
    assert "mekernels.attention_rows.default" in seen
    plain = mekernels.attention_rows(query, query, torch.tensor([[1]]), slice(0, 3))
    gradients = [torch.autograd.grad(result.square().sum(), query)[0] for result in (out, plain)]
    assert torch.equal(*gradients)
