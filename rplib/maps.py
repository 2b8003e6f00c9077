"""What `rplib.reliability` returns: one entry per ordered pair of networks."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Reliability(NamedTuple):
    """The voxels at which one teacher is reliable for one student (``mask``), and how reliable it is (``weight``).

    Attributes:
        student: index i of the network that learns.
        teacher: index j of the network that teaches.
        mask: (B, *spatial) bool, m_ij: the teacher is strictly more confident, and the voxel counts.
        weight: (B, *spatial) float32 (float64 for float64 input), m_ij * r_j.
        pseudo_label: (B, *spatial) int64, y_j.
        prototypes: (B, C, F) float32, mu_j of unit length or zero; None with ``weighting=None``.
        similarity: (B, C, *spatial) float32, s_j; None with ``weighting=None``.
    """

    student: int
    teacher: int
    mask: Tensor
    weight: Tensor
    pseudo_label: Tensor
    prototypes: Tensor | None
    similarity: Tensor | None


def ordered_pairs(networks: int, students: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """(student, teacher) for every ordered pair: (0, 1), (0, 2) .. (1, 0) ..; with ``students``, only pairs whose student learns.

    >>> ordered_pairs(2)
    [(0, 1), (1, 0)]
    >>> ordered_pairs(3, students=(0,))
    [(0, 1), (0, 2)]
    """
    learning = range(networks) if students is None else sorted(students)
    return [(i, j) for i in learning for j in range(networks) if i != j]
