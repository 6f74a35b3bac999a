"""The operators of the Triton backend: arguments checked, launches made and run.

`visattn_kernels.ops` has the schemas, `visattn_kernels.backends.triton` registers these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from visattn_kernels.backends import triton as backend
from visattn_kernels.errors import expected, same, strided
from visattn_kernels.ops import DIFFERENTIABLE
from visattn_kernels.patterns import decode
from visattn_kernels.problem import make_problem, tf32_products
from visattn_kernels.terms import TERM_TENSORS, terms_of
from visattn_kernels.triton import launch

Tensors = Sequence[torch.Tensor | None]

_N = len(TERM_TENSORS)


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, tensors: Tensors, options: Sequence[Any]) -> Any:
    """Check everything again, since operators can be called directly, and describe the call."""
    scale, query_scale, key_scale, encoded = options
    pattern = decode(encoded)
    terms = terms_of(tensors, query_scale, key_scale)
    try:
        problem = make_problem(q, k, v, pattern, scale, terms)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from None
    reasons = backend.unavailable() + backend.unsupported(problem)
    if reasons:
        rule = "a problem that the triton backend can run"
        raise expected(rule, "q", f"{list(q.shape)} on {q.device}", RuntimeError, "; ".join(reasons))
    present = {name: x for name, x in zip(TERM_TENSORS, tensors, strict=True) if x is not None}
    tf32 = q.dtype == torch.float32 and tf32_products()
    reach = pattern.reach(problem.queries, problem.keys)
    scales = (problem.scale, float(query_scale), float(key_scale))
    return launch.Call(q, k, v, present, tuple(pattern.encode()), reach, scales, _capability(q.device), tf32)


@cache
def _capability(device: torch.device) -> int | None:
    """The compute capability of a device, such as 90; None for the interpreter."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`visattn::triton_forward`."""
    call = _call(q, k, v, rest[:_N], rest[_N:])
    launches, out, lse = launch.forward(call)
    launch.run(launches, q.device)
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    """`visattn::triton_backward`."""
    tensors, (out, lse, *options, needs) = rest[:_N], rest[_N:]
    call = _call(q, k, v, tensors, options)
    shape = list(q.shape[:4])
    for name, x, want, dtype in (
        ("grad_out", grad_out, [*shape, v.shape[4]], q.dtype),
        ("out", out, [*shape, v.shape[4]], q.dtype),
        ("grad_lse", grad_lse, shape, torch.float32),
        ("lse", lse, shape, torch.float32),
    ):
        same(q, strided(x, name), ("q", name), "device")
        if x.dtype != dtype:
            raise expected(f"{name} of dtype {dtype}", f"{name}.dtype", x.dtype, RuntimeError)
        if list(x.shape) != want:
            raise expected(f"{name} of shape {want}", f"{name}.shape", list(x.shape), RuntimeError)
    every = dict(zip(DIFFERENTIABLE, (q, k, v, *tensors), strict=True))
    if not 0 <= needs < 1 << len(DIFFERENTIABLE):
        raise expected(f"needs from 0 to {(1 << len(DIFFERENTIABLE)) - 1}", "needs", needs, RuntimeError)
    names = [name for i, name in enumerate(DIFFERENTIABLE) if needs >> i & 1]
    for name in names:
        if every[name] is None:
            raise expected(f"a tensor {name}, whose gradient is asked for", "needs", needs, RuntimeError)
    grads: dict[str, torch.Tensor] = {}
    if names:
        launches, finish = launch.backward(call, grad_out, grad_lse, out, lse, names)
        launch.run(launches, q.device)
        grads = finish()
    return tuple(grads[name] if name in grads else q.new_empty((0,)) for name in DIFFERENTIABLE)


def rows(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`visattn::triton_map`."""
    tensors, (at, *options) = rest[:_N], rest[_N:]
    call = _call(q, k, None, tensors, options)
    same(q, strided(at, "at"), ("q", "at"), "device")
    if at.dtype != torch.int64 or at.dim() != 2 or at.shape[1] != 2:
        raise expected("at to be an int64 Tensor[P, 2]", "at", f"{at.dtype}{list(at.shape)}", RuntimeError)
    height, width = call.queries
    outside = (at < 0).any(1) | (at[:, 0] >= height) | (at[:, 1] >= width)
    if at.device.type == "cpu" and outside.any():
        rule = f"points (y, x) with 0 <= y < {height} and 0 <= x < {width}"
        raise expected(rule, "at", at.tolist(), RuntimeError)
    # To look at the points of a GPU tensor would be to wait for it: the rows of those outside are NaN instead.
    launches, weights = launch.rows(call, at.masked_fill(outside[:, None], 0))
    launch.run(launches, q.device)
    return weights.masked_fill_(outside[:, None, None, None], torch.nan) if at.device.type != "cpu" else weights


def received(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`visattn::triton_received`."""
    call = _call(q, k, None, rest[:_N], rest[_N:])
    launches, sums = launch.received(call)
    launch.run(launches, q.device)
    return sums


OPERATORS: dict[str, Callable[..., Any]] = {"forward": forward, "backward": backward, "map": rows, "received": received}
"""The function of each operator of the family."""
