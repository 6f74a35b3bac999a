"""What the kernels are made of: pieces of channels, products, relative vectors, scores.

A tile is a box of QY x QX queries, M in all, against a box of KY x KX keys, N in all, both in raster order. Channels come
in *pieces* of powers of two, a tuple of tensors [rows, piece]: D = 80 is (64, 16), D = 512 is (128,) * 4. So no width is
padded by more than its last piece.

Relative vectors. In a tile the offset of key (ky, kx) and query (qy, qx) along y takes QY + KY - 1 values, so the
products of the queries with those entries of the table are a small T[M, E]; the score of pair (m, n) takes T[m, e] at

    e = ky - qy + QY - 1,

which is known at compile time: a fixed permutation (`skew`). Gradients go back by the inverse: sums of dS over the keys
of one ky, put at their e (`unskew`), times the table, or times the queries.

Leaks. A product over a tile multiplies what a masked pair would bring by 0, and 0 * NaN is NaN. Each kernel computes
with plain products, looks whether its result is finite, and only if it is not computes again with CAREFUL ones, which
treat what is not finite as the reference does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visattn_kernels.triton.geometry import NEAR, ZERO, end_key, end_query, first_key, first_query, sees

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Pieces of channels.


@triton.jit
def load_pieces(data, offset, there, channel, width, PIECES: tl.constexpr):
    """Rows of a map, [rows, piece] each; zeros where a row is not there and beyond the width."""
    out = ()
    for i in tl.static_range(len(PIECES)):
        c = i * tl.constexpr(PIECES[0]) + tl.arange(0, tl.constexpr(PIECES[i]))
        at = data + (offset[:, None] + c.to(tl.int64)[None, :] * channel)
        out = out + (tl.load(at, mask=there[:, None] & (c < width)[None, :], other=0.0),)
    return out


@triton.jit
def store_pieces(data, offset, there, channel, width, pieces, PIECES: tl.constexpr):
    """The inverse of `load_pieces`, in the dtype of the tensor."""
    for i in tl.static_range(len(PIECES)):
        c = i * tl.constexpr(PIECES[0]) + tl.arange(0, tl.constexpr(PIECES[i]))
        at = data + (offset[:, None] + c.to(tl.int64)[None, :] * channel)
        tl.store(at, pieces[i].to(data.dtype.element_ty), mask=there[:, None] & (c < width)[None, :])


@triton.jit
def zero_pieces(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Sums that start at 0, float32."""
    out = ()
    for i in tl.static_range(len(PIECES)):
        out = out + (tl.zeros([ROWS, tl.constexpr(PIECES[i])], tl.float32),)
    return out


@triton.jit
def scale_pieces(pieces, factor):
    """Every row times its factor."""
    out = ()
    for i in tl.static_range(len(pieces)):
        out = out + (pieces[i] * factor[:, None],)
    return out


@triton.jit
def any_not_finite(pieces):
    """Whether there is a NaN or an Inf, as 0 or more."""
    count = 0
    for i in tl.static_range(len(pieces)):
        count += tl.sum(tl.sum((pieces[i] - pieces[i] != 0).to(tl.int32), 1), 0)
    return count


# Products.


@triton.jit
def dot_rows(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Products of rows with rows: [ROWS, COLUMNS], summed over all pieces."""
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(sums, p, b, seen, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """`sums + p @ b` for each piece of b; CAREFUL: over the pairs that are seen, whatever the others hold."""
    out = ()
    for i in tl.static_range(len(b)):
        x = b[i]
        if CAREFUL:
            out = out + (sums[i] + _careful(p, x, seen, PRECISION),)
        else:
            out = out + (tl.dot(p.to(x.dtype), x, sums[i], input_precision=PRECISION),)
    return out


@triton.jit
def _careful(p, b, seen, PRECISION: tl.constexpr):
    """p @ b where NaN and Inf of b reach the rows that see them and no other; where p is 0, 0 * Inf is NaN."""
    p = tl.where(seen, p, 0.0)
    finite = b - b == 0
    out = tl.dot(p.to(b.dtype), tl.where(finite, b, 0.0).to(b.dtype), input_precision=PRECISION)
    see = seen.to(tl.float32)
    for sign in tl.static_range(3):
        if sign == 0:
            at = (b != b).to(tl.float32)
            value = float("nan")
        elif sign == 1:
            at = (b == float("inf")).to(tl.float32)
            value = float("inf")
        else:
            at = (b == float("-inf")).to(tl.float32)
            value = float("-inf")
        met = tl.dot(see, at, input_precision="ieee") > 0.5
        out += tl.dot(p.to(tl.float32), at, input_precision="ieee") * tl.where(met, value, 0.0)
    return out


# Boxes.


@triton.jit
def indices(first_y, first_x, BY: tl.constexpr, BX: tl.constexpr):
    """The indices along y and x of a box's positions, in raster order, int32[BY * BX]."""
    r = tl.arange(0, BY * BX)
    return first_y + r // BX, first_x + r % BX


@triton.jit
def offsets(map, line_y, line_x, i_y, i_x):
    """Where positions of a line lie in a map, int64[rows], without map and head."""
    position_y = (line_y[0] + i_y * line_y[1]).to(tl.int64)
    position_x = (line_x[0] + i_x * line_x[1]).to(tl.int64)
    return position_y * map.y + position_x * map.x


@triton.jit
def key_range(axis, first, end, n, KIND: tl.constexpr, CAUSAL: tl.constexpr, C: tl.constexpr):
    """The keys, first and end, of the queries [first, end) of a class of n keys; none of no query."""
    low = first_key(axis, first, n, KIND, C.border, CAUSAL)
    high = end_key(axis, tl.maximum(end - 1, first), n, KIND, C.border, CAUSAL)
    return low, tl.where(first < end, high, low)


@triton.jit
def query_range(axis, first, end, n, KIND: tl.constexpr, CAUSAL: tl.constexpr, C: tl.constexpr):
    """The queries, first and end, of the keys [first, end) of a class of n queries; none of no key."""
    low = first_query(axis, first, n, KIND, C.border, CAUSAL)
    high = end_query(axis, tl.maximum(end - 1, first), n, KIND, C.border, CAUSAL)
    return low, tl.where(first < end, high, low)


@triton.jit
def inside(j, n, exist, C: tl.constexpr):
    """Of the keys of a box along an axis that exist, those on the map."""
    return exist & (j >= 0) & (j < n) if C.border == ZERO else exist


@triton.jit
def visible(y, x, i_y, i_x, j_y, j_x, n_y, n_x, queries, keys, C: tl.constexpr):
    """Which of the tile's pairs see one another, bool[M, N]; `queries` and `keys` say which of them are there."""
    seen = queries[:, None] & keys[None, :]
    if C.kind_y == NEAR:
        seen = seen & sees(y, i_y, j_y, n_y, C.kind_y, C.border, C.causal_y)
    if C.kind_x == NEAR:
        seen = seen & sees(x, i_x, j_x, n_x, C.kind_x, C.border, C.causal_x)
    if C.others:
        seen = seen & ((i_y[:, None] != j_y[None, :]) | (i_x[:, None] != j_x[None, :]))
    return seen


# Relative vectors. `A` is the axis, 0 for y and 1 for x; within a tile, query m lies at _query(m) of it and key n at
# _key(n).


@triton.jit
def _query(A: tl.constexpr, C: tl.constexpr):
    m = tl.arange(0, C.m)
    return m // C.qx if A == 0 else m % C.qx


@triton.jit
def _key(A: tl.constexpr, C: tl.constexpr):
    n = tl.arange(0, C.n)
    return n // C.kx if A == 0 else n % C.kx


@triton.jit
def first_entry(axis, first_i, first_j, A: tl.constexpr, C: tl.constexpr):
    """The entry of a table that column 0 of T stands for, for a tile that begins at these indices."""
    return first_j - first_i - (C.qy if A == 0 else C.qx) + axis.reach


@triton.jit
def load_table(table, head, first, axis, width, A: tl.constexpr, PIECES: tl.constexpr, C: tl.constexpr):
    """The rows of a table from entry `first` on, [E, piece] each; zeros where the table has none."""
    e = first + tl.arange(0, C.ey if A == 0 else C.ex)
    there = (e >= 0) & (e < 2 * axis.reach - 1)
    return load_pieces(table.data + head * table.head, e.to(tl.int64) * width, there, 1, width, PIECES)


@triton.jit
def skew_queries(t, A: tl.constexpr, C: tl.constexpr):
    """From products of queries and entries, [M, E], what each pair takes, [M, N]."""
    e = _key(A, C)[None, :] - _query(A, C)[:, None] + ((C.qy if A == 0 else C.qx) - 1)
    return tl.gather(t, e, 1)


@triton.jit
def skew_keys(t, A: tl.constexpr, C: tl.constexpr):
    """From products of keys and entries, [N, E], what each pair takes, [M, N]."""
    e = _key(A, C)[:, None] - _query(A, C)[None, :] + ((C.qy if A == 0 else C.qx) - 1)
    return tl.trans(tl.gather(t, e, 1))


@triton.jit
def _take(x, index, AXIS: tl.constexpr, LENGTH: tl.constexpr):
    """x at `index` along an axis of the given length, 0 where the index lies outside it."""
    there = (index >= 0) & (index < LENGTH)
    if LENGTH == 1:
        taken = tl.where(there, x, 0.0)
    else:
        taken = tl.where(there, tl.gather(x, tl.minimum(tl.maximum(index, 0), LENGTH - 1), AXIS), 0.0)
    return taken


@triton.jit
def sum_over_keys(g, A: tl.constexpr, C: tl.constexpr):
    """Sums over the keys of one index along A: [M, N] to [M, KY] or [M, KX]."""
    if C.kx == 1 if A == 0 else C.ky == 1:
        sums = g
    else:
        sums = tl.sum(tl.reshape(g, [C.m, C.ky, C.kx]), 2 if A == 0 else 1)
    return sums


@triton.jit
def unskew_queries(sums, A: tl.constexpr, C: tl.constexpr):
    """From sums over the keys of one index, put each at its entry: [M, E]."""
    e = tl.arange(0, C.ey if A == 0 else C.ex)
    index = e[None, :] + _query(A, C)[:, None] - ((C.qy if A == 0 else C.qx) - 1)
    return _take(sums, index, 1, C.ky if A == 0 else C.kx)


@triton.jit
def unskew_keys(g, A: tl.constexpr, C: tl.constexpr):
    """From [M, N], sums over the queries of one index along A, each at its entry: [N, E]."""
    t = tl.trans(g)
    if not (C.qx == 1 if A == 0 else C.qy == 1):
        t = tl.sum(tl.reshape(t, [C.n, C.qy, C.qx]), 2 if A == 0 else 1)
    e = tl.arange(0, C.ey if A == 0 else C.ex)
    index = _key(A, C)[:, None] + ((C.qy if A == 0 else C.qx) - 1) - e[None, :]
    return _take(t, index, 1, C.qy if A == 0 else C.qx)


@triton.jit
def unskew_both(g, C: tl.constexpr):
    """From [M, N], the sum over the pairs of each pair of offsets: [EY, EX]."""
    t = tl.reshape(g, [C.qy, C.qx, C.ky, C.kx])
    e_x = tl.arange(0, C.ex)[None, None, None, :]
    q_x = tl.arange(0, C.qx)[None, :, None, None]
    index = tl.broadcast_to(e_x + q_x - (C.qx - 1), [C.qy, C.qx, C.ky, C.ex])
    t = tl.sum(_take(t, index, 3, C.kx), 1)  # [QY, KY, EX]
    e_y = tl.arange(0, C.ey)[None, :, None]
    q_y = tl.arange(0, C.qy)[:, None, None]
    index = tl.broadcast_to(e_y + q_y - (C.qy - 1), [C.qy, C.ey, C.ex])
    return tl.sum(_take(t, index, 1, C.ky), 0)


@triton.jit
def query_part(rows, table, head, first, axis, width, A: tl.constexpr, PIECES: tl.constexpr, C: tl.constexpr):
    """Products of each pair's query-side row with its entry of a table, [M, N]."""
    t = dot_rows(rows, load_table(table, head, first, axis, width, A, PIECES, C), C.m, C.ey if A == 0 else C.ex, C.precision)
    return skew_queries(t, A, C)


@triton.jit
def key_part(rows, table, head, first, axis, width, A: tl.constexpr, PIECES: tl.constexpr, C: tl.constexpr):
    """Products of each pair's key with its entry of a table, [M, N]."""
    t = dot_rows(rows, load_table(table, head, first, axis, width, A, PIECES, C), C.n, C.ey if A == 0 else C.ex, C.precision)
    return skew_keys(t, A, C)


@triton.jit
def add_along(sums, t, seen, table, head, first, axis, width, A: tl.constexpr, PIECES: tl.constexpr, CAREFUL: tl.constexpr, C: tl.constexpr):
    """`sums + t @ entries`, for t[M, E] or t[N, E]; `seen` shaped like t, looked at only if CAREFUL."""
    return add_product(sums, t, load_table(table, head, first, axis, width, A, PIECES, C), seen, CAREFUL, C.precision)


# Gradients of tables: each program adds to a share of its own.


@triton.jit
def add_to_table(share, t, rows, seen, first, axis, width, A: tl.constexpr, PIECES: tl.constexpr, CAREFUL: tl.constexpr, C: tl.constexpr):
    """Add t^T @ rows to the entries from `first` on of a share [2K - 1, width]; how much was not finite."""
    E: tl.constexpr = C.ey if A == 0 else C.ex
    added = add_product(zero_pieces(E, PIECES), tl.trans(t), rows, seen, CAREFUL, C.precision)
    e = first + tl.arange(0, E)
    there = (e >= 0) & (e < 2 * axis.reach - 1)
    old = load_pieces(share, e.to(tl.int64) * width, there, 1, width, PIECES)
    new = ()
    for i in tl.static_range(len(PIECES)):
        new = new + (old[i] + added[i],)
    store_pieces(share, e.to(tl.int64) * width, there, 1, width, new, PIECES)
    tl.debug_barrier()  # other threads read these numbers next time
    return any_not_finite(added)


@triton.jit
def add_to_bias(share, t, first_y, first_x, y, x, C: tl.constexpr):
    """Add t[EY, EX] to the entries from (first_y, first_x) on of a share [2Ky - 1, 2Kx - 1]."""
    e_y = first_y + tl.arange(0, C.ey)
    e_x = first_x + tl.arange(0, C.ex)
    there_y = (e_y >= 0) & (e_y < 2 * y.reach - 1)
    there_x = (e_x >= 0) & (e_x < 2 * x.reach - 1)
    there = there_y[:, None] & there_x[None, :]
    at = share + (e_y.to(tl.int64)[:, None] * (2 * x.reach - 1) + e_x[None, :])
    tl.store(at, tl.load(at, mask=there, other=0.0) + t, mask=there)
    tl.debug_barrier()


@triton.jit
def clear(share, size):
    """Set a share to 0."""
    for first in range(0, size, 1024):
        at = first + tl.arange(0, 1024)
        tl.store(share + at.to(tl.int64), tl.zeros([1024], tl.float32), mask=at < size)
    tl.debug_barrier()


# Scores.


@triton.jit
def load_key_bias(terms, b, head, line_y, line_x, j_y, j_x, there):
    """The bias of each key, float32[N]; 0 where it is not on the map."""
    position_y = (line_y[0] + j_y * line_y[1]).to(tl.int64)
    position_x = (line_x[0] + j_x * line_x[1]).to(tl.int64)
    base = terms.key_bias + b * terms.key_bias_batch + head * terms.key_bias_head
    at = base + (position_y * terms.key_bias_y + position_x * terms.key_bias_x)
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def scores(
    q, k, key_bias, across, terms, factors, counts, head, y, x, i_y, i_x, j_y, j_x,
    i_y0, i_x0, j_y0, j_x0, seen, ACROSS: tl.constexpr, C: tl.constexpr,
):
    """The scores of a tile in base 2, [M, N] float32; -inf in pairs that are not seen.

    Args:
        q, k: pieces of the rows.
        key_bias: that of each key, or None.
        across: the query's part along x if ACROSS, where it was computed before.
    """
    s = dot_rows(q, k, C.m, C.n, C.precision) * (factors.scale * LOG2E)
    if terms.query_y.data is not None:
        first = first_entry(y, i_y0, j_y0, 0, C)
        part = query_part(q, terms.query_y, head, first, y, counts.head_dim, 0, C.pieces_d, C)
        s += part * (factors.query * LOG2E)
    if terms.query_x.data is not None:
        if ACROSS:
            part = across
        else:
            first = first_entry(x, i_x0, j_x0, 1, C)
            part = query_part(q, terms.query_x, head, first, x, counts.head_dim, 1, C.pieces_d, C)
        s += part * (factors.query * LOG2E)
    if terms.key_y.data is not None:
        first = first_entry(y, i_y0, j_y0, 0, C)
        part = key_part(k, terms.key_y, head, first, y, counts.head_dim, 0, C.pieces_d, C)
        s += part * (factors.key * LOG2E)
    if terms.key_x.data is not None:
        first = first_entry(x, i_x0, j_x0, 1, C)
        part = key_part(k, terms.key_x, head, first, x, counts.head_dim, 1, C.pieces_d, C)
        s += part * (factors.key * LOG2E)
    if terms.bias is not None:
        to = (j_y + (y.reach - 1)).to(tl.int64) * terms.bias_y + (j_x + (x.reach - 1)).to(tl.int64) * terms.bias_x
        of = i_y.to(tl.int64) * terms.bias_y + i_x.to(tl.int64) * terms.bias_x
        at = terms.bias + head * terms.bias_head + (to[None, :] - of[:, None])
        s += tl.load(at, mask=seen, other=0.0).to(tl.float32) * LOG2E
    if key_bias is not None:
        s += key_bias[None, :] * LOG2E
    return tl.where(seen, s, float("-inf"))


@triton.jit
def value_part(rows, across, terms, counts, head, y, i_y0, j_y0, ACROSS: tl.constexpr, C: tl.constexpr):
    """What value terms add to the product of a gradient row with a pair's value, [M, N]; `across` is that along x."""
    part = across
    if terms.value_y.data is not None:
        first = first_entry(y, i_y0, j_y0, 0, C)
        part = part + query_part(rows, terms.value_y, head, first, y, counts.value_dim, 0, C.pieces_v, C)
    return part
