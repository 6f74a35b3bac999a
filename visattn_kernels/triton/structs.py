"""What a kernel is given: tuples of pointers, strides and sizes, as csrc/problem.h has them."""

from __future__ import annotations

from typing import Any, NamedTuple

WHOLE, CELLS, STRIDED, NEAR = range(4)
"""The kinds of an axis, as in csrc/pattern.h."""


class Map(NamedTuple):
    """A tensor [B, H, W, heads, channels] of any strides, which count elements."""

    data: Any
    batch: int
    y: int
    x: int
    head: int
    channel: int = 1


class Axis(NamedTuple):
    """One axis of a part of a pattern.

    Attributes:
        queries, keys: lengths of the grids.
        size: width of a cell, or kernel.
        step: stride or dilation.
        shift: the first cut between cells.
        reach: K, for relative tables of 2K - 1 entries.
        classes: lines that see nothing of one another.
        blocks: blocks that the longest line is cut into, of queries or of keys as the kernel has it.
    """

    queries: int
    keys: int
    size: int
    step: int
    shift: int
    reach: int
    classes: int
    blocks: int


class Table(NamedTuple):
    """A relative table [heads, entries, channels], contiguous but for its heads; `data` is None where there is none."""

    data: Any = None
    head: int = 0


class Terms(NamedTuple):
    """The terms of a call. `y` and `x` are the kernel's axes, see `launch.Geometry`."""

    bias: Any = None
    bias_head: int = 0
    bias_y: int = 0
    bias_x: int = 0
    query_y: Table = Table()
    query_x: Table = Table()
    key_y: Table = Table()
    key_x: Table = Table()
    value_y: Table = Table()
    value_x: Table = Table()
    key_bias: Any = None
    key_bias_batch: int = 0
    key_bias_y: int = 0
    key_bias_x: int = 0
    key_bias_head: int = 0


class Factors(NamedTuple):
    """The factors of the score: of q·k, of `RelativeQuery` and of `RelativeKey`."""

    scale: float
    query: float
    key: float


class Counts(NamedTuple):
    """Sizes that are no stride and no axis, and do not depend on the batch.

    Triton compiles anew where a number of a tuple becomes 1 or a multiple of 16, or ceases to be. What depends on the
    batch is therefore no part of a tuple: kernels take `batch` and `shares`, how many programs share the tiles of a
    head, as numbers that are not specialised.
    """

    heads: int
    group: int  # query heads of a key head
    tiles: int  # of one map and one head
    positions: int  # of the query grid
    width: int  # of the query grid


class Partials(NamedTuple):
    """Shares of the gradients of tables, float32, contiguous [shares, heads, size].

    Attributes:
        data: None where no table's gradient is wanted.
        size: numbers of a share of one head.
        bias, query_y, ...: where each table begins in it.
    """

    data: Any = None
    size: int = 0
    bias: int = 0
    query_y: int = 0
    query_x: int = 0
    key_y: int = 0
    key_x: int = 0
    value_y: int = 0
    value_x: int = 0


class Config(NamedTuple):
    """All that is known at compile time. Fields alone: Triton's compiler sees no property of a tuple.

    Attributes:
        qy, qx: the box of queries of a tile; m of them.
        ky, kx: the box of keys of a tile; n of them.
        ey, ex: the entries of relative tables that a tile needs, powers of two.
        head_dim, value_dim: D and Dv.
        kind_y, kind_x, causal_y, causal_x, border: of the axes.
        others: a query does not see the key of its own position.
        leaks: NaN in what is masked could reach a result.
        careful: this launch computes heads anew that NaN reached; see `engine`.
        shared: a program has a share of the tiles of a head (backward), instead of one.
        natural: scores are natural ones, not multiplied by log2(e); of float32.
        wide: programs and tiles need 64 bits to be counted.
        precision: of float32 products, "ieee" or "tf32".
        goes_on: this is not the first part.
        with_values: there are values (forward) or gradients of out (backward).
        points: queries are a list.
        grad_q, ...: gradients that are wanted.
        tables, key_tables: whether gradients of tables are, of the query's and of the key's side.
    """

    qy: int
    qx: int
    m: int
    ky: int
    kx: int
    n: int
    ey: int
    ex: int
    head_dim: int
    value_dim: int
    kind_y: int
    kind_x: int
    causal_y: bool
    causal_x: bool
    border: int
    others: bool
    leaks: bool
    precision: str
    natural: bool = False
    wide: bool = False
    careful: bool = False
    shared: bool = False
    goes_on: bool = False
    with_values: bool = True
    points: bool = False
    grad_q: bool = False
    grad_k: bool = False
    grad_v: bool = False
    grad_bias: bool = False
    grad_query_y: bool = False
    grad_query_x: bool = False
    grad_key_y: bool = False
    grad_key_x: bool = False
    grad_value_y: bool = False
    grad_value_x: bool = False
    grad_key_bias: bool = False
    tables: bool = False
    key_tables: bool = False
