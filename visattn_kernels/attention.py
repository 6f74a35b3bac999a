"""The public operations: attention over a two-dimensional map, and its map read without storing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from visattn_kernels import backends, ops, reference
from visattn_kernels.errors import expected, tensor, told
from visattn_kernels.patterns import Global, Pattern
from visattn_kernels.problem import Problem, check_map, check_options, make_problem
from visattn_kernels.terms import Term, cast, scales, tensors_of
from visattn_kernels.tracing import one_node, refusing

_GLOBAL = Global()


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern = ...,
    *,
    scale: float | None = ...,
    terms: Sequence[Term] = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern = ...,
    *,
    scale: float | None = ...,
    terms: Sequence[Term] = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@one_node
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern = _GLOBAL,
    *,
    scale: float | None = None,
    terms: Sequence[Term] = (),
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every position of a map to the keys that a pattern shows it.

        logit[i, j] = scale * q_i·k_j + sum of score terms(i, j)        for j in keys(i)
        out_i       = sum_j softmax_j(logit[i, :]) * (v_j + sum of value terms(i, j))
        lse_i       = log sum_j exp(logit[i, j])

    Any strides are read in place: contiguous tensors, `heads_last` views of an image in either memory format,
    slices of a packed QKV projection, expanded tensors. Under autocast, q, k, v and the tensors of terms are cast to
    its dtype.

    Args:
        q (Tensor[B, H, W, heads, D]): queries; float64, float32, bfloat16 or float16. Any D >= 1.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys, same dtype and device; `kv_heads` divides `heads`.
        v (Tensor[B, Hk, Wk, kv_heads, Dv]): values, same dtype and device. Any Dv >= 1.
        pattern: which keys a query sees: `Global`, `Window`, `Grid`, `Neighborhood`, `Row`, `Column` or `CrissCross`.
            All but `Global` need grids of one size.
        scale: factor of q·k; None means `1/sqrt(D)`.
        terms: what is added to scores and values: `RelativeBias`, `RelativeQuery`, `RelativeKey`, `RelativeValue`,
            `KeyBias`, at most one of each, in any order. Their tensors have the dtype and device of q and may require
            grad. Relative tables go by offset, key position minus query position; those of Swin and ViTDet, which
            go by query minus key, are to be flipped along it.
        backend: "auto", or the name of the backend that must run this; `explain` lists them.
        return_lse: return lse too. It is differentiable, so that `merge` is.

    Returns:
        out (Tensor[B, H, W, heads, Dv]), dtype of q, contiguous; with `return_lse` also lse
        (Tensor[B, H, W, heads]), natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: the pattern or a term does not fit the grids, a term comes twice, or `backend` is no backend's name.
        RuntimeError: tensors disagree in rank, shape, dtype or device, or a forced backend cannot run this.
        NotImplementedError: derivatives that are not there: forward-mode ones, those of `torch.func`, and in the
            backward second ones. With `backend="reference"` all are.

    Memory:
        out and lse, and scratch memory per thread that grows with D and Dv and, with relative terms, with the pattern's
        reach. The backward adds one number per query and head (with a key bias, per key and head), for 16-bit inputs
        one float32 copy of the gradient of q, and for each head at most 32 copies of its relative tables that require
        grad. `CrissCross` takes twice as many of those, and in 16 bits float32 copies of out and of the gradients of
        k and v. On a GPU: one float32 number per query, head and map for the backward; one per key and query head with
        a key bias; of relative tables that require grad as many copies as fit 64 MB, or one; and `CrissCross` takes
        float32 copies of out and of the gradients of q, k and v in every dtype. Never anything of the size of the
        map, except with `backend="reference"`.

    References:
        Vaswani et al., 2017, equation 1; the online softmax of Milakov and Gimelshein, 2018; the tiling and the
        recomputation in the backward of Dao et al., 2022. Patterns and terms name their own.
    """
    if not isinstance(return_lse, bool):
        raise expected("return_lse to be a bool", "return_lse", told(return_lse), TypeError)
    q, k, v = ops.autocast(tensor(q, "q"), tensor(k, "k"), tensor(v, "v"))
    terms = _autocast(terms, q)
    problem = make_problem(q, k, v, pattern, scale, terms)
    name = backends.choose(problem, backend)
    if name == "reference":
        out, lse = reference.attention(q, k, v, pattern, scale=problem.scale, terms=terms)
    else:
        extra = tensors_of(terms)
        ops.refuse_transforms(q, k, v, *extra)
        out, lse = ops.operator(name, "forward")(q, k, v, *extra, *_call(problem, terms))
    return (out, lse) if return_lse else out


def _call(problem: Problem, terms: Sequence[Term]) -> tuple[Any, ...]:
    """The arguments that every operator takes after its tensors."""
    return (problem.scale, *scales(terms), problem.pattern.encode())


def _autocast(terms: Sequence[Term], q: torch.Tensor) -> Sequence[Term]:
    """Cast the tensors of terms as q was; what is no term is refused later."""
    if not ops.autocasts(q.device.type):
        return terms
    return cast(terms, lambda x: ops.autocast(x)[0]) if isinstance(terms, Sequence) else terms


@one_node
def attention_map(
    q: torch.Tensor,
    k: torch.Tensor,
    at: Sequence[tuple[int, int]] | torch.Tensor,
    pattern: Pattern = _GLOBAL,
    *,
    scale: float | None = None,
    terms: Sequence[Term] = (),
    backend: str = "auto",
) -> torch.Tensor:
    """Exact rows of the attention map: how much the queries `at` look at every key.

    Args:
        q (Tensor[B, H, W, heads, D]): queries.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys.
        at: points (y, x) of the query grid, a sequence of pairs or an integer Tensor[P, 2].
        pattern, scale, terms, backend: as in `attention`.

    Returns:
        Tensor[B, P, heads, Hk, Wk], float32 (float64 for float64 inputs), zeros outside the pattern. A row sums to 1,
        less what border="zero" gives to the zeros around the map; to 0 where a query has no key.

    Raises:
        ValueError: a point lies outside the query grid, or is no pair.
        TypeError, RuntimeError: as `attention`.
        NotImplementedError: its gradient is asked for, except with `backend="reference"`.

    Memory:
        The result, two numbers per point and head, and scratch memory per thread as `attention` has it.
    """
    q, k = ops.autocast(tensor(q, "q"), tensor(k, "k"))
    terms = _autocast(terms, q)
    problem = make_problem(q, k, None, pattern, scale, terms)
    points = points_in(at, problem.queries).to(q.device)
    name = backends.choose(problem, backend)
    if name == "reference":
        return reference.attention_map(q, k, points, pattern, scale=problem.scale, terms=terms)
    extra = tensors_of(terms, values=False)
    ops.refuse_transforms(q, k, *extra)
    rows: torch.Tensor = ops.operator(name, "map")(q, k, *extra, points, *_call(problem, terms))
    return rows


def points_in(at: Sequence[tuple[int, int]] | torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Check the points of `attention_map` on a grid of this size, and make them an int64 Tensor[P, 2]."""
    rule = "at to be points (y, x), a sequence of pairs of integers or an integer Tensor[P, 2]"
    if isinstance(at, torch.Tensor):
        if at.dtype.is_floating_point or at.dtype.is_complex or at.dtype == torch.bool:
            raise expected(rule, "at.dtype", at.dtype, TypeError)
        if at.dim() != 2 or at.shape[1] != 2:
            raise expected(rule, "at.shape", list(at.shape), ValueError)
        # Values that are not there yet (traced, or mapped by vmap) are checked by the operator when they are.
        if not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(at)):
            _check_inside(at.tolist(), size)
        return at.to(torch.int64)
    if not isinstance(at, Sequence) or isinstance(at, str):
        raise expected(rule, "at", told(at), TypeError)
    for i, point in enumerate(at):
        if not isinstance(point, Sequence) or any(isinstance(x, bool) or not isinstance(x, int) for x in point):
            raise expected(rule, f"at[{i}]", told(point), TypeError)
        if len(point) != 2:
            raise expected(rule, f"at[{i}]", told(point), ValueError)
    _check_inside(at, size)
    return torch.tensor([list(point) for point in at], dtype=torch.int64).reshape(-1, 2)


def _check_inside(points: Sequence[Sequence[int]], size: tuple[int, int]) -> None:
    """Refuse a point outside the query grid."""
    height, width = size
    for y, x in points:
        if not (0 <= y < height and 0 <= x < width):
            raise expected(
                f"points (y, x) with 0 <= y < {height} and 0 <= x < {width}", "at", f"({y}, {x})", ValueError
            )


@one_node
def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern = _GLOBAL,
    *,
    scale: float | None = None,
    terms: Sequence[Term] = (),
    backend: str = "auto",
) -> torch.Tensor:
    """How much each key is looked at: the column sums of the attention map, `sum_i A[i, j]`.

    Args:
        q (Tensor[B, H, W, heads, D]): queries.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys.
        pattern, scale, terms, backend: as in `attention`.

    Returns:
        Tensor[B, Hk, Wk, kv_heads], float32 (float64 for float64 inputs), summed over the query heads that share
        a key head. Its total per map is `H * W * heads`, less what border="zero" gives to the zeros around the map
        and 1 for each query and head with no key.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
        NotImplementedError: its gradient is asked for, except with `backend="reference"`.

    Memory:
        The result, two numbers per query and head, and scratch memory per thread as `attention` has it.
    """
    q, k = ops.autocast(tensor(q, "q"), tensor(k, "k"))
    terms = _autocast(terms, q)
    problem = make_problem(q, k, None, pattern, scale, terms)
    name = backends.choose(problem, backend)
    if name == "reference":
        return reference.attention_received(q, k, pattern, scale=problem.scale, terms=terms)
    extra = tensors_of(terms, values=False)
    ops.refuse_transforms(q, k, *extra)
    sums: torch.Tensor = ops.operator(name, "received")(q, k, *extra, *_call(problem, terms))
    return sums


@one_node
def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge results over disjoint sets of keys into the result over their union, exactly.

        lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) * out_p

    Args:
        parts: pairs (out, lse) of `attention(..., return_lse=True)` over the same queries, of any shapes
            `[..., Dv]` and `[...]` that agree.

    Returns:
        out, dtype of the first part, and lse. Differentiable any number of times.

    Raises:
        TypeError: `parts` is not a sequence of pairs of tensors.
        ValueError: there is no part.
        RuntimeError: the parts disagree in shape, dtype or device.
    """
    rule = "parts to be a sequence of pairs (out, lse)"
    if not isinstance(parts, Sequence):
        raise expected(rule, "parts", told(parts), TypeError)
    for i, part in enumerate(parts):
        if not isinstance(part, Sequence) or len(part) != 2:
            raise expected(rule, f"parts[{i}]", told(part), TypeError)
    if not parts:
        raise expected("at least one part", "parts", parts, ValueError)
    first_out, first_lse = tensor(parts[0][0], "parts[0][0]"), tensor(parts[0][1], "parts[0][1]")
    for i, (out, lse) in enumerate(parts):
        tensor(out, f"parts[{i}][0]"), tensor(lse, f"parts[{i}][1]")
        for name, x, like in ((f"parts[{i}][0]", out, first_out), (f"parts[{i}][1]", lse, first_lse)):
            for what in ("shape", "dtype", "device"):
                if getattr(x, what) != getattr(like, what):
                    raise expected(
                        f"all parts to have the same {what}",
                        f"{name}.{what}",
                        f"{getattr(x, what)}, unlike {getattr(like, what)} of the first part",
                        RuntimeError,
                    )
        if out.shape[:-1] != lse.shape:
            raise expected(
                "out of shape [..., Dv] and lse of shape [...]",
                f"parts[{i}]",
                f"shapes {list(out.shape)} and {list(lse.shape)}",
                RuntimeError,
            )
    # As in the reference: a query with no key in any part is computed with scores of 0 and masked after.
    lses = torch.stack([lse for _, lse in parts])  # [parts, ...]
    empty = (lses == -torch.inf).all(0)
    lses = lses.masked_fill(empty, 0)
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse).masked_fill(empty, 0)
    total = torch.zeros_like(first_out)
    for weight, (out, _) in zip(weights[..., None], parts, strict=True):
        total = total + weight * torch.where(weight == 0, torch.zeros_like(out), out)  # NaN there must not leak
    return total.to(first_out.dtype), lse.masked_fill(empty, -torch.inf)


def explain(
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    pattern: Pattern = _GLOBAL,
    *,
    scale: float | None = None,
    terms: Sequence[Term] = (),
) -> str:
    """Which backends can run a call, and why the others can't, in the order in which they are asked.

    Args:
        q, k, v, pattern, scale, terms: a call's arguments as in `attention`; without tensors, the backends of this
            machine.

    Returns:
        A text of one line per backend. Print it.
    """
    check_options(pattern, scale, terms)
    problem = None
    if q is not None or k is not None or v is not None:
        maps = [tensor(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")) if name != "v" or x is not None]
        q, k, *rest = ops.autocast(*maps)
        terms = _autocast(terms, q)
        problem = make_problem(q, k, rest[0] if rest else None, pattern, scale, terms)
    lines = [problem.describe()] if problem else []
    taken = False
    for backend in backends.in_order(problem) if problem else backends.REGISTRY:
        reasons = backend.reasons(problem) if problem else backend.unavailable()
        if reasons:
            lines.append(f"{backend.name:<10} no: {'; '.join(reasons)}")
            continue
        state = "yes" if taken or problem is None else "yes, taken"
        after = f"; {why}" if problem and (why := backend.yields(problem)) else ""
        taken = True
        lines.append(f"{backend.name:<10} {state} ({backend.about}{after})")
    return "\n".join(lines)


@one_node
@refusing
def heads_last(x: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """View an image `[B, C, H, W]` as `[B, H, W, heads, C // heads]`; never copies, in either memory format.

    Args:
        x (Tensor[B, C, H, W]): the output of a 1x1 convolution, say.
        heads: number of heads; divides C. Head h has channels `h * C // heads` and following.

    Raises:
        TypeError: `x` is not a tensor or `heads` not an integer.
        ValueError: `heads` does not divide C.
        RuntimeError: `x` has not four dimensions.
    """
    tensor(x, "x")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise expected("heads to be an integer", "heads", told(heads), TypeError)
    if x.dim() != 4:
        raise expected("x of shape [B, C, H, W]", "x.shape", list(x.shape), RuntimeError)
    if heads < 1 or x.shape[1] % heads != 0:
        raise expected(f"heads to divide the {x.shape[1]} channels of x", "heads", heads, ValueError)
    batch, channels, height, width = x.shape
    # view, not reshape: splitting one dimension is possible for any strides
    return x.view(batch, heads, channels // heads, height, width).permute(0, 3, 4, 1, 2)


@one_node
def channels_first(y: torch.Tensor) -> torch.Tensor:
    """View `[B, H, W, heads, D]` as an image `[B, heads * D, H, W]`, the inverse of `heads_last`.

    The image of a contiguous tensor is in the channels-last memory format. Copies only where strides admit no view.

    Args:
        y (Tensor[B, H, W, heads, D]): the output of `attention`, say.

    Raises:
        TypeError, RuntimeError: `y` is not such a tensor.
    """
    check_map(y, "y", hint="")
    return y.permute(0, 3, 4, 1, 2).flatten(1, 2)
