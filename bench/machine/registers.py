"""Registers as numpy arrays of unsigned integers, read and written as the types that instructions name; and what is defined.

A value has shape (lanes,), or (1,) if all lanes agree. It comes with a flag whether it is defined: True, False, or an array of
booleans (lanes,). Undefined values may be passed on, as they are in compiled code.
"""

from typing import Any, NamedTuple

import numpy as np

from rplib.bench.machine.arithmetic import bfloat16_bits, float16_bits, from_bfloat16

Known = Any  # True, False, an array of booleans, or `Halves`


class Halves(NamedTuple):
    """Of a register that packs two values: which of them is defined."""

    low: Any
    high: Any


_VIEWS: dict[str, Any] = {"pred": np.bool_, "f32": np.float32, "f64": np.float64}
_VIEWS |= {f"{kind}{bits}": np.dtype(f"u{bits // 8}").type for kind in "ub" for bits in (8, 16, 32, 64)}
_VIEWS |= {f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)}


def storage(register_class: str) -> Any:
    """numpy type that holds a register."""
    return np.bool_ if register_class == "pred" else np.dtype(f"u{int(register_class[1:]) // 8}").type


def as_type(bits: np.ndarray, type: str) -> np.ndarray:
    """The bits of a register as a type; short floats become float32, packed types get a second axis of two.

    >>> as_type(np.uint32([0x3F803F80]), "bf16x2")
    array([[1., 1.]], dtype=float32)
    """
    if type.endswith("x2"):
        element = type.removesuffix("x2")
        half = np.dtype(f"u{bits.dtype.itemsize // 2}")
        return as_type(np.ascontiguousarray(bits).view(half), element).reshape(-1, 2)
    if type == "bf16":
        return from_bfloat16(bits.astype(np.uint16))
    if type == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    view = np.dtype(_VIEWS[type])
    if bits.dtype.itemsize == view.itemsize:
        return bits.view(view)
    return bits.astype(f"u{view.itemsize}").view(view)  # a wide register feeds a narrow type: the lower bits


def to_bits(value: np.ndarray, type: str, register: Any) -> np.ndarray:
    """The inverse: a result of ``type`` as bits in a register of numpy type ``register``."""
    if type == "pred":
        return value.astype(np.bool_)
    if type.endswith("x2"):
        element = type.removesuffix("x2")
        half = np.dtype(f"u{np.dtype(register).itemsize // 2}").type
        return np.ascontiguousarray(to_bits(value, element, half)).reshape(-1, 2).view(register).ravel()
    if type == "bf16":
        return bfloat16_bits(value).astype(register)
    if type == "f16":
        return float16_bits(value).astype(register)
    value = np.asarray(value, _VIEWS[type])
    if value.dtype.itemsize == np.dtype(register).itemsize:
        return np.ascontiguousarray(value).view(register)
    if type[0] == "s":
        return value.astype(f"i{np.dtype(register).itemsize}").view(register)  # the sign fills the rest
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").astype(register)


def meet(*known: Known) -> Any:
    """Defined where all are: True, False or an array.

    >>> meet(True, np.array([True, False])), meet(True, True)
    (array([ True, False]), True)
    """
    result: Any = True
    for one in known:
        if isinstance(one, Halves):
            one = meet(*one)
        if one is False or result is False:
            return False
        if one is not True:
            result = one if result is True else result & one
    return result


def halves(known: Known) -> Halves:
    return known if isinstance(known, Halves) else Halves(known, known)


def choose(mask: np.ndarray, new: Known, old: Known) -> Any:
    """``new`` where the mask is set, else ``old``; True where all are."""
    if new is True and old is True:
        return True
    if isinstance(new, Halves) or isinstance(old, Halves):
        pair = Halves(*(choose(mask, n, o) for n, o in zip(halves(new), halves(old), strict=True)))
        return True if pair.low is True and pair.high is True else pair
    return simplified(np.where(mask, new, old))


def simplified(known: Any) -> Any:
    return True if isinstance(known, np.ndarray) and known.all() else known
