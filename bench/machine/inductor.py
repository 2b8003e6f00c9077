"""torch.compile for comparison, predicted the same way: inductor's Triton kernels for a CUDA GPU, compiled and run without one.

    python -m rplib.bench.machine.inductor [--dtypes float32,bfloat16] [--classes 2] [--features 16]

The vectorised form's loss and gradient are traced as one graph, which keeps everything that autograd would save. Inductor gets it
with CUDA tensors without data and the properties of an H200. The code that it writes then runs on the machine: of
the configurations that inductor would try, the one with the shortest predicted time. For cuBLAS products, only the bytes are
counted. The result is first compared with eager PyTorch.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rplib.bench.command import main
from rplib.bench.implementations import vectorised
from rplib.bench.machine.driver import Ran, Session, compiled
from rplib.bench.machine.prediction import GPUS, Needs, predicted
from rplib.bench.machine.report import DTYPES, LAYOUTS, SPATIAL, measure
from rplib.bench.machine.sass import executed, machine_code
from rplib.bench.shapes import Case, Shape, make_inputs
from rplib.errors import UserError

_H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=141 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, gcnArchName="",
)  # fmt: skip
_files = count()


def loss_and_gradients(za: Tensor, zb: Tensor, fa: Tensor, fb: Tensor) -> tuple[Tensor, ...]:
    """The function to compile: the loss and the gradients of both logits."""
    z = [t.detach().requires_grad_() for t in (za, zb)]
    loss = vectorised(z, [fa, fb])
    return (loss.detach(), *torch.autograd.grad(loss, z))


def inductor_code(function: Callable[..., Any], inputs: Sequence[Tensor]) -> str:
    """The Python module that inductor writes for ``function`` on CUDA tensors like ``inputs``, CPU tensors. Inside `compiled`."""
    import torch._inductor.config as config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    class CodeWritten(Exception):  # noqa: N818
        pass

    written: list[str] = []

    def keep_code(self: Any) -> None:
        code = self.codegen()[0]
        written.append(str(getattr(code, "value", code)))
        raise CodeWritten

    with ExitStack() as stack:
        stack.enter_context(_pretended_gpu())
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", keep_code))
        stack.enter_context(config.patch(compile_threads=1, force_disable_caches=True))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        cpu = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in inputs]
        graph = make_fx(function, decomposition_table=select_decomp_table())(*cpu)
        cuda = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in inputs]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        graph.recompile()
        FakeTensorProp(graph, mode).propagate(*cuda)
        stack.enter_context(tracing(TracingContext(mode)))
        try:
            compile_fx_inner(graph, cuda)
        except Exception:
            if not written:
                raise
    return written[0]


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """Answer inductor's queries about the GPU as if there were an H200."""
    import torch._dynamo.utils
    from torch._dynamo.device_interface import CudaInterface

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", answer(True)), (torch.cuda, "device_count", answer(1)),
        (torch.cuda, "current_device", answer(0)), (torch.cuda, "get_device_properties", answer(_H200)),
        (torch.cuda, "get_device_capability", answer((9, 0))), (torch.cuda, "_lazy_init", answer(None)),
        (torch.cuda, "_exchange_device", answer(0)), (torch.cuda, "_maybe_exchange_device", answer(0)),
        (torch.cuda, "device", lambda *_: nullcontext()), (torch.cuda, "set_device", answer(None)),
        (torch.cuda, "synchronize", answer(None)), (torch.version, "cuda", "12.8"),
        (torch._dynamo.utils, "preserve_rng_state", nullcontext),
    ]  # fmt: skip
    for interface in (CudaInterface, CudaInterface.Worker):
        answers += [(interface, "get_device_properties", staticmethod(answer(_H200)))]
        answers += [(interface, "current_device", staticmethod(answer(0)))]
    answers += [
        (CudaInterface, "is_available", staticmethod(answer(True))),
        (CudaInterface, "get_compute_capability", staticmethod(answer(90))),
        (CudaInterface, "is_triton_capable", staticmethod(answer(True))),
        (CudaInterface, "raise_if_triton_unavailable", staticmethod(answer(None))),
    ]
    with ExitStack() as stack:
        for owner, name, value in answers:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class _Runs:
    """Runs inductor's module on CPU tensors; ``cost``: (name, needs) of every launch, in order."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder
        self.cost: list[tuple[str, Needs]] = []

    def call(self, code: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        lines = [line for line in code.splitlines() if "_cuda_getCurrentRawStream" not in line and "AsyncCompile" not in line]
        body = "\n".join(lines).partition("def get_args")[0]
        body = body.replace("torch.cuda._DeviceGuard(0)", "_nothing()").replace("torch.cuda.set_device(0)", "pass")
        for line in ("empty_strided_cuda = ", "extern_kernels import", "import extern_kernels"):
            body = "\n".join(text for text in body.splitlines() if line not in text)
        space = {
            "async_compile": SimpleNamespace(triton=self._triton, wait=lambda _: None, cpp_pybinding=None),
            "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
            "extern_kernels": SimpleNamespace(bmm=self._bmm, mm=self._bmm), "get_raw_stream": lambda _: 0,
            "_nothing": nullcontext, "__name__": "inductor",
        }  # fmt: skip
        exec(compile(body, "inductor", "exec"), space)
        space["copy_if_misaligned"] = lambda t: t
        return space["call"](list(inputs))  # type: ignore[operator]

    def _triton(self, name: str, source: str, **_: Any) -> Any:
        path = self.folder / f"{name}_{next(_files)}.py"
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[path.stem] = module
        with _pretended_gpu():
            spec.loader.exec_module(module)
        return SimpleNamespace(run=lambda *arguments, stream: self._launch(name, getattr(module, name), arguments))

    def _launch(self, name: str, tuner: Any, arguments: Sequence[Any]) -> None:
        """Run every configuration on copies of the arguments' memory, keep the cheapest; its results are those of the others."""
        best: Needs | None = None
        before = [(a, a.clone()) for a in arguments if isinstance(a, Tensor)]
        for config in tuner.configs:
            for tensor, copy in before:
                tensor.copy_(copy)
            settings = dict(config.kwargs)
            axes = [f"{axis}numel" for axis in "xyz" if f"{axis.upper()}BLOCK" in settings]
            named = dict(zip(tuner.fn.arg_names, arguments, strict=False))
            grid = [-(-named[axis] // settings[f"{axis[0].upper()}BLOCK"]) for axis in axes] or [named["xnumel"]]
            if tuner.inductor_meta["grid_type"] not in ("Grid1D", "Grid2D"):
                raise UserError(f"{name}: grids of type {tuner.inductor_meta['grid_type']} are not known.")
            tuner.fn[tuple(grid)](*arguments, **settings, num_warps=config.num_warps, num_stages=config.num_stages)
            needs = _needs(self.session.launches[-1], self.session.architecture)
            if best is None or predicted(needs, GPUS["H200"]) < predicted(best, GPUS["H200"]):
                best = needs
        assert best is not None
        self.cost.append((name, best))

    def _bmm(self, a: Tensor, b: Tensor, *, out: Tensor) -> None:
        out.copy_(a @ b)
        moved = sum(t.numel() * t.element_size() for t in (a, b, out))
        self.cost.append(("product by cuBLAS", Needs(0.0, 0.0, moved)))


def _needs(ran: Ran, architecture: int) -> Needs:
    sass = sum(executed(machine_code(ran.ptx, ran.cubin, architecture), ran).values())
    return Needs(sass, ran.counts.shared_passes, ran.different_bytes)


def rival(classes: int, features: int, dtype: str, layout: str) -> list[tuple[str, Needs]]:
    """Needs of every launch of the compiled vectorised form, per voxel.

    Raises:
        UserError: its result differs from eager PyTorch.
    """
    shape = Shape("machine", 1, classes, features, SPATIAL)
    z, f = make_inputs(Case(shape, dtype, layout), torch.device("cpu"))
    inputs = [t.detach() for t in (*z, *f)]
    exact = loss_and_gradients(*inputs)
    with compiled(90) as session, tempfile.TemporaryDirectory() as folder:
        runs = _Runs(session, Path(folder))
        ours = runs.call(inductor_code(loss_and_gradients, inputs), inputs)
        for a, b in zip(ours, exact, strict=True):
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not error < 1e-2:
                raise UserError(f"inductor's code differs from eager PyTorch by {error:.1e}; its time has no meaning.")
        for finding in session.findings:  # where a layout holds values twice, one warp may store in place before another has read
            print(f"note: {finding}", file=sys.stderr)
    voxels = prod(SPATIAL)
    return [(name, Needs(*(value / voxels for value in needs))) for name, needs in runs.cost]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated (default %(default)s)")
    parser.add_argument("--layouts", default=LAYOUTS[0], help=f"one or more of {','.join(LAYOUTS)} (default %(default)s)")
    parser.add_argument("--classes", type=int, default=2, metavar="C", help="number of classes (default %(default)s)")
    parser.add_argument("--features", type=int, default=16, metavar="F", help="number of features (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    gpu = GPUS["H200"]
    for dtype in args.dtypes.split(","):
        for layout in args.layouts.split(","):
            theirs = rival(args.classes, args.features, dtype, layout)
            ours = [row.needs for row in measure(args.classes, args.features, dtype, layout)]
            print(f"C = {args.classes}, F = {args.features}, {dtype}, {layout}; per voxel, ps on an {gpu.name}")
            for name, needs in theirs:
                figures = f"SASS {needs.instructions:7.2f}  passes {needs.shared_passes:6.2f}  bytes {needs.bytes:7.2f}"
                print(f"  {name:60} {figures}  {1e12 * predicted(needs, gpu):7.1f} ps")
            total, own = (sum(predicted(needs, gpu) for needs in every) for every in ([n for _, n in theirs], ours))
            print(
                f"  torch.compile {1e12 * total:.1f} ps in {len(theirs)} launches, rplib {1e12 * own:.1f}: {total / own:.2f} x\n",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main("machine.inductor", str(__doc__), add_arguments, run))
