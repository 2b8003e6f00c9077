"""Triton's interpreter at about twice its speed, with the same results.

For every call of one @triton.jit function from another it looks through triton.language for names to replace, although the
launch has replaced them already. The second and later looks are left out here.
"""

import inspect
from contextlib import contextmanager


@contextmanager
def fast_interpreter():
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang
    patched = set()  # modules replaced by the launch that runs now

    class Nothing:
        def restore(self):
            pass

    def patch_once(fn):
        wanted = {id(value) for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)}
        if patched and wanted <= patched:
            return Nothing()
        outermost = not patched
        scope = patch(fn)
        if outermost:
            patched.update(wanted)
            restore = scope.restore

            def restore_all():
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
