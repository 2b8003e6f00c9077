"""Measure every implementation on one input: correctness first, then memory, bytes and launches, then interleaved times."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rplib.bench import rows as r
from rplib.bench.correctness import Truth
from rplib.bench.eager_traffic import EagerTraffic, eager_traffic
from rplib.bench.implementations import BASELINE, Implementation, Loss
from rplib.bench.inductor_traffic import InductorEstimate, inductor_estimate
from rplib.bench.metered import Metered, MeterFailedError
from rplib.bench.rows import Measurement
from rplib.bench.shapes import Case, clear_gradients, make_inputs
from rplib.bench.timer import DeviceCopy, as_cuda_graph, copy_size, interleaved
from rplib.errors import UserError
from rplib.memory import peak_memory

Say = Callable[[str], None]
Meter = Callable[[], Metered | None]
_COPY = "device copy"


def measure(
    case: Case,
    implementations: Sequence[Implementation],
    device: torch.device,
    repeats: int,
    meter: Meter,
    say: Say,
    save: Callable[[list[Measurement]], None],
) -> list[Measurement]:
    """One row per implementation, in their order.

    Args:
        meter: counts the Triton form's bytes on (a smaller volume of) this input; None: unknown yet, see `fill_in`;
            raises MeterFailedError.
        say: called with progress messages.
        save: called with the rows after every step, so that an interruption loses little.
    """
    rows = {i.name: r.new_row(case, i.name) for i in implementations}
    running = [i for i in implementations if _can_run(i, rows[i.name], device)]
    for implementation in implementations:
        if implementation.form == "triton":
            say(f"{implementation.name}: bytes, by the interpreter")
            fill_in(rows[implementation.name], meter)
    if running:
        torch.compiler.reset()  # its caches hold only a few shapes
        try:
            _Measurement(case, rows, device, say).run(running, repeats, save)
        except Exception as error:  # a failure on one input must not affect the others
            for implementation in running:
                row = rows[implementation.name]
                if row.seconds is None and row.status in (r.FAILED, r.MEASURED):
                    row.status = r.OUT_OF_MEMORY if _is_out_of_memory(error) else r.FAILED
                    row.detail = row.detail or _one_line(error)
    save(list(rows.values()))
    return list(rows.values())


def _can_run(implementation: Implementation, row: Measurement, device: torch.device) -> bool:
    obstacle = implementation.obstacle(device)
    if obstacle:
        row.status, row.detail = r.LEFT_OUT, obstacle
    return obstacle is None


def fill_in(row: Measurement, meter: Meter) -> None:
    """Add bytes and launches of the Triton form; if the machine cannot time it, also its correctness."""
    try:
        found = meter()
    except MeterFailedError as error:
        row.bytes_from = f"not counted: {error}"
        if row.status == r.LEFT_OUT:
            row.status, row.detail = r.FAILED, f"in the interpreter: {error}"
        return
    if found is None:
        return
    if not found.right:
        row.status, row.detail = r.WRONG, f"in the interpreter, {found.volume}: {found.verdict}"
        return
    row.lane_bytes_per_voxel, row.sector_bytes_per_voxel = found.lane_bytes, found.sector_bytes
    row.launches = row.launches or found.launches
    row.bytes_from = f"interpreter, {found.volume}"
    if row.status == r.LEFT_OUT:
        row.status, row.detail = r.COUNTED, f"not timed: {row.detail}"


class _Measurement:
    def __init__(self, case: Case, rows: dict[str, Measurement], device: torch.device, say: Say) -> None:
        self.rows = rows
        self.device = device
        self.say = say
        self.voxels = case.shape.voxels
        self.logits, self.features = make_inputs(case, device)
        self.losses: dict[str, Loss] = {}  # verified implementations

    def run(self, implementations: Sequence[Implementation], repeats: int, save: Callable[[list[Measurement]], None]) -> None:
        self.say("reference in float64")
        truth = Truth(self.logits, self.features)
        for implementation in implementations:
            row = self.rows[implementation.name]
            self.say(f"{implementation.name}: first call" + (", compiling" if implementation.form == "compiled" else ""))
            try:
                self._examine(implementation, row, truth)
            except Exception as error:  # a failure of one implementation must not affect the others
                row.status = r.OUT_OF_MEMORY if _is_out_of_memory(error) else r.FAILED
                row.detail = _one_line(error)
                self.losses.pop(implementation.name, None)
            self._tidy()
        del truth
        self._tidy()
        save(list(self.rows.values()))
        if not self.losses:
            return
        self.say(f"timing {', '.join(self.losses)}: {repeats} rounds")
        self._time(repeats)
        save(list(self.rows.values()))
        if self.device.type == "cuda":
            try:
                self._time_graphs(repeats)
            except Exception as error:
                self.say(f"no CUDA graphs: {_one_line(error)}")

    def _examine(self, implementation: Implementation, row: Measurement, truth: Truth) -> None:
        loss_fn = implementation.make()
        begin = time.perf_counter()
        with _instrument(implementation.form) as traffic:
            loss = loss_fn(self.logits, self.features)
            loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if implementation.form != "eager":
            row.first_call_seconds = time.perf_counter() - begin
        verdict = truth.judge(loss, self._gradients(), exact_order=implementation.exact_order)
        row.loss_error, row.gradient_error, row.near_ties = verdict.loss_error, verdict.gradient_error, verdict.near_ties
        if not verdict.right:
            row.status, row.detail = r.WRONG, str(verdict)
            return
        if isinstance(traffic, EagerTraffic):
            row.lane_bytes_per_voxel = traffic.bytes / self.voxels
            row.launches = traffic.operations
            row.bytes_from = r.OPERATIONS
        elif isinstance(traffic, InductorEstimate) and traffic.graphs:
            row.lane_bytes_per_voxel = traffic.bytes / self.voxels
            row.launches = traffic.kernels
            row.bytes_from = r.ESTIMATE
        del loss
        self.losses[implementation.name] = loss_fn
        row.status = r.MEASURED

        clear_gradients([*self.logits, *self.features])
        memory = peak_memory(lambda: loss_fn(self.logits, self.features), self.device)
        row.forward_bytes, row.backward_bytes = memory.forward, memory.backward
        if self.device.type == "cuda":
            row.launches = cuda_launches(self._call(loss_fn)) or row.launches

    def _time(self, repeats: int) -> None:
        copy = DeviceCopy(self.device, copy_size(self.device))
        calls = {name: self._call(loss_fn) for name, loss_fn in self.losses.items()}
        warmup = 0 if self.device.type == "cpu" else 2  # refills the GPU's allocator; a CPU has no such cache
        timings = interleaved({**calls, _COPY: copy}, self.device, repeats, warmup=warmup, before=self._clear)
        bandwidth = copy.bandwidth(timings[_COPY])
        for name in self.losses:
            row, timing = self.rows[name], timings[name]
            row.repeats, row.seconds, row.seconds_minimum = repeats, timing.median, timing.minimum
            row.seconds_first_quartile, row.seconds_third_quartile = timing.quartiles
            row.copy_bandwidth = bandwidth
            assert row.floor_bytes_per_voxel is not None
            row.copy_fraction = row.floor_bytes_per_voxel * self.voxels / timing.median / bandwidth
        if BASELINE in self.losses:
            r.compare_with(self.rows[BASELINE], self.rows.values())

    def _time_graphs(self, repeats: int) -> None:
        graphs = {}
        for name, loss_fn in self.losses.items():
            try:
                graphs[name] = as_cuda_graph(self._call_without_gradients(loss_fn))
            except Exception as error:  # forms that cannot be captured have no such figure
                self.say(f"{name}: no CUDA graph, {_one_line(error)}")
        if graphs:
            for name, timing in interleaved(graphs, self.device, repeats).items():
                self.rows[name].graph_seconds = timing.median

    def _call(self, loss_fn: Loss) -> Callable[[], None]:
        return lambda: loss_fn(self.logits, self.features).backward()

    def _call_without_gradients(self, loss_fn: Loss) -> Callable[[], None]:
        """Forward and backward with newly allocated gradients, also within a captured graph."""

        def call() -> None:
            self._clear()
            loss_fn(self.logits, self.features).backward()

        return call

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(z) if z.grad is None else z.grad for z in self.logits]

    def _clear(self) -> None:
        clear_gradients([*self.logits, *self.features])

    def _tidy(self) -> None:
        self._clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _instrument(form: str) -> Iterator[EagerTraffic | InductorEstimate | None]:
    """The byte counter for the first call of a form; the Triton form is counted by `metered`."""
    with ExitStack() as stack:
        if form == "eager":
            yield stack.enter_context(eager_traffic())
            return
        estimate = None
        if form == "compiled":
            with suppress(UserError):  # no figure if this torch has no estimate
                estimate = stack.enter_context(inductor_estimate())
        yield estimate


def cuda_launches(call: Callable[[], object]) -> int | None:
    """Kernels, memsets and copies that ``call`` puts on the GPU; None if the profiler does not see them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        call()
        torch.cuda.synchronize()
    events = [e for e in found.events() or [] if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return len(events) or None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 200 else text[:197] + "..."
