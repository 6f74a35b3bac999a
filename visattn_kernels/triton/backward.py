"""The backward kernels, which compute the weights again from lse; nothing is added atomically.

    P = e^(S - lse)                    of each pair, S the scores (engine.scores)
    dP = dO . (V + value terms)        dS = P * (dP - delta),   delta = dO . O - dlse

`attention_delta_kernel` is one pass over dO and O. Then, each recomputing P and dS for its pairs:

    attention_backward_dq_kernel       a program has a tile of queries and walks its keys:

            dQ    = scale * dS K  +  query_scale * (dS at each offset) R
            dR_q  = query_scale * (dS at each offset)^T Q        dR_v = (P at each offset)^T dO
            dbias = dS at each pair of offsets

    attention_backward_dkdv_kernel     a program has a tile of keys and walks the queries that see them, in every query
                                       head of its key head:

            dV = P^T dO          dK = scale * dS^T Q  +  key_scale * (dS at each offset) R
            dR_k = key_scale * (dS at each offset)^T K           dkey_bias = sum over queries of dS

Where gradients of tables are wanted, the tiles of a head are dealt to a fixed number of programs, each of which adds
to a share of its own in memory; torch sums the shares in a fixed order. A part of a pattern that is not the first adds
to the float32 sums of the one before. `attention_received` is the second kernel without gradients: sums of P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visattn_kernels.triton.engine import (
    add_along,
    add_product,
    add_to_bias,
    add_to_table,
    any_not_finite,
    clear,
    dot_rows,
    exponential,
    first_entry,
    indices,
    inside,
    key_range,
    load_key_bias,
    load_pieces,
    offsets,
    query_part,
    query_range,
    scores,
    store_pieces,
    sum_over_keys,
    unit,
    unskew_both,
    unskew_keys,
    unskew_queries,
    value_part,
    visible,
    zero_pieces,
)
from visattn_kernels.triton.forward import query_tile
from visattn_kernels.triton.geometry import block_of, line, locate, product, program


@triton.jit(do_not_specialize=["batch"])
def attention_delta_kernel(
    grad_out, out, grad_lse, delta, counts, batch, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """Delta = sum_d dO * O - dlse of ROWS positions of a head, float32.

    Args:
        grad_out, out, grad_lse, delta: `structs.Map`.
        counts: `structs.Counts`.
    """
    t, head, b = locate(program(WIDE), counts.tiles, counts.heads)
    if b >= batch:
        return
    position = product(t, ROWS, WIDE) + tl.arange(0, ROWS)
    there = position < counts.positions
    i_y, i_x = (position // counts.width).to(tl.int64), (position % counts.width).to(tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    at_grad = b * grad_out.batch + head * grad_out.head + i_y * grad_out.y + i_x * grad_out.x
    at_out = b * out.batch + head * out.head + i_y * out.y + i_x * out.x
    grads = load_pieces(grad_out.data, at_grad, there, grad_out.channel, WIDTH)
    outs = load_pieces(out.data, at_out, there, out.channel, WIDTH)
    for i in tl.static_range(len(grads)):
        total += tl.sum(grads[i].to(tl.float32) * outs[i].to(tl.float32), 1)
    at = b * grad_lse.batch + head * grad_lse.head + i_y * grad_lse.y + i_x * grad_lse.x
    total -= tl.load(grad_lse.data + at, mask=there, other=0.0).to(tl.float32)
    at = b * delta.batch + head * delta.head + i_y * delta.y + i_x * delta.x
    tl.store(delta.data + at, total, mask=there)


@triton.jit
def _load_rows(map, line_y, line_x, i_y, i_x, b, head, there, WIDTH: tl.constexpr):
    """Rows of a map at indices of a line."""
    at = b * map.batch + head * map.head + offsets(map, line_y, line_x, i_y, i_x)
    return load_pieces(map.data, at, there, map.channel, WIDTH)


@triton.jit
def _load_numbers(map, line_y, line_x, i_y, i_x, b, head, there, other):
    """Numbers of a map with one channel, at indices of a line."""
    at = b * map.batch + head * map.head + offsets(map, line_y, line_x, i_y, i_x)
    return tl.load(map.data + at, mask=there, other=other)


@triton.jit
def _weights(s, lse, seen, C: tl.constexpr):
    """P of a tile from scores and lse; 0 in pairs that are not seen, whatever lse is."""
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # of a query with no key
    return tl.where(seen & (s != float("-inf")), exponential(s - (lse * unit(C.natural))[:, None], C), 0.0)


# Queries.


@triton.jit
def _query_tile(
    i, head, q, k, v, grad_out, lse, delta, grad_q, before, terms, y, x, factors, counts, partials, share,
    CAREFUL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of q in the i-th tile of a head, and what it adds to tables; how much was not finite."""
    t, b = i % counts.tiles, (i // counts.tiles).to(tl.int64)
    c_y, i_y0, end_y, c_x, i_x0, end_x = query_tile(t, y, x, None, C)
    i_y, i_x = indices(i_y0, i_x0, C.qy, C.qx)
    queries = (i_y < end_y) & (i_x < end_x)
    line_qy, line_qx = line(y, c_y, y.queries, C.kind_y), line(x, c_x, x.queries, C.kind_x)
    line_y, line_x = line(y, c_y, y.keys, C.kind_y), line(x, c_x, x.keys, C.kind_x)
    low_y, high_y = key_range(y, i_y0, end_y, line_y[2], C.kind_y, C.causal_y, C)
    low_x, high_x = key_range(x, i_x0, end_x, line_x[2], C.kind_x, C.causal_x, C)
    kv_head = head // counts.group
    rows = _load_rows(q, line_qy, line_qx, i_y, i_x, b, head, queries, C.head_dim)
    grads = _load_rows(grad_out, line_qy, line_qx, i_y, i_x, b, head, queries, C.value_dim)
    lse_rows = _load_numbers(lse, line_qy, line_qx, i_y, i_x, b, head, queries, 0.0)
    delta_rows = _load_numbers(delta, line_qy, line_qx, i_y, i_x, b, head, queries, 0.0)
    bad = 0
    if C.goes_on and C.grad_q:
        sums = _load_rows(before, line_qy, line_qx, i_y, i_x, b, head, queries, C.head_dim)
    else:
        sums = zero_pieces(C.m, C.head_dim)
    for j_x0 in range(low_x, high_x, C.kx):
        first_x = first_entry(x, i_x0, j_x0, 1, C)
        across = 0.0
        across_values = 0.0
        if terms.query_x.data is not None:
            across = query_part(rows, terms.query_x, head, first_x, x, C.head_dim, 1, C)
        if terms.value_x.data is not None:
            across_values = query_part(grads, terms.value_x, head, first_x, x, C.value_dim, 1, C)
        grad_x = tl.full([C.m, C.kx], 0, tl.float32)
        weight_x = tl.full([C.m, C.kx], 0, tl.float32)
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
            keys = _load_rows(k, line_y, line_x, j_y, j_x, b, kv_head, there, C.head_dim)
            values = _load_rows(v, line_y, line_x, j_y, j_x, b, kv_head, there, C.value_dim)
            seen = visible(y, x, i_y, i_x, j_y, j_x, line_y[2], line_x[2], queries, exist, C)
            s = scores(
                rows, keys, key_bias, across, terms, factors, counts, head, y, x, i_y, i_x, j_y, j_x,
                i_y0, i_x0, j_y0, j_x0, seen, True, C,
            )  # fmt: skip
            p = _weights(s, lse_rows, seen, C)
            dp = dot_rows(grads, values, C.m, C.n, C)
            dp += value_part(grads, across_values, terms, counts, head, y, i_y0, j_y0, True, C)
            ds = tl.where(seen & (s != float("-inf")), p * (dp - delta_rows[:, None]), 0.0)
            if C.grad_q:
                sums = add_product(sums, ds * factors.scale, keys, seen, CAREFUL, C)
            first_y = first_entry(y, i_y0, j_y0, 0, C)
            seen_y = seen
            if CAREFUL:
                seen_y = unskew_queries(sum_over_keys(seen.to(tl.float32), 0, C), 0, C) > 0.5
                seen_x += sum_over_keys(seen.to(tl.float32), 1, C)
            if terms.query_y.data is not None and (C.grad_q or C.grad_query_y):
                along = unskew_queries(sum_over_keys(ds, 0, C), 0, C) * factors.query
                if C.grad_q:
                    sums = add_along(sums, along, seen_y, terms.query_y, head, first_y, y, C.head_dim, 0, CAREFUL, C)
                if C.grad_query_y:
                    bad += add_to_table(
                        share + partials.query_y, along, rows, tl.trans(seen_y), first_y, y, C.head_dim, 0,
                        CAREFUL, C,
                    )  # fmt: skip
            if C.grad_value_y:
                along = unskew_queries(sum_over_keys(p, 0, C), 0, C)
                bad += add_to_table(
                    share + partials.value_y, along, grads, tl.trans(seen_y), first_y, y, C.value_dim, 0,
                    CAREFUL, C,
                )  # fmt: skip
            if C.grad_bias:
                add_to_bias(share + partials.bias, unskew_both(ds, C), first_y, first_x, y, x, C)
            if terms.query_x.data is not None:
                grad_x += sum_over_keys(ds, 1, C)
            if C.grad_value_x:
                weight_x += sum_over_keys(p, 1, C)
        seen_x_entries = unskew_queries(seen_x, 1, C) > 0.5
        if terms.query_x.data is not None and (C.grad_q or C.grad_query_x):
            along = unskew_queries(grad_x, 1, C) * factors.query
            if C.grad_q:
                sums = add_along(
                    sums, along, seen_x_entries, terms.query_x, head, first_x, x, C.head_dim, 1,
                    CAREFUL, C,
                )  # fmt: skip
            if C.grad_query_x:
                bad += add_to_table(
                    share + partials.query_x, along, rows, tl.trans(seen_x_entries), first_x, x, C.head_dim, 1,
                    CAREFUL, C,
                )  # fmt: skip
        if C.grad_value_x:
            along = unskew_queries(weight_x, 1, C)
            bad += add_to_table(
                share + partials.value_x, along, grads, tl.trans(seen_x_entries), first_x, x, C.value_dim, 1,
                CAREFUL, C,
            )  # fmt: skip
    if C.grad_q:
        at = b * grad_q.batch + head * grad_q.head + offsets(grad_q, line_qy, line_qx, i_y, i_x)
        store_pieces(grad_q.data, at, queries, grad_q.channel, C.head_dim, sums)
        if C.leaks:
            bad += any_not_finite(sums)
    return bad


@triton.jit(do_not_specialize=["batch", "shares"])
def attention_backward_dq_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    before,
    terms,
    y,
    x,
    factors,
    counts,
    partials,
    batch,
    shares,
    flags,
    C: tl.constexpr,
):
    """dQ, and shares of the gradients of query-side tables; see the top of this file.

    Args:
        q, k, v, grad_out, lse, delta, grad_q, before: `structs.Map`; `before` is dQ of the part before, float32.
        terms, y, x, factors, counts, partials: `structs.Terms`, `Axis`, `Axis`, `Factors`, `Counts`, `Partials`.
        flags: int32 [heads], set, and read if C.careful; None unless C.leaks.
        batch, shares: numbers of maps, and of programs that share the tiles of a head.
        C: `structs.Config`.
    """
    i = program(C.wide)
    if i >= product(shares, counts.heads, C.wide):
        return
    head = (i // shares).to(tl.int64)
    if C.careful:
        if tl.load(flags + head) != 0:
            _query_tiles(
                i % shares, head, q, k, v, grad_out, lse, delta, grad_q, before, terms, y, x, factors, counts,
                partials, batch, shares, True, C,
            )  # fmt: skip
    else:
        bad = _query_tiles(
            i % shares, head, q, k, v, grad_out, lse, delta, grad_q, before, terms, y, x, factors, counts,
            partials, batch, shares, False, C,
        )  # fmt: skip
        if C.leaks:
            tl.store(flags + head, 1, mask=bad > 0)


@triton.jit
def _query_tiles(
    share, head, q, k, v, grad_out, lse, delta, grad_q, before, terms, y, x, factors, counts, partials,
    batch, shares, CAREFUL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The tiles of a program: one, or its share of those of a head; how much was not finite."""
    if C.shared:
        mine = None
        if C.tables:
            mine = partials.data + (share.to(tl.int64) * counts.heads + head) * partials.size
        if C.tables and CAREFUL:
            clear(mine, partials.size)
        bad = 0
        for t in range(share, product(counts.tiles, batch, C.wide), shares):
            bad += _query_tile(
                t, head, q, k, v, grad_out, lse, delta, grad_q, before, terms, y, x,
                factors, counts, partials, mine, CAREFUL, C,
            )  # fmt: skip
    else:
        bad = _query_tile(
            share, head, q, k, v, grad_out, lse, delta, grad_q, before, terms,
            y, x, factors, counts, partials, None, CAREFUL, C,
        )  # fmt: skip
    return bad


# Keys.


@triton.jit
def _key_tile(
    i, kv_head, q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k, before_v, grad_key_bias, before_key_bias,
    received, terms, y, x, factors, counts, partials, share, CAREFUL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of k, v and key biases in the i-th tile of a key head, and what it adds to tables."""
    t, b = i % counts.tiles, (i // counts.tiles).to(tl.int64)
    c_y, b_y, c_x, b_x = block_of(t, y, x, C.wide)
    line_y, line_x = line(y, c_y, y.keys, C.kind_y), line(x, c_x, x.keys, C.kind_x)
    line_qy, line_qx = line(y, c_y, y.queries, C.kind_y), line(x, c_x, x.queries, C.kind_x)
    j_y0, j_x0 = b_y * C.ky, b_x * C.kx
    j_y, j_x = indices(j_y0, j_x0, C.ky, C.kx)
    there = (j_y < line_y[2]) & (j_x < line_x[2])
    end_y, end_x = tl.minimum(j_y0 + C.ky, line_y[2]), tl.minimum(j_x0 + C.kx, line_x[2])
    low_y, high_y = query_range(y, j_y0, end_y, line_qy[2], C.kind_y, C.causal_y, C)
    low_x, high_x = query_range(x, j_x0, end_x, line_qx[2], C.kind_x, C.causal_x, C)
    keys = _load_rows(k, line_y, line_x, j_y, j_x, b, kv_head, there, C.head_dim)
    bad = 0
    if C.with_values:
        values = _load_rows(v, line_y, line_x, j_y, j_x, b, kv_head, there, C.value_dim)
        if C.goes_on and C.grad_k:
            sums_k = _load_rows(before_k, line_y, line_x, j_y, j_x, b, kv_head, there, C.head_dim)
        else:
            sums_k = zero_pieces(C.n, C.head_dim)
        if C.goes_on and C.grad_v:
            sums_v = _load_rows(before_v, line_y, line_x, j_y, j_x, b, kv_head, there, C.value_dim)
        else:
            sums_v = zero_pieces(C.n, C.value_dim)
    else:
        sums = tl.full([C.n], 0, tl.float32)
        if C.goes_on:
            sums = _load_numbers(received, line_y, line_x, j_y, j_x, b, kv_head, there, 0.0)
    for g in range(0, counts.group):
        head = kv_head * counts.group + g
        exist = there
        key_bias = None
        if terms.key_bias is not None:
            key_bias = load_key_bias(terms, b, head, line_y, line_x, j_y, j_x, there)
            exist = exist & (key_bias != float("-inf"))
        sums_bias = tl.full([C.n], 0, tl.float32)
        if C.grad_key_bias and C.goes_on:
            sums_bias = _load_numbers(before_key_bias, line_y, line_x, j_y, j_x, b, head, there, 0.0)
        for i_x0 in range(low_x, high_x, C.qx):
            first_x = first_entry(x, i_x0, j_x0, 1, C)
            for i_y0 in range(low_y, high_y, C.qy):
                i_y, i_x = indices(i_y0, i_x0, C.qy, C.qx)
                queries = (i_y < high_y) & (i_x < high_x)
                rows = _load_rows(q, line_qy, line_qx, i_y, i_x, b, head, queries, C.head_dim)
                lse_rows = _load_numbers(lse, line_qy, line_qx, i_y, i_x, b, head, queries, 0.0)
                seen = visible(y, x, i_y, i_x, j_y, j_x, line_y[2], line_x[2], queries, exist, C)
                s = scores(
                    rows, keys, key_bias, 0.0, terms, factors, counts, head, y, x, i_y, i_x, j_y, j_x,
                    i_y0, i_x0, j_y0, j_x0, seen, False, C,
                )  # fmt: skip
                if C.with_values:
                    p = _weights(s, lse_rows, seen, C)
                    delta_rows = _load_numbers(delta, line_qy, line_qx, i_y, i_x, b, head, queries, 0.0)
                    grads = _load_rows(grad_out, line_qy, line_qx, i_y, i_x, b, head, queries, C.value_dim)
                    if C.grad_v:
                        sums_v = add_product(sums_v, tl.trans(p), grads, tl.trans(seen), CAREFUL, C)
                    across = 0.0
                    if terms.value_x.data is not None:
                        across = query_part(grads, terms.value_x, head, first_x, x, C.value_dim, 1, C)
                    dp = dot_rows(grads, values, C.m, C.n, C)
                    dp += value_part(grads, across, terms, counts, head, y, i_y0, j_y0, True, C)
                    ds = tl.where(seen & (s != float("-inf")), p * (dp - delta_rows[:, None]), 0.0)
                    if C.grad_k:
                        scaled = tl.trans(ds * factors.scale)
                        sums_k = add_product(sums_k, scaled, rows, tl.trans(seen), CAREFUL, C)
                    if C.grad_key_bias:
                        sums_bias += tl.sum(ds, 0)
                    for A in tl.static_range(2):
                        table = terms.key_y if A == 0 else terms.key_x
                        if table.data is not None:
                            axis = y if A == 0 else x
                            first = first_x if A == 1 else first_entry(y, i_y0, j_y0, 0, C)
                            along = unskew_keys(ds, A, C) * factors.key
                            seen_t = seen
                            if CAREFUL:
                                seen_t = unskew_keys(seen.to(tl.float32), A, C) > 0.5
                            if C.grad_k:
                                sums_k = add_along(
                                    sums_k, along, seen_t, table, head, first, axis, C.head_dim, A,
                                    CAREFUL, C,
                                )  # fmt: skip
                            if C.grad_key_y if A == 0 else C.grad_key_x:
                                to = partials.key_y if A == 0 else partials.key_x
                                bad += add_to_table(
                                    share + head * partials.size + to, along, keys, tl.trans(seen_t), first, axis,
                                    C.head_dim, A, CAREFUL, C,
                                )  # fmt: skip
                else:  # lse is m of the forward, delta is l
                    m = tl.where(lse_rows == float("-inf"), 0.0, lse_rows)
                    inverse = 1.0 / _load_numbers(delta, line_qy, line_qx, i_y, i_x, b, head, queries, 1.0)
                    p = exponential(s - m[:, None], C) * inverse[:, None]
                    sums += tl.sum(tl.where(seen & (s != float("-inf")), p, 0.0), 0)
        if C.grad_key_bias:
            at = b * grad_key_bias.batch + head * grad_key_bias.head + offsets(grad_key_bias, line_y, line_x, j_y, j_x)
            tl.store(grad_key_bias.data + at, sums_bias, mask=there)
    if C.with_values:
        if C.grad_k:
            at = b * grad_k.batch + kv_head * grad_k.head + offsets(grad_k, line_y, line_x, j_y, j_x)
            store_pieces(grad_k.data, at, there, grad_k.channel, C.head_dim, sums_k)
            if C.leaks:
                bad += any_not_finite(sums_k)
        if C.grad_v:
            at = b * grad_v.batch + kv_head * grad_v.head + offsets(grad_v, line_y, line_x, j_y, j_x)
            store_pieces(grad_v.data, at, there, grad_v.channel, C.value_dim, sums_v)
            if C.leaks:
                bad += any_not_finite(sums_v)
    else:
        at = b * received.batch + kv_head * received.head + offsets(received, line_y, line_x, j_y, j_x)
        tl.store(received.data + at, sums, mask=there)
    return bad


@triton.jit(do_not_specialize=["batch", "shares"])
def attention_backward_dkdv_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k, before_v, grad_key_bias, before_key_bias, received, terms,
    y, x, factors, counts, partials, batch, shares, flags, C: tl.constexpr,
):  # fmt: skip
    """dK, dV, dkey_bias and shares of the gradients of key-side tables; or the sums of P. See the top of this file.

    Args:
        q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k, before_v, grad_key_bias, before_key_bias, received:
            `structs.Map`; those named `before` are of the part before, float32; `grad_key_bias` has query heads.
        terms, y, x, factors, counts, partials, flags: as in `attention_backward_dq_kernel`.
        C: `structs.Config`.
    """
    i = program(C.wide)
    if i >= product(shares, counts.heads // counts.group, C.wide):
        return
    kv_head = (i // shares).to(tl.int64)
    if C.careful:
        if tl.load(flags + kv_head) != 0:
            _key_tiles(
                i % shares, kv_head, q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k, before_v,
                grad_key_bias, before_key_bias, received, terms, y, x, factors, counts, partials, batch, shares,
    True, C,
            )  # fmt: skip
    else:
        bad = _key_tiles(
            i % shares, kv_head, q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k, before_v,
            grad_key_bias, before_key_bias, received, terms, y, x, factors, counts, partials, batch, shares, False, C,
        )  # fmt: skip
        if C.leaks:
            tl.store(flags + kv_head, 1, mask=bad > 0)


@triton.jit
def _key_tiles(
    share, kv_head, q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k, before_v, grad_key_bias, before_key_bias,
    received, terms, y, x, factors, counts, partials, batch, shares, CAREFUL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The tiles of a program: one, or its share of those of a key head; how much was not finite."""
    if C.shared:
        mine = None
        if C.key_tables:
            mine = partials.data + share.to(tl.int64) * counts.heads * partials.size
        if C.key_tables and CAREFUL:
            clear(mine + kv_head * counts.group * partials.size, counts.group * partials.size)
        bad = 0
        for t in range(share, product(counts.tiles, batch, C.wide), shares):
            bad += _key_tile(
                t, kv_head, q, k, v, grad_out, lse, delta, grad_k, grad_v, before_k,
                before_v, grad_key_bias, before_key_bias, received, terms, y, x, factors, counts, partials, mine,
                CAREFUL, C,
            )  # fmt: skip
    else:
        bad = _key_tile(
            share, kv_head, q, k, v, grad_out, lse, delta, grad_k, grad_v,
            before_k, before_v, grad_key_bias, before_key_bias, received, terms, y, x, factors, counts, partials,
            None, CAREFUL, C,
        )  # fmt: skip
    return bad
