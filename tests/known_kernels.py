"""Kernels whose machine code is known beforehand, to try the ahead-of-time report on; run in a process without the interpreter.

python known_kernels.py      prints one JSON object: case -> target -> resources
"""

import json
import sys

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def masked_add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def centre(x, y, out, n, BLOCK: tl.constexpr):
    """Keeps a whole tile alive across a reduction: a large BLOCK cannot stay in registers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, value - tl.sum(value * tl.load(y), axis=0))


def compiled(kernel, block, element="*fp32", aligned=("x", "y", "out", "n")):
    """Resources per target; ``block``: a number, or one per backend."""
    from rplib.bench.compiled_code import TARGETS, compile_for

    signature = {"x": element, "y": element, "out": element, "n": "i32", "BLOCK": "constexpr"}
    names = list(signature)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    result = {}
    for target in TARGETS.values():
        size = block[target.backend] if isinstance(block, dict) else block
        r = compile_for(target, kernel, signature, {"BLOCK": size}, attrs, num_warps=256 // target.warp_size)
        result[target.name] = {**vars(r), "wide_load_share": r.wide_load_share}
    return result


def main():
    json.dump(
        {
            # 256 threads: 4 float32 of 16 bytes, or 8 bfloat16 of 16 bytes, per thread and array.
            "add": compiled(add, 1024),
            "add bfloat16": compiled(add, 2048, "*bf16"),
            "add of unaligned arrays": compiled(add, 1024, aligned=()),
            "masked, length divisible by 16": compiled(masked_add, 1024),
            "masked, any length": compiled(masked_add, 1024, aligned=("x", "y", "out")),
            "reduction": compiled(centre, 1024),
            "reduction that cannot stay in registers": compiled(centre, {"cuda": 64 * 1024, "hip": 128 * 1024}),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
