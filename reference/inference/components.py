"""The largest connected component of each class, for organs in one piece."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_component(mask: NDArray) -> NDArray[np.bool_]:
    """The largest connected component (26-connectivity in 3-D; the first of equals); an empty mask stays empty.

    >>> largest_component(np.array([1, 0, 1, 1, 0])).astype(int)
    array([0, 0, 1, 1, 0])
    """
    mask = np.asarray(mask) != 0
    parts, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def largest_components(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep only the largest connected component of each class.

    >>> largest_components(np.array([2, 0, 1, 1, 0, 1, 2, 2], np.uint8)).tolist()
    [0, 0, 1, 1, 0, 0, 2, 2]
    """
    kept = np.zeros_like(label)
    for klass in range(1, int(label.max(initial=0)) + 1):
        kept[largest_component(label == klass)] = klass
    return kept
