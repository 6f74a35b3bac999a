"""Which tile for which problem and architecture: a table to read, and what it rests on.

A tile of M queries against N keys holds, in registers (64K of 32 bits for a multiprocessor, 255 for a thread):

    forward         M * (D / 2 + Dv + N)                 rows of q, sums of out, scores
    dq              M * (D / 2 + Dv / 2 + D + 2N)        rows of q and of the gradient, sums of dq, scores twice
    dk, dv          N * (D / 2 + Dv / 2 + D + Dv + 2M)   rows of k and v, sums of both, scores twice

(halves for 16-bit rows, wholes for float32), and in shared memory `stages` copies of the rows that a step brings in.
So the rows of the table go by the wider head, `width`, and by the bytes of an element. Products of float32 run on the
ordinary arithmetic units (without TF32), whose operands live in registers: their tiles are small. Then by what a tile
holds besides:

    plain       nothing: every key of a region for every query of it; number biases too in the forward
    near        which of the pairs see one another, and their indices; number biases, whose gradient goes by indices
    query       products of queries with a table, twice, and permutations of them
    vectors     those of keys or gradients too

No row is measured: they are the largest that compile within the limits of `benchmarks/compiled.py` (shared memory of
each architecture, next to no spilled registers), whose table docs/triton.md has. Tiles of 64 resident rows have 4 warps
where that makes fewer instructions (those of the inner loop, times the warps) and spills nothing: 8 warps split the
other side among them, so that each does nearly as much as one of 4 (on 9.0, of bfloat16: 616 × 4 for 568 × 8 in dq of
8/32, 847 × 4 for 863 × 8 in dk and dv of 64/64, 421 × 4 for 412 × 8 in the forward of 80/80 with `RelativeQuery`).
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A tile and how it is run.

    Attributes:
        m: queries.
        n: keys.
        warps: warps of a program.
        stages: steps in flight.
    """

    m: int
    n: int
    warps: int
    stages: int


Rows = tuple[tuple[int, Tile], ...]
"""Tiles by the widest head that they are for."""

TABLE: dict[tuple[str, int, str], Rows] = {
    ("forward", 2, "plain"): (
        (128, Tile(128, 64, 8, 3)),
        (256, Tile(64, 32, 8, 2)),
        (512, Tile(64, 32, 8, 2)),
    ),
    ("forward", 2, "near"): ((128, Tile(64, 32, 4, 2)), (512, Tile(32, 32, 8, 1))),
    ("forward", 2, "vectors"): ((128, Tile(64, 32, 8, 2)), (512, Tile(32, 32, 8, 1))),
    ("dq", 2, "plain"): ((128, Tile(64, 64, 8, 2)), (512, Tile(32, 32, 8, 1))),
    ("dq", 2, "near"): ((128, Tile(64, 32, 8, 2)), (512, Tile(32, 16, 8, 1))),
    ("dq", 2, "vectors"): ((16, Tile(32, 32, 8, 1)), (64, Tile(16, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("dkdv", 2, "plain"): ((16, Tile(64, 64, 8, 2)), (128, Tile(64, 64, 8, 1)), (512, Tile(32, 32, 8, 1))),
    ("dkdv", 2, "near"): ((128, Tile(32, 64, 4, 2)), (512, Tile(16, 32, 8, 1))),
    ("dkdv", 2, "vectors"): (
        (16, Tile(32, 32, 8, 1)),
        (64, Tile(16, 16, 8, 1)),
        (128, Tile(32, 32, 8, 1)),
        (512, Tile(16, 16, 8, 1)),
    ),
    ("forward", 4, "plain"): ((16, Tile(128, 64, 8, 2)), (128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("forward", 4, "near"): ((128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("forward", 4, "vectors"): ((128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("dq", 4, "plain"): ((16, Tile(64, 64, 8, 2)), (128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("dq", 4, "near"): ((128, Tile(32, 16, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("dq", 4, "vectors"): ((512, Tile(16, 16, 8, 1)),),
    ("dkdv", 4, "plain"): ((16, Tile(32, 64, 8, 2)), (128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("dkdv", 4, "near"): ((128, Tile(16, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("dkdv", 4, "vectors"): ((512, Tile(16, 16, 8, 1)),),
}
"""By pass, bytes of an element and what a tile holds; what holds for every architecture."""

# 99 KB of shared memory, where the others have 163 and 227.
_SMALL: dict[tuple[str, int, str], Rows] = {
    ("forward", 2, "plain"): ((128, Tile(128, 64, 8, 3)), (256, Tile(64, 32, 8, 1)), (512, Tile(32, 32, 4, 1))),
    ("dq", 2, "plain"): ((128, Tile(64, 64, 8, 2)), (512, Tile(16, 32, 4, 1))),
    ("dkdv", 2, "plain"): ((16, Tile(64, 64, 8, 2)), (128, Tile(64, 64, 8, 1)), (512, Tile(16, 32, 8, 1))),
}

# Counted there alone; on 8.0, whose products are other instructions, dq of 128/128 gains nothing by it.
_HOPPER: dict[tuple[str, int, str], Rows] = {
    ("forward", 2, "query"): ((128, Tile(64, 32, 4, 2)), (512, Tile(32, 32, 8, 1))),
    ("dq", 2, "plain"): ((128, Tile(64, 64, 4, 2)), (512, Tile(32, 32, 8, 1))),
    ("dkdv", 2, "plain"): (
        (16, Tile(64, 64, 4, 2)),
        (64, Tile(64, 64, 4, 1)),
        (128, Tile(64, 64, 8, 1)),
        (512, Tile(32, 32, 8, 1)),
    ),
    ("dkdv", 4, "plain"): ((16, Tile(32, 64, 4, 2)), (128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
}

OVERRIDES: dict[int, dict[tuple[str, int, str], Rows]] = {86: _SMALL, 89: _SMALL, 90: _HOPPER, 120: _SMALL}
"""Rows of architectures, by compute capability, that stand in the place of those of `TABLE`."""

CAREFUL = Tile(16, 16, 4, 1)
"""Of launches that compute anew what NaN reached: small, since they are rare and have the more to hold."""

INTERPRETED = Tile(64, 64, 4, 1)
"""In the interpreter, which has no registers to fill; each program takes it about as long."""


def tile_for(which: str, width: int, itemsize: int, holds: str, capability: int | None) -> Tile:
    """The tile of a pass.

    Args:
        which: "forward", "dq" or "dkdv".
        width: the larger of D and Dv.
        itemsize: bytes of an element.
        holds: "plain", "near", "query" or "vectors".
        capability: compute capability such as 90; None for the interpreter.
    """
    if capability is None:
        return INTERPRETED
    overrides = OVERRIDES.get(capability, {})
    keys = [(which, itemsize, kind) for kind in ((holds, "vectors") if holds == "query" else (holds,))]
    rows = next(table[key] for key in keys for table in (overrides, TABLE) if key in table)
    return next(tile for widest, tile in rows if width <= widest)
