"""Random problems through the wrapper, and random nonsense through the raw operators: either a result that holds to the
policy, or an error that says why; never a crash, never an access out of bounds (the sanitizers run this file too)."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, differentiate, hold, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import visattn_kernels as va
from visattn_kernels import ops
from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

SETTINGS = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    side = st.integers(1, 12)
    kv_heads = draw(st.integers(1, 3))
    return Case(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(0, 3)),
        queries=(draw(side), draw(side)),
        keys=(draw(side), draw(side)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.integers(1, 40)),
        scale=draw(st.none() | st.floats(-2, 2)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        needs=draw(st.sampled_from(["qkv", "qkv", "q", "k", "v", "qk", "kv"])),
    )


@settings(SETTINGS, max_examples=150)
@given(cases())
def test_random_problems(case: Case) -> None:
    def attend(q, k, v, **extra):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": "cpu"}
        return va.attention(q, k, v, case.pattern, **call, return_lse=True)

    hold(case, differentiate(attend, inputs(case), case.wanted))


SHAPE = st.lists(st.integers(0, 3), min_size=3, max_size=6).map(tuple)
GOOD = (1, 2, 3, 2, 2)


@st.composite
def almost(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that fits, mostly; else one with another size, rank, dtype or strides of 0."""
    kind = draw(st.sampled_from(["good"] * 12 + ["size", "rank", "dtype", "expanded"]))
    if kind == "size" and shape:
        i = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:i], draw(st.integers(0, 4)), *shape[i + 1 :])
    if kind == "rank":
        shape = draw(SHAPE)
    if kind == "dtype":
        dtype = draw(st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64]))
    x = torch.ones(shape, dtype=dtype)
    return x[:1].expand(shape) if kind == "expanded" and shape and shape[0] else x


PATTERN = st.just(va.Global().encode()) | st.lists(st.integers(-3, 9), max_size=12)
NEEDS = st.integers(0, 7) | st.integers(-9, 3000)


def call(name: str, *args) -> object:
    """The operator's result, or None if it raised an error of its own making."""
    try:
        return ops.operator("cpu", name)(*args)
    except RuntimeError as error:
        if "visattn: expected" not in str(error):
            raise
        return None


def consistent(q, k, v=None) -> bool:
    """Whether the shapes and dtypes make a problem."""
    maps = [x for x in (q, k, v) if x is not None]
    return (
        all(x.dim() == 5 and x.dtype == q.dtype and x.dtype in DTYPES and min(x.shape[1:]) > 0 for x in maps)
        and q.shape[0] == k.shape[0]
        and q.shape[4] == k.shape[4]
        and q.shape[3] % k.shape[3] == 0
        and (v is None or v.shape[:4] == k.shape[:4])
    )


@settings(SETTINGS, max_examples=400)
@given(st.data())
def test_raw_operators_refuse_what_does_not_fit(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    q = data.draw(almost(GOOD, dtype))
    k, v = data.draw(almost((1, 3, 2, 1, 2), dtype)), data.draw(almost((1, 3, 2, 1, 3), dtype))
    out, grad_out = data.draw(almost((1, 2, 3, 2, 3), dtype)), data.draw(almost((1, 2, 3, 2, 3), dtype))
    lse, grad_lse = data.draw(almost((1, 2, 3, 2), sums)), data.draw(almost((1, 2, 3, 2), sums))
    pattern, needs = data.draw(PATTERN), data.draw(NEEDS)
    term = data.draw(st.sampled_from([None] * 9 + [torch.ones(2)]))
    terms = (*ops.NO_TERMS[:-1], term)
    scalars = (data.draw(st.floats()), 1.0, 1.0, pattern)
    fits = pattern == va.Global().encode() and term is None

    result = call("forward", q, k, v, *terms, *scalars)
    assert (result is not None) == (fits and consistent(q, k, v))
    result = call("received", q, k, *terms, *scalars)
    assert (result is not None) == (fits and consistent(q, k))

    result = call("backward", grad_out, grad_lse, q, k, v, *terms, out, lse, *scalars, needs)
    shape = (*q.shape[:4], v.shape[-1]) if q.dim() >= 4 and v.dim() else ()
    whole = (
        all(x.shape == shape and x.dtype == q.dtype for x in (out, grad_out))
        and all(x.shape == q.shape[:4] and x.dtype == sums for x in (lse, grad_lse))
        and (q.dtype == torch.float64) == (sums == torch.float64)
        and 0 <= needs < 8
    )
    assert (result is not None) == (fits and consistent(q, k, v) and whole)

    at = data.draw(almost((2, 2), torch.int64))
    if at.dtype == torch.int64 and at.numel():
        at = at * data.draw(st.sampled_from([0, 1, 1, 2, 3, -1, 2**40, -(2**62)]))
    result = call("map", q, k, *terms, at, *scalars)
    inside = (
        (
            at.dtype == torch.int64
            and at.dim() == 2
            and at.shape[1] == 2
            and all(0 <= y < q.shape[1] and 0 <= x < q.shape[2] for y, x in at.tolist())
        )
        if consistent(q, k)
        else False
    )
    assert (result is not None) == (fits and inside)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e300, 5e-324])
def test_any_scale_is_a_number(scale: float) -> None:
    q = torch.ones(GOOD, requires_grad=True)
    va.attention(q, q, q, scale=scale, backend="cpu").sum().backward()


@pytest.mark.parametrize("width", [2**17, 2**40, 2**56, 2**61, 2**62])
@pytest.mark.parametrize("name", ["D", "Dv", "grid"])
def test_huge_expanded_tensors_are_refused(width: int, name: str) -> None:
    """Sizes whose products leave 64 bits: an error, and no access out of bounds."""
    one = torch.zeros(())
    q = k = one.expand(1, 1, 1, 1, width if name == "D" else 1)
    v = one.expand(1, 1, 1, 1, width if name == "Dv" else 1)
    if name == "grid":
        k = v = one.expand(1, width, 2**31, 1, 1) if width < 2**32 else one.expand(1, width, 1, 1, 1)
    for call in (
        lambda: ops.operator("cpu", "forward")(q, k, v, *ops.NO_TERMS, 1.0, 1.0, 1.0, va.Global().encode()),
        lambda: va.attention(q, k, v, backend="cpu"),
    ):
        with pytest.raises(RuntimeError, match=r"visattn: expected"):
            call()
