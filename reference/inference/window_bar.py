"""A progress bar over the windows of one image, for images that take minutes."""

import contextlib
import math
from collections.abc import Iterator, Sequence

from torch import nn

from rplib.reference.network import MutualVNet
from rplib.reference.progress import Progress


@contextlib.contextmanager
def window_bar(
    network: nn.Module, shape: Sequence[int], patch: Sequence[int], stride: Sequence[int], what: str
) -> Iterator[None]:
    """Show a bar while `network` processes the windows of an image of this shape."""
    with Progress(total=count_windows(shape, patch, stride), desc=what, unit="window", leave=False, mininterval=0.5) as bar:
        # The encoder processes every window once, with one decoder or both.
        part = network.encoder if isinstance(network, MutualVNet) else network
        hook = part.register_forward_hook(lambda _, windows, __: bar.update(len(windows[0])))
        try:
            yield
        finally:
            hook.remove()


def count_windows(shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> int:
    """Number of windows that cover an image.

    >>> count_windows((112, 100, 40), (96, 96, 80), (16, 16, 80))
    4
    """
    sizes = zip(shape, patch, stride, strict=True)
    return math.prod(math.ceil(max(size - window, 0) / step) + 1 for size, window, step in sizes)
