"""The loss inside PyTorch's machinery: compile, opcheck, autocast, checkpointing, fake tensors, double backward, determinism."""

import copy
import re
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from loss_cases import ANY_K_IMPLS, DEVICE, FAST_IMPLS, HAS_TRITON, IMPLS, LAYOUTS, TRITON, channels_last, networks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from truth import autograd_gradients, evaluate, frozen_loss, leaves, truth

import rplib

CPP = shutil.which("g++") or shutil.which("clang++")
NEEDS_CPP = pytest.mark.skipif(DEVICE.type == "cpu" and CPP is None, reason="inductor on a CPU needs a C++ compiler")
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
NEEDS_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)
OPTIONS = [
    {},
    {"confidence": "max_probability", "cross_entropy_on": "probabilities"},
    {"confidence": None, "weighting": None},
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_right(loss, gradients, logits, features, tolerance=2e-6, **keywords):
    exact = truth(logits, features, **keywords)
    assert abs(loss.item() - exact.loss.item()) <= tolerance * exact.magnitude.item()
    for ours, expected in zip(gradients, exact.gradients, strict=True):
        assert (ours.double() - expected).norm() <= tolerance * expected.norm()


def compiled_step(loss_fn, logits, features, upstream=1.0, **compile_keywords):
    z = leaves(logits)
    loss = torch.compile(loss_fn, fullgraph=True, **compile_keywords)(z, features)
    (loss * upstream).backward()
    return loss.detach(), [t.grad for t in z]


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.slow_cases("naive-max_probability-probabilities", "torch-max_probability-probabilities")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@EVERY_IMPL
def test_fullgraph(impl, options):
    logits, features = networks((6, 5, 4), 3, [8, 5])
    loss_fn = rplib.ReliableMutualLoss(impl=impl, **options)
    loss, gradients = compiled_step(loss_fn, logits, features, backend="aot_eager")
    assert_right(loss, gradients, logits, features, **options)


@pytest.mark.slow_cases("naive")
@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_fullgraph_with_three_networks(impl):
    logits, features = networks((6, 5, 4), 3, 8, count=3)
    loss, gradients = compiled_step(rplib.ReliableMutualLoss(impl=impl), logits, features, backend="aot_eager")
    assert_right(loss, gradients, logits, features)


@EVERY_IMPL
def test_fullgraph_with_a_non_contiguous_input_and_an_upstream_factor(impl):
    logits, features = networks((6, 5, 4), 3, 8)
    laid = [channels_last(z) for z in logits], [channels_last(f) for f in features]
    loss, gradients = compiled_step(rplib.ReliableMutualLoss(impl=impl), *laid, upstream=-7.5, backend="aot_eager")
    assert_right(loss, [g / -7.5 for g in gradients], logits, features)


@pytest.mark.slow_cases("naive", "torch")
@EVERY_IMPL
def test_fullgraph_for_changing_shapes(impl):
    step = torch.compile(rplib.ReliableMutualLoss(impl=impl), fullgraph=True, dynamic=True, backend="aot_eager")
    for spatial in ((6, 5, 4), (7, 3, 5)):
        logits, features = networks(spatial, 3, 8)
        z = leaves(logits)
        loss = step(z, features)
        loss.backward()
        assert_right(loss.detach(), [t.grad for t in z], logits, features)


@NEEDS_CPP
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_fullgraph_under_inductor(impl):
    logits, features = networks((6, 5, 4), 3, 8)
    loss, gradients = compiled_step(rplib.ReliableMutualLoss(impl=impl), logits, features, upstream=3.0)
    assert loss.dtype == torch.float32
    assert_right(loss, [g / 3.0 for g in gradients], logits, features)


@pytest.mark.slow_cases("torch")
@NEEDS_CPP
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_fullgraph_under_inductor_in_bfloat16(impl):
    logits, features = networks((6, 5, 4), 2, 16, dtype=torch.bfloat16)
    loss, gradients = compiled_step(rplib.ReliableMutualLoss(impl=impl), logits, features)
    exact = truth(logits, features)
    assert abs(loss.item() - exact.loss.item()) <= 2e-6 * exact.magnitude.item()
    for ours, expected in zip(gradients, exact.gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - expected).norm() <= 2.0**-8 * expected.norm()


@EVERY_IMPL
def test_the_loss_of_a_network_compiled_together(impl):
    """Convolutions, the loss and their backward in one graph, as a training step has them."""
    body = torch.nn.Conv2d(1, 6, 3, padding=1)
    heads = torch.nn.ModuleList(torch.nn.Conv2d(6, 2, 1) for _ in range(2))
    model = torch.nn.ModuleDict({"body": body, "heads": heads}).to(DEVICE)
    image = torch.randn(2, 1, 9, 11, device=DEVICE)
    loss_fn = rplib.ReliableMutualLoss(impl=impl)

    def step(model, image):
        x = model["body"](image)
        f = [x, x.square()]
        return loss_fn([head(t) for head, t in zip(model["heads"], f, strict=True)], f)

    eager, compiled = model, copy.deepcopy(model)
    step(eager, image).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, image).backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow_cases("naive")
@EVERY_IMPL
def test_mutual_objective_fullgraph(impl):
    logits, features = networks((6, 5, 4), 3, 8)
    target = torch.randint(0, 3, (1, 6, 5, 4), device=DEVICE)
    objective = rplib.MutualObjective(impl=impl)
    weight = torch.tensor(0.25, device=DEVICE)

    def run(call):
        z = leaves(logits)
        result = call(z, features, target, weight)
        result.total.backward()
        return [*(t.detach() for t in result), *(t.grad for t in z)]

    for a, b in zip(run(objective), run(torch.compile(objective, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.slow_cases("triton")
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_weight_that_changes_is_not_recompiled(impl):
    """The ramp gives a new number every 150 iterations."""
    from torch._dynamo.testing import CompileCounter

    logits, features = networks((3, 4), 3, 4)
    target = torch.randint(0, 3, (1, 3, 4), device=DEVICE)
    counter = CompileCounter()
    torch._dynamo.reset()
    objective = rplib.MutualObjective(impl=impl)
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for step in range(12):
        weight = 0.01 + 0.03 * step
        ours = compiled(logits, features, target, weight).total
        torch.testing.assert_close(ours, objective(logits, features, target, weight).total, rtol=1e-6, atol=0)
    assert counter.frame_count <= 2


@EVERY_IMPL
def test_check_finite_is_refused_under_compile(impl):
    logits, features = networks((6, 5), 3, 8)
    loss_fn = torch.compile(rplib.ReliableMutualLoss(impl=impl, check_finite=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="check_finite"):
        loss_fn(logits, features)


# -------------------------------------------------------------------------------------------------- Triton operators


class Recorder(TorchDispatchMode):
    """Every operator that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [str(func) for func, _, _ in self.calls]


def recorded(impl, logits, features, **keywords):
    with Recorder() as recorder:
        evaluate(impl, logits, features, **keywords)
    return recorder


def fresh(value):
    """The same arguments again, detached, with the same need of a gradient."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(v) for v in value)
    return value


def triton_calls(**keywords):
    """The project's operators as one forward and backward calls them, both cross-entropies, with and without weights."""
    logits, features = networks((7, 5), 3, [8, 5])
    recorder = recorded("triton", logits, None if keywords.get("weighting", "") is None else features, **keywords)
    return [(f, a, k) for f, a, k in recorder.calls if f.namespace == "rplib"]


def operator_names():
    import rplib.kernels.operators  # noqa: F401

    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rplib::"))


@pytest.mark.slow_cases("max_probability-probabilities", "None-None")
@NEEDS_TRITON
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_opcheck(options):
    calls = triton_calls(**options)
    assert len({f.name() for f, _, _ in calls}) >= 2, "statistics, weighting and gradient are separate operators"
    for func, args, kwargs in calls:
        torch.library.opcheck(func, fresh(args), {k: fresh(v) for k, v in kwargs.items()})
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in fresh(args)]
        torch.library.opcheck(func, tuple(plain), {k: fresh(v) for k, v in kwargs.items()})


@NEEDS_TRITON
def test_opcheck_reaches_every_operator():
    """No operator is registered that these tests never call; the objective and the maps count as callers."""
    called = {f.name() for options in OPTIONS for f, _, _ in triton_calls(**options)}
    logits, features = networks((7, 5), 3, 8)
    with Recorder() as recorder:
        z = leaves(logits)
        target = torch.zeros(1, 7, 5, dtype=torch.int64, device=DEVICE)
        rplib.MutualObjective(impl="triton")(z, features, target, 0.1).total.backward()
        rplib.reliability(logits, features, impl="triton")
    for func, args, kwargs in recorder.calls:
        if func.namespace == "rplib":
            called.add(func.name())
            torch.library.opcheck(func, fresh(args), {k: fresh(v) for k, v in kwargs.items()})
    assert set(operator_names()) == called


@NEEDS_TRITON
@pytest.mark.parametrize(("classes", "keywords"), [(2, {}), (4, {}), (2, {"confidence": None, "students": (1,)})])
def test_opcheck_of_the_objective_in_half_precision(classes, keywords):
    """Shapes and types of every output on fake tensors, where no two sizes are the same and no output has the logits' type."""
    logits, features = networks((7, 5), classes, [8, 6], batch=3, dtype=torch.bfloat16)
    target = torch.zeros(2, 7, 5, dtype=torch.uint8, device=DEVICE)
    weights = torch.ones(3, device=DEVICE)
    with Recorder() as recorder:
        objective = rplib.MutualObjective(impl="triton", statistics=True, **keywords)
        objective(leaves(logits), features, target, 0.1, sample_weights=weights).total.backward()
        rplib.reliability([z[:1] for z in logits], [f[:1] for f in features], impl="triton", **keywords)
    calls = [(f, a, k) for f, a, k in recorder.calls if f.namespace == "rplib"]
    assert {f.name() for f, _, _ in calls} == set(operator_names())
    for func, args, kwargs in calls:
        torch.library.opcheck(func, fresh(args), {k: fresh(v) for k, v in kwargs.items()}, test_utils="test_faketensor")


@NEEDS_TRITON
def test_operator_bodies_never_look_at_values(monkeypatch):
    """Bodies traced on fake tensors, kernels left out: .item(), a Python branch on a value or a copy to the host would raise."""
    import triton.runtime.interpreter as interpreter
    from torch._library.custom_ops import OPDEFS
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    calls = [call for options in OPTIONS for call in triton_calls(**options)]
    launches = []
    # A real tensor's address costs nothing; a fake one has none.
    monkeypatch.setattr("rplib.kernels.launch._trait", lambda argument: None)
    for kernel_type in (interpreter.InterpretedFunction, __import__("triton").runtime.jit.JITFunction):
        monkeypatch.setattr(
            kernel_type, "__getitem__", lambda self, grid: lambda *args, **kwargs: launches.append(self), raising=False
        )
        monkeypatch.setattr(kernel_type, "run", lambda self, *args, **kwargs: launches.append(self))
    for func, args, kwargs in calls:
        definition = OPDEFS[func.name().split(".")[0]]
        bodies = {definition._init_fn, *definition._backend_fns.values()}
        real = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        with FakeTensorMode() as mode:
            fake = tree_map_only(torch.Tensor, mode.from_tensor, real)
            for body in bodies:
                getattr(body, "__wrapped__", body)(*fake[0], **fake[1])
    assert launches, "no kernel was launched: the bodies were not traced"

    def looks(x):
        return x.new_zeros(()) if x.sum().item() > 0 else x

    with (
        pytest.raises(Exception, match=r"item|data.dependent|_local_scalar_dense"),
        FakeTensorMode() as mode,
    ):  # what the check would catch
        looks(mode.from_tensor(torch.ones(3)))


@NEEDS_TRITON
def test_no_float_atomics_in_the_kernels():
    root = Path(rplib.__file__).resolve().parent / "kernels"
    sources = sorted(root.glob("**/*.py"))
    assert any("triton.jit" in source.read_text() for source in sources)
    for source in sources:
        assert not re.search(r"\batomic_\w+\s*\(", source.read_text()), source.name


@NEEDS_TRITON
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_kernels_read_the_inputs_themselves(layout):
    """No copy whatever the strides: the launches get the caller's memory."""
    from rplib.kernels import launch

    logits, features = networks((5, 6, 7), 3, 6)
    logits, features = [layout(z) for z in logits], [layout(f) for f in features]
    launches = []
    with launch.observed(lambda launched: launches.append(launched) or True):
        evaluate("triton", logits, features)
    inputs = {t.data_ptr(): t.stride() for t in (*logits, *features)}
    for kernel in ("statistics_kernel", "weighting_kernel"):
        (launched,) = [one for one in launches if one.kernel.fn.__name__ == kernel]
        read = {a.data_ptr(): a.stride() for a in launched.arguments if isinstance(a, torch.Tensor)}
        assert inputs.items() <= read.items()


# ------------------------------------------------------------------------------------------------ plain PyTorch forms

FORBIDDEN = (
    "index_add",
    "scatter_add",
    "scatter_reduce",
    "index_put",
    "index_reduce",
    "bincount",
    "histc",
    "put_",
    "embedding_dense_backward",
)
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_assert_async")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("count", [2, 3])
def test_lean_form_uses_no_unordered_sums_and_no_synchronisation(count, options):
    logits, features = networks((6, 5), 3, 8, count=count)
    names = recorded("torch", logits, features, **options).names
    assert any("backward" in n or "mul" in n for n in names)
    bad = [n for n in names if any(word in n for word in (*FORBIDDEN, *SYNCHRONISING))]
    assert not bad, sorted(set(bad))


@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_plain_forms_run_on_fake_tensors(impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    logits, features = networks((6, 5), 3, 8)
    with FakeTensorMode() as mode:
        z = [mode.from_tensor(t).requires_grad_() for t in logits]
        loss = rplib.functional.reliable_mutual_loss(z, [mode.from_tensor(f) for f in features], impl=impl)
        loss.backward()
        assert loss.shape == () and all(t.grad.shape == t.shape for t in z)


# --------------------------------------------------------------------------------------------------- training's tools


@EVERY_IMPL
def test_inside_autocast_the_loss_is_computed_in_float32(impl):
    logits, features = networks((6, 5, 4), 3, 8)
    outside = evaluate(impl, logits, features)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss, gradients = evaluate(impl, logits, features)
    assert loss.dtype == torch.float32
    assert_right(loss, gradients, logits, features, tolerance=5e-6)
    assert torch.equal(loss, outside[0])


@EVERY_IMPL
def test_autocast_of_a_training_step(impl):
    """Half-precision logits and features from the layers, float32 parameters, a loss scaler's factor."""
    torch.manual_seed(0)
    body, heads = torch.nn.Conv2d(1, 6, 3).to(DEVICE), [torch.nn.Conv2d(6, 2, 1).to(DEVICE) for _ in range(2)]
    image = torch.randn(2, 1, 9, 11, device=DEVICE)
    seen = {}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        x = body(image)
        features = [x, x.abs()]
        logits = [head(f) for head, f in zip(heads, features, strict=True)]
        for z in logits:
            z.retain_grad()
        loss = rplib.functional.reliable_mutual_loss(logits, features, impl=impl)
        seen["dtype"] = logits[0].dtype
    (loss * 1024.0).backward()
    assert seen["dtype"] == torch.bfloat16 and loss.dtype == torch.float32
    exact = truth([z.detach() for z in logits], [f.detach() for f in features])
    for z, expected in zip(logits, exact.gradients, strict=True):
        assert z.grad.dtype == torch.bfloat16
        assert (z.grad.double() / 1024 - expected).norm() <= 2.0**-8 * expected.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@EVERY_IMPL
def test_activation_checkpointing(impl, reentrant):
    logits, features = networks((6, 5, 4), 3, 8)
    plain, gradients = evaluate(impl, logits, features)
    z = leaves(logits)

    def segment(a, b):
        return rplib.functional.reliable_mutual_loss([a * 1.0, b * 1.0], features, impl=impl)

    loss = checkpoint(segment, *z, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(loss.detach(), plain)
    assert all(torch.equal(t.grad, g) for t, g in zip(z, gradients, strict=True))


@EVERY_IMPL
def test_gradient_accumulation(impl):
    """Two micro-batches before a step, and a second backward through a kept graph."""
    first, second = networks((6, 5), 3, 8, seed=1), networks((6, 5), 3, 8, seed=2)
    scale = [torch.ones((), device=DEVICE, requires_grad=True) for _ in range(2)]
    for logits, features in (first, second):
        rplib.functional.reliable_mutual_loss([s * z for s, z in zip(scale, logits, strict=True)], features, impl=impl).backward()
    for k in range(2):
        expected = sum((truth(*problem).gradients[k] * problem[0][k].double()).sum() for problem in (first, second))
        assert abs(scale[k].grad.item() - expected.item()) <= 1e-5 * max(abs(expected.item()), 0.1)

    z = leaves(first[0])
    loss = rplib.functional.reliable_mutual_loss(z, first[1], impl=impl)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in z]
    loss.backward()
    for t, g in zip(z, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * g, rtol=0, atol=0)


@EVERY_IMPL
def test_logits_changed_in_place_before_backward_are_noticed_or_harmless(impl):
    logits, features = networks((6, 5), 3, 8)
    exact = truth(logits, features)
    z = leaves(logits)
    inner = [t * 1.0 for t in z]
    loss = rplib.functional.reliable_mutual_loss(inner, features, impl=impl)
    with torch.no_grad():
        for t in inner:
            t.zero_()
    noticed = None
    try:
        loss.backward()
    except RuntimeError as error:
        noticed = str(error)
    if noticed is not None:
        assert "modified by an inplace operation" in noticed
        return
    for t, expected in zip(z, exact.gradients, strict=True):
        assert (t.grad.double() - expected).norm() <= 5e-6 * expected.norm()


@EVERY_IMPL
def test_double_backward_is_right_or_refused(impl):
    """Gradient of (gradient of loss squared) . v: a saved gradient would give a wrong number silently."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    logits, features = networks((5, 4), 3, 8, dtype=dtype)
    directions = [torch.randn_like(t) for t in logits]
    z = leaves(logits)

    def second_derivative():
        loss = rplib.functional.reliable_mutual_loss(z, features, impl=impl)
        first = torch.autograd.grad(loss**2, z, create_graph=True)
        return torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, directions, strict=True)), z)

    if impl != "naive":
        with pytest.raises(RuntimeError, match=rf"(?is)({impl}|lean).*(once|twice|second).*naive"):
            second_derivative()
        z = leaves(logits)
        loss = rplib.functional.reliable_mutual_loss(z, features, impl=impl)
        first = torch.autograd.grad(loss**2, z, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"(?is)({impl}|lean).*(once|twice|second).*naive"):
            sum((g * v).sum() for g, v in zip(first, directions, strict=True)).backward()
        return
    ours = second_derivative()
    exact = [t.double().requires_grad_() for t in logits]
    first = torch.autograd.grad(frozen_loss(exact, truth(logits, features).pairs) ** 2, exact, create_graph=True)
    expected = torch.autograd.grad(sum((g * v.double()).sum() for g, v in zip(first, directions, strict=True)), exact)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


@EVERY_IMPL
def test_same_inputs_same_bits(impl):
    logits, features = networks((9, 8, 7), 4, 8, batch=2)
    loss, gradients = evaluate(impl, logits, features)
    maps = rplib.reliability(logits, features, impl=impl)
    for _ in range(2):
        torch.full((100_000,), float("nan"))  # other garbage in freed memory
        again, same = evaluate(impl, logits, features)
        assert torch.equal(loss, again) and all(torch.equal(g, h) for g, h in zip(gradients, same, strict=True))
        for m, n in zip(maps, rplib.reliability(logits, features, impl=impl), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(m[2:], n[2:], strict=True))


@EVERY_IMPL
def test_the_module_holds_nothing_and_survives_copy_and_save(impl, tmp_path):
    loss_fn = rplib.ReliableMutualLoss(impl=impl, confidence="max_probability")
    assert not list(loss_fn.parameters()) and not list(loss_fn.buffers()) and not loss_fn.state_dict()
    logits, features = networks((6, 5), 3, 8)
    torch.save(loss_fn, tmp_path / "loss.pt")
    loaded = torch.load(tmp_path / "loss.pt", weights_only=False)
    value = loss_fn(logits, features)
    assert torch.equal(value, copy.deepcopy(loss_fn)(logits, features)) and torch.equal(value, loaded(logits, features))
    assert "max_probability" in repr(loss_fn)


def test_pairs_of_the_truth_are_ordered_as_the_maps():
    logits, features = networks((4,), 2, 3, count=3)
    assert [(p.student, p.teacher) for p in truth(logits, features).pairs] == list(permutations(range(3), 2))
    assert len(autograd_gradients(logits, truth(logits, features).pairs)) == 3


# --------------------------------------------------------------------------------------------------------------- CUDA


@NEEDS_CUDA
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_no_synchronisation_and_graph_capture_on_cuda(impl):
    logits, features = networks((16, 16, 16), 2, 16)
    z = leaves(logits)

    def step():
        loss = rplib.functional.reliable_mutual_loss(z, features, impl=impl)
        return loss, torch.autograd.grad(loss, z)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager_loss, eager_gradients = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, gradients = step()
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, eager_loss) and all(torch.equal(a, b) for a, b in zip(gradients, eager_gradients, strict=True))
