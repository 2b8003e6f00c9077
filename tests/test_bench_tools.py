"""The instruments against cases with known answers; `rplib bench` refuses what is wrong and keeps what it has."""

import argparse
import csv
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from loss_cases import HAS_TRITON
from torch import Tensor

import rplib
from rplib import cli, naive
from rplib.bench import benchmark, measure, plot, timer, wide
from rplib.bench import rows as r
from rplib.bench.correctness import Truth
from rplib.bench.floor import RECORD_BYTES, floor_bytes
from rplib.bench.implementations import IMPLEMENTATIONS, Implementation, vectorised
from rplib.bench.metered import Metered, MeterFailedError, metered, reduced
from rplib.bench.shapes import LAYOUTS, SHAPES, TEACHERS, Case, Shape, clear_gradients, make_inputs
from rplib.bench.timer import DeviceCopy, Timing, as_cuda_graph, clock_for, copy_size, interleaved
from rplib.errors import UserError
from rplib.memory import peak_memory
from rplib.options import Options

CPU = torch.device("cpu")
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
DEVICES = ["cpu", GPU]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

TINY = Shape("tiny", 2, 3, 4, (5, 6, 7))
COUNTED = Metered("1x5x6x7", 100.0, 128.0, 5, True, "loss error 0")


@pytest.fixture
def tiny(monkeypatch):
    """`rplib bench` on a shape of milliseconds, with the interpreter's count given."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(benchmark, "metered", lambda case: COUNTED)
    monkeypatch.setattr(measure, "copy_size", lambda device: 1 << 20)
    return ["bench", "--shapes", "tiny", "--dtypes", "float32", "--formats", "contiguous", "--device", "cpu", "--repeats", "2"]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------------------- timer


def test_every_round_calls_each_once_and_begins_with_another():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleaved(calls, CPU, repeats=3, warmup=1, before=lambda: order.append("-"))
    assert "".join(order) == "-a-b-c" + "-b-c-a" + "-c-a-b" + "-a-b-c"
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_times_are_those_of_the_call_alone(monkeypatch):
    """By a clock that moves only when a call moves it: a busy machine changes nothing."""
    now = [1000.0]

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timings = interleaved({"long": takes(32.0), "short": takes(4.0)}, CPU, 3, before=takes(8.0))
    assert timings["long"].seconds == (32.0,) * 3
    assert timings["short"].seconds == (4.0,) * 3
    assert now[0] == 1000.0 + 4 * (32 + 4 + 2 * 8)  # three rounds and a warm-up, with what comes before


def test_median_and_quartiles():
    timing = Timing((9.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.median, timing.minimum, timing.quartiles) == (3.0, 1.0, (2.0, 4.0))
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


@pytest.mark.parametrize(("calls", "repeats"), [({}, 1), ({"a": int}, 0)])
def test_nothing_to_time(calls, repeats):
    with pytest.raises(ValueError, match="expected at least one"):
        interleaved(calls, CPU, repeats)


@pytest.mark.parametrize("device", DEVICES)
def test_device_copy_moves_what_it_says(device):
    copy = DeviceCopy(torch.device(device), 1000)
    copy()
    assert torch.equal(copy._target, copy._source)
    assert copy.moved == 2000
    assert copy.bandwidth(Timing((1.0, 2.0, 4.0))) == 1000  # bytes a second, by the median


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_clock_knows_how_long_a_copy_takes():
    device = torch.device("cuda")
    copy, double = DeviceCopy(device, copy_size(device) // 2), DeviceCopy(device, copy_size(device))
    timings = interleaved({"one": copy, "two": double}, device, 10)
    assert 1.6 < timings["two"].median / timings["one"].median < 2.4
    assert clock_for(device)(lambda: None) < 1e-3
    x = torch.zeros(1000, device=device)
    replay = as_cuda_graph(lambda: x.add_(1))
    before = float(x[0])
    replay()
    assert float(x[0]) == before + 1
    assert measure.cuda_launches(lambda: (x + 1, x * 2)) == 2


# -------------------------------------------------------------------------------------------------------------- memory

N = 1 << 16  # elements; CUDA hands out multiples of 512 bytes
SLACK = 4096  # scalars


@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_backward_apart(device):
    x = torch.ones(N, device=device, requires_grad=True)
    found = peak_memory(lambda: x.exp().sum(), torch.device(device))  # exp keeps its result for the backward pass
    assert 4 * N <= found.forward <= 4 * N + SLACK
    assert 8 * N <= found.backward <= 8 * N + SLACK  # that and the gradient
    assert found.peak == found.backward


@pytest.mark.parametrize("device", DEVICES)
def test_peak_is_not_the_sum(device):
    x = torch.ones(N, device=device, requires_grad=True)

    def forward() -> Tensor:
        with torch.no_grad():
            a = x + 1
            b = a + 1  # two alive
            del a, b
            c = x.repeat(3)  # three
            del c
        return x.sum()  # keeps nothing

    found = peak_memory(forward, torch.device(device))
    assert 12 * N <= found.forward <= 12 * N + SLACK
    assert 4 * N <= found.backward <= 4 * N + SLACK  # the gradient alone


def test_what_was_there_before_does_not_count():
    kept = [torch.ones(N) for _ in range(4)]
    x = torch.ones(N, requires_grad=True)
    kept.append(x * 3)
    found = peak_memory(lambda: (kept.pop().detach() * x).sum(), CPU)
    assert 4 * N <= found.forward <= 4 * N + SLACK


def test_memory_inside_custom_operators_is_seen():
    @torch.library.custom_op("rplib_bench_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        inside = x.repeat(5)
        return inside[: x.numel()] * 2

    twice.register_autograd(lambda ctx, g: g * 2)
    x = torch.ones(N, requires_grad=True)
    found = peak_memory(lambda: twice(x).sum(), CPU)
    assert 6 * 4 * N <= found.forward <= 6 * 4 * N + SLACK


@needs_compiler
def test_memory_of_compiled_code_is_seen():
    def chain(x: Tensor) -> Tensor:
        return x.sin().cos().sin().sum()

    x = torch.ones(N, requires_grad=True)
    compiled = torch.compile(chain)
    compiled(x).backward()
    x.grad = None
    found = peak_memory(lambda: compiled(x), CPU)
    assert found.forward <= SLACK  # fused: eager keeps 3 x 4 N here
    assert 4 * N <= found.backward <= 4 * N + SLACK
    assert peak_memory(lambda: chain(x), CPU).forward >= 12 * N


def test_memory_of_other_devices_is_refused():
    with pytest.raises(UserError, match="'meta'; expected cpu or cuda"):
        peak_memory(lambda: torch.zeros(()), torch.device("meta"))


# ------------------------------------------------------------------------------------------------------- floor, inputs


def test_floor_is_the_sum_of_its_passes():
    # float32, C = 2, F = 16: statistics 144; weighting 16 + 64; gradient 16. bfloat16 halves it.
    assert floor_bytes(2, 16, 4) == 144 + 16 + 64 + 16 == 2 * floor_bytes(2, 16, 2)
    assert floor_bytes(32, 256, 4) == 2 * 288 * 4 + 2 * 32 * 4 + 256 * 4 + 2 * 32 * 4
    assert 2 * torch.float32.itemsize == RECORD_BYTES


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("teachers", TEACHERS)
def test_one_network_teaches_everywhere_and_it_is_never_close(teachers, classes):
    case = Case(Shape("x", 2, classes, 4, (32, 48, 16)), teachers=teachers)
    logits, features = make_inputs(case, CPU)
    first, second = naive.maps([z.detach().double() for z in logits], [f.detach().double() for f in features], Options())
    taught_by_second = first.mask  # pair (0, 1)
    assert (first.mask ^ second.mask).all()
    assert not Truth(logits, features).judge(torch.zeros(()), logits, exact_order=False).near_ties
    if teachers == "cubes":
        corners = taught_by_second[:, ::16, ::16, ::16]
        assert torch.equal(corners.repeat_interleave(16, 1).repeat_interleave(16, 2).repeat_interleave(16, 3), taught_by_second)
        assert taught_by_second.double().mean() == 0.5
    else:
        assert 0.45 < taught_by_second.double().mean() < 0.55


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(6, 5), (6, 5, 4)])
def test_layout_of_inputs(layout, spatial):
    logits, features = make_inputs(Case(Shape("x", 2, 3, 4, spatial), "bfloat16", layout), CPU)
    for tensor in (*logits, *features):
        assert tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.bfloat16
        assert (tensor.stride(1) == 1) == (layout == "channels_last")
    same, _ = make_inputs(Case(Shape("x", 2, 3, 4, spatial), "bfloat16", "contiguous"), CPU)
    assert torch.equal(same[0], logits[0])


# --------------------------------------------------------------------------------------------------------- correctness


def prepared(case, dtype=None):
    logits, features = make_inputs(case, CPU)
    if dtype is not None:
        logits, features = ([t.detach().to(dtype).requires_grad_() for t in ts] for ts in (logits, features))
    return logits, features, Truth(logits, features)


def result(loss_fn, logits, features):
    clear_gradients([*logits, *features])
    loss = loss_fn(logits, features)
    loss.backward()
    return loss.detach(), [z.grad.clone() for z in logits]


@pytest.mark.parametrize("shape", [TINY, Shape("x", 3, 2, 16, (40, 9))])
def test_truth_is_the_naive_form_in_float64(shape):
    logits, features, truth = prepared(Case(shape, teachers="random"), torch.float64)
    loss, gradients = result(lambda z, f: naive.loss(z, f, Options()), logits, features)
    verdict = truth.judge(loss, gradients, exact_order=True)
    assert verdict.right and verdict.loss_error < 1e-14 and verdict.gradient_error < 1e-14 and verdict.near_ties == 0


def spoilt(loss, gradients):
    """What must be found wrong, by name."""
    one_voxel = [g.clone() for g in gradients]
    one_voxel[0][0, :, int(gradients[0][0].any(0).nonzero()[0])] = 0
    swapped = [gradients[1], gradients[0]]
    half = [g.to(torch.bfloat16).float() for g in gradients]
    return {
        "loss off by 1e-4": (loss * 1.0001, gradients),
        "gradient off by 1e-4": (loss, [g * 1.0001 for g in gradients]),
        "loss NaN": (loss * float("nan"), gradients),
        "gradient NaN": (loss, [g * float("nan") for g in gradients]),
        "one voxel without gradient": (loss, one_voxel),
        "the other student's gradient": (loss, swapped),
        "gradient computed in bfloat16": (loss, half),
        "no gradient": (loss, [torch.zeros_like(g) for g in gradients]),
    }


def test_wrong_results_are_found():
    logits, features, truth = prepared(Case(replace(TINY, spatial=(500,))))
    loss, gradients = result(rplib.ReliableMutualLoss(impl="torch"), logits, features)
    assert truth.judge(loss, gradients, exact_order=True).right
    found = {name: truth.judge(*wrong, exact_order=False).right for name, wrong in spoilt(loss, gradients).items()}
    assert not any(found.values()), found


def test_bfloat16_gradient_may_be_rounded_once_and_not_more():
    logits, features, truth = prepared(Case(replace(TINY, spatial=(500,)), "bfloat16"))
    loss, gradients = result(rplib.ReliableMutualLoss(impl="torch"), logits, features)
    assert truth.judge(loss, gradients, exact_order=True).right
    assert not truth.judge(loss, [g * 1.02 for g in gradients], exact_order=True).right


def test_either_choice_is_right_at_a_near_tie_and_nowhere_else():
    logits, features, _ = prepared(Case(replace(TINY, classes=2, batch=1, spatial=(400,))))
    with torch.no_grad():  # at 100 voxels the networks are equally confident to the last bit, and disagree
        logits[0][..., :100] = torch.tensor([1.0, 0.0])[:, None]
        logits[1][..., :100] = torch.tensor([0.0, 1.0 + 1e-7])[:, None]
    truth = Truth(logits, features)
    options = Options()
    masks = [m.mask for m in naive.maps([z.detach() for z in logits], [f.detach() for f in features], options)]
    swapped = [m.clone() for m in masks]
    swapped[0][:, :100], swapped[1][:, :100] = masks[1][:, :100], masks[0][:, :100]
    far = [m.clone() for m in masks]
    far[0][:, 200], far[1][:, 200] = masks[1][:, 200], masks[0][:, 200]
    for chosen, right in ((masks, True), (swapped, True), (far, False)):
        outcome = result(lambda z, f, chosen=chosen: naive.loss(z, f, options, chosen), logits, features)
        verdict = truth.judge(*outcome, exact_order=True)
        assert verdict.right == right and verdict.near_ties == 100


# ----------------------------------------------------------------------------------------------------- implementations


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["naive", "vectorised", "torch"])
def test_eager_implementations_are_right(name, dtype, layout):
    implementation = IMPLEMENTATIONS[name]
    assert implementation.form == "eager"
    for shape in (TINY, Shape("x", 2, 2, 16, (24, 24)), Shape("x", 1, 14, 32, (8, 8, 8))):
        logits, features, truth = prepared(Case(shape, dtype, layout, "random"))
        verdict = truth.judge(*result(implementation.make(), logits, features), exact_order=implementation.exact_order)
        assert verdict.right, verdict


def test_vectorised_is_the_formula_in_float64():
    logits, features, _ = prepared(Case(TINY, teachers="random"), torch.float64)
    ours, own_gradients = result(vectorised, logits, features)
    exact, gradients = result(lambda z, f: naive.loss(z, f, Options()), logits, features)
    assert abs(ours - exact) <= 1e-13 * abs(exact)
    for a, b in zip(own_gradients, gradients, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()


def test_who_cannot_run_says_why(monkeypatch):
    assert IMPLEMENTATIONS["triton"].obstacle(CPU) is not None or rplib.dispatch.interpreting()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert IMPLEMENTATIONS["torch-c"].obstacle(CPU) == "torch.compile needs a C++ compiler on a CPU"
    assert IMPLEMENTATIONS["torch"].obstacle(CPU) is None


# ------------------------------------------------------------------------------------------------------------- metered


@needs_triton
def test_triton_form_is_counted_in_a_process_of_its_own():
    shape = Shape("x", 1, 2, 16, (16, 16, 16))
    found = metered(Case(shape))
    assert found.right and found.volume == "1x16x16x16"
    assert 4 <= found.launches <= 6
    # 4096 voxels: partial sums weigh more than in a real volume
    assert floor_bytes(2, 16, 4) <= found.lane_bytes <= 1.5 * floor_bytes(2, 16, 4)


@needs_triton
def test_metering_that_fails_says_why_in_a_line():
    with pytest.raises(MeterFailedError, match="the kernels take up to 64 classes, got 65") as failed:
        metered(Case(Shape("x", 1, 65, 2, (4,))))
    assert "\n" not in str(failed.value)


def test_what_is_counted_is_no_larger_than_the_input():
    assert reduced(Case(SHAPES["pancreas"])) == reduced(Case(SHAPES["left-atrium"]))
    for shape in SHAPES.values():
        smaller = reduced(Case(shape)).shape
        assert (smaller.classes, smaller.features, smaller.batch) == (shape.classes, shape.features, 1)
        assert all(a <= b for a, b in zip(smaller.spatial, shape.spatial, strict=True))


# --------------------------------------------------------------------------------------------------------- rplib bench


def test_bench_measures_and_keeps_everything(tiny, tmp_path, capsys):
    arguments = [*tiny, "--implementations", "naive,vectorised,torch,triton", "--csv", str(tmp_path / "r.csv")]
    assert cli.main([*arguments, "--plot", str(tmp_path / "r.png")]) == 0
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert "tiny 2x3x4x5x6x7 float32 contiguous, teacher: cubes; floor 120 B/voxel, copy" in out
    assert float(lines["naive"][3]) == 1.0
    assert lines["triton"][1] == "-"  # the interpreter's time means nothing
    assert "triton: its bytes were counted, but it was not timed" in out and "No GPU was used" in out
    assert "3 of 4 measured, each after its result was verified; 0 wrong or failed." in out
    assert "[1/1" in err

    rows = {row["implementation"]: row for row in read(tmp_path / "r.csv")}
    for row in rows.values():
        assert row["torch"] == torch.__version__ and row["device"] and row["date"].count("-") == 2 and "commit" in row
        assert row["size"] == str(TINY) and int(row["floor_bytes_per_voxel"]) == floor_bytes(3, 4, 4)
    naive_row, ours = rows["naive"], rows["torch"]

    def peak(row):
        return max(int(row["forward_bytes"]), int(row["backward_bytes"]))

    assert naive_row["status"] == ours["status"] == "measured" and ours["repeats"] == "2"
    assert float(ours["times_faster"]) == pytest.approx(float(naive_row["seconds"]) / float(ours["seconds"]), rel=1e-4)
    assert float(ours["times_less_memory"]) == pytest.approx(peak(naive_row) / peak(ours), rel=1e-4)
    assert float(ours["copy_fraction"]) == pytest.approx(
        floor_bytes(3, 4, 4) * TINY.voxels / float(ours["seconds"]) / float(ours["copy_bandwidth"]), rel=1e-4
    )
    assert float(ours["lane_bytes_per_voxel"]) > floor_bytes(3, 4, 4) and int(ours["launches"]) > 10
    triton = rows["triton"]
    assert (triton["status"], triton["seconds"]) == ("counted", "")
    assert (triton["sector_bytes_per_voxel"], triton["launches"]) == ("128", "5")
    assert [row.implementation for row in r.read_csv(tmp_path / "r.csv")] == ["naive", "vectorised", "torch", "triton"]
    assert r.read_csv(tmp_path / "r.csv")[2].seconds == float(ours["seconds"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def wrong_by(factor):
    right = rplib.ReliableMutualLoss(impl="torch")
    return lambda: lambda logits, features: factor * right(logits, features)


def test_no_speed_for_a_wrong_result(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "fast", Implementation("fast", wrong_by(1.001), "eager", exact_order=True))
    arguments = [*tiny, "--implementations", "naive,fast,torch", "--csv", str(tmp_path / "r.csv")]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("fast"))
    assert line.split()[1] == "WRONG" and line.split()[2:4] == ["-", "-"]
    assert "WRONG: fast on tiny float32 contiguous: loss error 1.0e-03" in out
    rows = {row["implementation"]: row for row in read(tmp_path / "r.csv")}
    assert rows["fast"]["status"] == "WRONG"
    assert not any(rows["fast"][name] for name in ("seconds", "times_faster", "copy_fraction", "forward_bytes"))
    assert rows["torch"]["status"] == "measured" and rows["torch"]["seconds"]


def test_wrong_in_the_interpreter_is_wrong(tiny, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "metered", lambda case: replace(COUNTED, right=False, verdict="loss error 0.5"))
    assert cli.main([*tiny, "--implementations", "triton"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: triton on tiny float32 contiguous: in the interpreter, 1x5x6x7: loss error 0.5" in out and "128" not in out


def test_one_failure_costs_one_row(tiny, tmp_path, capsys, monkeypatch):
    def failing(error):
        def loss(logits, features):
            raise error

        return lambda: loss

    def no_count(case):
        raise MeterFailedError("no kernel today")

    errors = {"broken": ValueError("no such luck\nsecond line"), "huge": torch.OutOfMemoryError("out of memory")}
    for name, error in errors.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation(name, failing(error), "eager", exact_order=True))
    monkeypatch.setattr(benchmark, "metered", no_count)
    arguments = [*tiny, "--implementations", "broken,huge,torch,triton", "--csv", str(tmp_path / "r.csv")]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "failed: broken on tiny float32 contiguous: ValueError: no such luck\n" in out
    assert "failed: triton on tiny float32 contiguous: in the interpreter: no kernel today\n" in out
    rows = {row["implementation"]: row["status"] for row in read(tmp_path / "r.csv")}
    assert rows == {"broken": "failed", "huge": "out of memory", "torch": "measured", "triton": "failed"}


def test_an_input_that_fails_costs_its_own_rows(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "large", replace(TINY, name="large", batch=3))
    make = make_inputs

    def no_room(case, device):
        if case.shape.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nmore")
        return make(case, device)

    monkeypatch.setattr(measure, "make_inputs", no_room)
    arguments = ["--shapes", "large,tiny", "--implementations", "torch", "--csv", str(tmp_path / "r.csv")]
    assert cli.main([*tiny, *arguments]) == 0
    assert [(row["shape"], row["status"]) for row in read(tmp_path / "r.csv")] == [
        ("large", "out of memory"),
        ("tiny", "measured"),
    ]
    assert "CUDA out of memory. Tried to allocate much\n" in capsys.readouterr().out


def test_a_run_cut_short_keeps_what_it_has(tiny, tmp_path, monkeypatch):
    timed = []

    def cut_short(*args, **keywords):
        if timed:
            raise KeyboardInterrupt
        timed.append(1)
        return interleaved(*args, **keywords)

    monkeypatch.setattr(measure, "interleaved", cut_short)
    arguments = [*tiny, "--teachers", "cubes,random", "--implementations", "naive,torch", "--csv", str(tmp_path / "r.csv")]
    assert cli.main(arguments) == 130
    rows = read(tmp_path / "r.csv")
    assert [(row["teachers"], row["implementation"]) for row in rows] == [
        (teachers, name) for teachers in TEACHERS for name in ("naive", "torch")
    ]
    assert all(row["seconds"] for row in rows[:2]) and not any(row["seconds"] for row in rows[2:])
    assert all(row["forward_bytes"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "la"], "--shapes: unknown 'la'; expected one or more of left-atrium, pancreas"),
        (["--dtypes", "float8"], "--dtypes: unknown 'float8'"),
        (["--implementations", "torch,jax"], "--implementations: unknown 'jax'"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "gpu"], "--device: unknown device 'gpu'"),
        (["--device", "cuda:77"], "--device: cuda:77 is not available"),
        (["--csv", "/no/such/folder/r.csv"], "--csv: there is no folder /no/such/folder; create it first"),
        (["--plot", "picture.txt"], "unknown picture format '.txt'"),
    ],
)
def test_mistakes_of_the_user_are_one_line(arguments, said, capsys):
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("rplib: error: ") and said in err and err.count("\n") == 1


def test_plot_has_a_row_of_panels_for_every_dtype_and_layout(tmp_path):
    from matplotlib.image import imread

    def rows(dtype):
        row = r.new_row(Case(TINY, dtype), "torch")
        row.status, row.seconds, row.copy_bandwidth, row.lane_bytes_per_voxel = r.MEASURED, 0.1, 1e9, 300.0
        row.forward_bytes, row.backward_bytes = 10, 20
        return [row, replace(row, shape="other", seconds=0.2)]

    plot.draw(rows("float32"), tmp_path / "one.png")
    plot.draw([*rows("float32"), *rows("bfloat16")], tmp_path / "two.png")
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert two.shape[0] > 1.5 * one.shape[0] and two.shape[1] == one.shape[1]
    wrong = replace(rows("float32")[0], status=r.WRONG)
    with pytest.raises(UserError, match="nothing to plot"):
        plot.draw([wrong], tmp_path / "none.png")


# ---------------------------------------------------------------------------------------------------------------- wide


@pytest.mark.parametrize(
    ("found", "spills", "code", "said"),
    [
        (Metered("v", 3900.0, 5000.0, 5, True, "fine"), 0, 0, "3900 B/voxel by lane, 1.02 x the floor of 3840"),
        (Metered("v", 3900.0, 5000.0, 5, True, "fine"), 2, 1, "1 spill registers"),
        (Metered("v", 5100.0, 5200.0, 5, True, "fine"), 0, 1, "more than 1.3 x"),
        (Metered("v", 3900.0, 5000.0, 5, False, "off"), 0, 1, "WRONG"),
        (None, 0, 1, "failed: no kernel today"),
    ],
)
def test_wide_network_check(found, spills, code, said, monkeypatch, capsys):
    from rplib.bench.ahead_of_time import CompiledKernel

    def count(case):
        if found is None:
            raise MeterFailedError("no kernel today")
        scale = 1 if case.dtype == "float32" else 0.5
        return replace(found, lane_bytes=found.lane_bytes * scale, sector_bytes=found.sector_bytes * scale)

    row = CompiledKernel(
        **{field.name: "x" if field.type in ("str", str) else 0 for field in fields(CompiledKernel)} | {"spills": spills}
    )
    monkeypatch.setattr(wide, "metered", count)
    monkeypatch.setattr(wide, "report_all", lambda cases, jobs, progress: [row])
    assert wide.run(argparse.Namespace(edge=8, jobs=1)) == code
    out = capsys.readouterr().out
    assert said in out and out.rstrip().endswith("OK") == (code == 0)
