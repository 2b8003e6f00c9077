"""Cosine similarity of features and prototypes, for the lean form and for the maps of the Triton form."""

import torch
from torch import Tensor


def similarity(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """s_j: cosine of every voxel's feature (B, F, V) with every prototype (B, C, F) -> (B, C, V); and ||f||: (B, 1, V)."""
    unit = prototypes / prototypes.square().sum(dim=2, keepdim=True).sqrt().clamp_min(1e-8)
    length = features.square().sum(dim=1, keepdim=True).sqrt()  # (B, 1, V)
    if by_matrix_product(unit.shape[1], features.device):
        dots = torch.bmm(unit, features)
    else:
        dots = torch.cat([(features * mu[:, 0, :, None]).sum(dim=1, keepdim=True) for mu in unit.split(1, dim=1)], dim=1)
    return dots / length.clamp_min(1e-8), length


def by_matrix_product(classes: int, device: torch.device) -> bool:
    """Whether to sum over features or voxels with a matrix product, which is faster in eager PyTorch on a CPU for many classes.

    It is not used where the user's settings allow TF32 or bfloat16 products, nor under torch.compile, which reads the features
    once for all classes.
    """
    if torch.compiler.is_compiling() or device.type != "cpu" or classes <= 4:
        return False
    return torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(device.type)
