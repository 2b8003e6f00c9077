"""Compiles the kernels of the loss under every pair of options for sm_90 and prints what went wrong, as JSON.

What the interpreter accepts the compiler may refuse (types of branches that are not taken, for one), and the ahead-of-time report
compiles the default options alone. Run by test_ahead_of_time.py in a process without the interpreter.
"""

import json
from itertools import combinations

import torch

from rplib.bench.compiled_code import TARGETS, compile_for
from rplib.kernels import launch, passes, signatures
from rplib.kernels.rules import rules_of
from rplib.options import Options
from rplib.supervision import Supervision

OPTIONS = {
    "confidence": ("entropy", "max_probability", None),
    "weighted": (True, False),
    "on_logits": (True, False),
    "labelled": (None, 2, 0),  # samples; None: the loss alone; 0: the labels are on another rank
    "weight": (False, True),  # the mutual weight as a tensor
    "channels": ((2, 16), (3, 5), (14, 32)),
    "layout": ("contiguous", "channels_last", "slice", "wide"),  # wide: offsets of 64 bits
    "dtype": ("float32", "bfloat16", "float16"),
    "target": ("uint8", "int64", "bool", "int32", "float32"),
    "supervised": ("dice", "cross_entropy", "dice+cross_entropy"),
    "statistics": (False, True),
    "mask": (None, "contiguous", "slice"),
    "ignore_index": (None, 255),
    "mutual_on": ("all", "unlabelled"),
    "students": (None, (0,), (1,)),
    "minimum": (None, 0.7),
    "temperature": (1.0, 0.4),
    "class_weights": (False, True),
    "sample_weights": (False, True),
    "order": (False, True),
    "reduction": ("mean", "sum"),
    "call": ("training", "loss alone", "maps"),
}


def rows():
    """Points that hold every pair of values of every two options, found greedily."""
    names = list(OPTIONS)
    missing = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in OPTIONS[a] for y in OPTIONS[b]}
    while missing:
        (a, x), (b, y) = min(missing, key=str)
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(OPTIONS[name], key=lambda value: _new({**row, name: value}, missing))
        yield row
        missing -= set(_pairs(row))


def _pairs(row):
    names = [name for name in OPTIONS if name in row]
    return [((a, row[a]), (b, row[b])) for a, b in combinations(names, 2)]


def _new(row, missing):
    return sum(pair in missing for pair in _pairs(row))


def launches(row):
    """Those of one row, recorded on tensors without values."""
    (classes, features), dtype, labelled = row["channels"], getattr(torch, row["dtype"]), row["labelled"]
    spatial = (8, 12, 16) if row["layout"] != "wide" else (1024, 1024, 1024)
    logits = [_tensor(classes, spatial, dtype, row["layout"]) for _ in range(2)]
    read = [_tensor(features, spatial, dtype, row["layout"]) for _ in range(2)] if row["weighted"] else None
    target = None if labelled is None else torch.empty((labelled, *spatial), dtype=getattr(torch, row["target"]), device="meta")
    options = Options(
        confidence=row["confidence"],
        cross_entropy_on="logits" if row["on_logits"] else "probabilities",
        students=row["students"],
        minimum_confidence=row["minimum"],
        temperature=row["temperature"],
        class_weights=tuple(0.5 + c for c in range(classes)) if row["class_weights"] else None,
        reduction=row["reduction"],
    )
    plain = row["call"] == "maps" or target is None
    mask = _mask(spatial, row["mask"])
    sample_weights = torch.empty(4, device="meta") if row["sample_weights"] else None
    order = torch.empty(4, dtype=torch.int32, device="meta") if row["order"] and not plain else None
    batch = passes.Batch(logits, read, None if plain else target, mask, sample_weights, order)
    supervision = (
        None
        if plain
        else Supervision(
            supervised=row["supervised"],
            statistics=row["statistics"],
            ignore_index=row["ignore_index"],
            mutual_on=row["mutual_on"],
        )
    )
    rules = rules_of(
        options, supervision, classes,
        masked=mask is not None, sample_weighted=sample_weights is not None, reordered=order is not None,
    )  # fmt: skip
    weights = passes.Weights(0.5, 1.0, torch.empty((), device="meta") if row["weight"] else None)
    found = []
    with launch.observed(lambda one: found.append(one) is not None):  # False: not run
        known = passes.statistics(batch, rules)
        if row["call"] == "maps":
            passes.maps(batch, known, rules)
            return found
        _, _, record = passes.weighting(batch, known, rules, weights, with_record=row["call"] == "training")
        if row["call"] == "training":
            passes.gradient(torch.empty((), device="meta"), known.sums, record, batch, rules, 0.5)
    return found


def _tensor(channels, spatial, dtype, layout):
    if layout == "channels_last":
        return torch.empty((4, *spatial, channels), dtype=dtype, device="meta").movedim(-1, 1)
    if layout == "slice":
        return torch.empty((4, channels, *(size + 2 for size in spatial)), dtype=dtype, device="meta")[:, :, 1:-1, 1:-1, 1:-1]
    return torch.empty((4, channels, *spatial), dtype=dtype, device="meta")


def _mask(spatial, layout):
    if layout is None:
        return None
    mask = torch.empty((4, *(size + 1 for size in spatial)), dtype=torch.bool, device="meta")
    return mask[:, 1:, 1:, 1:] if layout == "slice" else torch.empty((4, *spatial), dtype=torch.bool, device="meta")


def main():
    seen, bad, compiled = set(), [], {}
    all_rows = list(rows())
    for row in all_rows:
        for one in launches(row):
            spec = signatures.spec(one)
            key = (spec.name, str(spec.constexprs), str(spec.signature), str(spec.attrs))
            if key in seen:
                continue
            seen.add(key)
            try:
                found = compile_for(
                    TARGETS["sm_90"], spec.fn, spec.signature, spec.constexprs, spec.attrs, num_warps=spec.num_warps
                )
            except Exception as error:  # every kind: what the compiler raises is its own business
                bad.append([spec.name, str(row), str(error)[-600:]])
                continue
            compiled[spec.name] = compiled.get(spec.name, 0) + 1
            if found.spills:
                bad.append([spec.name, str(row), f"spills {found.spills} times"])
    taken = {(name, value) for row in all_rows for name, value in row.items()}
    wanted = set().union(*({(name, value) for value in values} for name, values in OPTIONS.items()))
    print(json.dumps({"rows": len(all_rows), "compiled": compiled, "bad": bad, "left out": sorted(map(str, wanted - taken))}))


if __name__ == "__main__":
    main()
