"""Masks, offsets and reach of every pattern against their definitions, exhaustively on small grids."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import by_hand
import pytest
import torch

import visattn_kernels as va
from visattn_kernels import patterns as module
from visattn_kernels.patterns import PATTERN_FIELDS, PATTERN_KINDS, Pattern, Size

pytestmark = pytest.mark.fast

GRIDS = [*(Size(h, w) for h in range(1, 7) for w in range(1, 7)), Size(12, 10)]


def patterns() -> list[Pattern]:
    """Every kind with all that its options can do on grids up to 6 x 6."""
    every: list[Pattern] = [va.Global(), va.CrissCross()]
    every += [kind(span) for kind in (va.Row, va.Column) for span in (None, 1, 3, 5, 9)]
    every += [va.Window(size, shift) for size in (1, 2, 3, 5, 8) for shift in range(min(size, 4))]
    every += [va.Window((2, 3), (1, 2)), va.Window((7, 1), (4, 0))]
    every += [va.Grid(size) for size in (1, 2, 3, 4, 7)] + [va.Grid((2, 5))]
    causal = (False, True, (True, False))
    every += [
        va.Neighborhood(kernel, dilation, border, flags)
        for kernel, dilation, border, flags in itertools.product(
            (1, 2, 3, 4, (2, 5)), (1, 2, (3, 1)), ("shift", "mask", "zero"), causal
        )
    ]
    return every


@pytest.mark.parametrize("pattern", patterns(), ids=str)
def test_mask_offsets_and_reach(pattern: Pattern) -> None:
    fits = 0
    for grid in GRIDS:
        try:
            pattern.check(grid, grid)
        except ValueError:
            continue
        fits += 1
        (top, bottom), (left, right) = pattern.margin()
        true = torch.zeros(*grid, top + grid.height + bottom, left + grid.width + right, dtype=torch.bool)
        offsets = pattern.offsets(grid, grid, outside=True)
        reach = pattern.reach(grid, grid)
        assert [x.dtype for x in offsets] == [torch.int64] * 2
        for y, x in itertools.product(range(grid.height), range(grid.width)):
            for i, j, dy, dx in by_hand.keys_of(pattern, *grid, y, x):
                assert not true[y, x, i + top, j + left]
                true[y, x, i + top, j + left] = True
                assert (int(offsets[0][y, i + top]), int(offsets[1][x, j + left])) == (dy, dx)
                assert abs(dy) < reach[0]
                assert abs(dx) < reach[1]
        inside = slice(top, top + grid.height), slice(left, left + grid.width)
        inside = slice(top, top + grid.height), slice(left, left + grid.width)
        for outside, seen in ((True, true), (False, true[..., inside[0], inside[1]])):
            assert pattern.pairs(grid, grid, outside) == seen.sum()
            for axis in (0, 1):
                together = seen.any(3 - axis).any(1 - axis).sum()  # positions of this axis, whatever those of the other
                assert pattern.count(axis, grid[axis], grid[axis], outside) == together
        mask = pattern.mask(grid, grid)
        if mask is None:
            assert true.all()
            continue
        assert torch.equal(pattern.mask(grid, grid, outside=True), true)
        assert torch.equal(mask, true[..., inside[0], inside[1]])
        for whole, cut, axis in zip(offsets, pattern.offsets(grid, grid), inside, strict=True):
            assert torch.equal(whole[:, axis], cut)
        if pattern.margin() == ((0, 0), (0, 0)):
            assert mask.flatten(2).any(-1).all()  # no query is without a key
    assert fits


def test_what_a_kernel_that_is_pushed_inside_sees() -> None:
    pattern = va.Neighborhood((3, 2), dilation=(2, 1))
    for grid in GRIDS:
        if grid.height >= 6 and grid.width >= 2:
            assert pattern.mask(grid, grid).flatten(2).sum(-1).eq(6).all()  # K keys, everywhere


def test_swin() -> None:
    """The shifted window is the cyclic shift with its mask, here as in the paper's own code: regions by number."""
    size, shift, side = 4, 2, 12
    regions = torch.zeros(side, side)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for n, (rows, columns) in enumerate(itertools.product(cuts, cuts)):
        regions[rows, columns] = n
    regions = regions.roll((shift, shift), (0, 1))  # back to the map
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    window = ((y - shift) % side // size) * (side // size) + (x - shift) % side // size
    same = (window[:, :, None, None] == window) & (regions[:, :, None, None] == regions)
    grid = Size(side, side)
    assert torch.equal(va.Window(size, shift).mask(grid, grid), same)


@pytest.mark.parametrize(
    ("pattern", "fields"),
    [
        (va.Global(), {}),
        (va.Window((2, 3), (0, 1)), {"size_h": 2, "size_w": 3, "shift_w": 1}),
        (va.Grid((4, 5)), {"size_h": 4, "size_w": 5}),
        (va.Neighborhood(3, (1, 2)), {"size_h": 3, "size_w": 3, "step_h": 1, "step_w": 2}),
        (
            va.Neighborhood((2, 3), border="mask", is_causal=(False, True)),
            {"size_h": 2, "size_w": 3, "step_h": 1, "step_w": 1, "border": 1, "causal_w": 1},
        ),
        (
            va.Neighborhood(1, border="zero", is_causal=True),
            {"size_h": 1, "size_w": 1, "step_h": 1, "step_w": 1, "border": 2, "causal_h": 1, "causal_w": 1},
        ),
        (va.Row(), {}),
        (va.Row(5), {"size_w": 5}),
        (va.Column(3), {"size_h": 3}),
        (va.CrissCross(), {}),
    ],
    ids=str,
)
def test_encoding(pattern: Pattern, fields: dict[str, int]) -> None:
    kind = PATTERN_KINDS.index(type(pattern).__name__)
    named = dict(zip(PATTERN_FIELDS, pattern.encode(), strict=True))
    assert named == {**dict.fromkeys(PATTERN_FIELDS, 0), "kind": kind, **fields}


def test_the_pattern_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that docs/extending.md shows: what it sees, and what it says of a wrong height."""
    document = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    names = dict(vars(module))
    exec(re.search(r"```python\n(.+?)```", document, re.S)[1], names)
    stripes = names["Stripes"]
    mask = stripes(2).mask(Size(5, 3), Size(5, 3))
    assert mask[4, 1].any(1).tolist() == [False] * 4 + [True]
    assert mask[2, 0].sum(1).tolist() == [0, 0, 3, 3, 0]
    assert stripes(2).pairs(Size(5, 3), Size(5, 3)) == mask.sum()
    monkeypatch.setattr(module, "PATTERN_KINDS", (*PATTERN_KINDS, "Stripes"))
    assert dict(zip(PATTERN_FIELDS, stripes(2).encode(), strict=True))["size_h"] == 2
    for wrong, kind in ((0, ValueError), (2**31, ValueError), ((1, 2), TypeError), (True, TypeError)):
        with pytest.raises(kind, match=re.escape(f"height={wrong}")):
            stripes(wrong)
    with pytest.raises(ValueError, match="one grid, as Stripes"):
        stripes(2).check(Size(5, 3), Size(4, 3))


def test_sizes_are_pairs() -> None:
    assert va.Window(7) == va.Window((7, 7), (0, 0)) == va.Window([7, 7])
    assert hash(va.Window(7)) == hash(va.Window((7, 7)))
    assert va.Neighborhood(3, is_causal=True) == va.Neighborhood((3, 3), (1, 1), "shift", (True, True))
    assert va.Grid(2).grid_size == (2, 2)
    assert len({va.Row(), va.Row(3), va.Column(3), va.Row(3)}) == 3
