"""IEEE arithmetic in numpy that numpy lacks: fused multiply-add, bfloat16, flushing of subnormals, C's integer division."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray
_SMALLEST_NORMAL = np.float32(2.0**-126)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once.

    >>> one, tiny = np.float32([1]), np.float32([2**-13])
    >>> fused_multiply_add(one + tiny, one - tiny, -one) == -np.float32(2**-26)
    array([ True])
    """
    product = np.multiply(a, b, dtype=np.float64)  # exact
    return to_odd_float32(*two_sum(product, np.asarray(c, np.float64)))


def fused_multiply_add_down(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded towards minus infinity.

    >>> fused_multiply_add_down(np.float32([1, 1]), np.float32([2**-30, -(2**-30)]), np.float32([1, 1])).tolist()
    [1.0, 0.9999999403953552]
    """
    high, low = two_sum(np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64))
    nearest = to_odd_float32(high, low)
    return np.where(nearest.astype(np.float64) - high > low, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """x + y of float64 and the rounding error of that sum, exactly."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


def to_odd_float32(high: Array, low: Array) -> Array:
    """high + low, |low| at most half a unit of high, rounded to float32 once.

    The sum is first rounded to odd in float64: its last bit records that bits were cut off, so the second rounding is correct.
    """
    bits = np.ascontiguousarray(high).view(np.int64)
    inexact = (low != 0) & np.isfinite(high) & (bits & 1 == 0)
    if inexact.any():
        towards_zero = (low < 0) != (high < 0)
        bits = np.where(inexact, np.where(towards_zero, bits - 1, bits + 1), bits)
    return np.ascontiguousarray(bits).view(np.float64).astype(np.float32)


def flush(x: Array) -> Array:
    """Subnormal float32 become zeros of the same sign."""
    small = np.abs(x) < _SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """``function`` with subnormal arguments and results flushed to zero."""
    return lambda *arguments: flush(function(*map(flush, arguments)))


def bfloat16_bits(x: Array) -> Array:
    """float32 -> bits of the nearest bfloat16, ties to even.

    >>> [hex(b) for b in bfloat16_bits(np.float32([1.0, 1.00390625, 1.01171875, np.nan]))]
    ['0x3f80', '0x3f80', '0x3f82', '0x7fff']
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def float16_bits(x: Array) -> Array:
    """float32 or float64 -> bits of the nearest float16; NaN as the hardware writes it."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tensor_float32(x: Array) -> Array:
    """float32 rounded to 10 bits of mantissa, ties away from zero; bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def divide(x: Array, y: Array) -> Array:
    """Integer quotient, rounded towards zero; all ones for a divisor of 0.

    >>> divide(np.int32([7, -7, 7]), np.int32([2, 2, 0]))
    array([ 3, -3, -1], dtype=int32)
    """
    safe = np.where(y == 0, y.dtype.type(1), y)
    quotient = x // safe
    if x.dtype.kind == "i":
        quotient = quotient + ((x % safe != 0) & ((x < 0) != (safe < 0))).astype(x.dtype)
    return np.where(y == 0, np.array(-1).astype(x.dtype), quotient).astype(x.dtype)


def remainder(x: Array, y: Array) -> Array:
    """With the sign of x; x for a divisor of 0."""
    return np.where(y == 0, x, x - divide(x, y) * y).astype(x.dtype)


def high_half(x: Array, y: Array) -> Array:
    """The upper 32 bits of a product of 32-bit integers."""
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    return (x.astype(wide) * y.astype(wide) >> wide(32)).astype(x.dtype)


def shift_left(x: Array, n: Array) -> Array:
    bits = x.dtype.itemsize * 8
    return np.where(n >= bits, x.dtype.type(0), x << np.minimum(n, bits - 1).astype(x.dtype))


def shift_right(x: Array, n: Array) -> Array:
    """Signed types keep their sign."""
    bits = x.dtype.itemsize * 8
    shifted = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n >= bits, x.dtype.type(0), shifted)


def to_integer(x: Array, rounding: Callable[[Array], Array], dtype: type) -> Array:
    """Float -> integer, clipped to its range; NaN becomes 0."""
    info = np.iinfo(dtype)
    whole = rounding(x.astype(np.float64))
    inside = np.where(np.isnan(whole), 0.0, np.clip(whole, float(info.min), float(info.max)))
    top = inside >= float(info.max)  # float64 cannot hold every 64-bit limit
    return np.where(top, info.max, np.where(top, 0, inside).astype(dtype)).astype(dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of (b, a), chosen by the nibbles of the selector; its bit 3 copies the sign instead."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(1, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result
