"""Triton's interpreter in less than half the time, with the same results. Used by conftest.py and by
triton_support.py.
"""

from __future__ import annotations

from typing import Any

import pytest


def install(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    from triton.runtime import interpreter

    patch_the_language_once(interpreter, patch)
    remember_the_dtypes(interpreter, patch)


def patch_the_language_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """It prepares triton.language anew at every call of a function."""
    patch_language = interpreter._patch_lang
    done: set[int] = set()  # the modules for which it is prepared, as long as a kernel runs

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in done:
            return None  # of a call inside a kernel, which does not look at it
        is_kernel = not done
        done.add(id(function.__globals__))
        scope = patch_language(function)
        if is_kernel:
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_once)


def remember_the_dtypes(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """It makes a table of all of numpy's dtypes each time that it looks for one."""
    look_up = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def remembered(type_in_triton: Any) -> Any:
        name = type_in_triton.scalar.name
        if name not in found:
            found[name] = look_up(type_in_triton)
        return found[name]

    patch.setattr(interpreter, "_get_np_dtype", remembered)
