"""The traffic meter for Triton kernels against kernels whose bytes are known by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import DEVICE

from rplib.bench.traffic import kernel_traffic
from rplib.errors import UserError

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel meter needs the interpreter; run with TRITON_INTERPRET=1"
)


@triton.jit
def copy_whole(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def copy_masked(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def read_strided(x, y, step, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    offsets = i.to(tl.int64) * step if WIDE else i * step
    tl.store(y + i, tl.load(x + offsets))


@triton.jit
def read_some(x, y, keep, BLOCK: tl.constexpr):
    """Loads the elements that keep (BLOCK,) names; stores all."""
    i = tl.arange(0, BLOCK)
    wanted = tl.load(keep + i) != 0
    tl.store(y + i, tl.load(x + i, mask=wanted, other=0.0))


@triton.jit
def copy_samples(x, y, samples, BLOCK: tl.constexpr):
    """A mask of one value for the whole tile: this program's sample is wanted or not."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = tl.broadcast_to(tl.program_id(0) < samples, i.shape)
    tl.store(y + i, tl.load(x + i, mask=wanted, other=0.0))


@triton.jit
def gather(x, y, at, keep, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + tl.load(at + i), mask=tl.load(keep + i), other=0))


@triton.jit
def scale(x, y, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) * tl.load(factor))


@triton.jit
def read_rows(x, y, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile (ROWS, COLUMNS) of which a broadcast mask (ROWS, 1) keeps the first rows; the sum is stored as a scalar."""
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(x + r * row_stride + c, mask=r < rows, other=0.0)
    tl.store(y, tl.sum(tl.sum(tile, axis=1), axis=0))


@triton.jit
def read_cube(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, A)[:, None, None] * (B * C) + tl.arange(0, B)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    tl.store(y + i, tl.load(x + i))


@triton.jit
def same_address(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * 0))


@triton.jit
def choose(x, y, out, BLOCK: tl.constexpr):
    """One load whose lanes read from two tensors by turns."""
    i = tl.arange(0, BLOCK)
    pointers = tl.where(i % 2 == 0, x + i, y + i)
    tl.store(out + i, tl.load(pointers))


@triton.jit
def add_atomically(x, total, swapped, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(total + i, tl.load(x + i, mask=i < n), mask=i < n)
    tl.atomic_cas(swapped, 0, 1)


@triton.jit
def halves(x, y, BLOCK: tl.constexpr):
    _half(x, y, 0, BLOCK)
    _half(x, y, BLOCK, BLOCK)


@triton.jit
def _half(x, y, start, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def outside(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


def floats(n, dtype=torch.float32):
    return torch.arange(n, device=DEVICE).to(dtype)


def split(figures):
    """Lanes and sectors of loads, then of stores."""
    return (
        (figures.load_lane_bytes, figures.load_sector_bytes),
        (figures.store_lane_bytes, figures.store_sector_bytes),
    )


@INTERPRETED
class TestKernels:
    @pytest.mark.parametrize(
        ("dtype", "size"),
        [
            (torch.float64, 8), (torch.float32, 4), (torch.int64, 8), (torch.int32, 4), (torch.float16, 2),
            (torch.bfloat16, 2), (torch.int8, 1), (torch.uint8, 1), (torch.bool, 1),
        ],
    )  # fmt: skip
    def test_copy(self, dtype, size):
        x = floats(512, dtype)
        y = torch.zeros_like(x)
        with kernel_traffic() as traffic:
            copy_whole[(4,)](x, y, BLOCK=128)
        assert torch.equal(x, y)
        assert split(traffic) == ((512 * size, 512 * size),) * 2
        assert traffic.lane_bytes == traffic.sector_bytes == 2 * 512 * size
        assert traffic.kernels["copy_whole"].programs == 4

    def test_masked_tail(self):
        """1001 floats in blocks of 256: the last sector holds one of them."""
        x, y = floats(1001), floats(1001)
        with kernel_traffic() as traffic:
            copy_masked[(4,)](x, y, 1001, BLOCK=256)
        assert split(traffic) == ((4004, 126 * 32),) * 2

    def test_everything_masked(self):
        x, y = floats(8), floats(8)
        with kernel_traffic() as traffic:
            copy_masked[(2,)](x, y, 0, BLOCK=8)
        assert (traffic.lane_bytes, traffic.sector_bytes, traffic.launches) == (0, 0, 1)
        assert traffic.kernels["copy_masked"].by_argument == {}

    @pytest.mark.parametrize("samples", [0, 1, 3, 4])
    def test_mask_from_a_scalar(self, samples):
        x, y = floats(128) + 1, floats(128)
        with kernel_traffic() as traffic:
            copy_samples[(4,)](x, y, samples, BLOCK=32)
        assert split(traffic) == ((samples * 128, samples * 128), (512, 512))
        assert y.count_nonzero() == samples * 32
        assert "other" not in traffic.kernels["copy_samples"].by_argument

    @pytest.mark.parametrize(
        ("kept", "lanes", "sectors"),
        [
            (slice(0, None, 2), 128, 32),  # every second voxel: no sector is spared
            (slice(0, None, 8), 32, 32),  # one of each sector
            (slice(0, 128), 128, 16),  # half of them in a run: half the sectors
            (slice(4, 12), 8, 2),  # a run across a boundary
            (slice(255, 256), 1, 1),
        ],
    )
    def test_masks_within_sectors(self, kept, lanes, sectors):
        keep = torch.zeros(256, dtype=torch.int8, device=DEVICE)
        keep[kept] = 1
        x, y = floats(256), floats(256)
        with kernel_traffic(tensors={"x": x}) as traffic:
            read_some[(1,)](x, y, keep, BLOCK=256)
        assert split(traffic.by_tensor["x"]) == ((4 * lanes, 32 * sectors), (0, 0))
        assert split(traffic.by_tensor["other"]) == ((256, 256), (1024, 1024))
        assert torch.equal(y, x * keep)

    @pytest.mark.parametrize("wide", [False, True])
    @pytest.mark.parametrize(("step", "per_lane"), [(1, 4), (2, 8), (8, 32), (100, 32)])
    def test_strides(self, step, per_lane, wide):
        x, y = floats(64 * step), floats(64)
        with kernel_traffic() as traffic:
            read_strided[(1,)](x, y, step, BLOCK=64, WIDE=wide)
        assert split(traffic) == ((64 * 4, 64 * per_lane), (256, 256))
        assert torch.equal(y, x[::step])

    @given(
        lanes=st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=32, max_size=32),
        dtype=st.sampled_from([torch.int8, torch.float16, torch.float32, torch.float64]),
        start=st.integers(0, 20),
    )
    def test_any_addresses_and_masks(self, lanes, dtype, start):
        """Against a count of sets, for two programs of 16 lanes."""
        x, y = floats(120, dtype)[start:], floats(32, dtype)
        at = torch.tensor([index for index, _ in lanes], device=DEVICE)
        keep = torch.tensor([kept for _, kept in lanes], device=DEVICE)
        with kernel_traffic(tensors={"x": x}) as traffic:
            gather[(2,)](x, y, at, keep, BLOCK=16)
        first = x.data_ptr() - x.data_ptr() // 32 * 32
        touched = {(n // 16, (first + index * dtype.itemsize) // 32) for n, (index, kept) in enumerate(lanes) if kept}
        read = {(n // 16, index) for n, (index, kept) in enumerate(lanes) if kept}
        assert split(traffic.by_tensor["x"]) == ((len(read) * dtype.itemsize, 32 * len(touched)), (0, 0))

    def test_start_within_a_sector(self):
        """64 floats from the fourth byte of a sector on lie in nine sectors."""
        x, y = floats(65)[1:], floats(64)
        with kernel_traffic(tensors={"x": x}) as traffic:
            copy_whole[(1,)](x, y, BLOCK=64)
        assert split(traffic.by_tensor["x"])[0] == (256, 9 * 32)

    @pytest.mark.parametrize(("sector", "expected"), [(32, 9 * 32), (64, 5 * 64), (128, 3 * 128), (4, 256)])
    def test_sector_sizes(self, sector, expected):
        x, y = torch.empty(129, device=DEVICE), floats(64)
        start = (-x.data_ptr() // 4) % 32 + 1  # one float beyond a multiple of 128 bytes
        with kernel_traffic(sector_bytes=sector) as traffic:
            copy_whole[(1,)](x[start:], y, BLOCK=64)
        assert traffic.load_sector_bytes == expected

    def test_an_unaligned_element_lies_in_two_sectors(self):
        buffer = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
        x = triton.reinterpret(buffer[30:], tl.float32)  # bytes 30..33
        with kernel_traffic() as traffic:
            copy_whole[(1,)](x, floats(1), BLOCK=1)
        assert split(traffic)[0] == (4, 64)
        assert list(traffic.kernels["copy_whole"].by_argument) == ["x", "y"]

    def test_scalars(self):
        x, y, factor = floats(64), floats(64), floats(3)[2:]
        with kernel_traffic(tensors={"factor": factor}) as traffic:
            scale[(4,)](x, y, factor, BLOCK=16)
        assert split(traffic.by_tensor["factor"]) == ((4 * 4, 4 * 32), (0, 0))
        assert torch.equal(y, 2 * x)

    def test_rows_under_a_broadcast_mask(self):
        """3 of 4 rows of 16 floats, 21 floats apart: rows begin 0, 20 and 8 bytes into a sector, so touch 2, 3 and 3."""
        x, y = floats(4 * 21), floats(1)
        with kernel_traffic() as traffic:
            read_rows[(1,)](x, y, 3, 16, 21, ROWS=4, COLUMNS=16)
        assert split(traffic) == ((3 * 64, 8 * 32), (4, 32))

    def test_three_axes(self):
        x, y = floats(4 * 2 * 8), floats(64)
        with kernel_traffic() as traffic:
            read_cube[(1,)](x, y, A=4, B=2, C=8)
        assert split(traffic) == ((256, 256),) * 2

    def test_lanes_at_one_address(self):
        with kernel_traffic() as traffic:
            same_address[(1,)](floats(1), floats(64), BLOCK=64)
        assert split(traffic) == ((4, 32), (256, 256))

    def test_atomics_load_and_store(self):
        x, total, swapped = floats(16), floats(16), torch.zeros(1, dtype=torch.int32, device=DEVICE)
        with kernel_traffic(tensors={"total": total, "swapped": swapped}) as traffic:
            add_atomically[(1,)](x, total, swapped, 9, BLOCK=16)
        assert split(traffic.by_tensor["total"]) == ((36, 64), (36, 64))
        assert split(traffic.by_tensor["swapped"]) == ((4, 32), (4, 32))
        assert split(traffic.by_tensor["other"]) == ((36, 64), (0, 0))
        assert swapped.item() == 1 and total[8] == 16 and total[9] == 9

    def test_instructions_and_programs_count_apart(self):
        """Nothing is remembered between two loads of one sector: by two programs, or by two calls of a function."""
        x, y = floats(8), floats(8)
        with kernel_traffic() as traffic:
            halves[(1,)](x, y, BLOCK=4)
        assert split(traffic) == ((32, 64),) * 2
        with kernel_traffic() as traffic:
            copy_whole[(2,)](x, y, BLOCK=4)
        assert split(traffic) == ((32, 64),) * 2

    def test_kernels_tensors_and_arguments(self):
        x, y, z = floats(64), floats(64), floats(64)
        with kernel_traffic(tensors={"ends": [x, z], "middle": y, "none": None}) as traffic:
            copy_masked[(2,)](x, y, 40, BLOCK=32)
            copy_whole[(1,)](y, z, BLOCK=64)
            copy_masked[(2,)](y=z, x=x, n=8, BLOCK=32)
        assert list(traffic.kernels) == ["copy_masked", "copy_whole"]
        masked, whole = traffic.kernels.values()
        assert (masked.launches, masked.programs, whole.launches, traffic.launches) == (2, 4, 1, 3)
        assert split(masked) == ((192, 192), (192, 192))
        assert split(masked.by_argument["x"]) == ((192, 192), (0, 0))
        assert split(whole.by_argument["y"]) == ((0, 0), (256, 256))
        assert split(traffic.by_tensor["ends"]) == ((192, 192), (256 + 32, 256 + 32))
        assert split(traffic.by_tensor["middle"]) == ((256, 256), (160, 160))
        assert traffic.by_tensor["none"].lane_bytes == traffic.by_tensor["other"].lane_bytes == 0
        assert traffic.lane_bytes == sum(kernel.lane_bytes for kernel in traffic.kernels.values()) == 2 * (192 + 256)

    def test_one_load_from_two_tensors(self):
        x, y, out = floats(32), floats(32) + 100, floats(32)
        with kernel_traffic(tensors={"x": x, "y": y}) as traffic:
            choose[(1,)](x, y, out, BLOCK=32)
        assert torch.equal(out[::2], x[::2]) and torch.equal(out[1::2], y[1::2])
        for name in ("x", "y"):
            assert split(traffic.by_tensor[name])[0] == (64, 128)
            assert split(traffic.kernels["choose"].by_argument[name])[0] == (64, 128)

    def test_an_access_outside_every_argument_shows(self):
        memory = floats(64)
        x = memory[:48]
        with kernel_traffic() as traffic:
            outside[(1,)](x, floats(64), BLOCK=64)
        assert split(traffic.kernels["outside"].by_argument["other"])[0] == (64, 64)
        assert split(traffic.kernels["outside"].by_argument["x"])[0] == (192, 192)

    def test_one_tensor_as_two_arguments(self):
        x = floats(64)
        with kernel_traffic() as traffic:
            copy_whole[(1,)](x, x, BLOCK=64)
        assert {name: split(b) for name, b in traffic.kernels["copy_whole"].by_argument.items()} == {"x": ((256, 256),) * 2}

    def test_tensors_that_the_interpreter_copies(self, monkeypatch):
        """As it does with tensors on a GPU: the kernel sees other addresses than the caller."""
        monkeypatch.setattr(torch.UntypedStorage, "cpu", lambda storage: storage.clone())
        memory = floats(128)
        x, y = memory[64:], floats(64)
        with kernel_traffic(tensors={"x": x, "y": y}) as traffic:
            copy_whole[(1,)](x, y, BLOCK=64)
        assert torch.equal(y, x)
        assert [split(traffic.by_tensor[name]) for name in ("x", "y", "other")] == [
            ((256, 256), (0, 0)),
            ((0, 0), (256, 256)),
            ((0, 0), (0, 0)),
        ]

    def test_kernels_of_one_name(self):
        first = copy_whole

        def make():
            @triton.jit
            def copy_whole(x, y, BLOCK: tl.constexpr):
                tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + 1)

            return copy_whole

        second = make()
        x, y = floats(8), floats(8)
        with kernel_traffic() as traffic:
            for kernel in (first, second, first, second):
                kernel[(1,)](x, y, BLOCK=8)
        assert [kernel.launches for kernel in traffic.kernels.values()] == [2, 2]
        names = list(traffic.kernels)
        assert names[0] == "copy_whole" and names[1].startswith("copy_whole (test_bench_traffic.py:")

    def test_tensor_descriptors(self):
        """A tile (8, 16) at row 4 of 8 rows: only 4 rows exist."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        @triton.jit
        def copy_tile(source, out):
            out.store([0, 0], source.load([4, 16]))

        x = floats(8 * 32).view(8, 32)
        y = torch.zeros(8, 16, device=DEVICE)
        with kernel_traffic(tensors={"x": x}) as traffic:
            copy_tile[(1,)](TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor.from_tensor(y, [8, 16]))
        assert torch.equal(y[:4], x[4:, 16:]) and not y[4:].any()
        assert split(traffic) == ((4 * 64, 4 * 64), (8 * 64, 8 * 64))
        assert list(traffic.kernels["copy_tile"].by_argument) == ["source", "out"]
        assert split(traffic.by_tensor["x"])[0] == (256, 256)

    def test_nested(self):
        x, y = floats(8), floats(8)
        with kernel_traffic() as outer:
            copy_whole[(1,)](x, y, BLOCK=8)
            with kernel_traffic() as inner:
                copy_whole[(1,)](x, y, BLOCK=8)
            copy_whole[(1,)](x, y, BLOCK=8)
        assert (outer.lane_bytes, inner.lane_bytes, outer.launches, inner.launches) == (192, 64, 3, 1)

    def test_everything_is_put_back(self):
        import triton.runtime.interpreter as interpreter

        def hooks():
            builder = interpreter.interpreter_builder
            return dict(vars(builder)), dict(vars(type(builder))), dict(vars(interpreter.GridExecutor))

        x, y = floats(8), floats(8)
        copy_whole[(1,)](x, y, BLOCK=8)
        before = {**hooks()[0]}
        classes = hooks()[1:]

        def run_and_fail():
            with kernel_traffic() as traffic:
                copy_whole[(1,)](x, y, BLOCK=8)
                assert set(hooks()[0]) != set(before) and traffic.lane_bytes == 64
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run_and_fail()
        with pytest.raises(triton.runtime.errors.InterpreterError), kernel_traffic():
            copy_whole[(1,)](x, "no tensor", BLOCK=8)
        assert set(hooks()[0]) == set(before) and hooks()[1:] == classes
        copy_whole[(1,)](x, y, BLOCK=8)

    def test_a_kernel_that_fails_leaves_no_trace_in_the_next(self):
        @triton.jit
        def wrong(x, y, BLOCK: tl.constexpr):
            tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))
            tl.static_assert(BLOCK == 0, "wrong on purpose")

        x, y = floats(8), floats(8)
        with kernel_traffic() as traffic:
            with pytest.raises(Exception, match="wrong on purpose"):
                wrong[(1,)](x, y, BLOCK=8)
            copy_whole[(1,)](x, y, BLOCK=8)
        assert traffic.kernels["wrong"].lane_bytes == traffic.kernels["copy_whole"].lane_bytes == 64

    def test_names_must_be_tellable(self):
        x = floats(64).view(2, 32)
        for tensors, word in [
            ({"a": x[:, :20], "b": x[:, 10:]}, "share a range"),
            ({"a": x, "b": x}, "share a range"),
            ({"other": x}, "taken"),
            ({"a": [x, 3]}, "got int"),
        ]:
            with pytest.raises(UserError, match=word), kernel_traffic(tensors=tensors):
                pass
        with kernel_traffic(tensors={"a": [x, x[:, :4]], "b": floats(0)}) as traffic:
            copy_whole[(1,)](x, floats(64), BLOCK=64)
        assert traffic.by_tensor["a"].lane_bytes == 256

    @pytest.mark.parametrize("sector", [0, -32, 24])
    def test_sector_bytes_must_be_a_power_of_two(self, sector):
        with pytest.raises(UserError, match=f"power of two, got {sector}"), kernel_traffic(sector_bytes=sector):
            pass

    def test_another_interpreter_is_named(self, monkeypatch):
        import triton.runtime.interpreter as interpreter

        monkeypatch.delattr(interpreter.InterpreterBuilder, "create_masked_load")
        with pytest.raises(UserError, match=rf"not support the interpreter of Triton {triton.__version__}"), kernel_traffic():
            pass


def test_without_the_interpreter(tmp_path):
    """One sentence without it, and for a kernel made before it was switched on."""
    script = tmp_path / "early.py"
    script.write_text(
        "import os, torch, triton, triton.language as tl\n"
        "from rplib.bench.traffic import kernel_traffic\n"
        "@triton.jit\n"
        "def early(x):\n"
        "    tl.store(x, 1.0)\n"
        "for value in ('0', '1'):\n"
        "    os.environ['TRITON_INTERPRET'] = value\n"
        "    try:\n"
        "        with kernel_traffic():\n"
        "            early[(1,)](torch.zeros(1))\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("UserError the traffic meter needs Triton's interpreter; start the process with TRITON_INTERPRET")
    assert lines[1].startswith("UserError kernel early was defined before TRITON_INTERPRET was set")
