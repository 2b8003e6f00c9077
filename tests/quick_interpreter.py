"""Triton's interpreter without the look-ups on which it spends more than half of its time.

At each launch, and at each call of a function from a kernel, it searches all members of triton.language for builtins to replace:
100,000 look-ups for one loss and its gradient. Which names are builtins does not change, so here they are found once, and within
a launch they are replaced once. The NumPy type of each Triton type is found once, too. Results are the same
(test_quick_interpreter.py).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_NAMES = ("_patch_builtin", "_patch_lang", "_get_np_dtype")  # the functions of the interpreter that are exchanged
_originals: dict[str, Any] = {}


def builtin_names(place: Any) -> list[str]:
    """The names of Triton's builtins in a module or a class."""
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(place) if is_builtin(member)]


def install() -> bool:
    """Change the interpreter, once; False where this version of Triton is built otherwise, and then nothing is changed."""
    if _originals:
        return True
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in (*_NAMES, "_patch_attr", "_LangPatchScope")):
        return False
    _originals.update({name: getattr(interpreter, name) for name in _NAMES})
    search, replace, numpy_type = (_originals[name] for name in _NAMES)
    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    builtins = {place: builtin_names(place) for place in places}
    replaced: set[int] = set()  # modules whose builtins are replaced until the end of this launch

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        if place not in builtins:
            search(place, builder, scope)
            return
        for name in builtins[place]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):  # else it was replaced before
                interpreter._patch_attr(place, name, member, builder, scope)

    class LaunchScope(interpreter._LangPatchScope):  # type: ignore[misc,name-defined]
        """The scope of a launch: what it restores has to be replaced again."""

        def restore(self) -> None:
            super().restore()
            replaced.clear()

    @cache
    def modules_of(function: Any) -> set[int]:
        return {id(module) for module in (tl, tl.core) if module in function.__globals__.values()}

    def patch_lang(function: Any) -> Any:
        found = modules_of(function)
        if found and found <= replaced:  # called from a kernel, where Triton does not keep the scope
            return interpreter._LangPatchScope()
        scope = LaunchScope()
        scope._changes = replace(function)._changes
        replaced.update(found)
        return scope

    numpy_types: dict[str, Any] = {}  # released, a table of all types is made for each value

    def get_np_dtype(dtype: Any) -> Any:
        found = numpy_types.get(dtype.name)
        if found is None:
            found = numpy_types[dtype.name] = numpy_type(dtype)
        return found

    for name, function in zip(_NAMES, (patch_builtin, patch_lang, get_np_dtype), strict=True):
        setattr(interpreter, name, function)
    return True


@contextmanager
def as_released() -> Iterator[None]:
    """The interpreter as Triton has it."""
    from triton.runtime import interpreter

    ours = {name: getattr(interpreter, name) for name in _originals}
    for name, function in _originals.items():
        setattr(interpreter, name, function)
    try:
        yield
    finally:
        for name, function in ours.items():
            setattr(interpreter, name, function)
