"""Triton's interpreter, made quick enough for a table of hundreds of cases: what it does for each call, done once.

Before each call of a device function it patches the whole language anew, each 32-bit sum it computes in 64 bits too, to
look for an overflow, and for each tensor it makes its type and its shape anew. Together that is most of its time.

And its products are numpy's, whose rounding depends on the shapes of the operands, so that two passes over one pair
find different scores in tiles of different shapes. A GPU sums each number of a product in one order, whatever the tile.
Here products are summed in float64 and rounded once.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

SCALARS = ("int1", "int32", "int64", "float16", "float32")
"""The dtypes of the kernels' numbers."""


def quicken() -> None:
    """Patch the language once a kernel, look for no overflow, look types up; to be called once a process."""
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    if getattr(original, "quick", False):
        return
    of = interpreter._get_np_dtype
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

    scalars = {name: of(getattr(language, name)) for name in SCALARS}

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return scalars.get(scalar.name) or of(scalar)

    interpreter._get_np_dtype = numpy_dtype
    block_of = language.block_type.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
        if key not in blocks:
            block_of(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            sizes = [language.constexpr(n) for n in key]
            shapes[key] = (language.core.tuple(sizes), language.constexpr(math.prod(key)))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    language.block_type.__init__ = block_type
    language.tensor.__init__ = tensor

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot

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
