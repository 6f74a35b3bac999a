"""What pattern.h and terms.h must say of an axis and of two grids, by each pattern's Python mask and offsets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch

import visattn_kernels as va
from visattn_kernels.patterns import Pattern, Size

BORDERS = ("shift", "mask", "zero")


def axis_patterns(axis: int, length: int, dilations: bool = True) -> Iterator[Pattern]:
    """Every pattern that is legal along one axis; across it the values are others, so that swapped axes show.

    Sizes go to two more than the length, where nothing new can happen. CrissCross is held on grids alone.
    """

    def pair(along: int, across: int = 1) -> tuple[int, int]:
        return (across, along) if axis else (along, across)

    sizes = range(1, length + 3)
    yield from (va.Global(), va.Row(), va.Column())
    yield from (kind(span) for kind in (va.Row, va.Column) for span in sizes if span % 2)
    yield from (va.Window(pair(size, 4), pair(shift, 3)) for size in sizes for shift in range(size))
    yield from (va.Grid(pair(size, 2)) for size in sizes)
    for kernel, dilation in itertools.product(sizes, range(1, length + 2) if dilations else (1,)):
        for border, causal in itertools.product(BORDERS, (False, True)):
            if border != "shift" or kernel * dilation <= length:
                flags = (not causal, causal) if axis else (causal, not causal)
                yield va.Neighborhood(pair(kernel), pair(dilation), border, flags)


def hold_axis(geometry: ModuleType, pattern: Pattern, axis: int, length: int) -> None:
    """Hold one axis of a pattern of one part to what the pattern sees."""
    grid = Size(1, length) if axis else Size(length, 1)
    before, after = pattern.margin()[axis]
    positions = torch.arange(length)[:, None], torch.arange(-before, length + after)[None]
    sees = pattern.sees(axis, length, *positions).tolist()
    offsets = pattern.offsets(grid, grid, outside=True)[axis].tolist()
    keys = [[k - before for k, seen in enumerate(row) if seen] for row in sees]
    queries = [[q for q in range(length) if sees[q][k + before]] for k in range(length)]
    fields = pattern.encode()
    reach = geometry.reach_of(fields, axis, length)
    assert reach == pattern.reach(grid, grid)[axis]
    part = geometry.part_of(fields, 0, grid, grid)
    rule = part.x if axis else part.y
    met = []
    longest = 0
    for c in range(rule.classes()):
        line = rule.query_line(c)
        n = line.count
        assert (line.start, line.step, n) == (rule.key_line(c).start, rule.key_line(c).step, rule.key_line(c).count)
        members = [line.at(i) for i in range(n)]
        assert members
        assert [rule.class_of(y) for y in members] == [c] * n
        assert [rule.index_of(y) for y in members] == list(range(n))
        met += members
        longest = max(longest, n)
        of_queries = [rule.keys_of(i, n) for i in range(n)]
        of_keys = [rule.queries_of(j, n) for j in range(n)]
        for i, y in enumerate(members):
            seen = range(*of_queries[i])
            assert [line.at(j) for j in seen] == keys[y]
            assert [line.at(j) for j in range(*of_keys[i])] == queries[y]
            assert [offsets[y][k + before] for k in keys[y]] == [j - i for j in seen]
            entries = [geometry.table_entry(j - i, reach) for j in seen]
            assert entries == [j - i + reach - 1 for j in seen]
            assert 0 <= entries[0] <= entries[-1] < geometry.table_entries(reach)
        for ranges in (of_queries, of_keys):  # so that the first and the last of a run decide for all of it
            assert [first for first, _ in ranges] == sorted(first for first, _ in ranges)
            assert [end for _, end in ranges] == sorted(end for _, end in ranges)
    assert sorted(met) == list(range(length))
    # With a shift this is a bound: the first cell and the last may be cut so that none is whole.
    assert longest == rule.longest(length) or (isinstance(pattern, va.Window) and longest < rule.longest(length))
    assert rule.longest(length) <= length
    assert geometry.table_entries(reach) == 2 * reach - 1


def hold_grids(geometry: ModuleType, pattern: Pattern, queries: Size, keys: Size) -> None:
    """Hold a pattern's parts on two grids to its mask: pairs one by one, and every box of queries and of keys."""
    fields = pattern.encode()
    mask = pattern.mask(queries, keys, outside=True)
    mask = torch.ones(*queries, *keys, dtype=torch.bool) if mask is None else mask
    margins = pattern.margin()
    before, after = ([margin[side] for margin in margins] for side in (0, 1))
    inside = tuple(slice(before[axis], before[axis] + keys[axis]) for axis in (0, 1))
    total = np.zeros(mask.shape, dtype=np.int64)
    for number in range(geometry.parts(fields)):
        part = geometry.part_of(fields, number, queries, keys)
        assert part.near() == (part.y.near() or part.x.near())
        assert part.classes() == part.y.classes() * part.x.classes()
        counts, members = (
            part.pairs(before, after, walk).reshape(mask.shape)
            for walk in (geometry.Walk.OF_QUERIES, geometry.Walk.ALL)
        )
        assert (counts == members).all()
        transposed = part.pairs((0, 0), (0, 0), geometry.Walk.OF_KEYS).reshape(*queries, *keys)
        assert (transposed == counts[:, :, inside[0], inside[1]]).all()
        own = np.eye(queries.height * queries.width, dtype=np.int64).reshape(*queries, *queries)
        assert part.others == (number == 1)
        if part.others:
            assert (counts * own == 0).all()
            counts = counts + own  # a box spans the place that it leaves out
        total += members
        for c in range(part.classes()):
            _hold_boxes(part, part.region_of(c), counts, before)
    assert (total == mask.numpy()).all()  # every pair of the pattern in one part, once
    for axis in (0, 1):
        assert geometry.reach_of(fields, axis, keys[axis]) == pattern.reach(queries, keys)[axis]


def hold_criss_cross(geometry: ModuleType, grid: Size) -> None:
    """Hold the parts of CrissCross to the query's row, and to its column without the row."""
    row, column = (pattern.mask(grid, grid) for pattern in (va.Row(), va.Column()))
    fields = va.CrissCross().encode()
    assert geometry.parts(fields) == 2
    for number, true in enumerate((row, column & ~row)):
        part = geometry.part_of(fields, number, grid, grid)
        for walk in (geometry.Walk.OF_QUERIES, geometry.Walk.OF_KEYS, geometry.Walk.ALL):
            assert (part.pairs((0, 0), (0, 0), walk).reshape(true.shape) == true.numpy()).all()


def _hold_boxes(part, region, counts: np.ndarray, before: list[int]) -> None:
    """Hold every box of a region to the hull of what it sees, and of what sees it."""
    places = [[line.at(i) for i in range(line.count)] for line in (region.query_y, region.query_x)]
    origin = []  # index of the first position that there is, virtual or not
    for line, low, length in zip((region.key_y, region.key_x), before, counts.shape[2:], strict=True):
        origin.append(-((line.start + low) // line.step))
        places.append(list(range(line.at(origin[-1]) + low, length, line.step)))
    sees = counts[np.ix_(*places)] > 0
    _hold_hulls(part.boxes(region, True), sees, origin)
    inside = [slice(-low, line.count - low) for low, line in zip(origin, (region.key_y, region.key_x), strict=True)]
    _hold_hulls(part.boxes(region, False), sees[:, :, inside[0], inside[1]].transpose(2, 3, 0, 1), [0, 0])


def _hold_hulls(rows: np.ndarray, sees: np.ndarray, origin: list[int]) -> None:
    """Hold rows (y, x, h, w, walked y, x, h, w) to `sees[y, x, walked y, walked x]`, the walked side from an origin."""
    y, x, h, w, *walked = rows.reshape(-1, 8).T
    sums = np.zeros((sees.shape[0] + 1, sees.shape[1] + 1, *sees.shape[2:]), dtype=np.int64)
    sums[1:, 1:] = sees.cumsum(0).cumsum(1)
    seen = sums[y + h, x + w] - sums[y, x + w] - sums[y + h, x] + sums[y, x] > 0
    for axis, other in ((0, 2), (1, 1)):
        along = seen.any(other)
        first = along.argmax(1)
        end = along.shape[1] - along[:, ::-1].argmax(1)
        assert along.any(1).all()
        assert (walked[axis] == first + origin[axis]).all()
        assert (walked[2 + axis] == end - first).all()


def grid_patterns() -> list[Pattern]:
    """Every kind with every option, few sizes: the axes are held apart from each other."""
    every: list[Pattern] = [va.CrissCross(), va.Global(), va.Row(), va.Column(), va.Row(3), va.Column(5)]
    every += [va.Window(3), va.Window((2, 5), (1, 3)), va.Window(12, (4, 0)), va.Grid(2), va.Grid((3, 1)), va.Grid(10)]
    every += [
        va.Neighborhood(kernel, dilation, border, causal)
        for kernel, dilation, causal in [
            (3, 1, False),
            ((2, 4), 1, False),
            ((3, 2), (1, 2), False),
            ((2, 3), (3, 1), (True, False)),
            ((1, 3), 2, True),
        ]
        for border in BORDERS
    ]
    return every


def fits(pattern: Pattern, grid: Size) -> bool:
    """Whether a pattern is legal on a grid."""
    try:
        pattern.check(grid, grid)
    except ValueError:
        return False
    return True
