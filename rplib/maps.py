"""What `rplib.reliability` returns: one entry per ordered pair of networks."""

from typing import NamedTuple

from torch import Tensor


class Reliability(NamedTuple):
    """Which voxels one teacher is reliable at for one student, and how reliable (method: mask, weight).

    Attributes:
        student: index i of the network that learns.
        teacher: index j of the network that teaches.
        mask: (B, *spatial) bool, m_ij: the teacher is strictly more confident.
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


def ordered_pairs(networks: int) -> list[tuple[int, int]]:
    """(student, teacher) for every ordered pair: (0, 1), (0, 2) .. (1, 0) ..

    >>> ordered_pairs(2)
    [(0, 1), (1, 0)]
    """
    return [(i, j) for i in range(networks) for j in range(networks) if i != j]
