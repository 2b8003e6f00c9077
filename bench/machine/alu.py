"""Instructions whose result depends only on their operands: arithmetic, logic, comparisons, conversions.

`decode` looks up an opcode in a table of rules. A rule has a regular expression for the whole opcode, so that an unknown
modifier matches nothing, and for a match gives the types of operands and result, and a function of numpy arrays.

>>> rule = decode("add.s32")
>>> rule.function(np.int32([1, 2]), np.int32([10, 20]))
array([11, 22], dtype=int32)
>>> decode("add.cc.s32")  # not in the table
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rplib.bench.machine import arithmetic
from rplib.bench.machine.ptx import Unsupported


class Rule(NamedTuple):
    """inputs, result: types in PTX notation. selects: the third operand chooses one of the first two; the other may be
    undefined. decides: operand value that alone determines the result of a logical operation."""

    inputs: tuple[str, ...]
    result: str
    function: Callable[..., Any]
    selects: bool = False
    decides: bool | None = None


_TABLE: list[tuple[re.Pattern[str], Callable[..., Rule]]] = []
FLOAT = "f32|f64|f16|bf16|f16x2|bf16x2|f32x2"
INTEGER = "[us](?:16|32|64)"
BIT_TYPE = "b(?:16|32|64)"


def _rule(pattern: str) -> Callable[[Callable[..., Rule]], Callable[..., Rule]]:
    def register(make: Callable[..., Rule]) -> Callable[..., Rule]:
        _TABLE.append((re.compile(pattern), make))
        return make

    return register


def decode(opcode: str) -> Rule | None:
    """The rule of an opcode, or None if the table has none."""
    for pattern, make in _TABLE:
        if found := pattern.fullmatch(opcode):
            return make(**found.groupdict())
    return None


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@_rule(rf"(?P<name>add|sub|mul)(?:\.rn)?(?P<ftz>\.ftz)?\.(?P<type>{FLOAT})")
def _float_arithmetic(name: str, ftz: str | None, type: str) -> Rule:
    function = _ARITHMETIC[name]
    return Rule((type, type), type, arithmetic.flushing(function) if ftz else function)


@_rule(r"(?P<name>add|sub)\.rn\.f32\.(?P<short>f16|bf16)")
def _mixed_arithmetic(name: str, short: str) -> Rule:
    return Rule((short, "f32"), "f32", _ARITHMETIC[name])


@_rule(rf"(?P<name>add|sub)\.(?P<type>{INTEGER})")
@_rule(r"(?P<name>add)\.(?P<type>[us]16x2)")
@_rule(rf"(?P<name>mul)\.lo\.(?P<type>{INTEGER})")
def _integer_arithmetic(name: str, type: str) -> Rule:
    return Rule((type, type), type, _ARITHMETIC[name])


@_rule(r"mul\.wide\.(?P<sign>[us])(?P<bits>16|32)")
def _wide_product(sign: str, bits: str) -> Rule:
    narrow, wide = sign + bits, sign + str(2 * int(bits))
    return Rule((narrow, narrow), wide, lambda a, b: a.astype(_numpy(wide)) * b.astype(_numpy(wide)))


@_rule(r"mul\.hi\.(?P<type>[us]32)")
def _high_product(type: str) -> Rule:
    return Rule((type, type), type, arithmetic.high_half)


@_rule(r"mad\.lo\.(?P<type>[us](?:32|64))")
def _multiply_add(type: str) -> Rule:
    return Rule((type, type, type), type, lambda a, b, c: a * b + c)


@_rule(r"mad\.wide\.(?P<sign>[us])(?P<bits>16|32)")
def _wide_multiply_add(sign: str, bits: str) -> Rule:
    narrow, wide = sign + bits, sign + str(2 * int(bits))
    return Rule((narrow, narrow, wide), wide, lambda a, b, c: a.astype(_numpy(wide)) * b.astype(_numpy(wide)) + c)


@_rule(r"fma\.rn(?P<ftz>\.ftz)?\.(?P<type>f32|f32x2)")
def _fused(ftz: str | None, type: str) -> Rule:
    function = arithmetic.fused_multiply_add
    return Rule((type, type, type), type, arithmetic.flushing(function) if ftz else function)


@_rule(r"fma\.rm(?P<ftz>\.ftz)?\.f32")
def _fused_down(ftz: str | None) -> Rule:
    function = arithmetic.fused_multiply_add_down
    return Rule(("f32", "f32", "f32"), "f32", arithmetic.flushing(function) if ftz else function)


@_rule(r"fma\.rn\.(?P<type>f16|bf16|f16x2|bf16x2)")
def _short_fused(type: str) -> Rule:  # products of short floats are exact in float32, the result is rounded from there
    return Rule((type, type, type), type, arithmetic.fused_multiply_add)


@_rule(r"fma\.rn\.f32\.(?P<short>f16|bf16)")
def _mixed_fused(short: str) -> Rule:
    return Rule((short, short, "f32"), "f32", arithmetic.fused_multiply_add)


@_rule(r"div\.(?:full|rn|approx)(?P<ftz>\.ftz)?\.f32")
def _quotient(ftz: str | None) -> Rule:
    return Rule(("f32", "f32"), "f32", arithmetic.flushing(np.divide) if ftz else np.divide)


@_rule(rf"(?P<name>div|rem)\.(?P<type>{INTEGER})")
def _integer_division(name: str, type: str) -> Rule:
    return Rule((type, type), type, arithmetic.divide if name == "div" else arithmetic.remainder)


_SPECIAL: dict[str, Any] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "rcp": np.reciprocal,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@_rule(rf"(?P<name>{'|'.join(_SPECIAL)})\.(?:approx|rn)(?P<ftz>\.ftz)?\.f32")
def _special(name: str, ftz: str | None) -> Rule:
    def rounded(x: np.ndarray) -> np.ndarray:
        return _SPECIAL[name](x.astype(np.float64)).astype(np.float32)

    return Rule(("f32",), "f32", arithmetic.flushing(rounded) if ftz else rounded)


@_rule(r"(?P<name>neg|abs)(?:\.ftz)?\.(?P<type>f32|f64|f16|bf16|f16x2|bf16x2|s16|s32|s64)")
def _sign(name: str, type: str) -> Rule:
    return Rule((type,), type, np.negative if name == "neg" else np.abs)


_EXTREMES = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}  # numpy's fmin and fmax drop NaN, as the hardware does


@_rule(r"(?P<name>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.(?P<type>f32|f64|f16|bf16|f16x2|bf16x2)")
def _extreme(name: str, ftz: str | None, nan: str | None, type: str) -> Rule:
    function = _EXTREMES[name][0 if nan else 1]
    return Rule((type, type), type, arithmetic.flushing(function) if ftz else function)


def of_three(rule: Rule) -> Rule:
    """A minimum or maximum of three numbers, which sm_100 has, from that of two."""
    return rule._replace(inputs=rule.inputs[:1] * 3, function=lambda a, b, c: rule.function(rule.function(a, b), c))


@_rule(rf"(?P<name>min|max)\.(?P<type>{INTEGER})")
def _integer_extreme(name: str, type: str) -> Rule:
    return Rule((type, type), type, _EXTREMES[name][0])


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@_rule(rf"(?P<name>and|or|xor)\.(?P<type>pred|{BIT_TYPE})")
def _logic(name: str, type: str) -> Rule:
    decides = {"and": False, "or": True}.get(name) if type == "pred" else None
    return Rule((type, type), type, _LOGIC[name], decides=decides)


@_rule(rf"not\.(?P<type>pred|{BIT_TYPE})")
def _complement(type: str) -> Rule:
    return Rule((type,), type, np.invert)


@_rule(r"lop3\.b32")
def _three_way_logic() -> Rule:
    def function(a: Any, b: Any, c: Any, table: Any) -> Any:
        result = np.zeros(1, np.uint32)
        for i in range(8):
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = result | np.where(table >> np.uint32(i) & np.uint32(1), term, np.uint32(0))
        return result

    return Rule(("b32", "b32", "b32", "b32"), "b32", function)


@_rule(rf"shl\.(?P<type>{BIT_TYPE})")
def _left(type: str) -> Rule:
    return Rule((type, "u32"), type, arithmetic.shift_left)


@_rule(rf"shr\.(?P<type>{BIT_TYPE}|{INTEGER})")
def _right(type: str) -> Rule:
    return Rule((type, "u32"), type, arithmetic.shift_right)


@_rule(r"shf\.(?P<way>[lr])\.(?P<mode>wrap|clamp)\.b32")
def _funnel(way: str, mode: str) -> Rule:
    def function(low: Any, high: Any, n: Any) -> Any:
        n = (n & np.uint32(31) if mode == "wrap" else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return ((both << n) >> np.uint64(32) if way == "l" else both >> n).astype(np.uint32)

    return Rule(("b32", "b32", "u32"), "b32", function)


@_rule(r"bfe\.(?P<type>[us]32)")
def _extract(type: str) -> Rule:
    def function(a: Any, position: Any, length: Any) -> Any:
        top = arithmetic.shift_left(a, np.maximum(32 - position.astype(np.int64) - length, 0).astype(np.uint32))
        return np.where(length == 0, a.dtype.type(0), arithmetic.shift_right(top, np.uint32(32) - length))

    return Rule((type, "u32", "u32"), type, function)


@_rule(r"bfi\.b32")
def _insert() -> Rule:
    def function(a: Any, b: Any, position: Any, length: Any) -> Any:
        field = arithmetic.shift_left(~arithmetic.shift_left(np.full(1, 0xFFFFFFFF, np.uint32), length), position)
        return (arithmetic.shift_left(a, position) & field) | (b & ~field)

    return Rule(("b32", "b32", "u32", "u32"), "b32", function)


@_rule(r"prmt\.b32")
def _permute() -> Rule:
    return Rule(("b32", "b32", "u32"), "b32", arithmetic.permute_bytes)


_COMPARE: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


@_rule(rf"setp\.(?P<name>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.(?P<type>{INTEGER}|{BIT_TYPE})")
def _compare(name: str, type: str) -> Rule:
    return Rule((type, type), "pred", _COMPARE[name])


@_rule(r"setp\.(?P<name>eq|ne|lt|le|gt|ge)(?P<unordered>u?)(?:\.ftz)?\.(?P<type>f32|f64|f16|bf16)")
def _float_compare(name: str, unordered: str, type: str) -> Rule:
    def function(a: Any, b: Any) -> Any:
        nan = np.isnan(a) | np.isnan(b)
        return _COMPARE[name](a, b) | nan if unordered else _COMPARE[name](a, b) & ~nan

    return Rule((type, type), "pred", function)


@_rule(r"setp\.(?P<name>num|nan)\.(?P<type>f32|f64|f16|bf16)")
def _is_nan(name: str, type: str) -> Rule:
    return Rule((type, type), "pred", lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan"))


@_rule(r"selp\.(?P<kind>[bus]|f)(?P<bits>16|32|64)")
def _select(kind: str, bits: str) -> Rule:
    type = "b" + bits
    return Rule((type, type, "pred"), type, lambda a, b, p: np.where(p, a, b), selects=True)


@_rule(rf"mov\.(?P<type>pred|{BIT_TYPE}|{INTEGER}|f32|f64|f16|bf16)")
def _move(type: str) -> Rule:
    type = type if type == "pred" else "b" + "".join(filter(str.isdigit, type.replace("bf", "")))
    return Rule((type,), type, lambda a: a)


@_rule(r"cvt\.(?P<to>[us](?:8|16|32|64))\.(?P<of>[us](?:8|16|32|64))")
def _resize(to: str, of: str) -> Rule:
    return Rule((of,), to, lambda a: a.astype(_numpy(to)))


@_rule(r"cvt\.rn\.(?P<to>f32|f64|f16|bf16)\.(?P<of>[us](?:8|16|32|64))")
def _to_float(to: str, of: str) -> Rule:
    return Rule((of,), to, lambda a: a.astype(np.float64 if to == "f64" else np.float32))


_TO_WHOLE: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@_rule(r"cvt\.(?P<way>rni|rzi|rmi|rpi)(?:\.ftz)?\.(?P<to>[us](?:8|16|32|64))\.(?P<of>f32|f64|f16|bf16)")
def _to_integer(way: str, to: str, of: str) -> Rule:
    return Rule((of,), to, lambda a: arithmetic.to_integer(a, _TO_WHOLE[way], _numpy(to)))


@_rule(r"cvt\.(?P<way>rni|rzi|rmi|rpi)(?:\.ftz)?\.(?P<type>f32|f64)\.(?P=type)")
def _to_whole(way: str, type: str) -> Rule:
    return Rule((type,), type, _TO_WHOLE[way])


@_rule(r"cvt(?:\.ftz)?\.sat\.f32\.f32")
def _saturate() -> Rule:
    return Rule(("f32",), "f32", lambda a: np.where(np.isnan(a), np.float32(0), np.clip(a, np.float32(0), np.float32(1))))


@_rule(r"cvt\.(?P<to>f32|f64)\.(?P<of>f16|bf16|f32)")
@_rule(r"cvt\.rn\.(?P<to>f16|bf16|f32)\.(?P<of>f32|f64)")
def _resize_float(to: str, of: str) -> Rule:
    if of == "f64" and to == "bf16":
        raise Unsupported("cvt.rn.bf16.f64")
    return Rule((of,), to, lambda a: a.astype(np.float64 if to == "f64" else a.dtype if to == "f16" else np.float32))


@_rule(r"cvt\.rn\.(?P<short>f16|bf16)x2\.f32")
def _pack(short: str) -> Rule:
    def function(high: Any, low: Any) -> Any:
        bits = arithmetic.bfloat16_bits if short == "bf16" else arithmetic.float16_bits
        return bits(high).astype(np.uint32) << np.uint32(16) | bits(low)

    return Rule(("f32", "f32"), "b32", function)


@_rule(r"cvt\.rna\.tf32\.f32")
def _to_tensor_float() -> Rule:
    return Rule(("f32",), "b32", arithmetic.tensor_float32)


@_rule(r"(?P<name>popc|clz|brev)\.b32")
def _count_bits(name: str) -> Rule:
    def function(a: Any) -> Any:
        bits = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4)[:, ::-1], axis=1)  # the highest first
        if name == "popc":
            return bits.sum(1).astype(np.uint32)
        if name == "clz":
            return np.where(bits.any(1), bits.argmax(1), 32).astype(np.uint32)
        return np.packbits(bits[:, ::-1], axis=1)[:, ::-1].copy().view(np.uint32).ravel()

    return Rule(("b32",), "b32", function)


def _numpy(type: str) -> Any:
    return np.dtype(("i" if type[0] == "s" else "u") + str(int(type[1:]) // 8)).type
