"""The ramp-up of the consistency weight."""

import math


def ramp(iteration: int, length: float = 40, every: int = 150) -> float:
    """Weight of the mutual loss at an iteration: exp(-5 (1 - min(t // every, T) / T)^2).

    Args:
        iteration: t, counted from 1.
        length: T, in steps of ``every`` iterations; 0 gives 1 from the start.
        every: iterations per step.

    Returns:
        A number from exp(-5) to 1.

    Raises:
        ValueError: negative iteration or length, or ``every`` below 1.

    Source: Su et al., Medical Image Analysis 94 (2024) 103111; the Gaussian ramp-up of Laine and Aila (2017).

    Example:
        >>> from rplib import ramp
        >>> round(ramp(1), 6), round(ramp(3000), 6), ramp(6000)
        (0.006738, 0.286505, 1.0)
    """
    if iteration < 0:
        raise ValueError(f"iteration is {iteration}; expected a count from 1.")
    if length < 0:
        raise ValueError(f"length is {length}; expected 0 or more steps.")
    if every < 1:
        raise ValueError(f"every is {every}; expected at least 1 iteration per step.")
    if length == 0:
        return 1.0
    progress = min(iteration // every, length) / length
    return math.exp(-5.0 * (1.0 - progress) ** 2)
