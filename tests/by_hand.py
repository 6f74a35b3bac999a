"""The formula written a second time, in plain Python numbers, from the definitions alone.

Nothing of the library takes part but the numbers that describe a pattern, so that no mistake of its masks, offsets or
contractions can be in here too.
"""

from __future__ import annotations

import math

from visattn_kernels import Column, CrissCross, Global, Grid, Neighborhood, Row, Window
from visattn_kernels.patterns import Pattern


def keys_of(pattern: Pattern, height: int, width: int, y: int, x: int) -> list[tuple[int, int, int, int]]:
    """What the query (y, x) of a map sees: (y', x', Δy, Δx) of each key; one outside the map has k = 0 and v = 0."""
    rows, columns = [(i, i - y) for i in range(height)], [(i, i - x) for i in range(width)]
    if isinstance(pattern, CrissCross):
        return [(i, j, dy, dx) for i, dy in rows for j, dx in columns if i == y or j == x]
    if isinstance(pattern, Row):
        rows = [(y, 0)]
        columns = [(j, d) for j, d in columns if pattern.span is None or abs(d) <= pattern.span // 2]
    elif isinstance(pattern, Column):
        columns = [(x, 0)]
        rows = [(i, d) for i, d in rows if pattern.span is None or abs(d) <= pattern.span // 2]
    elif isinstance(pattern, Window):
        rows = cell(y, height, pattern.window_size[0], pattern.shift[0])
        columns = cell(x, width, pattern.window_size[1], pattern.shift[1])
    elif isinstance(pattern, Grid):
        rows, columns = lattice(y, height, pattern.grid_size[0]), lattice(x, width, pattern.grid_size[1])
    elif isinstance(pattern, Neighborhood):
        rows, columns = (
            around(
                position,
                length,
                pattern.kernel_size[axis],
                pattern.dilation[axis],
                pattern.border,
                pattern.is_causal[axis],
            )
            for axis, (position, length) in enumerate(((y, height), (x, width)))
        )
    else:
        assert isinstance(pattern, Global)
    return [(i, j, dy, dx) for i, dy in rows for j, dx in columns]


def cell(y: int, length: int, size: int, shift: int) -> list[tuple[int, int]]:
    """Walk both ways from y until a cut: one lies before each position ≡ shift (mod size)."""
    first, last = y, y
    while first > 0 and first % size != shift:
        first -= 1
    while last + 1 < length and (last + 1) % size != shift:
        last += 1
    return [(i, i - y) for i in range(first, last + 1)]


def lattice(y: int, length: int, count: int) -> list[tuple[int, int]]:
    """Every s-th position, s = ceil(length / count)."""
    s = math.ceil(length / count)
    return [(i, (i - y) // s) for i in range(length) if (i - y) % s == 0]


def around(y: int, length: int, kernel: int, dilation: int, border: str, causal: bool) -> list[tuple[int, int]]:
    """K positions of y's class modulo the dilation."""
    members = [i for i in range(length) if i % dilation == y % dilation]
    here = members.index(y)
    if causal:
        start = here - kernel + 1
    elif border == "shift":
        start = min(max(here - kernel // 2, 0), len(members) - kernel)
    else:
        start = here - kernel // 2
    taken = range(start, start + kernel)
    return [(y + (j - here) * dilation, j - here) for j in taken if border == "zero" or 0 <= j < len(members)]


def attend(q, k, v, pattern: Pattern, scale: float, terms: dict, query_scale: float, key_scale: float):
    """out, lse and the map as nested lists, one number at a time.

    Args:
        q, k, v: nested lists.
        pattern: for maps of different sizes, Global.
        scale: factor of q·k.
        terms: nested lists by schema name, and "reach", (Kh, Kw).
        query_scale: factor of the relative query term.
        key_scale: factor of the relative key term.
    """
    batch, height, width, heads = len(q), len(q[0]), len(q[0][0]), len(q[0][0][0])
    key_height, key_width, kv_heads = len(k[0]), len(k[0][0]), len(k[0][0][0])
    value_dim = len(v[0][0][0][0]) if batch else 0
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))
    reach = terms.get("reach", (0, 0))

    def entry(name: str, h: int, axis: int, offset: int):
        """The vector of a relative table; a table per head is a list of lists of vectors."""
        table = terms.get(f"{name}_{'hw'[axis]}")
        if table is None:
            return None
        table = table[h] if isinstance(table[0][0], list) else table
        assert len(table) == 2 * reach[axis] - 1
        assert offset + reach[axis] - 1 >= 0
        return table[offset + reach[axis] - 1]

    out = [[[[[0.0] * value_dim for _ in range(heads)] for _ in range(width)] for _ in range(height)] for _ in q]
    lse = [[[[-math.inf] * heads for _ in range(width)] for _ in range(height)] for _ in q]
    maps = [
        [
            [[[[0.0] * key_width for _ in range(key_height)] for _ in range(width)] for _ in range(height)]
            for _ in range(heads)
        ]
        for _ in q
    ]
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if isinstance(pattern, Global):
                    seen = [(i, j, i - y, j - x) for i in range(key_height) for j in range(key_width)]
                else:
                    seen = keys_of(pattern, height, width, y, x)
                for h in range(heads):
                    g = h // (heads // kv_heads)
                    query, logits = q[b][y][x][h], {}
                    for i, j, dy, dx in seen:
                        inside = 0 <= i < key_height and 0 <= j < key_width
                        key = k[b][i][j][g] if inside else [0.0] * len(query)
                        logit = scale * dot(query, key)
                        if "relative_bias" in terms:
                            assert min(dy + reach[0], dx + reach[1]) >= 1
                            logit += terms["relative_bias"][h][dy + reach[0] - 1][dx + reach[1] - 1]
                        for axis, offset in ((0, dy), (1, dx)):
                            if (vector := entry("relative_query", h, axis, offset)) is not None:
                                logit += query_scale * dot(query, vector)
                            if (vector := entry("relative_key", h, axis, offset)) is not None:
                                logit += key_scale * dot(key, vector)
                        if "key_bias" in terms and inside:
                            bias = terms["key_bias"][b][i][j]
                            bias = bias[h] if isinstance(bias, list) else bias
                            if bias == -math.inf:
                                continue
                            logit += bias
                        logits[i, j, dy, dx] = logit
                    if not logits:
                        continue
                    total = sum(math.exp(logit) for logit in logits.values())
                    lse[b][y][x][h] = math.log(total)
                    for (i, j, dy, dx), logit in logits.items():
                        p = math.exp(logit) / total
                        inside = 0 <= i < key_height and 0 <= j < key_width
                        value = v[b][i][j][g] if inside else [0.0] * value_dim
                        if inside:
                            maps[b][h][y][x][i][j] = p
                        for axis, offset in ((0, dy), (1, dx)):
                            if (vector := entry("relative_value", h, axis, offset)) is not None:
                                value = [a + c for a, c in zip(value, vector, strict=True)]
                        for c in range(value_dim):
                            out[b][y][x][h][c] += p * value[c]
    return out, lse, maps
