"""Which tile for which problem and architecture: a table to read, and what it rests on.

A tile of M queries against N keys holds, in registers (64K of 32 bits for a multiprocessor, 255 for a thread):

    forward         M * (D / 2 + Dv + N)                 rows of q, sums of out, scores
    dq              M * (D / 2 + Dv / 2 + D + 2N)        rows of q and of the gradient, sums of dq, scores twice
    dk, dv          N * (D / 2 + Dv / 2 + D + Dv + 2M)   rows of k and v, sums of both, scores twice

(halves for 16-bit rows, wholes for float32), and in shared memory `stages` copies of the rows that a step brings in. So the
rows of the table go by the wider head, `width`, and by the bytes of an element. Products of float32 run on the ordinary
arithmetic units (without TF32), whose operands live in registers: their tiles are small.

No row is measured yet: they follow from the arithmetic above and from what compiles without spills
(docs/triton.md has the table of that). `python -m benchmarks tiles` measures the candidates on a GPU.
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


PASSES = ("forward", "dq", "dkdv")

# By pass, bytes of an element, and the widest head that a row is for.
TABLE: dict[tuple[str, int], tuple[tuple[int, Tile], ...]] = {
    ("forward", 2): (
        (64, Tile(64, 64, 4, 3)),
        (128, Tile(64, 64, 4, 2)),
        (256, Tile(64, 32, 8, 2)),
        (512, Tile(32, 32, 8, 1)),
    ),
    ("dq", 2): (
        (64, Tile(64, 64, 4, 2)),
        (128, Tile(64, 32, 4, 2)),
        (256, Tile(32, 32, 8, 1)),
        (512, Tile(32, 16, 8, 1)),
    ),
    ("dkdv", 2): (
        (64, Tile(64, 64, 4, 2)),
        (128, Tile(32, 64, 4, 1)),
        (256, Tile(32, 32, 8, 1)),
        (512, Tile(16, 32, 8, 1)),
    ),
    ("forward", 4): (
        (64, Tile(32, 32, 4, 2)),
        (128, Tile(32, 32, 8, 1)),
        (512, Tile(16, 16, 8, 1)),
    ),
    ("dq", 4): (
        (64, Tile(32, 32, 4, 1)),
        (128, Tile(32, 16, 8, 1)),
        (512, Tile(16, 16, 8, 1)),
    ),
    ("dkdv", 4): (
        (64, Tile(32, 32, 4, 1)),
        (128, Tile(16, 32, 8, 1)),
        (512, Tile(16, 16, 8, 1)),
    ),
}
"""The rows that hold for every architecture."""

OVERRIDES: dict[tuple[int, str, int], tuple[tuple[int, Tile], ...]] = {}
"""Rows of one architecture, by its compute capability (80, 86, 89, 90, 100, 120), which go before those of `TABLE`."""

INTERPRETED = Tile(32, 32, 4, 1)
"""In the interpreter, which has no registers to fill: small, so that small maps have several tiles."""


def tile_for(which: str, width: int, itemsize: int, capability: int | None) -> Tile:
    """The tile of a pass.

    Args:
        which: one of `PASSES`.
        width: the larger of D and Dv.
        itemsize: bytes of an element.
        capability: compute capability such as 90; None for the interpreter.
    """
    if capability is None:
        return INTERPRETED
    rows = OVERRIDES.get((capability, which, itemsize), ()) + TABLE[which, itemsize]
    return next(tile for widest, tile in rows if width <= widest)
