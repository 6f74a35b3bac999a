"""csrc/pattern.h as Triton functions: which keys a query sees, along lines of an axis.

A *line* is a class of evenly spaced positions (start, step, count); along it a query's keys are the indices
[first, end). The functions take scalars and tensors alike. Axes are `structs.Axis`; their kind, border and causality
are known at compile time.

A kernel's axes are called y and x: y is the one walked in the inner loop, whichever of the map's that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visattn_kernels.patterns import BORDERS
from visattn_kernels.triton import structs

WHOLE = tl.constexpr(structs.WHOLE)
CELLS = tl.constexpr(structs.CELLS)
STRIDED = tl.constexpr(structs.STRIDED)
NEAR = tl.constexpr(structs.NEAR)
SHIFT = tl.constexpr(BORDERS.index("shift"))
ZERO = tl.constexpr(BORDERS.index("zero"))


# Programs and tiles are counted in 32 bits unless there are more (C.wide): a 64-bit division is a call of hundreds of
# instructions that spills what is live. Maps and heads are 64-bit from the start, since strides multiply them.


@triton.jit
def program(WIDE: tl.constexpr):
    """The number of this program; if WIDE the grid is folded into two dimensions (`launch.fold`)."""
    if WIDE:
        i = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    else:
        i = tl.program_id(0)
    return i


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """A * b, in 64 bits if WIDE."""
    return (a + tl.full([], 0, tl.int64)) * b if WIDE else a * b


@triton.jit
def locate(i, tiles, heads):
    """The tile, head and map of the i-th tile of all."""
    rest = i // tiles
    return i % tiles, (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)


@triton.jit
def block_of(tile, y, x, WIDE: tl.constexpr):
    """The classes and the blocks of a tile along y and x: tiles go through blocks and classes in raster order."""
    across = product(x.classes, x.blocks, WIDE)
    ty = (tile // across).to(tl.int32)
    tx = (tile % across).to(tl.int32)
    return ty // y.blocks, ty % y.blocks, tx // x.blocks, tx % x.blocks


@triton.jit
def line(axis, c, length, KIND: tl.constexpr):
    """Start, step and count of the positions of class c on an axis of the given length."""
    if KIND == WHOLE:
        start = c * 0
        step = start + 1
        count = start + length
    elif KIND == CELLS:
        first = tl.minimum(axis.shift, 1)  # whether a cell lies before the first cut
        start = tl.maximum(axis.shift + (c - first) * axis.size, 0)
        step = c * 0 + 1
        count = tl.minimum(axis.shift + (c - first + 1) * axis.size, length) - start
    else:
        start = c
        step = c * 0 + axis.step
        count = (length - c + axis.step - 1) // axis.step
    return start, step, count


@triton.jit
def class_of(axis, position, KIND: tl.constexpr):
    """The class of a position and its index there."""
    if KIND == WHOLE:
        c = position * 0
        index = position
    elif KIND == CELLS:
        before = position < axis.shift
        c = tl.where(before, 0, tl.minimum(axis.shift, 1) + (position - axis.shift) // axis.size)
        index = tl.where(before, position, (position - axis.shift) % axis.size)
    else:
        c = position % axis.step
        index = position // axis.step
    return c, index


@triton.jit
def first_key(axis, i, n, KIND: tl.constexpr, BORDER: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key of the query with index i of a class of n."""
    if KIND != NEAR:
        first = i * 0
    else:
        first = i - axis.size + 1 if CAUSAL else i - axis.size // 2
        if BORDER == SHIFT and not CAUSAL:
            first = tl.minimum(tl.maximum(first, 0), tl.maximum(n - axis.size, 0))
        elif BORDER != ZERO:
            first = tl.maximum(first, 0)
    return first


@triton.jit
def end_key(axis, i, n, KIND: tl.constexpr, BORDER: tl.constexpr, CAUSAL: tl.constexpr):
    """One past the last key of the query with index i of a class of n."""
    if KIND != NEAR:
        end = i * 0 + n
    else:
        end = i + 1 if CAUSAL else i - axis.size // 2 + axis.size
        if BORDER == SHIFT and not CAUSAL:
            end = tl.minimum(first_key(axis, i, n, KIND, BORDER, CAUSAL) + axis.size, n)
        elif BORDER != ZERO:
            end = tl.minimum(end, n)
    return end


@triton.jit
def first_query(axis, j, n, KIND: tl.constexpr, BORDER: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query that sees the key with index j of a class of n."""
    if KIND != NEAR:
        first = j * 0
    else:
        ahead = axis.size - 1 if CAUSAL else axis.size // 2
        first = tl.maximum(j + ahead - axis.size + 1, 0)
        if BORDER == SHIFT and not CAUSAL:
            first = tl.where(j < axis.size, 0, first)
    return first


@triton.jit
def end_query(axis, j, n, KIND: tl.constexpr, BORDER: tl.constexpr, CAUSAL: tl.constexpr):
    """One past the last query that sees the key with index j of a class of n."""
    if KIND != NEAR:
        end = j * 0 + n
    else:
        ahead = axis.size - 1 if CAUSAL else axis.size // 2
        end = tl.minimum(j + ahead + 1, n)
        if BORDER == SHIFT and not CAUSAL:
            end = tl.where(j >= n - axis.size, n, end)
    return end


@triton.jit
def sees(axis, i, j, n, KIND: tl.constexpr, BORDER: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether queries [M] see keys [N] of a box on one axis, bool[M, N]; the box itself is bounded elsewhere."""
    first = first_key(axis, i, n, KIND, BORDER, CAUSAL)
    end = end_key(axis, i, n, KIND, BORDER, CAUSAL)
    return (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
