"""One result by two patterns: what the CPU engine must compute alike, to the bit where the claim is that strong.

Bits are equal where both ways add the same numbers in the same order. They are not where the engine cuts the two into
other tiles or takes another pass; those are held in float64, where a wrong key cannot pass for rounding.
"""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from cases import Case, differentiate, inputs, short

import visattn_kernels as va
from visattn_kernels.backends import cpu
from visattn_kernels.patterns import Pattern

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable())),
    pytest.mark.usefixtures("two_threads"),
]

Results = dict[str, torch.Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
GRIDS = [(3, 5), (7, 11), (16, 12), (23, 9)]
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v")

on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
on_grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))


def tensors_of(grid: tuple[int, int], dtype: torch.dtype = torch.float64, **shapes: int) -> Results:
    """q, k, v and the gradients of out and lse, heads grouped."""
    return inputs(Case(dtype, queries=grid, keys=grid, **{"heads": 4, "head_dim": 6, "value_dim": 5, **shapes}))


def run(pattern: Pattern, tensors: Results) -> Results:
    """out, lse and the gradients of q, k and v by the CPU engine."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return va.attention(q, k, v, pattern, backend="cpu", return_lse=True)

    return differentiate(forward, tensors, "qkv")


def each(tensors: Results, function) -> Results:
    """`function` of every tensor."""
    return {name: function(x) for name, x in tensors.items()}


def cut(tensors: Results, ys: slice, xs: slice) -> Results:
    """A part of the map."""
    return each(tensors, lambda x: x[:, ys, xs])


def transpose(tensors: Results) -> Results:
    """Columns for rows."""
    return each(tensors, lambda x: x.transpose(1, 2))


def same_bits(a: Results, b: Results, names: tuple[str, ...] = NAMES) -> None:
    """Hold results to be equal to the bit."""
    for name in names:
        assert torch.equal(a[name], b[name]), name


def same_numbers(a: Results, b: Results, names: tuple[str, ...] = NAMES) -> None:
    """Hold float64 results to be equal but for rounding."""
    for name in names:
        assert a[name].dtype == torch.float64
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@on_dtypes
@on_grids
def test_one_cell_is_global(grid: tuple[int, int], dtype: torch.dtype) -> None:
    h, w = grid
    tensors = tensors_of(grid, dtype)
    expected = run(va.Global(), tensors)
    windows = va.Window(grid), va.Window((h + 3, w + 2)), va.Window((2 * h, 2 * w), shift=grid)
    for pattern in (*windows, va.Grid(grid), va.Grid((h + 1, 2 * w))):
        same_bits(run(pattern, tensors), expected)


@on_dtypes
@on_grids
def test_neighborhood_of_the_whole_map_is_global(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """The gradient of q of near patterns has a pass of its own, so that it adds in another order."""
    tensors = tensors_of(grid, dtype)
    results, expected = (run(pattern, tensors) for pattern in (va.Neighborhood(grid), va.Global()))
    same_bits(results, expected, ("out", "lse", "grad_k", "grad_v"))
    if dtype == torch.float64:
        same_numbers(results, expected, ("grad_q",))


@on_dtypes
@pytest.mark.parametrize("length", [1, 9, 40, 150])
def test_one_row_or_column_is_global(length: int, dtype: torch.dtype) -> None:
    for pattern, grid in ((va.Row(), (1, length)), (va.Column(), (length, 1))):
        tensors = tensors_of(grid, dtype)
        same_bits(run(pattern, tensors), run(va.Global(), tensors))


@on_dtypes
@on_grids
def test_transpose_makes_a_row_a_column(grid: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = tensors_of(grid, dtype)
    for pattern, other in ((va.Row(), va.Column()), (va.Column(), va.Row())):
        same_bits(run(pattern, tensors), transpose(run(other, transpose(tensors))))


@on_grids
def test_transpose_to_rounding(grid: tuple[int, int]) -> None:
    """Spans are walked by vectors that are rectangles, others after a transpose; CrissCross adds its rows first."""
    tensors = tensors_of(grid)
    spans = [(va.Row(span), va.Column(span)) for span in (1, 3, 11)]
    for pattern, other in (*spans, (va.CrissCross(), va.CrissCross())):
        same_numbers(run(pattern, tensors), transpose(run(other, transpose(tensors))))


@on_dtypes
@on_grids
def test_window_of_one_returns_the_value(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """And its gradient: the backward has the very scores of the forward, so that a weight of 1 is 1, however large."""
    tensors = tensors_of(grid, dtype, kv_heads=2)
    tensors["q"] *= 16
    results = run(va.Window(1), tensors)
    k, v = (tensors[name].repeat_interleave(2, 3) for name in "kv")
    assert torch.equal(results["out"], v)
    wide = torch.promote_types(dtype, torch.float32)
    grad_v = tensors["grad_out"].to(wide).unflatten(3, (2, 2)).sum(4)
    assert torch.equal(results["grad_v"], grad_v.to(dtype))
    if dtype == torch.float64:
        lse = (tensors["q"] * k).sum(-1) * k.shape[-1] ** -0.5
        same_numbers(results, {"lse": lse}, ("lse",))


@on_dtypes
@pytest.mark.parametrize("length", [9, 40, 150])
def test_span_is_a_neighborhood_in_one_row(length: int, dtype: torch.dtype) -> None:
    for span in (1, 5, 11, 2 * length + 1):
        tensors = tensors_of((1, length), dtype)
        same_bits(run(va.Row(span), tensors), run(va.Neighborhood((1, span), border="mask"), tensors))
        tensors = transpose(tensors)
        same_bits(run(va.Column(span), tensors), run(va.Neighborhood((span, 1), border="mask"), tensors))


@on_grids
@pytest.mark.parametrize("span", [1, 3, 7, 25])
def test_span_is_a_neighborhood(grid: tuple[int, int], span: int) -> None:
    """To rounding: `Neighborhood` walks one region with several rows in a vector, `Row` a region for each row."""
    tensors = tensors_of(grid)
    same_numbers(run(va.Row(span), tensors), run(va.Neighborhood((1, span), border="mask"), tensors))
    same_numbers(run(va.Column(span), tensors), run(va.Neighborhood((span, 1), border="mask"), tensors))


@on_dtypes
@pytest.mark.parametrize(
    ("grid", "size", "shift"),
    [
        ((3, 5), (2, 3), (0, 0)),
        ((7, 11), (4, 5), (1, 3)),
        ((16, 12), (8, 7), (3, 0)),
        ((23, 9), (16, 9), (7, 0)),
        ((16, 8), (9, 8), (0, 0)),
    ],
)
def test_window_is_global_on_each_cell(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], dtype: torch.dtype
) -> None:
    """The gradient of q is summed over tiles that suit the largest cell, so that a smaller one may round otherwise."""
    tensors = tensors_of(grid, dtype)
    whole = run(va.Window(size, shift), tensors)
    rows, columns = (
        [slice(*ends) for ends in pairwise(sorted({0, *range(shift[axis], grid[axis], size[axis]), grid[axis]}))]
        for axis in (0, 1)
    )
    for ys, xs in product(rows, columns):
        results, expected = cut(whole, ys, xs), run(va.Global(), cut(tensors, ys, xs))
        full = (ys.stop - ys.start, xs.stop - xs.start) == size
        same_bits(results, expected, NAMES if full else ("out", "lse", "grad_k", "grad_v"))
        if dtype == torch.float64:
            same_numbers(results, expected, ("grad_q",))


@on_grids
def test_criss_cross_is_a_row_and_a_column_merged(grid: tuple[int, int]) -> None:
    """The column without the query itself: for the queries of one row, `Column` with that row's keys removed.

    To rounding: `merge` rounds out and lse of both before it weighs them.
    """
    tensors = tensors_of(grid, kv_heads=2)
    height = grid[0]

    def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        call = {"backend": "cpu", "return_lse": True}
        columns = []
        for y in range(height):
            bias = torch.zeros(k.shape[:3], dtype=k.dtype)
            bias[:, y] = -torch.inf
            parts = va.attention(q, k, v, va.Column(), terms=(va.KeyBias(bias),), **call)
            columns.append([x[:, y] for x in parts])
        column = [torch.stack(rows, 1) for rows in zip(*columns, strict=True)]
        return va.merge([va.attention(q, k, v, va.Row(), **call), column])

    same_numbers(run(va.CrissCross(), tensors), differentiate(merged, tensors, "qkv"))


DILATED = [
    ((3, 2), (2, 2), False),
    ((2, 3), (3, 1), (True, False)),
    ((5, 4), (2, 3), False),
    ((1, 7), (1, 2), (False, True)),
]


def hold_dilated(tensors: Results, border: str, hold) -> None:
    """Hold dilated neighborhoods to those without dilation on each sub-grid."""
    grid = tensors["q"].shape[1:3]
    for kernel, dilation, causal in DILATED:
        if border == "shift" and any(k * d > n for k, d, n in zip(kernel, dilation, grid, strict=True)):
            continue
        whole = run(va.Neighborhood(kernel, dilation, border, causal), tensors)
        for y in range(dilation[0]):
            for x in range(dilation[1]):
                part = slice(y, None, dilation[0]), slice(x, None, dilation[1])
                hold(cut(whole, *part), run(va.Neighborhood(kernel, 1, border, causal), cut(tensors, *part)))


@on_dtypes
@pytest.mark.parametrize("border", ["shift", "mask", "zero"])
def test_dilation_is_a_neighborhood_on_each_of_equal_sub_grids(border: str, dtype: torch.dtype) -> None:
    for grid in ((6, 6), (12, 18)):
        hold_dilated(tensors_of(grid, dtype), border, same_bits)


@on_grids
@pytest.mark.parametrize("border", ["shift", "mask", "zero"])
def test_dilation_is_a_neighborhood_on_each_sub_grid(border: str, grid: tuple[int, int]) -> None:
    """To rounding where sub-grids differ in size: the vectors of all are those that suit the largest."""
    hold_dilated(tensors_of(grid), border, same_numbers)


PATTERNS = [
    va.Global(),
    va.Window((4, 5), shift=(1, 2)),
    va.Grid(3),
    va.Neighborhood(3),
    va.Neighborhood((4, 3), dilation=(1, 2), border="zero"),
    va.Row(),
    va.Row(5),
    va.Column(),
    va.CrissCross(),
]
on_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=short)


@on_dtypes
@on_patterns
def test_a_map_alone_and_a_second_run(pattern: Pattern, dtype: torch.dtype) -> None:
    for grid in ((7, 11), (16, 12)):
        tensors = tensors_of(grid, dtype, batch=3, kv_heads=2)
        results = run(pattern, tensors)
        same_bits(run(pattern, tensors), results)
        for b in (slice(0, 1), slice(2, 3), slice(1, 3)):
            same_bits(run(pattern, each(tensors, lambda x, b=b: x[b])), each(results, lambda x, b=b: x[b]))


@on_dtypes
@on_patterns
def test_grouped_heads_are_repeated_heads(pattern: Pattern, dtype: torch.dtype) -> None:
    """The gradients of k and v are sums over the heads of a group, which the engine adds up within its own sums."""
    for kv_heads in (1, 2):
        tensors = tensors_of((7, 11), dtype, kv_heads=kv_heads)
        repeated = {**tensors, **{name: tensors[name].repeat_interleave(4 // kv_heads, 3) for name in "kv"}}
        results, expected = run(pattern, tensors), run(pattern, repeated)
        same_bits(results, expected, ("out", "lse", "grad_q"))
        if dtype == torch.float64:
            for name in ("grad_k", "grad_v"):
                expected[name] = expected[name].unflatten(3, (kv_heads, -1)).sum(4)
            same_numbers(results, expected, ("grad_k", "grad_v"))
