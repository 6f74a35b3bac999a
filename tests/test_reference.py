"""The reference against hand-written loops, and against itself where two of its results must agree."""

from __future__ import annotations

from dataclasses import replace

import by_hand
import pytest
import torch
from cases import PATTERNS, TERM_CASES, Case, TermCase, _cells, differentiate, inputs, short

import visattn_kernels as va
from visattn_kernels import reference
from visattn_kernels.patterns import Size

pytestmark = pytest.mark.fast

CELLS = [case for case in _cells() if case.queries != (7, 11) or len(case.terms) in (0, len(TERM_CASES))]
"""Every pattern with every term; of the larger grid, which takes long by hand, those with no term and with all."""

SHAPES = [
    Case(batch=1, queries=(2, 3), keys=(3, 2), heads=4, kv_heads=2, head_dim=3, value_dim=5),
    Case(batch=2, queries=(1, 4), keys=(1, 4), heads=1, kv_heads=1, head_dim=1, value_dim=1),
    Case(queries=(2, 2), keys=(1, 3), heads=3, kv_heads=1, scale=-1.5),
    Case(queries=(2, 2), keys=(1, 3), heads=2, kv_heads=1, terms=(TermCase("KeyBias", per_head=True, removed=0.5),)),
    Case(batch=0, queries=(2, 2), keys=(2, 2), terms=(TermCase("RelativeValue"),)),
]


def scale_of(case: Case, kind: str) -> float:
    return next((term.scale for term in case.terms if term.kind == kind), 1.0)


@pytest.mark.parametrize("case", SHAPES + CELLS, ids=lambda case: case.id)
def test_against_loops(case: Case) -> None:
    case = replace(case, dtype=torch.float64)
    tensors = inputs(case)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    written = {name: tensors[name].tolist() for name in case.term_tensors}
    written["reach"] = case.pattern.reach(Size(*case.queries), Size(*case.keys))
    if case.batch == 0:
        out, lse = torch.zeros(*q.shape[:4], case.value_dim).double(), torch.zeros(q.shape[:4]).double()
        weights = torch.zeros(0, case.heads, *case.queries, *case.keys).double()
    else:
        factors = scale_of(case, "RelativeQuery"), scale_of(case, "RelativeKey")
        by_loops = by_hand.attend(q.tolist(), k.tolist(), v.tolist(), case.pattern, case.true_scale, written, *factors)
        out, lse, weights = (torch.tensor(x, dtype=torch.float64) for x in by_loops)
    call = {"pattern": case.pattern, "scale": case.scale, "terms": case.build_terms(tensors), "backend": "reference"}
    torch.testing.assert_close(va.attention(q, k, v, **call, return_lse=True), (out, lse), rtol=1e-12, atol=1e-12)
    points = [(case.queries[0] - 1, 0), (0, case.queries[1] - 1)]
    rows = torch.stack([weights[:, :, y, x] for y, x in points], 1)
    torch.testing.assert_close(va.attention_map(q, k, points, **call), rows, rtol=1e-12, atol=1e-12)
    group = case.heads // case.kv_heads
    sums = torch.stack([weights[:, g * group : (g + 1) * group].sum((1, 2, 3)) for g in range(case.kv_heads)], -1)
    torch.testing.assert_close(va.attention_received(q, k, **call), sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize(
    ("pattern", "grid"),
    [(p, grid) for p, grid in PATTERNS if grid != (7, 11)],
    ids=lambda x: str(x) if isinstance(x, tuple) else short(x),
)
def test_nan_and_inf_reach_those_that_see_them(pattern, grid, where: str, value: float) -> None:
    """One number goes bad: queries that do not see it, and keys that those alone see, keep their results."""
    together = tuple(options[-1 if options[0].kind == "KeyBias" else 0] for options in TERM_CASES)
    gone = (*together[:-1], TermCase("KeyBias", removed=0.3))
    case = Case(torch.float64, 2, grid, grid, 2, 1, 3, 2, pattern=pattern, terms=gone)
    tensors = inputs(case)

    def forward(q, k, v, **extra):
        terms = case.build_terms(extra)
        return va.attention(q, k, v, pattern, terms=terms, backend="reference", return_lse=True)

    clean = differentiate(forward, tensors, case.wanted)
    y, x, head = grid[0] // 2, grid[1] // 3, 0
    tensors[where] = tensors[where].clone()
    tensors[where][1, y, x, head, 1] = value
    dirty = differentiate(forward, tensors, case.wanted)
    map_ = reference.visible(tensors["q"], tensors["k"], pattern, case.build_terms(tensors))
    (top, _), (left, _) = pattern.margin()
    sees = map_[..., top : top + grid[0], left : left + grid[1]]  # [B, heads, H, W, Hk, Wk]
    if where in ("q", "grad_out"):
        touched = torch.zeros(2, *grid, 2, dtype=torch.bool)
        touched[1, y, x, head] = True
    else:  # both heads share the key
        touched = torch.zeros(2, *grid, 2, dtype=torch.bool)
        touched[1] = sees[1, :, :, :, y, x].permute(1, 2, 0)
    reached = (sees & touched.permute(0, 3, 1, 2)[..., None, None]).any(1).any(1).any(1)  # [B, Hk, Wk]
    forward_kept = ~touched if where != "grad_out" else torch.ones_like(touched)
    for name, kept in (("out", forward_kept), ("lse", forward_kept), ("grad_q", ~touched)):
        torch.testing.assert_close(dirty[name][kept], clean[name][kept], rtol=1e-12, atol=1e-12, msg=name)
    if where in ("k", "v"):
        reached[1, y, x] = True
    for name in ("grad_k", "grad_v"):
        torch.testing.assert_close(dirty[name][~reached], clean[name][~reached], rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(dirty["grad_key_bias"][0], clean["grad_key_bias"][0], rtol=1e-12, atol=1e-12)
    if where == "v":  # and those that see it do get it
        out = dirty["out"][..., 1][touched]
        assert out.isnan().all() if value != value else out.eq(value).all()
    if where == "k" and value != value:
        assert dirty["lse"][touched].isnan().all()


def test_nothing_stays_of_a_removed_key() -> None:
    """A bias of -inf removes a key: NaN in it reaches nothing, and its gradients are 0."""
    case = Case(torch.float64, 1, (3, 4), (3, 4), 2, 2, 3, 3, terms=(TermCase("KeyBias"),))
    tensors = inputs(case)
    bias = tensors["key_bias"]
    bias[0, 1, 2] = -torch.inf
    tensors["k"][0, 1, 2], tensors["v"][0, 1, 2] = torch.nan, torch.inf
    results = differentiate(
        lambda q, k, v, key_bias: va.attention(
            q, k, v, terms=(va.KeyBias(key_bias),), backend="reference", return_lse=True
        ),
        tensors,
        case.wanted,
    )
    for name, x in results.items():
        assert x.isfinite().all(), name
    for name in ("grad_k", "grad_v", "grad_key_bias"):
        assert results[name][0, 1, 2].eq(0).all(), name


def test_no_key_gives_zero_and_minus_infinity_and_zero_gradients() -> None:
    scores = torch.full((1, 1, 1, 2, 2, 2), -torch.inf, dtype=torch.float64)
    scores[..., 1, :, :] = 1.0
    scores.requires_grad_()
    weights, lse = reference.weights(scores)
    assert weights[..., 0, :, :].eq(0).all()
    assert lse[..., 0].eq(-torch.inf).all()
    weights.pow(2).sum().backward()
    assert scores.grad is not None
    assert scores.grad[..., 0, :, :].eq(0).all()


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    tensors = inputs(Case(dtype=torch.bfloat16, keys=(40, 40)))
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    out, lse = va.attention(q, k, v, backend="reference", return_lse=True)
    exact, exact_lse = reference.formula(q.double(), k.double(), v.double(), va.Global(), scale=8**-0.5)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "pattern",
    [va.Global(), va.Window((2, 3), 1), va.Neighborhood(2, border="zero"), va.CrissCross()],
    ids=short,
)
def test_differentiable_twice_and_forwards(pattern) -> None:
    kinds = ("RelativeBias", "RelativeQuery", "RelativeKey", "RelativeValue", "KeyBias")
    terms = tuple(TermCase(kind) for kind in kinds)
    case = Case(torch.float64, 1, (2, 2), (2, 2), 1, 1, 2, 1, pattern=pattern, terms=terms)
    tensors = inputs(case)
    names = case.wanted
    leaves = [tensors[name].requires_grad_() for name in names]

    def f(*args):
        q, k, v, *extra = args
        built = case.build_terms(dict(zip(names[3:], extra, strict=True)))
        return va.attention(q, k, v, pattern, terms=built, backend="reference")

    assert torch.autograd.gradgradcheck(f, leaves)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
