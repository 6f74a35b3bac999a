"""Triton's interpreter, made quick enough for a table of hundreds of cases: what it does for each call, done once.

Before each call of a device function it patches the whole language anew, and each 32-bit sum it computes in 64 bits
too, to look for an overflow. Together that is three quarters of its time.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any


def quicken() -> None:
    """Patch the language once a kernel, look for no overflow; to be called once a process."""
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    if getattr(original, "quick", False):
        return
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    active: set[int] = set()

    class Nothing:
        def restore(self) -> None:
            pass

    class Outermost:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            active.clear()
            self.scope.restore()

    @cache
    def languages(fn: FunctionType) -> set[int]:
        modules = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (language, language.core)]
        return {id(x) for x in modules}

    def once(fn: FunctionType) -> Any:
        found = languages(fn)
        if found <= active:
            return Nothing()
        outermost = not active
        active.update(found)
        scope = original(fn)
        return Outermost(scope) if outermost else scope

    once.quick = True  # type: ignore[attr-defined]
    interpreter._patch_lang = once
