"""Triton's interpreter, without what it repeats once this is imported: 30% of the time of a model's pass."""

import triton.language as tl
from triton.runtime import interpreter


def patch_once(real):
    """Let the interpreter patch a module of its language once a launch.

    Each call of a helper within a launch looked through all of the language, 0.5 ms, and found it patched.
    """
    patched = set()

    def patch(fn):
        modules = {name for name, module in (("tl", tl), ("core", tl.core)) if module in fn.__globals__.values()}
        if patched and modules <= patched:
            return None  # of a helper, which takes no scope; before a launch nothing is patched
        scope = real(fn)
        if not patched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.update(modules)
        return scope

    return patch


def look_up_once(real):
    """Let NumPy's dtype of one of Triton's be looked up once; each value made a table of all dtypes."""
    found = {}

    def look_up(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = real(dtype)
        return found[name]

    return look_up


interpreter._patch_lang = patch_once(interpreter._patch_lang)
interpreter._get_np_dtype = look_up_once(interpreter._get_np_dtype)
