"""Random problems through the wrapper, and random nonsense through the raw operators: either a result that holds to the
policy, or an error that says why; never a crash, never an access out of bounds (the sanitizers run this file too)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, LAYOUTS, TERMS, Case, TermCase, differentiate, hold, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import visattn_kernels as va
from visattn_kernels import ops
from visattn_kernels.backends import cpu
from visattn_kernels.patterns import BORDERS, PATTERN_FIELDS, PATTERN_KINDS, Pattern, Size
from visattn_kernels.terms import TERM_TENSORS

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable())),
    pytest.mark.usefixtures("two_threads"),
]

SETTINGS = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def patterns(draw: st.DrawFn, grid: tuple[int, int]) -> Pattern:
    """A pattern that fits the grid."""
    size = st.integers(1, 14)
    pair = lambda x: draw(x) if draw(st.booleans()) else (draw(x), draw(x))
    kind = draw(st.sampled_from(PATTERN_KINDS))
    if kind == "Window":
        sides = draw(size), draw(size)
        return va.Window(sides, tuple(draw(st.integers(0, side - 1)) for side in sides))
    if kind == "Grid":
        return va.Grid(pair(size))
    if kind in ("Row", "Column"):
        return getattr(va, kind)(draw(st.none() | st.integers(0, 7).map(lambda i: 2 * i + 1)))
    if kind == "Neighborhood":
        border, causal = draw(st.sampled_from(BORDERS)), pair(st.booleans())
        if border != "shift":
            return va.Neighborhood(pair(st.integers(1, 7)), pair(st.integers(1, 4)), border, causal)
        kernel = tuple(draw(st.integers(1, side)) for side in grid)
        dilation = tuple(draw(st.integers(1, side // k)) for side, k in zip(grid, kernel, strict=True))
        return va.Neighborhood(kernel, dilation, border, causal)
    return getattr(va, kind)()


@st.composite
def term_cases(draw: st.DrawFn, kind: str) -> TermCase:
    """One term with any of its options."""
    layout = draw(st.sampled_from(["contiguous", "strided", "transposed", "expanded"]))
    if kind == "KeyBias":
        return TermCase(kind, per_head=draw(st.booleans()), removed=draw(st.sampled_from([0, 0.3, 0.9])), layout=layout)
    if kind == "RelativeBias":
        return TermCase(kind, layout=layout)
    sides, scale = draw(st.sampled_from(["h", "w", "hw"])), draw(st.sampled_from([1.0, -0.5, 2.0]))
    scale = 1.0 if kind == "RelativeValue" else scale
    return TermCase(kind, sides, draw(st.booleans()), scale, layout=layout)


@st.composite
def cases(draw: st.DrawFn, sides: int = 12, groups: int = 3) -> Case:
    """A problem of any pattern, terms, layouts and widths, on grids and with groups of heads of at most so many."""
    side = st.integers(1, sides)
    kv_heads = draw(st.integers(1, groups))
    queries = draw(side), draw(side)
    keys = queries if draw(st.booleans()) else (draw(side), draw(side))
    pattern = draw(patterns(queries)) if keys == queries else va.Global()
    kinds = draw(st.sets(st.sampled_from([*TERMS])))
    kinds = [kind for kind in TERMS if kind in kinds and (keys == queries or kind == "KeyBias")]
    return Case(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(0, 3)),
        queries=queries,
        keys=keys,
        heads=kv_heads * draw(st.integers(1, groups)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.integers(1, 40)),
        scale=draw(st.none() | st.floats(-2, 2)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        needs=draw(st.sampled_from(["qkv", "qkv", "q", "k", "v", "qk", "kv"])),
        term_needs=draw(st.booleans()),
        pattern=pattern,
        terms=tuple(draw(term_cases(kind)) for kind in kinds),
    )


@settings(SETTINGS, max_examples=200)
@given(cases())
def test_random_problems(case: Case) -> None:
    def attend(q, k, v, **extra):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": "cpu"}
        return va.attention(q, k, v, case.pattern, **call, return_lse=True)

    hold(case, differentiate(attend, inputs(case), case.wanted))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array.*:DeprecationWarning")
@settings(SETTINGS, max_examples=40)
@given(cases(10, 2))  # more than a tile of queries and of keys; each program takes the interpreter about as long
def test_random_problems_by_triton(case: Case) -> None:
    case = replace(case, dtype=torch.float16 if case.dtype.itemsize == 2 else torch.float32)

    def attend(q, k, v, **extra):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": "triton"}
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


@st.composite
def encodings(draw: st.DrawFn) -> list[int]:
    """The integers of a pattern, mostly; else any."""
    fields = draw(patterns((2, 3))).encode()
    kind = draw(st.sampled_from(["good"] * 6 + ["one", "any"]))
    if kind == "one":
        fields[draw(st.integers(0, len(fields) - 1))] = draw(
            st.integers(-3, 9) | st.sampled_from([2**31, 2**62, -(2**63)])
        )
    return draw(st.lists(st.integers(-3, 9), max_size=12)) if kind == "any" else fields


def decoded(fields: list[int]) -> Pattern | None:
    """The pattern of these integers, None where there is none."""
    if len(fields) != len(PATTERN_FIELDS) or not 0 <= fields[0] < len(PATTERN_KINDS):
        return None
    f = dict(zip(PATTERN_FIELDS, fields, strict=True))
    pair = lambda name: (f[f"{name}_h"], f[f"{name}_w"])
    kind = PATTERN_KINDS[fields[0]]
    try:
        if kind == "Window":
            pattern: Pattern = va.Window(pair("size"), pair("shift"))
        elif kind == "Grid":
            pattern = va.Grid(pair("size"))
        elif kind == "Neighborhood":
            if f["border"] not in range(len(BORDERS)):
                return None
            causal = f["causal_h"] == 1, f["causal_w"] == 1
            pattern = va.Neighborhood(pair("size"), pair("step"), BORDERS[f["border"]], causal)
        elif kind in ("Row", "Column"):
            pattern = getattr(va, kind)(f["size_w" if kind == "Row" else "size_h"] or None)
        else:
            pattern = getattr(va, kind)()
    except ValueError:
        return None
    return pattern if pattern.encode() == fields else None


NEEDS = st.integers(0, 7) | st.integers(-9, 3000)


def call(backend: str, name: str, *args) -> object:
    """The operator's result, or None if it raised an error of its own making."""
    try:
        return ops.operator(backend, name)(*args)
    except RuntimeError as error:
        if "visattn: expected" not in str(error):
            raise
        return None


def consistent(pattern: Pattern | None, terms: dict[str, torch.Tensor | None], q, k, v=None) -> bool:
    """Whether the pattern, the shapes and the dtypes make a problem."""
    maps = [x for x in (q, k, v) if x is not None]
    if pattern is None or not (
        all(x.dim() == 5 and x.dtype == q.dtype and x.dtype in DTYPES and min(x.shape[1:]) > 0 for x in maps)
        and q.shape[0] == k.shape[0]
        and q.shape[4] == k.shape[4]
        and q.shape[3] % k.shape[3] == 0
        and (v is None or v.shape[:4] == k.shape[:4])
    ):
        return False
    queries, keys, heads = Size(*q.shape[1:3]), Size(*k.shape[1:3]), q.shape[3]
    try:
        pattern.check(queries, keys)
    except ValueError:
        return False
    entries = [2 * reach - 1 for reach in pattern.reach(queries, keys)]
    for name, x in terms.items():
        if x is None:
            continue
        if name == "key_bias":
            shapes = [(*k.shape[:3],), (*k.shape[:3], heads)]
        elif queries != keys:
            return False
        elif name == "relative_bias":
            shapes = [(heads, *entries)]
        else:
            width = v.shape[4] if name.startswith("relative_value") else q.shape[4]
            table = (entries["hw".index(name[-1])], width)
            shapes = [table, (heads, *table)]
        if x.dtype != q.dtype or tuple(x.shape) not in shapes:
            return False
    return True


@st.composite
def term_tensors(draw: st.DrawFn, pattern: Pattern | None, grid, dtype) -> dict[str, torch.Tensor | None]:
    """Some of the eight, of shapes that fit q of shape GOOD, mostly."""
    reach = (pattern or va.Global()).reach(Size(*GOOD[1:3]), Size(*grid))
    terms: dict[str, torch.Tensor | None] = dict.fromkeys(TERM_TENSORS)
    for name in draw(st.sets(st.sampled_from(TERM_TENSORS), max_size=3)) if draw(st.booleans()) else ():
        if name == "key_bias":
            shape = (1, *grid, 2) if draw(st.booleans()) else (1, *grid)
        elif name == "relative_bias":
            shape = (2, 2 * reach[0] - 1, 2 * reach[1] - 1)
        else:
            table = (2 * reach["hw".index(name[-1])] - 1, 3 if name.startswith("relative_value") else 2)
            shape = (2, *table) if draw(st.booleans()) else table
        if math.prod(shape) < 2**20:  # a reach may be enormous
            terms[name] = draw(almost(shape, dtype))
    return terms


@settings(SETTINGS, max_examples=800)
@given(st.data())
def test_raw_operators_refuse_what_does_not_fit(data: st.DataObject) -> None:
    refuse_what_does_not_fit(data, "cpu", DTYPES)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array.*:DeprecationWarning")
@settings(SETTINGS, max_examples=120)
@given(st.data())
def test_raw_operators_of_triton_refuse_what_does_not_fit(data: st.DataObject) -> None:
    refuse_what_does_not_fit(data, "triton", (torch.float32, torch.float16))


def refuse_what_does_not_fit(data: st.DataObject, backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Call a family's operators with what fits, mostly: a result if all does, else an error."""
    dtype = data.draw(st.sampled_from(dtypes))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    grid = data.draw(st.sampled_from([(2, 3), (2, 3), (3, 2)]))
    q = data.draw(almost(GOOD, dtype))
    k, v = data.draw(almost((1, *grid, 1, 2), dtype)), data.draw(almost((1, *grid, 1, 3), dtype))
    out, grad_out = data.draw(almost((1, 2, 3, 2, 3), dtype)), data.draw(almost((1, 2, 3, 2, 3), dtype))
    lse, grad_lse = data.draw(almost((1, 2, 3, 2), sums)), data.draw(almost((1, 2, 3, 2), sums))
    fields, needs = data.draw(encodings()), data.draw(NEEDS)
    pattern = decoded(fields)
    named = data.draw(term_tensors(pattern, grid, dtype))
    scores = {name: None if name.startswith("relative_value") else x for name, x in named.items()}
    terms, score_terms = tuple(named.values()), tuple(scores.values())
    scalars = (data.draw(st.floats()), data.draw(st.floats()), data.draw(st.floats()), fields)

    result = call(backend, "forward", q, k, v, *terms, *scalars)
    assert (result is not None) == (q.dtype in dtypes and consistent(pattern, named, q, k, v))
    result = call(backend, "received", q, k, *score_terms, *scalars)
    fits = q.dtype in dtypes and consistent(pattern, scores, q, k)
    assert (result is not None) == fits

    result = call(backend, "backward", grad_out, grad_lse, q, k, v, *terms, out, lse, *scalars, needs)
    shape = (*q.shape[:4], v.shape[-1]) if q.dim() >= 4 and v.dim() else ()
    whole = (
        all(x.shape == shape and x.dtype == q.dtype for x in (out, grad_out))
        and all(x.shape == q.shape[:4] and x.dtype == sums for x in (lse, grad_lse))
        and (q.dtype == torch.float64) == (sums == torch.float64)
        and 0 <= needs < 1 << len(ops.DIFFERENTIABLE)
        and not any(needs >> 3 + i & 1 for i, term in enumerate(terms) if term is None)
    )
    assert (result is not None) == (whole and q.dtype in dtypes and consistent(pattern, named, q, k, v))

    at = data.draw(almost((2, 2), torch.int64))
    if at.dtype == torch.int64 and at.numel():
        at = at * data.draw(st.sampled_from([0, 1, 1, 2, 3, -1, 2**40, -(2**62)]))
    result = call(backend, "map", q, k, *score_terms, at, *scalars)
    inside = (
        fits
        and at.dtype == torch.int64
        and at.dim() == 2
        and at.shape[1] == 2
        and all(0 <= y < q.shape[1] and 0 <= x < q.shape[2] for y, x in at.tolist())
    )
    assert (result is not None) == inside


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
