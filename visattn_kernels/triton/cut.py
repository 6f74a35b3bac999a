"""How a part of a pattern is cut into tiles and walked: axes, boxes, on the host.

`sides_of` is `axis_of` of csrc/pattern.h a second time, in Python; `geometry.py` is the rest of it, for kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from visattn_kernels.patterns import BORDERS, PATTERN_FIELDS, PATTERN_KINDS, Size
from visattn_kernels.triton.structs import CELLS, NEAR, STRIDED, WHOLE, Axis
from visattn_kernels.triton.tiles import Tile


class Side(NamedTuple):
    """One axis of a part of a pattern, as csrc/pattern.h has it, and its place among the map's."""

    kind: int
    queries: int
    keys: int
    size: int
    step: int
    shift: int
    reach: int
    causal: bool

    @property
    def classes(self) -> int:
        """How many lines the axis is cut into."""
        if self.kind == WHOLE:
            return 1
        if self.kind == CELLS:
            return int(self.shift > 0) + -(-max(self.queries - self.shift, 0) // self.size)
        return min(self.step, self.queries)

    def longest(self, length: int) -> int:
        """The longest line of an axis of that length."""
        if self.kind == WHOLE:
            return length
        return min(self.size, length) if self.kind == CELLS else -(-length // self.step)

    def walked(self, block: int, of_keys: bool = True) -> int:
        """How many keys a block of queries sees at most, or how many queries see a block of keys."""
        n = self.longest(self.keys if of_keys else self.queries)
        return block + self.size - 1 if self.kind == NEAR else n

    def axis(self, blocks_of: int, of_keys: bool) -> Axis:
        """What kernels get, with blocks of that many queries or keys."""
        blocks = -(-self.longest(self.keys if of_keys else self.queries) // blocks_of)
        return Axis(self.queries, self.keys, self.size, self.step, self.shift, self.reach, self.classes, blocks)


@dataclass(frozen=True)
class Geometry:
    """A part of a pattern as a kernel walks it.

    Attributes:
        y, x: the kernel's axes. y is walked in the inner loop.
        border: what lies outside the map, by its number.
        others: a query does not see the key of its own position.
        swap: the kernel's y is the map's x. So a row of keys, as a column of them, is walked in the inner loop.
        flat: the kernel's y is the whole map, its x has one position.
    """

    y: Side
    x: Side
    border: int
    others: bool
    swap: bool = False
    flat: bool = False

    def place(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Something of the map's height and width in the order (y, x) of the kernel."""
        return (width, height) if self.swap else (height, width)


@lru_cache(maxsize=1024)
def sides_of(
    pattern: tuple[int, ...], part: int, queries: Size, keys: Size, reach: tuple[int, int]
) -> tuple[Side, Side]:
    """The axes, height and width, of a part of an encoded pattern: `axis_of` of csrc/pattern.h.

    Sizes that reach beyond the map are cut to where it makes no difference, so that 32 bits hold every index.
    """
    fields = dict(zip(PATTERN_FIELDS, pattern, strict=True))
    kind = PATTERN_KINDS[fields["kind"]]
    sides = []
    for axis, name in enumerate("hw"):
        n = queries[axis]
        size, step, shift = (fields[f"{what}_{name}"] for what in ("size", "step", "shift"))
        side = Side(WHOLE, n, keys[axis], 1, 1, 0, reach[axis], False)
        if kind == "Window":
            shift = min(shift, n)
            side = side._replace(kind=CELLS, size=min(size, n + max(shift, 1)), shift=shift)
        elif kind == "Grid":
            side = side._replace(kind=STRIDED, step=-(-n // size))
        elif kind == "Neighborhood":
            zero = BORDERS[fields["border"]] == "zero"
            size = size if zero or size <= 2 * n + 2 else 2 * n + 2 + size % 2
            causal = bool(fields[f"causal_{name}"])
            side = side._replace(kind=NEAR, size=size, step=min(step, n), causal=causal)
        elif kind != "Global":
            row = kind == "Row" or (kind == "CrissCross" and part == 0)
            if row != (axis == 1):
                side = side._replace(kind=CELLS)
            elif size > 0:
                side = side._replace(kind=NEAR, size=min(size, 2 * n + 1))
        sides.append(side)
    return sides[0], sides[1]


def parts_of(pattern: tuple[int, ...]) -> int:
    """How many parts an encoded pattern has."""
    return 2 if PATTERN_KINDS[pattern[0]] == "CrissCross" else 1


@lru_cache(maxsize=1024)
def boxes(g: Geometry, tile: Tile, points: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
    """The boxes of queries and of keys of a tile: those that leave the least of the work to padding.

    Of equals that which needs the fewest entries of relative tables at each step of the inner loop.
    """
    queries = 1 if points else g.y.longest(g.y.queries) * g.x.longest(g.x.queries)
    m = max(16, min(tile.m, power(queries)))
    keys = g.y.walked(min(m, g.y.queries)) * g.x.walked(min(m, g.x.queries))
    n = max(16, min(tile.n, power(keys)))
    best: tuple[tuple[int, ...], Any] | None = None
    for qy in _splits(m):
        qx = m // qy
        blocks = 1 if points else -(-g.y.longest(g.y.queries) // qy) * -(-g.x.longest(g.x.queries) // qx)
        ahead = (1, 1) if points else (qy, qx)
        for ky in _splits(n):
            kx = n // ky
            steps = -(-g.y.walked(ahead[0]) // ky) * -(-g.x.walked(ahead[1]) // kx)
            cost = (blocks * steps, power(qy + ky) + power(qx + kx), qy + ky)
            if best is None or cost < best[0]:
                best = (cost, ((qy, qx), (ky, kx)))
    assert best is not None
    return best[1]  # type: ignore[no-any-return]


def _splits(n: int) -> list[int]:
    """The powers of two up to n."""
    return [1 << i for i in range(n.bit_length())]


def power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
