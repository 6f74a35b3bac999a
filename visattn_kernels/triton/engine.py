"""What the kernels are made of: pieces of channels, products, relative vectors, scores.

A tile is a box of QY x QX queries, M in all, against a box of KY x KX keys, N in all, both in raster order. Channels
come in *pieces* of powers of two, a tuple of tensors [rows, piece]: D = 80 is (64, 16), D = 512 is (128,) * 4. So no
width is padded by more than its last piece.

Relative vectors. In a tile the offset of key (ky, kx) and query (qy, qx) along y takes QY + KY - 1 values, so the
products of the queries with those entries of the table are a small T[M, E]; the score of pair (m, n) takes T[m, e] at

    e = ky - qy + QY - 1,

which is known at compile time: a fixed permutation (`skew`). Gradients go back by the inverse: sums of dS over the keys
of one ky, put at their e (`unskew`), times the table, or times the queries.

Leaks. A product over a tile multiplies what a masked pair would bring by 0, and 0 * NaN is NaN. Each kernel computes
with plain products and sets the flag of a head in which a result is not finite. Where masked pairs can be in a product
(C.leaks) it is launched a second time, C.careful: for heads with a flag, all of them anew, with products that treat
what is not finite as the reference does. As a rule there is none, and that is a look at a flag.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visattn_kernels.triton.geometry import NEAR, ZERO, end_key, end_query, first_key, first_query, sees

LN2 = tl.constexpr(0.6931471805599453)


# Pieces of channels, known at compile time.


@triton.constexpr_function
def pieces(width):
    """The pieces of a width: powers of two of at least 16, equal but for the last, which is smaller.

    80 is (64, 16), 512 is (128,) * 4, 3 is (16,). A tail that would pad to the size of the rest is one piece with it.
    """
    padded = -(-max(width, 1) // 16) * 16
    if padded >= 128:
        full, rest = padded // 128, padded % 128
        return (128,) * full + ((1 << (rest - 1).bit_length(),) if rest else ())
    first = 1 << (padded - 1).bit_length()
    if padded == first:
        return (first,)
    rest = 1 << (padded - first // 2 - 1).bit_length()
    return (first,) if rest == first // 2 else (first // 2, rest)


@triton.constexpr_function
def piece_count(width):
    """How many pieces a width has."""
    return len(pieces(width))


@triton.constexpr_function
def piece(width, i):
    """The channels of a piece."""
    return pieces(width)[i]


@triton.constexpr_function
def piece_start(width, i):
    """The first channel of a piece."""
    return i * pieces(width)[0]


@triton.jit
def load_pieces(data, offset, there, channel, WIDTH: tl.constexpr):
    """Rows of a map, [rows, piece] each; zeros where a row is not there and beyond the width."""
    out = ()
    for i in tl.static_range(piece_count(WIDTH)):
        c = piece_start(WIDTH, i) + tl.arange(0, piece(WIDTH, i))
        at = data + (offset[:, None] + c.to(tl.int64)[None, :] * channel)
        mask = there[:, None]
        if (
            piece_start(WIDTH, i) + piece(WIDTH, i) > WIDTH
        ):  # a mask of columns would keep whole pieces from being read in whole vectors
            mask = mask & (c < WIDTH)[None, :]
        out = out + (tl.load(at, mask=mask, other=0.0),)
    return out


@triton.jit
def store_pieces(data, offset, there, channel, WIDTH: tl.constexpr, pieces):
    """The inverse of `load_pieces`, in the dtype of the tensor."""
    for i in tl.static_range(piece_count(WIDTH)):
        c = piece_start(WIDTH, i) + tl.arange(0, piece(WIDTH, i))
        at = data + (offset[:, None] + c.to(tl.int64)[None, :] * channel)
        mask = there[:, None]
        if piece_start(WIDTH, i) + piece(WIDTH, i) > WIDTH:
            mask = mask & (c < WIDTH)[None, :]
        tl.store(at, pieces[i].to(data.dtype.element_ty), mask=mask)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums that start at 0, float32."""
    out = ()
    for i in tl.static_range(piece_count(WIDTH)):
        out = out + (tl.zeros([ROWS, piece(WIDTH, i)], tl.float32),)
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
def dot_rows(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr):
    """Products of rows with rows: [ROWS, COLUMNS], summed over all pieces."""
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=C.precision)
    return s


@triton.jit
def add_product(sums, p, b, seen, CAREFUL: tl.constexpr, C: tl.constexpr):
    """`sums + p @ b` for each piece of b; CAREFUL: over the pairs that are seen, whatever the others hold."""
    out = ()
    for i in tl.static_range(len(b)):
        x = b[i]
        if CAREFUL:
            out = out + (sums[i] + _careful(p, x, seen, C),)
        else:
            out = out + (tl.dot(p.to(x.dtype), x, sums[i], input_precision=C.precision),)
    return out


@triton.jit
def _careful(p, b, seen, C: tl.constexpr):
    """P @ b where NaN and Inf of b reach the rows that see them and no other; where p is 0, 0 * Inf is NaN."""
    p = tl.where(seen, p, 0.0).to(b.dtype)
    finite = b - b == 0
    out = tl.dot(p, tl.where(finite, b, 0.0).to(b.dtype), input_precision=C.precision)
    see = seen.to(b.dtype)
    for sign in tl.static_range(3):
        if sign == 0:
            at = (b != b).to(b.dtype)
            value = float("nan")
        elif sign == 1:
            at = (b == float("inf")).to(b.dtype)
            value = float("inf")
        else:
            at = (b == float("-inf")).to(b.dtype)
            value = float("-inf")
        # What counts here is zero, positive or negative: TF32 does for float32.
        met = tl.dot(see, at, input_precision="tf32") > 0.5
        out += tl.dot(p, at, input_precision="tf32") * tl.where(met, value, 0.0)
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


# Relative vectors. `A` is the axis, 0 for y and 1 for x. The permutations go through flat indices: a gather along one
# axis of a matrix would be made of shuffles and selects, one for each of its columns.


@triton.jit
def _along(r, SIZE_X: tl.constexpr, A: tl.constexpr):
    """The index along an axis of position r of a box."""
    return r // SIZE_X if A == 0 else r % SIZE_X


@triton.jit
def first_entry(axis, first_i, first_j, A: tl.constexpr, C: tl.constexpr):
    """The entry of a table that column 0 of T stands for, for a tile that begins at these indices."""
    return first_j - first_i - (C.qy if A == 0 else C.qx) + axis.reach


@triton.jit
def load_table(table, head, first, axis, WIDTH: tl.constexpr, A: tl.constexpr, C: tl.constexpr):
    """The rows of a table from entry `first` on, [E, piece] each; zeros where the table has none."""
    e = first + tl.arange(0, C.ey if A == 0 else C.ex)
    there = (e >= 0) & (e < 2 * axis.reach - 1)
    return load_pieces(table.data + head * table.head, e.to(tl.int64) * WIDTH, there, 1, WIDTH)


@triton.jit
def _skew_queries(t, A: tl.constexpr, C: tl.constexpr):
    """From products of queries and entries, [M, E], what each pair takes, [M, N]."""
    E: tl.constexpr = C.ey if A == 0 else C.ex
    K: tl.constexpr = C.ky if A == 0 else C.kx
    r = tl.arange(0, C.m * K)
    e = r % K - _along(r // K, C.qx, A) + ((C.qy if A == 0 else C.qx) - 1)
    g = tl.reshape(tl.gather(tl.reshape(t, [C.m * E]), r // K * E + e, 0), [C.m, K])
    if A == 0:
        g = tl.broadcast_to(tl.expand_dims(g, 2), [C.m, C.ky, C.kx])
    else:
        g = tl.broadcast_to(tl.expand_dims(g, 1), [C.m, C.ky, C.kx])
    return tl.reshape(g, [C.m, C.n])


@triton.jit
def _skew_keys(t, A: tl.constexpr, C: tl.constexpr):
    """From products of keys and entries, [N, E], what each pair takes, [M, N]."""
    E: tl.constexpr = C.ey if A == 0 else C.ex
    Q: tl.constexpr = C.qy if A == 0 else C.qx
    r = tl.arange(0, Q * C.n)
    e = _along(r % C.n, C.kx, A) - r // C.n + (Q - 1)
    g = tl.reshape(tl.gather(tl.reshape(t, [C.n * E]), r % C.n * E + e, 0), [Q, C.n])
    if A == 0:
        g = tl.broadcast_to(tl.expand_dims(g, 1), [C.qy, C.qx, C.n])
    else:
        g = tl.broadcast_to(tl.expand_dims(g, 0), [C.qy, C.qx, C.n])
    return tl.reshape(g, [C.m, C.n])


@triton.jit
def _take(x, row, index, LENGTH: tl.constexpr):
    """x[row, index] of rows of the given length, 0 where the index lies outside; all of them flat."""
    there = (index >= 0) & (index < LENGTH)
    return tl.where(there, tl.gather(x, row * LENGTH + tl.minimum(tl.maximum(index, 0), LENGTH - 1), 0), 0.0)


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
    E: tl.constexpr = C.ey if A == 0 else C.ex
    LENGTH: tl.constexpr = C.ky if A == 0 else C.kx
    r = tl.arange(0, C.m * E)
    index = r % E + _along(r // E, C.qx, A) - ((C.qy if A == 0 else C.qx) - 1)
    return tl.reshape(_take(tl.reshape(sums, [C.m * LENGTH]), r // E, index, LENGTH), [C.m, E])


@triton.jit
def unskew_keys(g, A: tl.constexpr, C: tl.constexpr):
    """From [M, N], sums over the queries of one index along A, each at its entry: [N, E]."""
    E: tl.constexpr = C.ey if A == 0 else C.ex
    LENGTH: tl.constexpr = C.qy if A == 0 else C.qx
    sums = tl.trans(g)
    if not (C.qx == 1 if A == 0 else C.qy == 1):
        sums = tl.sum(tl.reshape(sums, [C.n, C.qy, C.qx]), 2 if A == 0 else 1)
    r = tl.arange(0, C.n * E)
    index = _along(r // E, C.kx, A) + (LENGTH - 1) - r % E
    return tl.reshape(_take(tl.reshape(sums, [C.n * LENGTH]), r // E, index, LENGTH), [C.n, E])


@triton.jit
def unskew_both(g, C: tl.constexpr):
    """From [M, N], the sum over the pairs of each pair of offsets: [EY, EX]."""
    ROWS: tl.constexpr = C.qy * C.qx * C.ky
    r = tl.arange(0, ROWS * C.ex)
    q_x = (r // (C.ex * C.ky)) % C.qx
    t = _take(tl.reshape(g, [C.m * C.n]), r // C.ex, r % C.ex + q_x - (C.qx - 1), C.kx)
    t = tl.sum(tl.reshape(t, [C.qy, C.qx, C.ky * C.ex]), 1)  # [QY, KY * EX]
    # The same along y, where a row is one query row and one entry along x: [QY, EX, KY] before, [QY, EX, EY] after.
    t = tl.reshape(tl.permute(tl.reshape(t, [C.qy, C.ky, C.ex]), [0, 2, 1]), [C.qy * C.ex * C.ky])
    r = tl.arange(0, C.qy * C.ex * C.ey)
    q_y = r // (C.ey * C.ex)
    t = _take(t, r // C.ey, r % C.ey + q_y - (C.qy - 1), C.ky)
    return tl.trans(tl.sum(tl.reshape(t, [C.qy, C.ex, C.ey]), 0))


@triton.jit
def query_part(rows, table, head, first, axis, WIDTH: tl.constexpr, A: tl.constexpr, C: tl.constexpr):
    """Products of each pair's query-side row with its entry of a table, [M, N]."""
    t = dot_rows(rows, load_table(table, head, first, axis, WIDTH, A, C), C.m, C.ey if A == 0 else C.ex, C)
    return _skew_queries(t, A, C)


@triton.jit
def key_part(rows, table, head, first, axis, WIDTH: tl.constexpr, A: tl.constexpr, C: tl.constexpr):
    """Products of each pair's key with its entry of a table, [M, N]."""
    t = dot_rows(rows, load_table(table, head, first, axis, WIDTH, A, C), C.n, C.ey if A == 0 else C.ex, C)
    return _skew_keys(t, A, C)


@triton.jit
def add_along(
    sums,
    t,
    seen,
    table,
    head,
    first,
    axis,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
    CAREFUL: tl.constexpr,
    C: tl.constexpr,
):
    """`sums + t @ entries`, for t[M, E] or t[N, E]; `seen` shaped like t, looked at only if CAREFUL."""
    return add_product(sums, t, load_table(table, head, first, axis, WIDTH, A, C), seen, CAREFUL, C)


# Gradients of tables: each program adds to a share of its own.


@triton.jit
def add_to_table(
    share, t, rows, seen, first, axis, WIDTH: tl.constexpr, A: tl.constexpr, CAREFUL: tl.constexpr, C: tl.constexpr
):
    """Add t^T @ rows to the entries from `first` on of a share [2K - 1, WIDTH]; what is not finite."""
    E: tl.constexpr = C.ey if A == 0 else C.ex
    added = add_product(zero_pieces(E, WIDTH), tl.trans(t), rows, seen, CAREFUL, C)
    e = first + tl.arange(0, E)
    there = (e >= 0) & (e < 2 * axis.reach - 1)
    # This load feeds no product, so that the compiler's pipeline does not bring it before the last store.
    old = load_pieces(share, e.to(tl.int64) * WIDTH, there, 1, WIDTH)
    new = ()
    for i in tl.static_range(piece_count(WIDTH)):
        new = new + (old[i] + added[i],)
    store_pieces(share, e.to(tl.int64) * WIDTH, there, 1, WIDTH, new)
    tl.debug_barrier()  # other threads read these numbers next time
    return any_not_finite(rows) + any_not_finite((t,))


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


# Scores, for powers of 2, with the factor that makes them that folded in; but in float32 natural ones, for powers of e:
# scores of hundreds lose more by one more rounding than a product costs, whose operand is the small difference to lse.


@triton.constexpr_function
def unit(natural):
    """What a natural score is multiplied by."""
    return 1.0 if natural else 1.4426950408889634


@triton.jit
def exponential(x, C: tl.constexpr):
    """e^score of a score, or a difference of scores."""
    return tl.exp(x) if C.natural else tl.exp2(x)


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
    q,
    k,
    key_bias,
    across,
    terms,
    factors,
    counts,
    head,
    y,
    x,
    i_y,
    i_x,
    j_y,
    j_x,
    i_y0,
    i_x0,
    j_y0,
    j_x0,
    seen,
    ACROSS: tl.constexpr,
    C: tl.constexpr,
):
    """The scores of a tile in units of `unit`, [M, N] float32; -inf in pairs that are not seen.

    Args:
        q, k: pieces of the rows.
        key_bias: that of each key, or None.
        across: the query's part along x if ACROSS, where it was computed before.
    """
    s = dot_rows(q, k, C.m, C.n, C) * (factors.scale * unit(C.natural))
    if terms.query_y.data is not None:
        first = first_entry(y, i_y0, j_y0, 0, C)
        part = query_part(q, terms.query_y, head, first, y, C.head_dim, 0, C)
        s += part * (factors.query * unit(C.natural))
    if terms.query_x.data is not None:
        if ACROSS:
            part = across
        else:
            first = first_entry(x, i_x0, j_x0, 1, C)
            part = query_part(q, terms.query_x, head, first, x, C.head_dim, 1, C)
        s += part * (factors.query * unit(C.natural))
    if terms.key_y.data is not None:
        first = first_entry(y, i_y0, j_y0, 0, C)
        part = key_part(k, terms.key_y, head, first, y, C.head_dim, 0, C)
        s += part * (factors.key * unit(C.natural))
    if terms.key_x.data is not None:
        first = first_entry(x, i_x0, j_x0, 1, C)
        part = key_part(k, terms.key_x, head, first, x, C.head_dim, 1, C)
        s += part * (factors.key * unit(C.natural))
    if terms.bias is not None:
        to = (j_y + (y.reach - 1)).to(tl.int64) * terms.bias_y + (j_x + (x.reach - 1)).to(tl.int64) * terms.bias_x
        of = i_y.to(tl.int64) * terms.bias_y + i_x.to(tl.int64) * terms.bias_x
        at = terms.bias + head * terms.bias_head + (to[None, :] - of[:, None])
        s += tl.load(at, mask=seen, other=0.0).to(tl.float32) * unit(C.natural)
    if key_bias is not None:
        s += key_bias[None, :] * unit(C.natural)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def value_part(rows, across, terms, counts, head, y, i_y0, j_y0, ACROSS: tl.constexpr, C: tl.constexpr):
    """What value terms add to the product of a gradient row with a pair's value, [M, N]; `across` is that along x."""
    part = across
    if terms.value_y.data is not None:
        first = first_entry(y, i_y0, j_y0, 0, C)
        part = part + query_part(rows, terms.value_y, head, first, y, C.value_dim, 0, C)
    return part
