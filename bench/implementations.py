"""The implementations to compare: name -> loss of two networks, and where it can run.

naive            the authors' formulation, line by line (`rplib.naive`); the baseline
vectorised       the same formulas in idiomatic PyTorch: one-hot products instead of loops over
                 samples and classes, weights without a graph
vectorised-c     the same under torch.compile
torch            rplib's lean PyTorch form
torch-c          the same under torch.compile
triton           rplib's kernels
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rplib
from rplib import dispatch

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Implementation:
    """One row of the table.

    Attributes:
        name: as on the command line.
        make: builds the loss; a compiled one compiles at its first call on each kind of input.
        form: "eager", "compiled" or "triton"; decides how its bytes are counted.
        exact_order: its masks are exact outside near-ties even where both networks are almost certain; plain float32
            formulas lose the order there, by 2e-6 in entropy.
    """

    name: str
    make: Callable[[], Loss]
    form: str
    exact_order: bool

    def obstacle(self, device: torch.device) -> str | None:
        """The reason why it cannot be timed on this device, or None."""
        if self.form == "triton":
            return dispatch.device_obstacle(device)
        if self.form == "compiled" and device.type == "cpu" and not _has_compiler():
            return "torch.compile needs a C++ compiler on a CPU"
        if self.form == "compiled" and device.type == "cuda" and not dispatch.triton_installed():
            return "torch.compile needs Triton on a GPU"
        return None


def vectorised(logits: Sequence[Tensor], features: Sequence[Tensor], eps: float = 1e-6) -> Tensor:
    """The mutual loss in plain PyTorch. logits K x (B, C, *spatial), features K x (B, F, *spatial); 0-dim float32 or better.

    >>> import torch
    >>> z = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)]
    >>> vectorised(z, [torch.ones(1, 3, 4)] * 2).item()  # identical networks teach each other nothing
    0.0
    """
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    z = [t.flatten(2).to(dtype) for t in logits]  # (B, C, V)
    with torch.no_grad():
        p = [t.softmax(1) for t in z]
        entropy = [-(q * (q + eps).log()).sum(1) for q in p]  # (B, V)
        label = [q.argmax(1) for q in p]
        reliable = [_reliability(q, y, f.flatten(2).to(dtype), eps) for q, y, f in zip(p, label, features, strict=True)]
    total = z[0].new_zeros(())
    for i in range(len(z)):
        for j in range(len(z)):
            if i == j:
                continue
            mask = entropy[i] > entropy[j]
            cross_entropy = F.cross_entropy(z[i], label[j], reduction="none")  # (B, V)
            total = total + (mask * reliable[j] * cross_entropy).sum() / (mask.sum().to(dtype) + eps)
    return total


def _reliability(p: Tensor, label: Tensor, f: Tensor, eps: float) -> Tensor:
    """r_j: (B, V)."""
    one_hot = F.one_hot(label, p.shape[1]).to(f.dtype)  # (B, V, C)
    sums = torch.bmm(f, one_hot).transpose(1, 2)  # (B, C, F)
    prototypes = F.normalize(sums / (one_hot.sum(1).unsqueeze(2) + eps), dim=2, eps=1e-12)
    similarity = torch.bmm(prototypes, f) / f.norm(dim=1, keepdim=True).clamp_min(1e-8)  # (B, C, V)
    return 1 - (similarity - p).square().mean(1)


def compiled(loss: Loss) -> Loss:
    """``loss`` under torch.compile, whole, for fixed shapes."""
    return torch.compile(loss, fullgraph=True, dynamic=False)


def _ours(impl: str) -> Callable[[], Loss]:
    return lambda: rplib.ReliableMutualLoss(impl=impl)  # type: ignore[arg-type]


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("naive", _ours("naive"), "eager", exact_order=False),
        Implementation("vectorised", lambda: vectorised, "eager", exact_order=False),
        Implementation("vectorised-c", lambda: compiled(vectorised), "compiled", exact_order=False),
        Implementation("torch", _ours("torch"), "eager", exact_order=True),
        Implementation("torch-c", lambda: compiled(rplib.ReliableMutualLoss(impl="torch")), "compiled", exact_order=True),
        Implementation("triton", _ours("triton"), "triton", exact_order=True),
    )
}
BASELINE = "naive"


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl"))
