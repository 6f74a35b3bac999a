"""The forward kernel: out and lse of a tile of queries, by an online softmax over its box of keys.

A program has one tile of one head of one map:

            keys, x outer, y inner ->
           +------+------+------+
    M=QY*QX| s, p | s, p | ...  |     s = scores (engine.scores), p = e^(s - m)
    queries+------+------+------+     m, total: running maximum and sum of each query
           KY*KX keys a step          acc: running sums of p * value, pieces of [M, Dv]

It holds the queries' rows and acc, and reads keys and values once. A part of a pattern that is not the first goes on
from the out and lse of the one before. With `C.points` the queries are a list of positions, one a program; with no
values only lse is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visattn_kernels.triton.engine import (
    LN2,
    add_along,
    add_product,
    any_not_finite,
    exponential,
    first_entry,
    indices,
    inside,
    key_range,
    load_key_bias,
    load_pieces,
    offsets,
    query_part,
    scale_pieces,
    scores,
    store_pieces,
    sum_over_keys,
    unit,
    unskew_queries,
    visible,
    zero_pieces,
)
from visattn_kernels.triton.geometry import block_of, class_of, line, locate, product, program


@triton.jit
def query_tile(tile, y, x, points, C: tl.constexpr):
    """The classes of a tile of queries, its first indices and their ends, along y and x."""
    if C.points:
        c_y, i_y = class_of(y, tl.load(points + 2 * tile.to(tl.int64)).to(tl.int32), C.kind_y)
        c_x, i_x = class_of(x, tl.load(points + (2 * tile.to(tl.int64) + 1)).to(tl.int32), C.kind_x)
        end_y, end_x = i_y + 1, i_x + 1
    else:
        c_y, b_y, c_x, b_x = block_of(tile, y, x, C.wide)
        i_y, i_x = b_y * C.qy, b_x * C.qx
        end_y = tl.minimum(i_y + C.qy, line(y, c_y, y.queries, C.kind_y)[2])
        end_x = tl.minimum(i_x + C.qx, line(x, c_x, x.queries, C.kind_x)[2])
    return c_y, i_y, end_y, c_x, i_x, end_x


@triton.jit
def _walk(q, k, v, terms, y, x, factors, counts, b, head, tile, acc, m, total, CAREFUL: tl.constexpr, C: tl.constexpr):
    """Go through the keys of a tile; acc, m and total go on from what they are."""
    c_y, i_y0, end_y, c_x, i_x0, end_x = tile
    i_y, i_x = indices(i_y0, i_x0, C.qy, C.qx)
    queries = (i_y < end_y) & (i_x < end_x)
    line_y, line_x = line(y, c_y, y.keys, C.kind_y), line(x, c_x, x.keys, C.kind_x)
    low_y, high_y = key_range(y, i_y0, end_y, line_y[2], C.kind_y, C.causal_y, C)
    low_x, high_x = key_range(x, i_x0, end_x, line_x[2], C.kind_x, C.causal_x, C)
    kv_head = head // counts.group
    keys_of_head = k.data + b * k.batch + kv_head * k.head
    for j_x0 in range(low_x, high_x, C.kx):
        across = 0.0
        if terms.query_x.data is not None:
            first = first_entry(x, i_x0, j_x0, 1, C)
            across = query_part(q, terms.query_x, head, first, x, C.head_dim, 1, C)
        along_x = tl.full([C.m, C.kx], 0, tl.float32)
        seen_x = tl.full([C.m, C.kx], 0, tl.float32)
        for j_y0 in range(low_y, high_y, C.ky):
            j_y, j_x = indices(j_y0, j_x0, C.ky, C.kx)
            exist = (j_y < high_y) & (j_x < high_x)
            there = inside(j_x, line_x[2], inside(j_y, line_y[2], exist, C), C)
            key_bias = None
            if terms.key_bias is not None:
                key_bias = load_key_bias(terms, b, head, line_y, line_x, j_y, j_x, there)
                exist = exist & (key_bias != float("-inf"))
                there = there & exist
            keys = load_pieces(keys_of_head, offsets(k, line_y, line_x, j_y, j_x), there, k.channel, C.head_dim)
            seen = visible(y, x, i_y, i_x, j_y, j_x, line_y[2], line_x[2], queries, exist, C)
            s = scores(
                q, keys, key_bias, across, terms, factors, counts, head, y, x, i_y, i_x, j_y, j_x,
                i_y0, i_x0, j_y0, j_x0, seen, True, C,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = exponential(s - m_safe[:, None], C)
            factor = exponential(m - m_safe, C)
            total = total * factor + tl.sum(p, 1)
            m = m_new
            if C.with_values:
                acc = scale_pieces(acc, factor)
                values_of_head = v.data + b * v.batch + kv_head * v.head
                values = load_pieces(
                    values_of_head, offsets(v, line_y, line_x, j_y, j_x), there, v.channel, C.value_dim
                )
                acc = add_product(acc, p, values, seen, CAREFUL, C)
                if terms.value_y.data is not None:
                    first = first_entry(y, i_y0, j_y0, 0, C)
                    t = unskew_queries(sum_over_keys(p, 0, C), 0, C)
                    seen_t = seen
                    if CAREFUL:
                        seen_t = unskew_queries(sum_over_keys(seen.to(tl.float32), 0, C), 0, C) > 0.5
                    acc = add_along(acc, t, seen_t, terms.value_y, head, first, y, C.value_dim, 0, CAREFUL, C)
                if terms.value_x.data is not None:
                    along_x = along_x * factor[:, None] + sum_over_keys(p, 1, C)
                    if CAREFUL:
                        seen_x += sum_over_keys(seen.to(tl.float32), 1, C)
        if C.with_values and terms.value_x.data is not None:
            first = first_entry(x, i_x0, j_x0, 1, C)
            t = unskew_queries(along_x, 1, C)
            seen_t = unskew_queries(seen_x, 1, C) > 0.5
            acc = add_along(acc, t, seen_t, terms.value_x, head, first, x, C.value_dim, 1, CAREFUL, C)
    return acc, m, total


@triton.jit
def _tile(
    t,
    head,
    b,
    q,
    k,
    v,
    out,
    lse,
    before,
    before_lse,
    terms,
    y,
    x,
    factors,
    counts,
    points,
    CAREFUL: tl.constexpr,
    C: tl.constexpr,
):
    """Out and lse of a tile; how much of out is not finite."""
    tile = query_tile(t, y, x, points, C)
    c_y, i_y0, end_y, c_x, i_x0, end_x = tile
    i_y, i_x = indices(i_y0, i_x0, C.qy, C.qx)
    queries = (i_y < end_y) & (i_x < end_x)
    line_y, line_x = line(y, c_y, y.queries, C.kind_y), line(x, c_x, x.queries, C.kind_x)
    at_q = b * q.batch + head * q.head + offsets(q, line_y, line_x, i_y, i_x)
    rows = load_pieces(q.data, at_q, queries, q.channel, C.head_dim)
    at_lse = b * lse.batch + head * lse.head
    if C.points:
        at_lse += t.to(tl.int64) * lse.y + (i_y * 0).to(tl.int64)
    else:
        at_lse += offsets(lse, line_y, line_x, i_y, i_x)
    acc = zero_pieces(C.m, C.value_dim)
    m = tl.full([C.m], float("-inf"), tl.float32)
    total = tl.full([C.m], 0, tl.float32)
    if C.goes_on:
        m = tl.load(before_lse + at_lse, mask=queries, other=float("-inf"))
        if C.with_values:
            m = m * unit(C.natural)
            total = tl.where(m == float("-inf"), 0.0, 1.0)
            at = b * before.batch + head * before.head + offsets(before, line_y, line_x, i_y, i_x)
            acc = load_pieces(before.data, at, queries, before.channel, C.value_dim)
        else:
            total = tl.load(before.data + at_lse, mask=queries, other=0.0)
    acc, m, total = _walk(rows, k, v, terms, y, x, factors, counts, b, head, tile, acc, m, total, CAREFUL, C)
    bad = 0
    if C.with_values:
        none = total == 0  # of NaN it is NaN, whatever the maximum has dropped
        safe = tl.where(none, 1.0, total)
        sums = m + tl.log(safe) if C.natural else (m + tl.log2(safe)) * LN2
        sums = tl.where(m == float("inf"), float("inf"), sums)
        tl.store(lse.data + at_lse, tl.where(none, float("-inf"), sums), mask=queries)
        at = b * out.batch + head * out.head + offsets(out, line_y, line_x, i_y, i_x)
        store_pieces(out.data, at, queries, out.channel, C.value_dim, scale_pieces(acc, 1.0 / safe))
        if C.leaks and not CAREFUL:
            bad = any_not_finite(acc)
    else:
        tl.store(lse.data + at_lse, m, mask=queries)
        tl.store(out.data + at_lse, tl.where(m == float("inf"), 1.0, total), mask=queries)
    return bad


@triton.jit(do_not_specialize=["batch", "shares"])
def attention_forward_kernel(
    q, k, v, out, lse, before, before_lse, terms, y, x, factors, counts, batch, shares, points, flags, C: tl.constexpr
):
    """Out and lse of one tile; see the top of this file.

    Args:
        q, k, v, out, lse, before: `structs.Map`; `before` is the out of the part before, float32. Without values `lse`
            is for m, in the kernels' units, and `out`, which lies as lse does, for l.
        before_lse: that part's lse, shaped like lse.
        terms, y, x, factors, counts: `structs.Terms`, `Axis`, `Axis`, `Factors`, `Counts`.
        batch, shares: numbers of maps, and of programs that share the tiles of a head if C.careful.
        points: int64 [points, 2], (y, x) positions, if C.points.
        flags: int32 [heads], set, and read if C.careful; None unless C.leaks.
        C: `structs.Config`.
    """
    i = program(C.wide)
    if C.careful:
        head = (i % counts.heads).to(tl.int64)
        if tl.load(flags + head) != 0:
            for t in range(i // counts.heads, product(counts.tiles, batch, C.wide), shares):
                b = (t // counts.tiles).to(tl.int64)
                _tile(
                    t % counts.tiles, head, b, q, k, v, out, lse, before, before_lse, terms, y, x,
                    factors, counts, points, True, C,
                )  # fmt: skip
    else:
        t, head, b = locate(i, counts.tiles, counts.heads)
        if b >= batch:
            return
        bad = _tile(t, head, b, q, k, v, out, lse, before, before_lse, terms, y, x, factors, counts, points, False, C)
        if C.leaks:
            tl.store(flags + head, 1, mask=bad > 0)
