"""Imports flow one way: every package imports from those below it alone, and no modules import one another in a circle.

Read from the source, imports inside functions included.
"""

import ast
from pathlib import Path

import pytest
from package_tools import tree_packages

# From the bottom to the top. A module may import from its own layer and from those before it.
LAYERS = (
    (
        "rplib.errors", "rplib.ranks", "rplib.options", "rplib.supervision", "rplib.maps", "rplib.similarity", "rplib.statistics",
        "rplib.memory", "rplib.inputs",
    ),
    ("rplib.kernels",),
    ("rplib",),  # the public API: what is not named elsewhere in this list
    (
        "rplib.reference.arguments", "rplib.reference.files", "rplib.reference.progress", "rplib.reference.config",
        "rplib.reference.devices", "rplib.reference.network", "rplib.reference.checkpoint",
    ),
    ("rplib.reference.datasets",),
    ("rplib.reference.conversion",),
    ("rplib.reference.inference",),
    ("rplib.reference.evaluation",),
    ("rplib.reference.reporting",),
    ("rplib.reference.training",),
    ("rplib.reference",),  # the commands
    ("rplib.bench",),
)  # fmt: skip

# Commands of the core; `rplib.cli` finds every command by its name and imports none.
TOP = {"rplib.__main__", "rplib.check", "rplib.info"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in tree_packages().items():
        for file in folder.glob("*.py"):
            found[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of the project that this one imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {other for other in found if other in MODULES and other != name}


def types_alone(name: str) -> set[str]:
    """Modules that are imported for type checkers alone: never at run time, so in no circle."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {inner.module for node in guarded for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom) and inner.module}


IMPORTS = {name: imports(name) for name in MODULES}


def layer(name: str) -> int:
    """Place in LAYERS, by the longest prefix that is named there."""
    if name in TOP:
        return len(LAYERS)
    prefixes = {prefix: n for n, group in enumerate(LAYERS) for prefix in group}
    parts = name.split(".")
    return next(prefixes[p] for k in range(len(parts), 0, -1) if (p := ".".join(parts[:k])) in prefixes)


def test_the_tree_is_read():
    assert len(MODULES) > 80
    assert "rplib.reference.training.step" in IMPORTS["rplib.reference.training.trainer"]
    assert "rplib.kernels.operators" in IMPORTS["rplib.functional"]  # inside a function


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_come_from_the_same_layer_or_below(name):
    upward = sorted(other for other in IMPORTS[name] if layer(other) > layer(name))
    assert not upward, f"{name} imports from above: {upward}"


def test_the_trainer_uses_the_public_interface_alone():
    public = {"rplib", "rplib.errors", "rplib.memory"}
    for name, found in IMPORTS.items():
        if name.startswith("rplib.reference"):
            inner = {other for other in found if not other.startswith("rplib.reference")}
            assert inner <= public | {"rplib.cli"}, f"{name} imports {sorted(inner - public)}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle of each group of modules that import one another."""
    found, state, path = [], dict.fromkeys(graph, "new"), []

    def visit(name: str) -> None:
        state[name] = "open"
        path.append(name)
        for other in sorted(graph[name]):
            if state[other] == "open":
                found.append([*path[path.index(other) :], other])
            elif state[other] == "new":
                visit(other)
        path.pop()
        state[name] = "done"

    for name in sorted(graph):
        if state[name] == "new":
            visit(name)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_no_modules_import_one_another():
    # A package's own name in an import is its __init__, which the members are imported through anyway.
    inits = {name for name, file in MODULES.items() if file.name == "__init__.py" and name != "rplib"}
    left_out = {"rplib", *inits}
    graph = {name: found - left_out - types_alone(name) for name, found in IMPORTS.items() if name not in inits}
    assert circles({name: found for name, found in graph.items() if name != "rplib"}) == []
