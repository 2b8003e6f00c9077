"""Inputs for measurements: shapes of real trainings, memory layouts, and teacher patterns."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

CUBE = 16  # edge of the cubes in which the teacher alternates, in voxels


@dataclass(frozen=True)
class Shape:
    """logits are (batch, classes, *spatial), features (batch, features, *spatial), for each of two networks."""

    name: str
    batch: int
    classes: int
    features: int
    spatial: tuple[int, ...]

    @property
    def voxels(self) -> int:
        """Number of voxels in the batch.

        >>> SHAPES["left-atrium"].voxels
        4014080
        """
        return self.batch * prod(self.spatial)

    def __str__(self) -> str:
        return f"{self.batch}x{self.classes}x{self.features}x{'x'.join(map(str, self.spatial))}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("left-atrium", 4, 2, 16, (112, 112, 80)),  # the paper's patch: two labelled and two unlabelled samples
        Shape("pancreas", 4, 2, 16, (96, 96, 96)),
        Shape("organs-14", 1, 14, 32, (96, 96, 96)),  # 13 organs; one sample: the naive form needs 7 GB beyond its inputs
        Shape("cardiac-2d", 24, 4, 16, (256, 256)),  # short-axis slices, three structures and background
        Shape("small", 2, 2, 16, (32, 32, 32)),
        Shape("odd", 2, 3, 5, (37, 41, 29)),  # no block size divides any axis
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")
TEACHERS = ("cubes", "random")


@dataclass(frozen=True)
class Case:
    """One input of the table.

    ``teachers``: "cubes": the teacher alternates between cubes of 16^3 voxels, similar to regions of real volumes; "random": it
    alternates voxel by voxel, which no implementation can exploit.
    """

    shape: Shape
    dtype: str = "float32"
    layout: str = "contiguous"
    teachers: str = "cubes"

    def __str__(self) -> str:
        return f"{self.shape.name} {self.shape} {self.dtype} {self.layout} {self.teachers}"


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and features of two networks, leaves that require grad, as in a training.

    The teacher's logit of its class is 6 to 7, the student's 1 to 2, so that their order is never a near-tie. Features point
    towards their class.

    >>> logits, features = make_inputs(Case(SHAPES["small"]), torch.device("cpu"))
    >>> logits[0].shape, features[1].shape
    (torch.Size([2, 2, 32, 32, 32]), torch.Size([2, 16, 32, 32, 32]))
    """
    shape, dtype = case.shape, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(seed)
    first_teaches = _first_teaches(case, generator)  # (B or 1, *spatial)
    logits, features = [], []
    for k in range(2):
        label = torch.randint(shape.classes, (shape.batch, 1, *shape.spatial), generator=generator)
        teaches = first_teaches if k == 0 else ~first_teaches
        height = torch.rand(shape.batch, *shape.spatial, generator=generator) + torch.where(teaches, 6.0, 1.0)
        z = torch.rand(shape.batch, shape.classes, *shape.spatial, generator=generator).sub_(0.5)
        z.scatter_add_(1, label, height.unsqueeze(1))
        f = torch.randn(shape.batch, shape.features, *shape.spatial, generator=generator)
        directions = torch.randn(shape.classes, shape.features, generator=generator)
        for c, direction in enumerate(directions):
            f.addcmul_(direction.view(1, -1, *[1] * len(shape.spatial)), (label == c).float())
        logits.append(_placed(z, dtype, case.layout, device))
        features.append(_placed(f, dtype, case.layout, device))
    return logits, features


def clear_gradients(tensors: Sequence[Tensor]) -> None:
    """Like ``optimizer.zero_grad(set_to_none=True)``."""
    for tensor in tensors:
        tensor.grad = None


def _first_teaches(case: Case, generator: torch.Generator) -> Tensor:
    spatial = case.shape.spatial
    if case.teachers == "random":
        return torch.rand(case.shape.batch, *spatial, generator=generator) < 0.5
    cube = sum((torch.arange(size) // CUBE).view(-1, *[1] * (len(spatial) - 1 - axis)) for axis, size in enumerate(spatial))
    assert isinstance(cube, Tensor)
    return (cube % 2 == 0).unsqueeze(0)


def _placed(tensor: Tensor, dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    tensor = tensor.to(device, dtype)
    if layout == "channels_last":  # for any number of spatial axes
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.requires_grad_()
