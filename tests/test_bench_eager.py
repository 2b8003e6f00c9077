"""The traffic meter for eager PyTorch, and inductor's estimate, against cases whose bytes are known by hand."""

import shutil

import pytest
import torch
from loss_cases import DEVICE

from rplib.bench.eager_traffic import Operation, eager_traffic
from rplib.bench.inductor_traffic import inductor_estimate
from rplib.errors import UserError

CPP = shutil.which("g++") or shutil.which("clang++")


def floats(n, dtype=torch.float32):
    return torch.arange(n, device=DEVICE).to(dtype)


class TestEager:
    def test_addition(self):
        a, b = floats(1000), floats(1000)
        with eager_traffic() as traffic:
            a + b
        assert (traffic.operations, traffic.bytes) == (1, 12 * 1000)
        assert traffic.by_operation == {"aten.add.Tensor": Operation(1, 12000)}

    def test_views_are_free(self):
        a = floats(24)
        with eager_traffic() as traffic:
            b = a.view(2, 3, 4).transpose(0, 1)[1:].unsqueeze(0).expand(5, -1, -1, -1).detach()
            b = b[..., 0].select(1, 0).squeeze().narrow(0, 0, 2).unfold(0, 1, 1)
            b.is_contiguous(), b.numel()
            torch.ops.aten._unsafe_view(a, (4, 6))
            torch.ops.aten.alias(a).real.chunk(2)
        assert (traffic.operations, traffic.bytes) == (0, 0)

    def test_a_copy_is_no_view(self):
        a = floats(24).view(4, 6)
        with eager_traffic() as traffic:
            a.t().contiguous()
            a.t().reshape(-1)
        assert traffic.by_operation == {"aten.clone.default": Operation(2, 2 * 192)}

    def test_allocations_are_free_but_filling_is_not(self):
        a = floats(10)
        with eager_traffic() as traffic:
            torch.empty(5), torch.empty_like(a), a.new_empty(3), torch.empty_strided((2, 2), (1, 2))
        assert (traffic.operations, traffic.bytes) == (0, 0)
        with eager_traffic() as traffic:
            torch.zeros(5), torch.ones_like(a)
        assert (traffic.operations, traffic.bytes) == (2, 20 + 40 + 40)

    def test_in_place(self):
        a, b = floats(1000), floats(1000)
        with eager_traffic() as traffic:
            a += b
        assert traffic.by_operation == {"aten.add_.Tensor": Operation(1, 12000)}

    def test_out(self):
        a, out = floats(1000), torch.empty(1000, device=DEVICE)
        with eager_traffic() as traffic:
            torch.neg(a, out=out)
        assert traffic.by_operation == {"aten.neg.out": Operation(1, 12000)}

    def test_two_results(self):
        a = floats(1000).view(10, 100)
        with eager_traffic() as traffic:
            a.max(dim=1)
        assert traffic.by_operation == {"aten.max.dim": Operation(1, 4000 + 10 * 4 + 10 * 8)}

    def test_lists_of_operands(self):
        parts = [floats(10), floats(20)]
        with eager_traffic() as traffic:
            torch.cat(parts)
        assert traffic.by_operation == {"aten.cat.default": Operation(1, 2 * 120)}

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.int8, 1), (torch.bool, 1)])
    def test_dtypes(self, dtype, size):
        a = floats(1000).to(dtype)
        with eager_traffic() as traffic:
            a.eq(a)
        assert traffic.bytes == 2 * 1000 * size + 1000

    def test_expanded_operands_count_in_full(self):
        a = floats(4)
        with eager_traffic() as traffic:
            a[:, None].expand(4, 25) + 1
            a[:, None] + floats(25)  # broadcast by the operation itself: its operands are small
        assert traffic.by_operation["aten.add.Tensor"].bytes == (400 + 400) + (16 + 100 + 400)

    def test_forward_and_backward(self):
        """y = sum(x * x): product 12 n; sum 4 n + 4; then ones 8; two products with the expanded one 24 n; their sum 12 n."""
        x = floats(1000).requires_grad_()
        with eager_traffic() as traffic:
            (x * x).sum().backward()
        assert torch.equal(x.grad, 2 * x.detach())
        assert traffic.bytes == 12000 + 4004 + 8 + 24000 + 12000
        assert traffic.operations == 6

    def test_inference_mode_sees_the_same_operations(self):
        a, w = floats(24).view(4, 6), floats(18).view(3, 6)
        figures = []
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), eager_traffic() as traffic:
                torch.nn.functional.linear(a, w).softmax(1)
            figures.append(traffic.by_operation)
        assert figures[0] == figures[1] and "aten.mm.default" in figures[0]

    def test_a_custom_operator_is_one_call(self):
        library = torch.library.Library("rplib_traffic_test", "FRAGMENT")
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: (x + x).clone(), "CompositeExplicitAutograd")
        try:
            with eager_traffic() as traffic:
                torch.ops.rplib_traffic_test.twice(floats(10))
        finally:
            library._destroy()
        own = "rplib_traffic_test.twice.default"
        assert traffic.custom_operators == [own] and traffic.by_operation[own] == Operation(1, 80)

    def test_nested(self):
        a = floats(10)
        with eager_traffic() as outer:
            a + a
            with eager_traffic() as inner:
                a * a
        assert (inner.operations, outer.operations) == (1, 2)

    def test_compiled_functions_are_refused(self):
        def double(x):
            return (2 * x).sum()

        x = floats(10).requires_grad_()
        compiled = torch.compile(double, backend="aot_eager")
        recorded = compiled(x)
        with pytest.raises(UserError, match=r"torch\.compile"), eager_traffic():
            compiled(x)
        with pytest.raises(UserError, match=r"torch\.compile"), eager_traffic():
            recorded.backward()
        with pytest.raises(UserError, match=r"torch\.compile"), eager_traffic():
            torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
        recorded = compiled(x)  # still compiled, and allowed again
        assert type(recorded.grad_fn).__name__ == "CompiledFunctionBackward"
        recorded.backward()
        assert torch.equal(x.grad, torch.full((10,), 2.0))

    def test_functions_with_their_own_backward(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, upstream):
                return 2 * upstream * ctx.saved_tensors[0]

        x = floats(10).requires_grad_()
        with eager_traffic() as traffic:
            Square.apply(x).backward(torch.ones(10))
        assert traffic.by_operation["aten.mul.Tensor"] == Operation(3, 120 + 80 + 120)


# -------------------------------------------------------------------------------------------------------------- inductor


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cpu" and CPP is None, reason="inductor on a CPU needs a C++ compiler")
class TestInductor:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_fused_kernels(self):
        """x - mean(x): x and a scalar, then x and the scalar again and the result."""
        x = floats(1000)
        with inductor_estimate() as estimate:
            torch.compile(lambda x: x - x.mean())(x)
        assert (estimate.bytes, estimate.kernels, estimate.graphs) == (4004 + 8004, 2, 1)

    def test_forward_and_backward(self):
        x = floats(1000).requires_grad_()
        with inductor_estimate() as estimate:
            torch.compile(lambda x: (2 * x).sin().sum())(x).backward()
        assert (estimate.bytes, estimate.graphs) == (4004 + 8004, 2)

    def test_what_was_compiled_before_is_not_estimated(self):
        def triple(x):
            return 3 * x

        compiled = torch.compile(triple, backend="inductor")
        compiled(floats(10))
        with inductor_estimate() as estimate:
            compiled(floats(10))
        with pytest.raises(UserError, match="compiled nothing"):
            _ = estimate.bytes
