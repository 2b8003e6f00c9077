"""Tensors as the memory of a launch: which bytes belong to their elements, and which of those hold a value."""

import numpy as np
import torch

from rplib.bench.machine.memory import Allocation

_UNWRITTEN = 0xD7  # fills memory that has not been written


class Tensors:
    """Remembers which tensors began without values."""

    def __init__(self) -> None:
        self._empty: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def made_empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill new memory with a pattern and remember that it has no values."""
        plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided
        if plain and tensor.untyped_storage().nbytes():
            memory = _bytes(tensor)
            memory[:] = _UNWRITTEN
            # Keep the tensor: memory that is freed and reused would be treated as undefined.
            self._empty[tensor.untyped_storage().data_ptr()] = tensor, np.zeros(len(memory), bool)
        return tensor

    def allocations(self, tensors: list[tuple[str, torch.Tensor]]) -> list[Allocation]:
        """Named arguments -> one piece of memory per storage."""
        groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            if tensor.numel():
                groups.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        made = []
        for start, members in groups.items():
            place = min(t.element_size() for _, t in members)
            memory = _bytes(members[0][1])
            allowed = np.zeros(len(memory) // place, bool)
            for _, t in members:
                _elements(allowed, t, place)
            a = Allocation(tuple(n for n, _ in members), start, memory, place, None if allowed.all() else allowed)
            if start in self._empty:
                mask = self._empty[start][1]
                mask |= memory != _UNWRITTEN  # written by the host in the meantime
                a.defined = np.asarray(mask[: len(mask) // place * place].reshape(-1, place).any(1))
            made.append(a)
        return made

    def written(self, allocations: list[Allocation]) -> None:
        """After a launch, record the memory that its stores have defined."""
        for a in allocations:
            if a.defined is not None:
                self._empty[a.base][1][: len(a.defined) * a.place] |= np.repeat(a.defined, a.place)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage of a tensor, as it is."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _elements(mask: np.ndarray, tensor: torch.Tensor, place: int) -> None:
    """Set the places of a storage that belong to elements of the tensor."""
    flags = torch.from_numpy(mask)
    wide = tensor.element_size() // place
    start = tensor.storage_offset() * wide
    if tensor.is_contiguous():
        flags[start : start + tensor.numel() * wide] = True
        return
    sizes, strides = [*tensor.shape, wide], [*(s * wide for s in tensor.stride()), 1]
    torch.as_strided(flags, sizes, strides, start).fill_(True)
