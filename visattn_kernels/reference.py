"""The truth that every kernel is held to: dense attention in pure torch.

It stores the whole map, runs in any dtype on any device, and is differentiable any number of times. It sees only
patterns and terms, so that no mistake of a kernel can be in it too.

Inside, keys lie on the key grid extended by the pattern's margin (none but for border="zero"), where keys outside
exist; [Hk', Wk'] are its sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from visattn_kernels.patterns import Pattern, Size
from visattn_kernels.terms import TERM_TENSORS, Term, cast, scales, tensors_of


def logits(
    q: torch.Tensor, k: torch.Tensor, pattern: Pattern, *, scale: float, terms: Sequence[Term] = ()
) -> torch.Tensor:
    """The scores of every query with every key, `[B, heads, H, W, Hk', Wk']`, -inf where it does not see the key.

    Args:
        q (Tensor[B, H, W, heads, D]): queries.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys.
        pattern: which keys a query sees.
        scale: factor of q·k.
        terms: what is added to the scores; value terms change nothing.
    """
    extra = dict(zip(TERM_TENSORS, tensors_of(terms), strict=True))
    query_scale, key_scale = scales(terms)
    k = k.repeat_interleave(q.shape[3] // k.shape[3], dim=3)  # [B, Hk, Wk, heads, D]
    sees = visible(q, k, pattern, terms)  # [B, heads, H, W, Hk', Wk']
    inside = None if sees is None else _crop(sees, pattern, k)
    scores = _dot("byxhd,bvuhd->bhyxvu", q, k, inside) * scale

    # What a key takes part in: outside the map it has k = 0 and no bias, so nothing is added there.
    tables = [_table(extra[f"relative_key_{side}"], q, k, pattern, axis, False) for axis, side in enumerate("hw")]
    if tables[0] is not None or tables[1] is not None:
        parts = _along(
            tables,
            inside,
            lambda table, seen: _dot("bvuhd,hyvd->bhyvu", k, table, seen)[:, :, :, None],
            lambda table, seen: _dot("bvuhd,hxud->bhxvu", k, table, seen)[:, :, None],
            (3, 2),
        )
        scores = scores + key_scale * parts
    if (bias := extra["key_bias"]) is not None:
        scores = scores + _per_key(bias)
    (top, bottom), (left, right) = pattern.margin()
    scores = torch.nn.functional.pad(scores, (left, right, top, bottom))

    # What the offset alone decides is there outside, too.
    if (bias := extra["relative_bias"]) is not None:
        ys, xs = (_index(q, k, pattern, axis, True) for axis in (0, 1))
        scores = scores + bias[:, ys[:, None, :, None], xs[:, None, :]]
    tables = [_table(extra[f"relative_query_{side}"], q, k, pattern, axis, True) for axis, side in enumerate("hw")]
    if tables[0] is not None or tables[1] is not None:
        parts = _along(
            tables,
            sees,
            lambda table, seen: _dot("byxhd,hyvd->bhyxv", q, table, seen)[..., None],
            lambda table, seen: _dot("byxhd,hxud->bhyxu", q, table, seen)[..., None, :],
            (5, 4),
        )
        scores = scores + query_scale * parts
    return scores if sees is None else scores.masked_fill(~sees, -torch.inf)


def weights(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys and its log-sum-exp; a query with no key has weights 0 and lse -inf.

    Args:
        scores (Tensor[B, heads, H, W, Hk', Wk']): logits.

    Returns:
        The map, shaped like `scores`, and lse (Tensor[B, heads, H, W]).
    """
    # A query with no key is computed with scores of 0 and masked after, so that its gradient is 0 and not NaN.
    masked = scores == -torch.inf
    empty = masked.flatten(-2).all(-1)
    scores = scores.masked_fill(empty[..., None, None], 0)
    lse = scores.flatten(-2).logsumexp(-1)
    # A masked weight is 0 whatever lse is: exp(-inf - NaN) must not leak.
    weights = torch.exp(scores - lse[..., None, None]).masked_fill(masked, 0)
    return weights, lse.masked_fill(empty, -torch.inf)


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, *, scale: float, terms: Sequence[Term] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with every operation in the dtype of its inputs; see `attention` for the arguments."""
    map_, lse = weights(logits(q, k, pattern, scale=scale, terms=terms))
    return combine(map_, q, k, v, pattern, terms=terms), lse.permute(0, 2, 3, 1)


def combine(
    map_: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    terms: Sequence[Term] = (),
) -> torch.Tensor:
    """The sum of values and value terms, weighted by a map `[B, heads, H, W, Hk', Wk']`; see `attention`."""
    extra = dict(zip(TERM_TENSORS, tensors_of(terms), strict=True))
    sees = visible(q, k, pattern, terms)
    v = v.repeat_interleave(q.shape[3] // v.shape[3], dim=3)
    inside = None if sees is None else _crop(sees, pattern, k)
    out = _weigh("bhyxvu,bvuhd->byxhd", _crop(map_, pattern, k), v, inside)
    tables = [_table(extra[f"relative_value_{side}"], q, k, pattern, axis, True) for axis, side in enumerate("hw")]
    if tables[0] is None and tables[1] is None:
        return out
    return out + _along(
        tables,
        sees,
        lambda table, seen: _weigh("bhyxv,hyvd->byxhd", map_.sum(5), table, seen),
        lambda table, seen: _weigh("bhyxu,hxud->byxhd", map_.sum(4), table, seen),
        (5, 4),
    )


def probabilities(
    q: torch.Tensor, k: torch.Tensor, pattern: Pattern, *, scale: float, terms: Sequence[Term] = ()
) -> torch.Tensor:
    """The whole map, `[B, heads, H, W, Hk, Wk]`, in the dtype of its inputs; keys outside the map are left out."""
    return _crop(weights(logits(q, k, pattern, scale=scale, terms=terms))[0], pattern, k)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, *, scale: float, terms: Sequence[Term] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention; 16-bit inputs are computed in float32.

    Args:
        q (Tensor[B, H, W, heads, D]): queries.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys.
        v (Tensor[B, Hk, Wk, kv_heads, Dv]): values.
        pattern: which keys a query sees.
        scale: factor of q·k.
        terms: what is added to scores and values.

    Returns:
        out (Tensor[B, H, W, heads, Dv]), dtype of q, and lse (Tensor[B, H, W, heads]), float32 or float64.

    Memory:
        `B * heads * H*W * Hk*Wk` elements, several times.
    """
    q, k, v, terms, dtype = _widened(q, k, v, terms)
    out, lse = formula(q, k, v, pattern, scale=scale, terms=terms)
    return out.to(dtype), lse


def attention_map(
    q: torch.Tensor,
    k: torch.Tensor,
    at: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float,
    terms: Sequence[Term] = (),
) -> torch.Tensor:
    """Rows of the map at the queries `at` (int64 Tensor[P, 2]), `[B, P, heads, Hk, Wk]`, float32 or float64."""
    q, k, _, terms, _ = _widened(q, k, k, terms)
    return probabilities(q, k, pattern, scale=scale, terms=terms)[:, :, at[:, 0], at[:, 1]].transpose(1, 2)


def attention_received(
    q: torch.Tensor, k: torch.Tensor, pattern: Pattern, *, scale: float, terms: Sequence[Term] = ()
) -> torch.Tensor:
    """The sum of each key's weights over all queries and its head group, `[B, Hk, Wk, kv_heads]`."""
    q, k, _, terms, _ = _widened(q, k, k, terms)
    per_head = probabilities(q, k, pattern, scale=scale, terms=terms).sum((2, 3))  # [B, heads, Hk, Wk]
    groups = (q.shape[0], k.shape[3], q.shape[3] // k.shape[3], *per_head.shape[2:])
    return per_head.reshape(groups).sum(2).permute(0, 2, 3, 1)


def visible(q: torch.Tensor, k: torch.Tensor, pattern: Pattern, terms: Sequence[Term] = ()) -> torch.Tensor | None:
    """Which keys each query sees, `bool[B, heads, H, W, Hk', Wk']`; None where it is every key of the pattern Global.

    A key is removed by the pattern, or by a bias of -inf.
    """
    queries, keys = Size(q.shape[1], q.shape[2]), Size(k.shape[1], k.shape[2])
    mask = pattern.mask(queries, keys, q.device, outside=True)
    bias = tensors_of(terms)[TERM_TENSORS.index("key_bias")]
    if bias is not None:
        (top, bottom), (left, right) = pattern.margin()
        kept = torch.nn.functional.pad(_per_key(bias) != -torch.inf, (left, right, top, bottom), value=True)
        mask = kept if mask is None else mask & kept
    if mask is None:
        return None
    return mask.expand(q.shape[0], q.shape[3], *queries, *mask.shape[-2:])


def _widened(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Sequence[Term]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[Term], torch.dtype]:
    """The arguments in the dtype of sums, and the dtype they came in."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype), cast(terms, lambda x: x.to(dtype)), q.dtype


def _crop(x: torch.Tensor, pattern: Pattern, k: torch.Tensor) -> torch.Tensor:
    """Cut what lies outside the key grid from the last two dimensions."""
    (top, _), (left, _) = pattern.margin()
    return x[..., top : top + k.shape[1], left : left + k.shape[2]]


def _per_key(bias: torch.Tensor) -> torch.Tensor:
    """A bias per key, `[B, Hk, Wk]` or `[B, Hk, Wk, heads]`, as `[B, heads or 1, 1, 1, Hk, Wk]`."""
    return (bias[..., None] if bias.dim() == 3 else bias).permute(0, 3, 1, 2)[:, :, None, None]


def _index(q: torch.Tensor, k: torch.Tensor, pattern: Pattern, axis: int, outside: bool) -> torch.Tensor:
    """The entry of a relative table for each query and key of an axis, int64 `[H, Hk]`; any entry where masked."""
    queries, keys = Size(q.shape[1], q.shape[2]), Size(k.shape[1], k.shape[2])
    reach = pattern.reach(queries, keys)[axis]
    return (pattern.offsets(queries, keys, q.device, outside)[axis] + reach - 1).clamp(0, 2 * reach - 2)


def _table(
    table: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, pattern: Pattern, axis: int, outside: bool
) -> torch.Tensor | None:
    """The vector of each query and key of an axis, `[heads, H, Hk, D]`, from a relative table."""
    if table is None:
        return None
    table = table if table.dim() == 3 else table.expand(q.shape[3], *table.shape)
    return table[:, _index(q, k, pattern, axis, outside)]


def _along(
    tables: list[torch.Tensor | None],
    sees: torch.Tensor | None,
    h: Callable[..., torch.Tensor],
    w: Callable[..., torch.Tensor],
    gone: tuple[int, int],
) -> torch.Tensor:
    """The sum of what the two axes of a relative term give, `h(table, seen)` and `w(table, seen)`.

    Args:
        tables: of the height and the width, one may be None.
        sees: the mask.
        h, w: what to do on an axis.
        gone: the dimension of the mask that each of them has not; seen means by any position along it.
    """
    parts = [
        part(table, None if sees is None else sees.any(dim))
        for part, table, dim in zip((h, w), tables, gone, strict=True)
        if table is not None
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


# Contractions over the pairs that are visible. A plain einsum multiplies what lies in a masked pair by 0, and 0 * NaN
# is NaN, in the forward as in the backward. These two never look there, and each other's gradients are made of them:
#
#     dot     P[pair] = sum_d A[query, d] * B[key, d]           dA = weigh(dP, B), dB = weigh(dP, A)
#     weigh   A[query, d] = sum_key P[pair] * B[key, d]         dP = dot(dA, B),   dB = weigh(P, dA)


def _dot(equation: str, a: torch.Tensor, b: torch.Tensor, sees: torch.Tensor | None) -> torch.Tensor:
    """`einsum("A,B->P")`, 0 in the pairs that are not visible."""
    if sees is None:
        return torch.einsum(equation, a, b)
    names, pair = equation.split("->")
    function = _Dot if torch.compiler.is_compiling() else _DotWithTangents
    result: torch.Tensor = function.apply(a, b, sees, (pair, *names.split(",")))  # type: ignore[no-untyped-call]
    return result


def _weigh(equation: str, p: torch.Tensor, b: torch.Tensor, sees: torch.Tensor | None) -> torch.Tensor:
    """`einsum("P,B->A")` over the pairs that are visible."""
    if sees is None:
        return torch.einsum(equation, p, b)
    names, a = equation.split("->")
    pair, b_name = names.split(",")
    function = _Weigh if torch.compiler.is_compiling() else _WeighWithTangents
    result: torch.Tensor = function.apply(p, b, sees, (pair, a, b_name))  # type: ignore[no-untyped-call]
    return result


class _Dot(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor, sees: torch.Tensor, names: tuple[str, str, str]) -> torch.Tensor:
        pair, a_name, b_name = names
        return torch.einsum(f"{a_name},{b_name}->{pair}", a, b).masked_fill(~sees, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        a, b, sees = ctx.saved_tensors
        pair, a_name, b_name = ctx.names
        grad_a = _weigh(f"{pair},{b_name}->{a_name}", grad, b, sees) if ctx.needs_input_grad[0] else None
        grad_b = _weigh(f"{pair},{a_name}->{b_name}", grad, a, sees) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None


class _Weigh(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(p: torch.Tensor, b: torch.Tensor, sees: torch.Tensor, names: tuple[str, str, str]) -> torch.Tensor:
        pair, a_name, b_name = names
        equation = f"{pair},{b_name}->{a_name}"
        p, finite = p.masked_fill(~sees, 0), b.isfinite()
        out = torch.einsum(equation, p, torch.where(finite, b, 0))
        seen = sees.to(p.dtype)
        # NaN and Inf come back for those that see them; where p is 0, 0 * Inf is NaN as anywhere.
        for value, there in ((torch.nan, b.isnan()), (torch.inf, b == torch.inf), (-torch.inf, b == -torch.inf)):
            at = there.to(p.dtype)
            met = torch.einsum(equation, seen, at) > 0
            out = out + torch.einsum(equation, p, at) * torch.zeros_like(out).masked_fill(met, value)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        p, b, sees = ctx.saved_tensors
        pair, a_name, b_name = ctx.names
        grad_p = _dot(f"{a_name},{b_name}->{pair}", grad, b, sees) if ctx.needs_input_grad[0] else None
        grad_b = _weigh(f"{pair},{a_name}->{b_name}", p, grad, sees) if ctx.needs_input_grad[1] else None
        return grad_p, grad_b, None, None


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keep what both derivatives need."""
    *tensors, ctx.names = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


# torch.compile takes no Function with a forward-mode derivative, which nothing asks for there.


class _DotWithTangents(_Dot):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        a, b, sees = ctx.saved_tensors
        pair, a_name, b_name = ctx.names
        return _product_rule(_dot, f"{a_name},{b_name}->{pair}", (a, b), tangents, sees)


class _WeighWithTangents(_Weigh):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        p, b, sees = ctx.saved_tensors
        pair, a_name, b_name = ctx.names
        return _product_rule(_weigh, f"{pair},{b_name}->{a_name}", (p, b), tangents, sees)


def _product_rule(
    contract: Any, equation: str, at: tuple[torch.Tensor, torch.Tensor], tangents: Any, sees: torch.Tensor
) -> torch.Tensor:
    """The tangent of a product."""
    parts = []
    if tangents[0] is not None:
        parts.append(contract(equation, tangents[0], at[1], sees))
    if tangents[1] is not None:
        parts.append(contract(equation, at[0], tangents[1], sees))
    result: torch.Tensor = sum(parts[1:], parts[0])
    return result
