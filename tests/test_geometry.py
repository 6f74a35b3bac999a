"""pattern.h and terms.h against the Python patterns, exhaustively on small axes and grids."""

from __future__ import annotations

import itertools
from types import ModuleType

import compiled
import pytest
from cases import PATTERNS
from geometry_rules import axis_patterns, fits, grid_patterns, hold_axis, hold_criss_cross, hold_grids

import visattn_kernels as va
from visattn_kernels.patterns import PATTERN_FIELDS, PATTERN_KINDS, Pattern, Size

LENGTH, DILATED_LENGTH = 9, 12
GRIDS = [Size(h, w) for h in range(1, LENGTH + 1) for w in range(1, LENGTH + 1)]


@pytest.fixture(scope="session")
def geometry() -> ModuleType:
    """pattern.h and terms.h as a Python module."""
    return compiled.geometry()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("length", range(1, DILATED_LENGTH + 1))
def test_axis(geometry: ModuleType, axis: int, length: int) -> None:
    """Every legal pattern on every length: classes, keys, queries, offsets, table entries."""
    for pattern in axis_patterns(axis, length):
        hold(hold_axis, geometry, pattern, axis, length)


@pytest.mark.parametrize("pattern", grid_patterns(), ids=str)
def test_grids(geometry: ModuleType, pattern: Pattern) -> None:
    """The product of two axes, and the two parts of CrissCross: pairs and boxes, on every grid."""
    for grid in GRIDS:
        if fits(pattern, grid):
            hold(hold_grids, geometry, pattern, grid, grid)


def test_every_kind_is_held() -> None:
    """No kind is left out here, nor in the table of cases."""
    kinds = lambda patterns: {type(pattern).__name__ for pattern in patterns}
    assert kinds(grid_patterns()) == set(PATTERN_KINDS)
    assert kinds(axis_patterns(0, 3)) == kinds(axis_patterns(1, 3)) == set(PATTERN_KINDS) - {"CrissCross"}
    assert kinds(pattern for pattern, _ in PATTERNS) | {"Global"} == set(PATTERN_KINDS)


def test_parts_of_criss_cross(geometry: ModuleType) -> None:
    for grid in GRIDS:
        hold_criss_cross(geometry, grid)


def test_two_grids(geometry: ModuleType) -> None:
    sides = [Size(1, 1), Size(3, 5), Size(9, 2), Size(4, 1)]
    for queries, keys in itertools.product(sides, sides):
        hold(hold_grids, geometry, va.Global(), queries, keys)


def hold(rule, geometry: ModuleType, pattern: Pattern, *where: object) -> None:
    """Hold a pattern to a rule; a failure says where."""
    try:
        rule(geometry, pattern, *where)
    except AssertionError as error:
        raise AssertionError(f"{pattern} on {where}: {error}") from error


def test_one_region_by_hand(geometry: ModuleType) -> None:
    """A zero border: keys outside exist, and no key outside has queries."""
    grid = Size(4, 5)
    part = geometry.part_of(va.Neighborhood((2, 3), dilation=(1, 2), border="zero").encode(), 0, grid, grid)
    region = part.region_of(1)  # all rows, columns 1 and 3
    assert [(line.start, line.step, line.count) for line in (region.query_y, region.key_x)] == [(0, 1, 4), (1, 2, 2)]
    assert part.keys_of(region, (0, 0, 1, 1)) == [-1, -1, 2, 3]
    assert part.keys_of(region, (2, 0, 2, 2)) == [1, -1, 3, 4]
    assert part.queries_of(region, (3, 0, 1, 1)) == [3, 0, 1, 2]
    assert part.queries_of(region, (0, 1, 1, 1)) == [0, 0, 2, 2]
    assert part.member(0, 0, -1, -1, 4, 2)
    assert not part.member(0, 0, 1, 0, 4, 2)


def test_fields(geometry: ModuleType) -> None:
    assert len(PATTERN_FIELDS) == len(va.Global().encode())
    with pytest.raises(ValueError, match=f"a pattern has {len(PATTERN_FIELDS)} fields"):
        geometry.parts([0] * (len(PATTERN_FIELDS) - 1))
