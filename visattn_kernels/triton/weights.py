"""Rows of the map: the weights of single queries, from the scores of the forward's tiles and their m and l.

A program has one query of one head of one map and walks its keys once; `attention_forward_kernel` with `C.points` has
computed m and l before. What lies outside the pattern is 0 beforehand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visattn_kernels.triton.engine import (
    exponential,
    indices,
    inside,
    key_range,
    load_key_bias,
    load_pieces,
    offsets,
    scores,
    visible,
)
from visattn_kernels.triton.forward import query_tile
from visattn_kernels.triton.geometry import line, locate, program


@triton.jit(do_not_specialize=["batch"])
def attention_map_kernel(q, k, maximum, total, weights, terms, y, x, factors, counts, batch, points, C: tl.constexpr):
    """The weights of one query.

    Args:
        q, k, maximum: `structs.Map`; the y of `maximum`, m of the forward, counts points.
        total: l of the forward, shaped like m.
        weights: `structs.Map` whose y and x are those of keys and whose channel is the point.
        terms, y, x, factors, counts: `structs.Terms`, `Axis`, `Axis`, `Factors`, `Counts`.
        batch: number of maps.
        points: int64 [points, 2], (y, x) positions.
        C: `structs.Config`.
    """
    t, head, b = locate(program(C.wide), counts.tiles, counts.heads)
    if b >= batch:
        return
    c_y, i_y0, end_y, c_x, i_x0, end_x = query_tile(t, y, x, points, C)
    i_y, i_x = indices(i_y0, i_x0, C.qy, C.qx)
    queries = (i_y < end_y) & (i_x < end_x)
    line_qy, line_qx = line(y, c_y, y.queries, C.kind_y), line(x, c_x, x.queries, C.kind_x)
    line_y, line_x = line(y, c_y, y.keys, C.kind_y), line(x, c_x, x.keys, C.kind_x)
    low_y, high_y = key_range(y, i_y0, end_y, line_y[2], C.kind_y, C.causal_y, C)
    low_x, high_x = key_range(x, i_x0, end_x, line_x[2], C.kind_x, C.causal_x, C)
    at = b * q.batch + head * q.head + offsets(q, line_qy, line_qx, i_y, i_x)
    rows = load_pieces(q.data, at, queries, q.channel, C.head_dim)
    at_query = b * maximum.batch + head * maximum.head + t.to(tl.int64) * maximum.y
    m = tl.load(maximum.data + at_query)
    m = tl.where(m == float("-inf"), 0.0, m)  # of a query with no key
    inverse = 1.0 / tl.load(total + at_query)
    for j_x0 in range(low_x, high_x, C.kx):
        for j_y0 in range(low_y, high_y, C.ky):
            j_y, j_x = indices(j_y0, j_x0, C.ky, C.kx)
            exist = (j_y < high_y) & (j_x < high_x)
            there = inside(j_x, line_x[2], inside(j_y, line_y[2], exist, C), C)
            key_bias = None
            if terms.key_bias is not None:
                key_bias = load_key_bias(terms, b, head, line_y, line_x, j_y, j_x, there)
                exist = exist & (key_bias != float("-inf"))
            at_keys = b * k.batch + (head // counts.group) * k.head + offsets(k, line_y, line_x, j_y, j_x)
            keys = load_pieces(k.data, at_keys, there & exist, k.channel, C.head_dim)
            seen = visible(y, x, i_y, i_x, j_y, j_x, line_y[2], line_x[2], queries, exist, C)
            s = scores(
                rows, keys, key_bias, 0.0, terms, factors, counts, head, y, x, i_y, i_x, j_y, j_x,
                i_y0, i_x0, j_y0, j_x0, seen, False, C,
            )  # fmt: skip
            p = tl.where(seen & (s != float("-inf")), exponential(s - m, C) * inverse, 0.0)
            row = b * weights.batch + head * weights.head + t.to(tl.int64) * weights.channel
            row += offsets(weights, line_y, line_x, j_y, j_x)
            first = (tl.arange(0, C.m) == 0)[:, None]
            to = row[None, :] + tl.full([C.m, 1], 0, tl.int64)
            tl.store(weights.data + to, p, mask=seen & there[None, :] & first)
