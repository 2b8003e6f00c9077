"""Small Triton kernels on the machine, in a process without Triton's interpreter: values, counts, planted faults.

python tests/machine_kernels.py ARCHITECTURE        prints a line per check; exit code 1 if one failed
"""

import sys
import traceback

import pytest
import torch
import triton
import triton.language as tl

from rplib.bench.machine import Unsupported, compiled
from rplib.bench.machine import findings as kinds
from rplib.bench.machine.sass import executed, machine_code


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def sums(x, rows, columns, R: tl.constexpr, C: tl.constexpr):
    t = tl.load(x + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(rows + tl.arange(0, R), tl.sum(t, axis=1))
    tl.store(columns + tl.arange(0, C), tl.sum(t, axis=0))


@triton.jit
def softmax(x, out, n, stride, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    z = tl.load(x + row * stride + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(z - tl.max(z, axis=0))
    tl.store(out + row * stride + i, (e / tl.sum(e, axis=0)).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def running_sum(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.cumsum(tl.load(x + i), axis=0))


@triton.jit
def transpose(x, out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    t = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out + c[:, None] * R + r[None, :], tl.trans(t))


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HOW: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=HOW))


@triton.jit
def integers(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a // b + a % b * 3 + (a >> 2) + ((a.to(tl.int64) * b) >> 7).to(tl.int32) + tl.minimum(a, b))


@triton.jit
def special(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, tl.log(v) + tl.sqrt(v) + 1.0 / v + tl.exp(-v) + tl.floor(v))


@triton.jit
def strided_sums(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, n, BLOCK * tl.num_programs(0)):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def counted(x, bins, N: tl.constexpr):
    tl.atomic_add(bins + tl.load(x + tl.arange(0, N)), 1)


@triton.jit
def every_program_one_place(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0) + tl.program_id(0))


@triton.jit
def neighbours(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + (i + BLOCK) % (BLOCK * tl.num_programs(0))) + 1)


@triton.jit
def sum_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), axis=0))


def close(ours, exact, tolerance):
    error = (ours.double() - exact.double()).abs().max().item()
    assert error <= tolerance, f"off by {error}"


def clean(run):
    assert run.findings == [], [str(finding) for finding in run.findings]


def a_copy_in_blocks_of_512(run):
    """1024 values, 4 warps: each thread of two blocks moves 4 values at once; 4096 bytes are 128 sectors each way."""
    x, out = torch.randn(1024), torch.empty(1024)
    copy[(2,)](x, out, 1024, BLOCK=512)
    assert torch.equal(x, out)
    clean(run)
    counts = run.launches[-1].counts
    assert run.launches[-1].sectors == {"x": (128, 0), "out": (0, 128)} and counts.sectors == 256
    assert [(a.requests, a.bytes) for a in counts.global_accesses.values()] == [(8, 4096), (8, 4096)]
    assert all(".v4.b32" in opcode for opcode in counts.opcodes.values())
    assert (counts.barriers, counts.shared_passes) == (0, 0)


def a_copy_with_a_ragged_tail(run):
    """1000 is no multiple of 16: a thread takes its 4 values by 4 instructions, each of which meets every sector."""
    x, out = torch.randn(1008)[:1000], torch.empty(1024)
    copy[(2,)](x, out, 1000, BLOCK=512)
    assert torch.equal(x, out[:1000])
    clean(run)
    launch = run.launches[-1]
    assert launch.sectors == {"x": (125, 0), "out": (0, 125)} and launch.counts.sectors == 2 * 4 * 125
    # 250 threads are 8 warps, by 4 instructions each way
    assert sum(a.requests for a in launch.counts.global_accesses.values()) == 2 * 32
    assert sum(a.bytes for a in launch.counts.global_accesses.values()) == 8000


def unaligned_tensors(run):
    x, out = torch.randn(1001)[1:], torch.empty(1001)[1:]
    copy[(4,)](x, out, 1000, BLOCK=256)
    assert torch.equal(x, out)
    clean(run)


def sums_through_shared_memory(run):
    x = torch.randn(64, 32)
    rows, columns = torch.empty(64), torch.empty(32)
    sums[(1,)](x, rows, columns, R=64, C=32)
    close(rows, x.double().sum(1), 1e-5)
    close(columns, x.double().sum(0), 1e-5)
    clean(run)
    launch = run.launches[-1]
    assert launch.counts.barriers >= 2 and launch.counts.shared_passes >= sum(
        a.requests for a in launch.counts.shared_accesses.values()
    )


def one_size_of_one(run):
    """Triton makes an argument that is 1 a constant, and none of one that is divisible by 16."""
    for n in (1, 16, 17):
        x, out = torch.randn(n), torch.empty(n)
        copy[(1,)](x, out, n, BLOCK=32)
        assert torch.equal(x, out), n
    clean(run)


def softmax_of_three_dtypes(run):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)):
        x = torch.randn(7, 250).to(dtype)
        out = torch.empty_like(x)
        softmax[(7,)](x, out, 250, 250, BLOCK=256)
        close(out, torch.softmax(x.double(), 1), tolerance)
    clean(run)


def a_running_sum(run):
    x = torch.randint(-100, 100, (512,), dtype=torch.int32)
    out = torch.empty_like(x)
    running_sum[(1,)](x, out, N=512)
    assert torch.equal(out, x.cumsum(0).int())
    clean(run)


def transposes(run):
    for x in (torch.randn(64, 32), torch.randn(64, 64).half()):
        out = torch.empty(x.shape[::-1], dtype=x.dtype)
        transpose[(1,)](x, out, R=x.shape[0], C=x.shape[1])
        assert torch.equal(out, x.t())
    clean(run)


def a_product_of_matrices(run):
    a, b, c = torch.randn(32, 16), torch.randn(16, 64), torch.empty(32, 64)
    product[(1,)](a, b, c, M=32, N=64, K=16, HOW="ieee")
    close(c, a.double() @ b.double(), 1e-5)
    clean(run)
    # Tensor cores: inputs cut to 11 bits; bfloat16 and float16 as they are.
    product[(1,)](a, b, c, M=32, N=64, K=16, HOW="tf32")
    cut = [(t.view(torch.int32) & -0x2000).view(torch.float32).double() for t in (a, b)]
    close(c, cut[0] @ cut[1], 5e-6)
    assert not torch.allclose(c.double(), a.double() @ b.double(), rtol=1e-5)
    clean(run)
    for dtype in (torch.bfloat16, torch.float16):
        x, y = a.to(dtype), b.to(dtype)
        product[(1,)](x, y, c, M=32, N=64, K=16, HOW="tf32")
        close(c, x.double() @ y.double(), 5e-6)
    clean(run)


def an_undefined_operand_of_a_product(run):
    """It makes the row or column undefined that it takes part in, not the others."""
    a, b, c = torch.empty(32, 16), torch.randn(16, 64), torch.empty(32, 64)
    product[(1,)](a, b, c, M=32, N=64, K=16, HOW="tf32")
    assert run.findings and "undefined" in str(run.findings[0])
    run.clear()


def products_that_are_not_executed(run):
    if run.architecture > 80:  # of whole warp groups
        a, b = torch.randn(128, 32).half(), torch.randn(32, 64).half()
        with pytest.raises(Unsupported):
            product[(1,)](a, b, torch.empty(128, 64), M=128, N=64, K=32, HOW="tf32")


def integer_arithmetic(run):
    x = torch.randint(-(2**31), 2**31 - 1, (256,), dtype=torch.int32)
    y = torch.randint(1, 1000, (256,), dtype=torch.int32) * (1 - 2 * (torch.arange(256) % 2)).int()
    out = torch.empty_like(x)
    integers[(1,)](x, y, out, N=256)
    a, b = x.long(), y.long()
    quotient = torch.div(a, b, rounding_mode="trunc")
    exact = quotient + (a - quotient * b) * 3 + (a >> 2) + (a * b >> 7) + torch.minimum(a, b)
    assert torch.equal(out, (exact & 0xFFFFFFFF).where(exact & 0x80000000 == 0, (exact & 0xFFFFFFFF) - 2**32).int())
    clean(run)


def special_functions(run):
    x = torch.rand(512) * 10 + 0.01
    out = torch.empty(512)
    special[(1,)](x, out, N=512)
    v = x.double()
    close(out / (1 + 1 / x), (v.log() + v.sqrt() + 1 / v + (-v).exp() + v.floor()) / (1 + 1 / v), 1e-5)
    clean(run)


def loops_of_different_length(run):
    x, out = torch.randn(5003), torch.empty(3)
    strided_sums[(3,)](x, out, 5003, BLOCK=512)
    owner = torch.arange(5003) // 512 % 3
    close(out, torch.stack([x.double()[owner == k].sum() for k in range(3)]), 1e-4)
    clean(run)


def atomic_counters(run):
    x, bins = torch.randint(0, 5, (256,)), torch.zeros(5, dtype=torch.int32)
    counted[(1,)](x, bins, N=256)
    assert torch.equal(bins, torch.bincount(x, minlength=5).int())
    clean(run)


def machine_instructions(run):
    """The line table accounts for the code: as many loads, stores and barriers ran in SASS as in PTX."""
    x, out = torch.randn(5003), torch.empty(3)
    strided_sums[(3,)](x, out, 5003, BLOCK=512)
    launch = run.launches[-1]
    ran = executed(machine_code(launch.ptx, launch.cubin, run.architecture), launch)
    ptx = launch.instructions
    assert ran["BAR"] == ptx["bar.sync"] > 0
    assert ran["STG"] == sum(n for opcode, n in ptx.items() if opcode.startswith("st.global"))
    assert ran["LDG"] == sum(n for opcode, n in ptx.items() if opcode.startswith("ld.global"))
    assert 0.5 < sum(ran.values()) / sum(ptx.values()) < 2


def found(run, kind):
    assert kind in {finding.kind[: len(kind)] for finding in run.findings}, [str(finding) for finding in run.findings]


def reading_past_the_end_is_found(run):
    copy[(1,)](torch.randn(100), torch.empty(128), 128, BLOCK=128)
    found(run, kinds.OUT_OF_BOUNDS)


def writing_past_the_end_is_found(run):
    copy[(1,)](torch.randn(128), torch.empty(100), 128, BLOCK=128)
    found(run, kinds.OUT_OF_BOUNDS)


def uninitialised_memory_is_found(run):
    copy[(1,)](torch.empty(128), torch.empty(128), 128, BLOCK=128)
    found(run, kinds.UNDEFINED_STORE)


def what_the_host_or_a_kernel_wrote_is_defined(run):
    first, second, third = (torch.empty(128) for _ in range(3))
    first.normal_()
    copy[(1,)](first, second, 128, BLOCK=128)
    copy[(1,)](second, third, 128, BLOCK=128)
    assert torch.equal(first, third)
    clean(run)


def programs_that_write_one_place_are_found(run):
    every_program_one_place[(4,)](torch.randn(128), torch.empty(1), BLOCK=128)
    found(run, kinds.GLOBAL_RACE)


def programs_that_read_what_others_write_are_found(run):
    neighbours[(4,)](torch.randn(512), BLOCK=128)
    found(run, kinds.GLOBAL_RACE)


def a_masked_load_without_other_is_found(run):
    """Triton fills such lanes with zeros in code of today; where it does not, the sum is undefined."""
    out = torch.empty(1)
    x = torch.randn(100)
    sum_without_other[(1,)](x, out, 100, BLOCK=128)
    if not run.findings:
        close(out, x.sum(), 1e-4)


def a_barrier_left_out_is_found(run):
    _changed(run, lambda ptx: "\n".join(line for line in ptx.splitlines() if "bar.sync" not in line))
    found(run, kinds.SHARED_RACE)


def a_store_left_out_is_found(run):
    def without_a_store(ptx):
        lines = ptx.splitlines()
        del lines[next(n for n, line in enumerate(lines) if "st.shared" in line)]
        return "\n".join(lines)

    _changed(run, without_a_store)
    assert any(finding.kind.startswith((kinds.UNDEFINED_STORE, kinds.UNDEFINED_USE)) for finding in run.findings)


def a_guard_left_out_is_found(run):
    """Lanes beyond the end of a tensor touch it."""
    from rplib.bench.machine import driver

    x, out = torch.randn(1000), torch.empty(1000)
    true, driver.parse = driver.parse, lambda ptx: true("\n".join(line.replace("@%p", "@!%p", 1) for line in ptx.splitlines()))
    try:
        copy[(4,)](x, out, 1000, BLOCK=256)
    finally:
        driver.parse = true
    found(run, kinds.OUT_OF_BOUNDS)


def _changed(run, change):
    from rplib.bench.machine import driver

    true, driver.parse = driver.parse, lambda ptx: true(change(ptx))
    try:
        sums[(1,)](torch.randn(64, 32), torch.empty(64), torch.empty(32), R=64, C=32)
    finally:
        driver.parse = true


def main(architecture):
    checks = [
        f for f in globals().values() if callable(f) and getattr(f, "__code__", None) and f.__code__.co_varnames[:1] == ("run",)
    ]
    failed = 0
    for check in checks:
        if check.__name__ in ("clean", "found", "_changed"):
            continue
        torch.manual_seed(0)
        with compiled(architecture) as run:
            try:
                check(run)
                print(f"passed {check.__name__}")
            except Exception:
                failed += 1
                print(f"FAILED {check.__name__}")
                traceback.print_exc(file=sys.stdout)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
