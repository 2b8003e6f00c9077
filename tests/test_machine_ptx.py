"""The machine on PTX written by hand: counts worked out on paper, and faults that each check must find."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from rplib.bench.machine import Unsupported, arithmetic, execute
from rplib.bench.machine import findings as kinds
from rplib.bench.machine.alu import decode
from rplib.bench.machine.counts import passes


def text(body, parameters=1, threads=64):
    """A kernel k: %r1 the thread, %r2 four times that, %r3 = %r2 in shared memory, %rd1.. the parameters, %rd9 = %rd1 + %r2."""
    declared = ", ".join(f".param .u64 k_param_{n}" for n in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{n + 1}, [k_param_{n}];" for n in range(parameters))
    return f"""
.visible .entry k({declared})
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<30>;
.reg .b64 %rd<20>;
{loads}
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd8, %r1, 4;
add.s64 %rd9, %rd1, %rd8;
shl.b32 %r2, %r1, 2;
mov.b32 %r4, global_smem;
add.s32 %r3, %r2, %r4;
{body.replace("; ", ";").replace(";", ";" + chr(10))}
ret;
}}
"""


def run(body, *tensors, threads=64, grid=(1, 1, 1), shared=0, empty=()):
    return execute(text(body, len(tensors), threads), grid, tensors, shared=shared, empty=empty)


def kinds_of(ran):
    return [finding.kind.partition(":")[0] for finding in ran.findings]


COPY = "ld.global.b32 %r9, [%rd9]; add.s64 %rd10, %rd2, %rd8; st.global.b32 [%rd10], %r9;"


# ---------------------------------------------------------------------------------------------------------- known counts


def test_a_copy_of_two_warps():
    source, target = torch.randn(64), torch.empty(64)
    ran = run(COPY, source, target, empty=[1])
    assert torch.equal(source, target) and ran.findings == []
    launch = ran.launches[0]
    # 12 instructions before the end of the block and ret, each by two warps; 64 x 4 bytes are 8 sectors each way, 4 of each warp
    assert sum(launch.instructions.values()) == 2 * 12 and launch.instructions["ld.global.b32"] == 2
    assert launch.counts.sectors == 16 and launch.sectors == {"0": (8, 0), "1": (0, 8)} and launch.different_bytes == 512
    assert [(a.requests, a.bytes, a.units) for a in launch.counts.global_accesses.values()] == [(2, 256, 8)] * 2
    assert launch.counts.barriers == 0 and launch.counts.shared_passes == 0


@pytest.mark.parametrize(("stride", "expected"), [(0, 1), (1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_of_a_stride(stride, expected):
    """Lane n touches word n * stride: as many passes as lanes meet in one bank, apart from those that ask for one word."""
    lanes = np.arange(32)
    assert passes(lanes, 4 * stride * lanes, 4) == expected
    body = f"mul.lo.s32 %r5, %r2, {stride}; add.s32 %r5, %r5, %r4; st.shared.b32 [%r5], %r1;"
    ran = run(body, torch.zeros(1), threads=32, shared=4 * 32 * 33)
    assert ran.launches[0].counts.shared_passes == expected


def test_wide_accesses_take_a_pass_per_128_bytes():
    lanes = np.arange(32)
    assert passes(lanes, 8 * lanes, 8) == 2 and passes(lanes, 16 * lanes, 16) == 4
    assert passes(lanes, 0 * lanes, 16) == 4  # each quarter of the warp is served by itself
    assert passes(lanes[:8], 16 * lanes[:8], 16) == 1
    assert passes(lanes, 2 * lanes, 2) == 1  # two lanes share a word


def test_barriers_and_a_reversal_through_shared_memory():
    body = (
        "ld.global.b32 %r9, [%rd9]; st.shared.b32 [%r3], %r9; bar.sync 0;"
        "sub.s32 %r10, 252, %r2; add.s32 %r10, %r10, %r4; ld.shared.b32 %r11, [%r10]; st.global.b32 [%rd9], %r11;"
    )
    values = torch.arange(64.0 * 3).view(3, 64)
    # three blocks that all reverse the same 64 values would race; one does not
    ran = run(body, values[0].clone(), shared=256)
    assert ran.findings == [] and ran.launches[0].counts.barriers == 1 and ran.launches[0].counts.shared_passes == 4


def test_branches_part_lanes_and_join_them():
    body = """
setp.lt.s32 %p1, %r1, 10;
mov.b32 %r9, 7;
@%p1 bra $L__BB0_2;
mov.b32 %r9, 9;
$L__BB0_2:
st.global.b32 [%rd9], %r9;
"""
    out = torch.zeros(64, dtype=torch.int32)
    ran = run(body, out)
    assert out.tolist() == [7] * 10 + [9] * 54 and ran.findings == []
    assert ran.launches[0].instructions["mov.b32"] == 2 + 2 + 2 and ran.launches[0].instructions["st.global.b32"] == 2


def test_a_loop_runs_as_often_as_each_lane_asks():
    body = """
mov.b32 %r9, 0;
$L__BB0_1:
add.s32 %r9, %r9, 3;
add.s32 %r1, %r1, -16;
setp.ge.s32 %p1, %r1, 0;
@%p1 bra $L__BB0_1;
st.global.b32 [%rd9], %r9;
"""
    out = torch.zeros(64, dtype=torch.int32)
    ran = run(body, out)
    assert out.tolist() == [3 * (t // 16 + 1) for t in range(64)]
    assert ran.launches[0].instructions["setp.ge.s32"] == 2 + 4  # the first warp stops after two turns, the second after four


def test_a_shuffle_and_a_reduction():
    body = (
        "shfl.sync.bfly.b32 %r9, %r1, 16, 31, -1; redux.sync.add.s32 %r10, %r1, -1;"
        "bar.warp.sync -1; sub.s32 %r9, %r9, %r10; st.global.b32 [%rd9], %r9;"
    )
    out = torch.zeros(64, dtype=torch.int32)
    ran = run(body, out)
    sums = [sum(range(32)), sum(range(32, 64))]
    assert out.tolist() == [(t ^ 16) - sums[t // 32] for t in range(64)] and ran.findings == []


def test_grids_of_three_axes():
    body = (
        "mov.u32 %r9, %ctaid.x; mov.u32 %r10, %ctaid.y; mov.u32 %r11, %nctaid.x; mad.lo.s32 %r9, %r10, %r11, %r9;"
        "mul.wide.u32 %rd10, %r9, 4; add.s64 %rd10, %rd1, %rd10; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd10], %r10;"
    )
    out = torch.full((6,), -1, dtype=torch.int32)
    assert run(body, out, grid=(3, 2, 1)).findings == [] and out.tolist() == [0, 0, 0, 1, 1, 1]


# -------------------------------------------------------------------------------------------------------- planted faults

WRITE = "st.shared.b32 [%r3], %r1;"
READ_OTHER = "xor.b32 %r9, %r3, 128; ld.shared.b32 %r10, [%r9]; st.global.b32 [%rd9], %r10;"  # what the other warp wrote
FAULTS = {
    "no barrier between write and read": (WRITE + READ_OTHER, kinds.SHARED_RACE),
    "no barrier between read and write": (WRITE + "bar.sync 0;" + READ_OTHER + WRITE, kinds.SHARED_RACE),
    "two warps write one place": ("st.shared.b32 [%r4], %r1;", kinds.SHARED_RACE),
    "beyond the end of shared memory": ("st.shared.b32 [%r3+4], %r1;", kinds.OUT_OF_SHARED),
    "before shared memory": ("st.shared.b32 [%r2], %r1;", kinds.OUT_OF_SHARED),
    "misaligned in shared memory": ("st.shared.b32 [%r3+2], %r1;", kinds.MISALIGNED),
    "shared memory that nothing wrote": ("ld.shared.b32 %r9, [%r3]; st.global.b32 [%rd9], %r9;", kinds.UNDEFINED_STORE),
    "read beyond the end": ("ld.global.b32 %r9, [%rd9+4];", kinds.OUT_OF_BOUNDS),
    "write before the beginning": ("st.global.b32 [%rd9+-4], %r1;", kinds.OUT_OF_BOUNDS),
    "null": ("mov.b64 %rd10, 0; ld.global.b32 %r9, [%rd10];", kinds.OUT_OF_BOUNDS),
    "misaligned": ("ld.global.v2.b32 {%r9, %r10}, [%rd1+4];", kinds.MISALIGNED),
    "all threads write one place": ("st.global.b32 [%rd1], %r1;", kinds.LANES_DISAGREE),
    "a register that nothing wrote": ("st.global.b32 [%rd9], %r20;", kinds.UNDEFINED_STORE),
    "an undefined guard": ("@%p3 st.global.b32 [%rd9], %r1;", kinds.UNDEFINED_USE),
    "an undefined address": ("add.s64 %rd10, %rd9, %rd15; ld.global.b32 %r9, [%rd10];", kinds.UNDEFINED_USE),
    "an undefined condition": ("@%p3 bra $L__BB0_1;\n$L__BB0_1:\n", kinds.UNDEFINED_USE),
    "a masked load leaves a hole": (
        "setp.lt.s32 %p1, %r1, 9; @%p1 ld.global.b32 %r9, [%rd9]; st.global.b32 [%rd9], %r9;",
        kinds.UNDEFINED_STORE,
    ),
    "half a block at a barrier": ("setp.lt.s32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", kinds.DEADLOCK),
    "half a warp shuffles": ("setp.lt.s32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", kinds.DIVERGENT),
    "a warp reads what another has written to global memory": (
        "st.global.b32 [%rd9], %r1; xor.b32 %r9, %r2, 128; cvt.u64.u32 %rd10, %r9; add.s64 %rd10, %rd1, %rd10;"
        "ld.global.b32 %r10, [%rd10];",
        kinds.GLOBAL_RACE,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    body, kind = FAULTS[name]
    ran = run(body, torch.zeros(64, dtype=torch.int32), shared=256)
    assert kind in [found[: len(kind)] for found in kinds_of(ran)], [str(f) for f in ran.findings]
    assert all(f.kernel == "k" and f.count > 0 and "thread" in f.example for f in ran.findings)


def test_the_same_without_the_fault_is_clean():
    body = WRITE + "bar.sync 0;" + READ_OTHER + "bar.sync 0;" + WRITE
    assert run(body, torch.zeros(64, dtype=torch.int32), shared=256).findings == []


def test_blocks_that_race():
    out = torch.zeros(64, dtype=torch.int32)
    writes = "mov.u32 %r9, %ctaid.x; st.global.b32 [%rd9], %r9;"
    assert kinds_of(run(writes, out, grid=(2, 1, 1))) == [kinds.GLOBAL_RACE]
    in_turn = "mov.u32 %r9, %ctaid.x; setp.eq.s32 %p1, %r9, 0; @%p1 st.global.b32 [%rd9], %r1; @!%p1 ld.global.b32 %r10, [%rd9];"
    assert kinds_of(run(in_turn, out, grid=(2, 1, 1))) == [kinds.GLOBAL_RACE]
    assert run(in_turn, out, grid=(1, 1, 1)).findings == []


def test_the_same_value_from_two_warps_is_a_note():
    ran = run("mov.b32 %r9, 5; st.shared.b32 [%r4], %r9;", torch.zeros(1), shared=256)
    assert ran.findings == [] and [note.kind for note in ran.notes] == [kinds.SAME_VALUE]


def test_memory_that_nothing_wrote():
    source, target = torch.zeros(64), torch.zeros(64)
    assert kinds_of(run(COPY, source, target, empty=[0])) == [kinds.UNDEFINED_STORE]
    assert run(COPY, source, target).findings == []


def test_between_the_elements_of_a_view():
    every_second, target = torch.zeros(128)[::2], torch.zeros(64)
    assert kinds_of(run(COPY, every_second, target)) == [kinds.BETWEEN_ELEMENTS]
    tail_of_storage = torch.zeros(68)[4:]
    assert run(COPY, tail_of_storage, target).findings == []


def test_a_copy_on_the_way_is_not_there_yet():
    body = (
        "cp.async.ca.shared.global [%r3], [%rd9], 4; cp.async.commit_group; {wait}"
        "ld.shared.b32 %r9, [%r3]; add.s32 %r9, %r9, 1; st.global.b32 [%rd9], %r9;"
    )
    values = torch.arange(64, dtype=torch.int32)
    ran = run(body.format(wait="cp.async.wait_group 0;"), values, shared=256)
    assert ran.findings == [] and values.tolist() == list(range(1, 65))
    assert kinds_of(run(body.format(wait="cp.async.wait_group 1;"), values, shared=256)) == [kinds.UNDEFINED_STORE]


def test_atomic_sums_do_not_race():
    out = torch.zeros(1, dtype=torch.int32)
    assert run("red.global.add.s32 [%rd1], %r1;", out, grid=(3, 1, 1)).findings == [] and out.item() == 3 * sum(range(64))


# ------------------------------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    "body",
    [
        "add.cc.s32 %r9, %r1, %r1;",
        "add.sat.f32 %r9, %r1, %r1;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r5}, {%r6}, {%r7};",
        "ld.local.b32 %r9, [%r1];",
        "bar.sync 1;",
        "mov.b32 %r9, %clock;",
        "mov.b32 %q1, 4;",
        "ld.shared.v4.b32 {%r9, %r10}, [%r3];",
        "call.uni foo;",
        ".shared .align 4 .b8 mine[4];",
        "bra $L__BB0_7;",
        "{ mov.b32 %r9, 1; }",
        "setp.lt.s32 %p1|%p2, %r1, %r2;",
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(body):
    touched = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Unsupported, match=r"line \d+|register"):
        run("st.global.b32 [%rd9], %r1;" + body, touched)
    assert not touched.any()


def test_heads_that_are_not_known():
    good = text("")
    for old, new in (
        (".reqntid 64", ".reqnctapercluster 2"),
        (".param .u64 k", ".param .texref k"),
        (".visible .entry", ".func"),
    ):
        with pytest.raises(Unsupported):
            execute(good.replace(old, new), (1, 1, 1), [torch.zeros(1)])
    with pytest.raises(Unsupported, match="variable of the module"):
        execute(".global .align 4 .b8 table[4];\n" + good, (1, 1, 1), [torch.zeros(1)])
    with pytest.raises(Unsupported, match="must state its threads"):
        execute(good.replace(".reqntid 64\n", ""), (1, 1, 1), [torch.zeros(1)])


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_fused_multiply_add_rounds_once():
    """Against exact fractions; some sums lie halfway between two floats but for the last bits of the product."""
    rng = np.random.default_rng(0)
    n = 3000
    a, b = rng.normal(size=(2, n)).astype(np.float32)
    c = (rng.normal(size=n) * 2.0 ** rng.integers(-30, 30, n)).astype(np.float32)
    step = rng.integers(1, 200, 1000)
    a[:1000], b[:1000] = 1 + 2.0**-23 * step, 2.0**-24 * (1 - 2.0**-23 * step)
    c[:1000] = 1 + 2.0**-23 * rng.integers(0, 1000, 1000)
    a[1000:1100] *= np.float32(2.0**-70)  # results below the normal numbers
    b[1000:1100] *= np.float32(2.0**-70)
    c[1000:1100] = np.float32(2.0**-149) * rng.integers(-9, 9, 100).astype(np.float32)
    got = arithmetic.fused_multiply_add(a, b, c)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != got).any()  # rounding twice would show
    for x, y, z, r in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = [np.nextafter(r, np.float32(sign * np.inf)) for sign in (-1, 1)]
        error = abs(Fraction(float(r)) - exact)
        best = min(abs(Fraction(float(q)) - exact) for q in neighbours)
        assert error < best or (error == best and int(r.view(np.uint32)) % 2 == 0), (x, y, z, r)


def test_bfloat16_rounds_as_torch():
    values = torch.randn(5000) * 2.0 ** torch.randint(-140, 120, (5000,))
    ours = arithmetic.bfloat16_bits(values.numpy()).view(np.int16)
    assert np.array_equal(ours, values.bfloat16().view(torch.int16).numpy())


def test_integer_division_rounds_towards_zero():
    rng = np.random.default_rng(1)
    x, y = rng.integers(-(2**31), 2**31, (2, 500)).astype(np.int32)
    y[::3] = rng.integers(1, 9, len(y[::3]))
    exact = [int(Fraction(int(a), int(b))) for a, b in zip(x, y, strict=True)]
    assert arithmetic.divide(x, y).tolist() == exact
    assert arithmetic.remainder(x, y).tolist() == [int(a) - q * int(b) for a, b, q in zip(x, y, exact, strict=True)]


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("shl.b32", (np.uint32([1, 1, 1]), np.uint32([4, 31, 32])), [16, 2**31, 0]),
        ("shr.s32", (np.int32([-8, -8, 8]), np.uint32([1, 40, 40])), [-4, -1, 0]),
        ("shr.u32", (np.uint32([2**31, 2**31]), np.uint32([31, 32])), [1, 0]),
        ("bfe.u32", (np.uint32([0xABCD]), np.uint32([4]), np.uint32([8])), [0xBC]),
        ("bfe.s32", (np.int32([0x80]), np.uint32([7]), np.uint32([1])), [-1]),
        ("bfi.b32", (np.uint32([0xF]), np.uint32([0]), np.uint32([4]), np.uint32([2])), [0x30]),
        ("prmt.b32", (np.uint32([0x33221100]), np.uint32([0x77665544]), np.uint32([0x7531])), [0x77553311]),
        ("prmt.b32", (np.uint32([0x80]), np.uint32([0]), np.uint32([0x8880])), [0xFFFFFF80]),
        ("mul.hi.u32", (np.uint32([2**31]), np.uint32([6])), [3]),
        ("mul.wide.s32", (np.int32([-(2**31)]), np.int32([2**31 - 1])), [-(2**31) * (2**31 - 1)]),
        ("max.f32", (np.float32([np.nan, 1]), np.float32([2, np.nan])), [2, 1]),
        ("setp.neu.f32", (np.float32([np.nan, 1]), np.float32([0, 1])), [True, False]),
        ("setp.ne.f32", (np.float32([np.nan, 1]), np.float32([0, 2])), [False, True]),
        ("cvt.rzi.s32.f32", (np.float32([-1.7, 3e9, np.nan]),), [-1, 2**31 - 1, 0]),
        ("cvt.rni.s32.f32", (np.float32([2.5, 3.5]),), [2, 4]),
        ("cvt.rzi.u64.f32", (np.float32([2.0**70]),), [2**64 - 1]),
        ("popc.b32", (np.uint32([0xF0F]),), [8]),
        ("clz.b32", (np.uint32([1, 0]),), [31, 32]),
        ("brev.b32", (np.uint32([1]),), [2**31]),
        ("lop3.b32", (np.uint32([12]), np.uint32([10]), np.uint32([6]), np.uint32([0x96])), [12 ^ 10 ^ 6]),
        ("add.ftz.f32", (np.float32([2.0**-130]), np.float32([2.0**-130])), [0]),
        ("shf.l.wrap.b32", (np.uint32([0x80000000]), np.uint32([1]), np.uint32([33])), [3]),
    ],
)
def test_single_instructions(opcode, operands, expected):
    rule = decode(opcode)
    with np.errstate(all="ignore"):
        assert rule.function(*operands).tolist() == expected


def test_packed_values_are_defined_half_by_half():
    """sm_100 packs one value and one unused register; the half that is used must count as defined."""
    body = (
        "mov.b64 %rd10, {%r1, %r20}; mov.b64 %rd11, {%r1, %r1}; add.rn.f32x2 %rd12, %rd10, %rd11; mov.b64 {%r9, %r10}, %rd12;"
        "st.global.b32 [%rd9], %r9;"
    )
    out = torch.zeros(64)
    assert run(body, out).findings == []
    assert kinds_of(run(body.replace("], %r9", "], %r10"), out)) == [kinds.UNDEFINED_STORE]
    shorts = "cvt.u16.u32 %rs1, %r1; mov.b32 %r9, {%rs1, %rs2}; mov.b32 {%rs3, %rs4}, %r9; cvt.u32.u16 %r10, %rs3;"
    assert run(shorts + "st.global.b32 [%rd9], %r10;", out).findings == []
    assert kinds_of(run(shorts.replace(" %rs3;", " %rs4;") + "st.global.b32 [%rd9], %r10;", out)) == [kinds.UNDEFINED_STORE]


def test_pairs_are_compared_half_by_half():
    """1.0 and 2.0 as bfloat16 (0x3F80, 0x4000) in the halves of a register."""
    body = (
        "mov.b32 %r9, 0x40003F80; mov.b32 %r10, 0x3F803F80; setp.gt.bf16x2 %p1|%p2, %r9, %r10;"
        "selp.b32 %r11, 1, 0, %p1; selp.b32 %r12, 2, 0, %p2; add.s32 %r11, %r11, %r12; st.global.b32 [%rd9], %r11;"
    )
    out = torch.zeros(64, dtype=torch.int32)
    assert run(body, out).findings == [] and out.tolist() == [2] * 64


def test_pairs_are_added_half_by_half():
    """0xFFFF + 1 carries nothing into the upper half."""
    body = "mov.b32 %r9, 0x0001FFFF; add.s16x2 %r10, %r9, 0x00010001; st.global.b32 [%rd9], %r10;"
    out = torch.zeros(64, dtype=torch.int32)
    assert run(body, out).findings == [] and out.tolist() == [0x00020000] * 64


def test_the_largest_of_three():
    """An instruction of sm_100: with .NaN a NaN stays, without it does not."""
    body = "mov.b32 %r9, 0f7FC00000; mov.b32 %r10, 0f40400000; mov.b32 %r12, 0f40000000;"
    body += "max{}.f32 %r11, %r12, %r10, %r9; st.global.b32 [%rd9], %r11;"
    out = torch.zeros(64)
    assert run(body.format(""), out).findings == [] and out.tolist() == [3.0] * 64
    assert run(body.format(".NaN"), out).findings == [] and out.isnan().all()


def test_findings_say_where():
    ran = run(".loc 1 7 3 // source.py:7:3\nst.global.b32 [%rd9+4], %r1;", torch.zeros(64))
    (finding,) = ran.findings
    assert finding.source == "source.py:7:3" and finding.count == 1
    assert re.search(r"block \(0, 0, 0\) thread 63, 4 bytes at 256 of 0, which has 256", finding.example)
