"""The report of kernel costs, on hand-written machine code and IR with known results."""

import importlib.util
import json
import platform
import subprocess
import sys

import ceilings
import pytest
import torch

from mekernels import launch as common

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

if importlib.util.find_spec("triton"):
    from mekernels import resources
    from mekernels.resources import prediction, sass
    from mekernels.resources.turns import Turns

SASS = """
//--------------------- .text.example --------------------------
        .type           example,@function
example:
.text.example:
\t//## File "/k.py", line 10
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, RZ ;
        /*0020*/               @P6 EXIT ;
.L_x_1:
\t//## File "/k.py", line 12
        /*0030*/                   UMOV UR4, URZ ;
.L_x_0:
\t//## File "/lib.py", line 3 inlined at "/k.py", line 14
\t//## File "/k.py", line 14
        /*0040*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   MUFU.EX2 R9, R9 ;
        /*0070*/              @!P3 BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   UIADD3 UR4, UR4, 0x4, URZ ;
        /*0090*/                   UISETP.GE.AND UP0, UPT, UR4, UR5, UPT ;
        /*00a0*/                   FFMA R9, R9, R9, R9 ;
        /*00b0*/                   BRA.U !UP0, `(.L_x_0) ;
\t//## File "/k.py", line 20
        /*00c0*/                   STG.E.64 desc[UR8][R2.64], R8 ;
        /*00d0*/                   VIADD R2, R2, 0x40 ;
        /*00e0*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*00f0*/               @P0 CALL.REL.NOINC `(.L_x_4) ;
        /*0100*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0110*/                   FADD R9, R9, R9 ;
        /*0120*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0130*/                   LDS.128 R4, [R5] ;
        /*0140*/                   LDSM.16.MT88.4 R4, [R5] ;
        /*0150*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0160*/                   CALL.REL.NOINC `($sub) ;
        /*0170*/                   EXIT ;
.L_x_5:
        /*0180*/                   BRA `(.L_x_5);
        /*0190*/                   NOP ;
"""


@pytest.fixture
def code():
    return sass.parse(SASS)


def test_instructions(code):
    assert len(code) == 26
    load = code[4]
    assert (load.address, load.name, load.base, load.predicate) == (0x40, "LDG.E.128", "LDG", "")
    assert load.frames == (("/lib.py", 3), ("/k.py", 14))
    assert code[3].frames == (("/k.py", 12),)
    assert code[2].predicate == "P6"
    branch = code[7]
    assert (branch.predicate, branch.target) == ("!P3", 0x110)
    assert code[11].target == 0x40


def test_loops_nested_moved_out_of_line_and_left_by_a_call(code):
    outer, inner = sass.loops(code)
    assert (outer.head, outer.depth, outer.advance) == (0x30, 1, 64)
    assert (inner.head, inner.depth, inner.advance) == (0x40, 2, 4)
    turn = set(range(0x40, 0xC0, 16)) | {0x110, 0x120}
    assert inner.addresses == turn
    assert outer.addresses == turn | {0x30} | set(range(0xC0, 0x110, 16))


def test_a_loop_that_nothing_reaches_is_none(code):
    assert all(0x180 not in loop.addresses for loop in sass.loops(code))


def test_pipes_and_widths(code):
    inner = sass.loops(code)[1]
    counted = sass.counts(item for item in code if item.address in inner.addresses)
    assert counted == {
        "total": 10,
        "control": 3,
        "fp32": 2,
        "load": 1,
        "mufu": 1,
        "tensor": 1,
        "uniform": 2,
    }
    by_name = {item.name: item for item in code}
    assert by_name["LDG.E.128"].bytes == by_name["LDS.128"].bytes == 16
    assert by_name["STG.E.64"].bytes == 8
    assert by_name["LDSM.16.MT88.4"].bytes == 16
    assert by_name["HMMA.16816.F32.BF16"].products == 16 * 8 * 16
    assert by_name["HGMMA.64x64x16.F32.BF16"].products == 64 * 64 * 16


@pytest.mark.parametrize(
    ("line", "pipe"),
    [
        ("@P0 IMAD.WIDE.U32 R2, R3, R4, R6", "integer"),
        ("FSETP.GT.AND P0, PT, R2, R3, PT", "integer"),
        ("F2FP.BF16.F32.PACK_AB R2, R3, R4", "integer"),
        ("I2F.RP R2, R3", "mufu"),
        ("@!UP1 USHF.R.S32.HI UR5, URZ, 0x1f, UR4", "uniform"),
        ("ULDC.64 UR6, c[0x0][0x208]", "uniform"),
        ("LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64]", "load"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR8][R2.64], R5", "store"),
        ("SHFL.BFLY PT, R2, R3, 0x1, 0x1f", "shared"),
        ("STL.64 [R1+0x8], R2", "local"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control"),
        ("DFMA R2, R4, R6, R8", "fp64"),
        ("HADD2.F32 R2, -RZ, R3.H0_H0", "fp32"),
        ("NEWTHING R2, R3", "other"),
    ],
)
def test_pipe_of(line, pipe):
    (item,) = sass.parse(f"        /*0000*/    {line} ;")
    assert item.pipe == pipe


def test_a_subroutine_counts_to_the_loop_that_calls_it():
    text = """
        /*0000*/ MOV R2, RZ ;
        /*0010*/ CALL.REL.NOINC 0x60 ;
        /*0020*/ IADD3 R2, R2, -0x2, RZ ;
        /*0030*/ ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0040*/ @P0 BRA 0x10 ;
        /*0050*/ EXIT ;
        /*0060*/ MUFU.RCP R4, R5 ;
        /*0070*/ RET.REL.NODEC R6 0x0 ;
    """
    (loop,) = sass.loops(sass.parse(text))
    assert loop.addresses == {0x10, 0x20, 0x30, 0x40, 0x60, 0x70}
    assert loop.advance == 2


def test_two_ways_back_are_one_loop():
    text = """
        /*0000*/ NOP ;
        /*0010*/ FADD R1, R1, R1 ;
        /*0020*/ @P0 BRA 0x10 ;
        /*0030*/ FMUL R1, R1, R1 ;
        /*0040*/ @!P1 BRA 0x10 ;
        /*0050*/ EXIT ;
    """
    (loop,) = sass.loops(sass.parse(text))
    assert loop.addresses == {0x10, 0x20, 0x30, 0x40}


def test_empty_text_has_no_instruction():
    assert sass.parse("nothing") == []
    assert sass.loops([]) == []


IR = """
#loc = loc("/k.py":1:0)
#loc1 = loc("/k.py":10:4)
#loc2 = loc("/lib.py":3:4)
#loc3 = loc("/k.py":14:4)
#loc4 = loc("/k.py":20:4)
#loc5 = loc(callsite(#loc2 at #loc3))
#loc6 = loc("n"(#loc1))
module {
  tt.func public @example(%x: !tt.ptr<f32>, %index: !tt.ptr<i64>, %n: i32, %s.1: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c2 = arith.constant 2 : i32 loc(#loc1)
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %true = arith.constant true loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc6)
    %half = arith.divsi %pid, %c2 : i32 loc(#loc1)
    %odd = arith.remsi %pid, %c2 : i32 loc(#loc1)
    %first = arith.cmpi eq, %odd, %c0 : i32 loc(#loc1)
    scf.if %first {
      scf.for %i = %c0 to %n step %c64_i32  : i32 {
        %r = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32> loc(#loc4)
        %p = tt.splat %index : !tt.ptr<i64> -> tensor<32x!tt.ptr<i64>> loc(#loc4)
        %q = tt.addptr %p, %r : tensor<32x!tt.ptr<i64>>, tensor<32xi32> loc(#loc4)
        %t = tt.load %q : tensor<32x!tt.ptr<i64>> loc(#loc4)
        %a = tt.splat %x : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>> loc(#loc5)
        %b = tt.addptr %a, %t : tensor<32x!tt.ptr<f32>>, tensor<32xi64> loc(#loc5)
        %v = tt.load %b : tensor<32x!tt.ptr<f32>> loc(#loc5)
      } loc(#loc1)
    } else {
      %limit = tt.load %index : !tt.ptr<i64> loc(#loc4)
      %short = arith.trunci %limit : i64 to i32 loc(#loc4)
      %end = arith.minsi %s.1, %short : i32 loc(#loc4)
      %sum = scf.for %j = %half to %end step %c1 iter_args(%held = %x) -> (!tt.ptr<f32>)  : i32 {
        tt.store %held, %held : !tt.ptr<f32> loc(#loc4)
        scf.yield %held : !tt.ptr<f32> loc(#loc4)
      } loc(#loc1)
    } loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
"""


def test_turns_are_summed_over_the_programs():
    x = torch.empty(2, 3, 100, 4, device="meta")
    index = torch.empty(5, dtype=torch.int64, device="meta")
    turns = Turns(IR, (5,), {"x": x, "index": index, "n": 130, "s": (7, 9)})
    kernel, then, rows, other, cut = turns.regions
    assert [region.kind for region in turns.regions] == ["kernel", "if", "for", "if", "for"]
    assert (kernel.runs, then.runs, other.runs) == (5, 3, 2)
    assert (rows.runs, rows.step, rows.depth) == (3 * 3, 64, 1)
    # Programs 1 and 3 turn from 0 and 1 to 9: the limit that is read from memory shortens nothing.
    assert cut.runs == 9 + 8
    assert (("/lib.py", 3), ("/k.py", 14)) in rows.anchors
    moved = turns.moved()
    # 5 of 100 tokens are picked; the list is read whole.
    assert moved["x"] == {"read": 4 * 2 * 3 * 5 * 4, "written": 4.0 * 17}
    assert moved["index"] == {"read": 8.0 * 5, "written": 0.0}


USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]

Resource usage:
 Common:
  GLOBAL:0
 Function scan:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function sum:
  REG:32 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function scan:
  REG:38 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_of_a_library_for_several_gpus():
    assert resources.parse_usage(USAGE) == {
        "sm_80 scan": {"REG": 40, "STACK": 0, "SHARED": 1024, "LOCAL": 0},
        "sm_80 sum": {"REG": 32, "STACK": 16, "SHARED": 0, "LOCAL": 0},
        "sm_90 scan": {"REG": 38, "STACK": 0, "SHARED": 1024, "LOCAL": 0},
    }
    for broken in ("", USAGE.replace(" LOCAL:0 CONSTANT[0]:576", "")):
        with pytest.raises(RuntimeError, match="cuobjdump must list registers"):
            resources.parse_usage(broken)


PICKED = """
#loc = loc("/k.py":1:0)
  tt.func public @example(%x: !tt.ptr<f32>, %y: !tt.ptr<f32>, %z: !tt.ptr<f32>) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %c8 = arith.constant 8 : i32 loc(#loc)
    scf.for %i = %c0 to %c8 step %c1  : i32 {
      %even = arith.cmpi eq, %i, %c0 : i32 loc(#loc)
      %p = scf.if %even -> (!tt.ptr<f32>) {
        scf.yield %x : !tt.ptr<f32> loc(#loc)
      } else {
        scf.yield %y : !tt.ptr<f32> loc(#loc)
      } loc(#loc)
      %q = arith.select %even, %p, %z : !tt.ptr<f32> loc(#loc)
      %v = tt.load %q : !tt.ptr<f32> loc(#loc)
    } loc(#loc)
    scf.while : () -> () {
      scf.condition(%even) loc(#loc)
    } do {
      %w = tt.load %x : !tt.ptr<f32> loc(#loc)
      scf.yield loc(#loc)
    } loc(#loc)
    tt.store %z, %z : !tt.ptr<f32> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
"""


def test_pointers_that_are_picked_and_loops_of_unknown_length():
    tensors = {name: torch.empty(5, device="meta") for name in "xyz"}
    turns = Turns(PICKED, (3,), tensors)
    moved = turns.moved()
    # 8 turns of 3 programs, shared by three tensors of 5 elements each.
    assert moved["y"] == {"read": 4.0 * 5, "written": 0.0}
    assert moved["z"] == {"read": 4.0 * 5, "written": 4.0 * 3}
    assert [(region.kind, region.runs) for region in turns.regions if region.kind in ("for", "while")] == [
        ("for", 24.0),
        ("while", None),
    ]
    assert turns.accesses[-1].elements == 3


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(32, 0, 4, 16), (255, 0, 8, 1), (168, 0, 4, 3), (64, 0, 1, 32), (32, 70_000, 4, 3), (32, 232_000, 4, 1)],
)
def test_blocks_of_one_multiprocessor(registers, shared, warps, blocks):
    assert prediction.occupancy(registers, shared, warps, prediction.MACHINES[90]) == blocks


def test_the_slowest_pipe_is_the_bound():
    machine = prediction.MACHINES[90]
    (exponential,) = sass.parse("/*0000*/ MUFU.EX2 R1, R1 ;")
    cycles = machine.processors * machine.clock
    times = prediction.seconds([prediction.Placed(exponential, 1e6)], 4, 3e6, machine)
    assert times["mufu"] == pytest.approx(4e6 / 0.5 / cycles)
    assert times["issue"] == pytest.approx(4e6 / 4 / cycles)
    assert times["bytes"] == pytest.approx(1e-6)
    assert max(times, key=times.get) == "mufu"
    unknown = prediction.seconds([prediction.Placed(exponential, None)], 4, 3e6, machine)
    assert unknown == {"bytes": pytest.approx(1e-6)}


def test_matrix_instructions_cost_what_they_multiply():
    machine = prediction.MACHINES[90]
    for name, share in (("HMMA.16816.F32.BF16", machine.mma_share), ("HGMMA.64x64x16.F32.BF16", 1.0)):
        (item,) = sass.parse(f"/*0000*/ {name} R1, R1 ;")
        operations = 2 * item.products * (4 if name[1] == "M" else 1) * 1e6
        peak = 2 * machine.products * machine.processors * machine.clock * share
        times = prediction.seconds([prediction.Placed(item, 1e6)], 4, 0.0, machine)
        assert times["tensor"] == pytest.approx(operations / peak)


compiles = pytest.mark.skipif(
    platform.machine() != "x86_64" or common.interpreted(), reason="needs triton's compiler"
)


@compiles
def test_command(tmp_path):
    name = "diagonal_attention Wan-14B bfloat16"
    command = [sys.executable, "-m", "mekernels.resources", *name.split()]
    done = subprocess.run(
        [*command, "--json", "--dump", str(tmp_path / "d")], text=True, capture_output=True, check=True
    )
    report = json.loads(done.stdout)
    assert "prediction" in report["note"]
    assert report["assumed"]["machines"]["sm_90"]["bandwidth"] == 3.0e12
    assert [entry["architecture"] for entry in report["kernels"]] == ["sm_80", "sm_90"]
    for entry in report["kernels"]:
        stem = tmp_path / "d" / f"{entry['kernel']} {entry['architecture']}".replace(" ", "_")
        launch = json.loads(stem.with_name(stem.name + ".json").read_text())
        assert launch["grid"] == entry["grid"]
        assert launch["warps"] == entry["warps"]
        assert launch["arguments"]["query"]["shape"] == [1, 40, 32760, 128]
        assert "FOLD" in launch["constexpr"]
        assert stem.with_name(stem.name + ".cubin").read_bytes().startswith(b"\x7fELF")
        again = sass.parse(stem.with_name(stem.name + ".sass").read_text())
        assert sass.counts(again) == entry["instructions"]
        # One tile of 32 frames, two parts of the keys, two steps along the width.
        assert [loop["turns_per_program"] for loop in entry["loops"]] == [1, 1, 2, 4]
        assert entry["bytes"]["by_argument"]["key"]["read"] == 2 * 2 * 40 * 32760 * 128
        assert entry["bytes"]["by_argument"]["out"]["written"] == 4 * 40 * 21 * 21 * 1560
        predicted = entry["predicted"]
        assert predicted["bound_seconds"] == max(predicted["seconds"].values())
        assert predicted["share"] == pytest.approx(
            predicted["bound_seconds"] / predicted["beside"]["seconds"]
        )
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert done.stdout.count(name) == 2
    assert done.stdout.count("PREDICTED") == 2


REPORT = {
    "triton": "9.9.1",
    "kernels": [
        {
            "kernel": "k",
            "architecture": "sm_90",
            "warp_instructions": 5000.0,
            "registers": 40,
            "spills": 0,
            "shared_bytes": 0,
            "loops": [
                {"depth": 1, "instructions_times_warps": 7},
                {"depth": 2, "instructions_times_warps": 20},
            ],
        }
    ],
}


def test_ceilings_are_compared_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "PATH", tmp_path / "ceilings.json")
    path = tmp_path / "report.json"

    def compare(*options, **changes):
        report = {**REPORT, "kernels": [{**REPORT["kernels"][0], **changes}]}
        path.write_text(json.dumps(report))
        status = ceilings.main([str(path), *options])
        return status, capsys.readouterr()

    assert compare()[0] == 1
    assert compare("--write")[0] == 0
    assert json.loads(ceilings.PATH.read_text()) == {"9.9": {"k sm_90": [20, 5, 40, 0, 0]}}
    assert compare() == (0, ("", ""))
    status, output = compare(registers=41)
    assert status == 1
    assert output.out == "ABOVE k sm_90: registers 41, at most 40\n"
    assert compare(warp_instructions=None)[0] == 1
    status, output = compare("--write", spills=8)
    assert status == 1
    assert "not written" in output.err
    status, output = compare(registers=32)
    assert status == 0
    assert "registers 40 -> 32" in output.out
