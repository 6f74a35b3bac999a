"""The CPU engine against the reference: every case of the table, on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, DTYPES, PATTERNS, TERM_CASES, Case, TermCase, differentiate, expected_map, hold, inputs, short
from conftest import poison
from isas import HERE
from tolerance import check

import visattn_kernels as va
from visattn_kernels import reference
from visattn_kernels.backends import cpu
from visattn_kernels.terms import TERM_TENSORS

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable())),
    pytest.mark.usefixtures("two_threads"),
]


EVERYTHING = tuple(options[0] for options in TERM_CASES)  # every term


@pytest.fixture(params=HERE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force an instruction set."""
    monkeypatch.setenv("VISATTN_CPU_ISA", request.param)
    assert cpu.isa() == request.param
    return request.param


def on_each_isa(cases: list[Case]) -> pytest.MarkDecorator:
    """Every case on every instruction set, one after the other, so that a process computes what it expects once;
    avx512_bf16 differs from avx512 in bfloat16 alone."""
    pairs = [(isa, case) for case in cases for isa in HERE if isa != "avx512_bf16" or case.dtype == torch.bfloat16]
    ids = [f"{isa}-{case.id}" for isa, case in pairs]
    return pytest.mark.parametrize(("isa", "case"), pairs, indirect=["isa"], ids=ids)


def attend(case: Case):
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": "cpu"}
        with poison():
            return va.attention(q, k, v, case.pattern, **call, return_lse=True)

    return forward


@on_each_isa(CASES)
def test_forward_and_backward(case: Case, isa: str) -> None:
    tensors = inputs(case)
    with poison():
        results = differentiate(attend(case), tensors, case.wanted)
    assert results["out"].is_contiguous()
    assert results["out"].dtype == case.dtype
    hold(case, results)


@on_each_isa([case for case in CASES if case.needs == "qkv"])
def test_map_and_received(case: Case, isa: str) -> None:
    tensors = inputs(case)
    q, k, terms = tensors["q"], tensors["k"], case.build_terms(tensors)
    points, both = expected_map(case)
    call = {"pattern": case.pattern, "scale": case.scale, "terms": terms, "backend": "cpu"}
    with poison():
        rows = va.attention_map(q, k, points, **call)
        sums = va.attention_received(q, k, **call)
    for name, x in (("map", rows), ("received", sums)):
        exact, eager = both[name]
        check(name, x, exact, eager, case.dtype)
        assert x[exact == 0].eq(0).all(), f"{name}: weight in a masked place"
    if case.batch and case.keeps_weight:
        torch.testing.assert_close(rows.sum((-1, -2)), torch.ones(case.batch, 4, case.heads, dtype=rows.dtype))
        total = float(case.heads * case.queries[0] * case.queries[1])
        torch.testing.assert_close(sums.sum((1, 2, 3)), torch.full((case.batch,), total, dtype=sums.dtype))


def test_no_points(isa: str) -> None:
    case = Case()
    q, k = inputs(case)["q"], inputs(case)["k"]
    assert va.attention_map(q, k, [], backend="cpu").shape == (2, 0, 2, 5, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_any_batch_any_run(dtype: torch.dtype, isa: str) -> None:
    shapes = {"batch": 3, "heads": 4, "kv_heads": 2, "head_dim": 24, "value_dim": 17}
    same_bits(Case(dtype=dtype, queries=(11, 13), keys=(19, 23), **shapes))
    shapes |= {"queries": (13, 17), "keys": (13, 17), "terms": EVERYTHING}
    for pattern in (va.Global(), va.Window(5, 2), va.Neighborhood(5, border="zero"), va.CrissCross()):
        same_bits(Case(dtype=dtype, pattern=pattern, **shapes))


def same_bits(case: Case) -> None:
    """Hold results to one another for other numbers of threads, and each map's to those of the map alone."""
    tensors = inputs(case)
    first = differentiate(attend(case), tensors, case.wanted)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 7):
            torch.set_num_threads(n)
            again = differentiate(attend(case), tensors, case.wanted)
            for name, x in first.items():
                assert torch.equal(x, again[name]), f"{name} with {n} threads"
    finally:
        torch.set_num_threads(threads)
    for b in range(case.batch):
        shared = [name for name in case.term_tensors if name != "key_bias"]
        slices = {name: x if name in shared else x[b : b + 1] for name, x in tensors.items()}
        alone = differentiate(attend(case), slices, case.wanted)
        for name, x in first.items():
            if name.removeprefix("grad_") not in shared:  # whose gradients are sums over maps
                assert torch.equal(x[b : b + 1], alone[name]), f"{name} of map {b}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_reach_what_they_reach_in_the_reference(
    dtype: torch.dtype, value: float, where: str, isa: str
) -> None:
    case = Case(dtype=dtype, batch=2, queries=(3, 5), keys=(9, 9), head_dim=3, value_dim=4)
    tensors = inputs(case)
    tensors[where][1, 2, 3, 1, 0] = value
    with torch.no_grad():
        results = attend(case)(tensors["q"], tensors["k"], tensors["v"])
        scale = case.true_scale
        exact = reference.formula(*(tensors[n].double() for n in "qkv"), case.pattern, scale=scale)
        eager = reference.formula(*(tensors[n] for n in "qkv"), case.pattern, scale=scale)
    for name, x, r, low in zip(("out", "lse"), results, exact, eager, strict=True):
        low = torch.where(r.isfinite(), low.double().nan_to_num(), r)  # eager low precision may overflow on its own
        check(name, x, r, low, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out", *TERM_TENSORS[:-1]])
@pytest.mark.parametrize("pattern", [pattern for pattern, grid in PATTERNS if grid == (7, 11)], ids=short)
def test_nan_never_leaks(pattern, where: str, dtype: torch.dtype, isa: str) -> None:
    """What a bad number reaches in the reference, and nothing else; forwards, and in every gradient."""
    case = Case(dtype, 2, (7, 11), (7, 11), 2, 1, 3, 2, pattern=pattern, terms=(*EVERYTHING[:-1], TermCase("KeyBias")))
    tensors = inputs(case)
    tensors["key_bias"][1, 2, 2] = -torch.inf
    tensors["k"][1, 2, 2] = torch.nan  # removed: reaches nothing
    if where in TERM_TENSORS:
        tensors[where][..., 0, 0] = torch.nan  # the longest offset, which few pairs have, or none
    else:
        tensors[where][1, 3, 5, 0, 1] = torch.nan
    results = differentiate(attend(case), tensors, case.wanted)
    call = {"pattern": pattern, "scale": case.true_scale}

    def formula(q, k, v, **extra):
        return reference.formula(q, k, v, **call, terms=case.build_terms(extra))

    exact = differentiate(formula, {name: x.double() for name, x in tensors.items()}, case.wanted)
    for name, x in results.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@pytest.mark.parametrize("term", ["KeyBias", "RelativeBias"])
@pytest.mark.parametrize("pattern", [pattern for pattern, grid in PATTERNS if grid == (7, 11)], ids=short)
def test_infinite_biases_spread_as_in_the_reference(pattern, term: str, isa: str) -> None:
    case = Case(batch=2, queries=(7, 11), keys=(7, 11), pattern=pattern, terms=(TermCase(term),))
    tensors = inputs(case)
    (name,) = case.term_tensors
    tensors[name][..., tensors[name].shape[-2] // 2, tensors[name].shape[-1] // 2] = torch.inf
    found, exact = ({}, {})
    for results, backend in ((found, "cpu"), (exact, "reference")):
        call = {"pattern": pattern, "scale": case.true_scale, "backend": backend}

        def attend_by(q, k, v, call=call, **extra):
            return va.attention(q, k, v, terms=case.build_terms(extra), return_lse=True, **call)

        results |= differentiate(attend_by, tensors, case.wanted)
        q, k, terms = tensors["q"], tensors["k"], case.build_terms(tensors)
        results["map"] = va.attention_map(q, k, [(3, 5), (0, 0), (6, 2)], terms=terms, **call)
        results["received"] = va.attention_received(q, k, terms=terms, **call)
    assert any(x.isnan().any() for x in exact.values())
    for name, x in found.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@pytest.mark.parametrize("pattern", [va.Global(), va.Window(3), va.CrissCross()], ids=short)
def test_queries_with_no_key(pattern, isa: str) -> None:
    case = Case(batch=2, queries=(5, 7), keys=(5, 7), pattern=pattern, terms=(TermCase("KeyBias"), *EVERYTHING[:-1]))
    tensors = inputs(case)
    tensors["key_bias"][1] = -torch.inf
    results = differentiate(attend(case), tensors, case.wanted)
    for name in ("out", "grad_q", "grad_k", "grad_v", "grad_key_bias"):
        assert results[name][1].eq(0).all(), name
        assert results[name].isfinite().all(), name
    assert results["lse"][1].eq(-torch.inf).all()
    alone = replace(case, batch=1)
    first = {name: x[:1] if x.shape[0] == 2 and not name.startswith("relative") else x for name, x in tensors.items()}
    expected = differentiate(attend(alone), first, case.wanted)
    for name in case.term_tensors:
        if name != "key_bias":
            torch.testing.assert_close(results[f"grad_{name}"], expected[f"grad_{name}"])


def test_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISATTN_CPU_ISA", "neon9")
    q = torch.ones(1, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"visattn: expected an instruction set.*VISATTN_CPU_ISA=neon9"):
        va.attention(q, q, q, backend="cpu")


def test_reference_agrees_on_extreme_logits(isa: str) -> None:
    """Logits of hundreds, where a softmax without its maximum overflows."""
    case = Case(queries=(4, 4), keys=(16, 16), spread=200.0, scale=1.0)
    results = differentiate(attend(case), inputs(case), "qkv")
    hold(case, results)


def test_leaves_inputs_alone(isa: str) -> None:
    case = replace(Case(), layouts=("nchw", "packed", "strided", "expanded"))
    tensors = inputs(case)
    before = {name: x.clone() for name, x in tensors.items()}
    differentiate(attend(case), tensors, "qkv")
    for name, x in before.items():
        assert torch.equal(tensors[name], x), name
