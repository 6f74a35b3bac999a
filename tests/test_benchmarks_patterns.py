"""The benchmark's peers on every pattern and term: held to the dense reference, and the wrong ones refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tolerance
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import flex, naive, providers, verify, workloads
from benchmarks.cases import Case, Inputs, make_inputs, to_layout
from benchmarks.workloads import TermSpec, Workload
from visattn_kernels import reference
from visattn_kernels.patterns import Column, CrissCross, Global, Grid, Neighborhood, Pattern, Row, Size, Window
from visattn_kernels.terms import RelativeBias, RelativeKey, RelativeQuery, RelativeValue

NAIVE, SDPA, FLEX = (providers.find(name) for name in ("naive", "sdpa", "flex"))

SMALL: dict[str, tuple[Size, Pattern]] = {
    "sam-h-global": (Size(5, 6), Global()),
    "sam-h-window": (Size(6, 8), Window((3, 4))),
    "swin-b-s1": (Size(6, 8), Window((3, 4), shift=(1, 2))),
    "maxvit-grid": (Size(6, 8), Grid((3, 2))),
    "nat-b-s1": (Size(6, 8), Neighborhood((3, 5))),
    "sasa-s1": (Size(5, 6), Neighborhood((3, 5), border="zero")),
    "axial-65-row": (Size(4, 7), Row()),
    "axial-65-column": (Size(4, 7), Column()),
    "axial-129-row": (Size(3, 5), Row()),
    "axial-129-column": (Size(5, 3), Column()),
    "ccnet-97": (Size(5, 6), CrissCross()),
}
"""Every workload that is not plain global attention, on grids and patterns whose axes can't be mistaken."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny: a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name: str) -> Workload:
    size, pattern = SMALL[name]
    dims = {"heads": 2, "cpu_heads": None, "head_dim": 4, "value_dim": 6 if "axial" in name or "ccnet" in name else 4}
    return replace(workloads.find(name), queries=size, keys=size, pattern=pattern, gpu_batch=2, cpu_batch=2, **dims)


def dense(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """`Bench.results` of the reference."""
    w = case.workload
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, *(x for t in inputs.terms for x in t))]
    q, k, v, *tables = leaves
    left = iter(tables)
    terms = [spec.build(*(next(left) for _ in spec.tensors)) for spec in w.terms]
    out, _ = reference.formula(q, k, v, w.pattern, scale=w.factor, terms=terms)
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    return {"out": out.detach(), **dict(zip(["q", "k", "v", *w.term_names], grads, strict=True))}


def agree(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(results) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(results[name], x, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text)


def test_every_workload_has_a_small_one() -> None:
    """A row without a test of its peers can't be added."""
    assert set(SMALL) == {w.name for w in workloads.WORKLOADS if w.terms or not isinstance(w.pattern, Global)}
    for name, (_, pattern) in SMALL.items():
        assert type(pattern) is type(workloads.find(name).pattern)


# The peers.


@pytest.mark.parametrize("name", SMALL)
def test_naive(name: str) -> None:
    case = Case(small(name), "float64", "cpu")
    inputs = make_inputs(case)
    assert NAIVE.reasons(case, "both") == []
    agree(providers.Bench(NAIVE, case, "both", inputs).results(), dense(case, inputs))


CELLS = ("sam-h-global", "sam-h-window", "swin-b-s1", "maxvit-grid")


@pytest.mark.parametrize("name", SMALL)
def test_sdpa(name: str) -> None:
    case = Case(small(name), "float64", "cpu")
    inputs = make_inputs(case)
    assert bool(SDPA.reasons(case, "both")) == (name not in CELLS)
    if name in CELLS:
        agree(providers.Bench(SDPA, case, "both", inputs).results(), dense(case, inputs))


CUTS = {
    "row": naive.Cells(1, 7),
    "column": naive.Cells(4, 1),
    "window": naive.Cells(2, 7, shift=(1, 0)),
    "grid": naive.Cells(2, 1, strided=True),
}
CUT_PATTERNS = {"row": Row(), "column": Column(), "window": Window((2, 7), shift=(1, 0)), "grid": Grid((2, 1))}


@pytest.mark.parametrize("with_sdpa", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", CUTS)
def test_every_term_in_every_cell(name: str, per_head: bool, with_sdpa: bool) -> None:
    """More than the workloads need, so that a term that is wrong where no workload has it does not wait there."""
    kinds = (RelativeQuery, RelativeKey) if with_sdpa else (RelativeQuery, RelativeKey, RelativeValue)
    terms = (
        TermSpec(RelativeBias, ("table",)),
        *(TermSpec(kind, ("rel_h", "rel_w"), per_head=per_head) for kind in kinds),
    )
    w = Workload(
        "terms", "", Size(4, 7), Size(4, 7), 2, 4, 6, gpu_batch=0, cpu_batch=2, pattern=CUT_PATTERNS[name], terms=terms
    )
    case = Case(w, "float64", "cpu")
    inputs = make_inputs(case)
    function = naive.cells_sdpa if with_sdpa else naive.cells
    run = lambda case, q, k, v, terms: function(q, k, v, (4, 7), CUTS[name], w.factor, w.tables(terms))
    agree(providers.Bench(replace(NAIVE, run=run), case, "both", inputs).results(), dense(case, inputs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", SMALL)
def test_flex(name: str) -> None:
    """Its mask and its function of the score, uncompiled."""
    w = small(name)
    w = replace(w, terms=tuple(term for term in w.terms if term.term is not RelativeValue))
    case = Case(w, "float64", "cpu")
    assert bool(FLEX.reasons(Case(small(name), "float64", "cpu"), "forward")) == ("axial" in name)
    inputs = make_inputs(case)
    run = lambda case, q, k, v, terms: flex.attend(w, q, k, v, w.tables(terms), flex_attention)
    results = providers.Bench(replace(FLEX, run=run), case, "forward", inputs).results()
    agree(results, {"out": dense(case, inputs)["out"]})


def test_flex_compiled() -> None:
    """Zeros outside the map, vectors per position captured: the most that is asked of it."""
    case = Case(small("sasa-s1"), "float32", "cpu")
    inputs = make_inputs(case)
    results = providers.Bench(FLEX, case, "forward", inputs).results()
    assert verify.verdict(verify.Truth(case, inputs).verify(results)) == []


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood(3, dilation=2),
        Neighborhood(3, is_causal=True),
        Neighborhood(3, border="mask"),
        Neighborhood(4),
        Row(3),
        Column(3),
        Window(5),
        Window((3, 5)),
        Grid(4),
    ],
)
def test_what_naive_has_no_code_for(pattern: Pattern) -> None:
    case = Case(replace(small("ccnet-97"), queries=Size(6, 8), keys=Size(6, 8), pattern=pattern), "float32", "cpu")
    assert any("has no code for" in reason for reason in NAIVE.reasons(case, "forward"))
    assert any("has no code for" in reason for reason in SDPA.reasons(case, "forward"))
    assert FLEX.reasons(case, "forward") == []


# Verification.


@pytest.mark.parametrize("name", SMALL)
def test_the_sampled_truth_is_the_dense_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and against autograd."""
    monkeypatch.setitem(verify._CHUNK, "cpu", 100)
    monkeypatch.setattr(verify, "SAMPLES", 9)
    case = Case(small(name), "float64", "cpu")
    inputs = make_inputs(case)
    truth, expected = verify.Truth(case, inputs), dense(case, inputs)
    for sample in (truth._exact(True)[0], truth._eager(True)):
        assert sorted(sample) == sorted(expected)
        for key, x in expected.items():
            if key in ("out", "q", "k", "v"):
                x = x[-1].flatten(0, 1).transpose(0, 1)[:, truth.queries if key in ("out", "q") else truth.keys]
            torch.testing.assert_close(sample[key], x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_bounds_are_those_of_the_policy(name: str) -> None:
    case = Case(small(name), "float32", "cpu")
    inputs = make_inputs(case)
    truth, w = verify.Truth(case, inputs), case.workload
    _, sizes, bound = truth._exact(True)
    wide = {key: getattr(inputs, key).double() for key in ("q", "k", "v")}
    terms = [spec.build(*(x.double() for x in x_of)) for spec, x_of in zip(w.terms, inputs.terms, strict=True)]
    sampled = lambda x, index: x[-1].flatten(0, 1)[index].transpose(0, 1)
    expected = tolerance.element_bound(*wide.values(), w.pattern, w.factor, torch.float32, terms)
    torch.testing.assert_close(bound, sampled(expected, truth.queries))
    wide |= {"grad_out": inputs.grad.double(), "grad_lse": torch.zeros_like(inputs.grad[..., 0].double())}
    expected = tolerance.gradient_sizes(wide, w.pattern, w.factor, terms)
    for key, index in (("q", truth.queries), ("k", truth.keys), ("v", truth.keys)):
        torch.testing.assert_close(sizes[key], sampled(expected[f"grad_{key}"], index))
    own = [
        {name: field for field, name in spec.term.tensors.items()}[name] for spec in w.terms for name in spec.tensors
    ]
    for key, name in zip(w.term_names, own, strict=True):
        torch.testing.assert_close(sizes[key], expected[f"grad_{name}"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SMALL)
def test_the_right_answer_passes(name: str, dtype: str) -> None:
    case = Case(small(name), dtype, "cpu")
    inputs = make_inputs(case)
    truth = verify.Truth(case, inputs)
    for provider in (NAIVE, SDPA):
        if not provider.reasons(case, "both"):
            results = providers.Bench(provider, case, "both", inputs).results()
            assert verify.verdict(truth.verify(results)) == []


def changed_inputs(change):
    """The naive provider, given other tables."""
    return lambda case, q, k, v, terms: NAIVE.run(case, q, k, v, [[change(x) for x in term] for term in terms])


def changed_workload(**changes):
    """The naive provider, computing another pattern."""
    other = lambda case: replace(case, workload=replace(case.workload, **changes))
    return lambda case, q, k, v, terms: NAIVE.run(other(case), q, k, v, terms)


FLIPPED = changed_inputs(lambda x: x.flip(0 if x.dim() == 2 else -1 if x.shape[-1] != 4 else -2))
"""Query minus key in place of key minus query."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, FLIPPED) for name in SMALL if name != "ccnet-97"),
        ("swin-b-s1", changed_workload(pattern=Window((3, 4), shift=(2, 2)))),
        ("swin-b-s1", changed_workload(pattern=Window((3, 4)))),
        ("maxvit-grid", changed_workload(pattern=Window((3, 2)))),
        ("sasa-s1", changed_inputs(lambda x: x * 1.1)),
        ("ccnet-97", changed_workload(pattern=Global())),
        ("ccnet-97", changed_workload(pattern=Row())),
    ],
)
def test_a_wrong_provider_is_refused(name: str, wrong, dtype: str) -> None:
    case = Case(small(name), dtype, "cpu")
    inputs = make_inputs(case)
    results = providers.Bench(replace(NAIVE, run=wrong), case, "both", inputs).results()
    assert any(reason.startswith("out: ") for reason in verify.verdict(verify.Truth(case, inputs).verify(results)))


def test_a_seam_without_its_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    naive.swin_mask.cache_clear()
    monkeypatch.setattr(naive, "_SWIN_MASK", 0.0)
    case = Case(small("swin-b-s1"), "float32", "cpu")
    inputs = make_inputs(case)
    results = providers.Bench(NAIVE, case, "both", inputs).results()
    naive.swin_mask.cache_clear()
    assert verify.verdict(verify.Truth(case, inputs).verify(results))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in SMALL if name != "ccnet-97"])
def test_a_wrong_gradient_of_any_table_is_refused(name: str, dtype: str) -> None:
    case = Case(small(name), dtype, "cpu")
    inputs = make_inputs(case)
    truth = verify.Truth(case, inputs)
    right = providers.Bench(NAIVE, case, "both", inputs).results()
    for table in case.workload.term_names:
        grad = right[table]
        for wrong in (grad * 1.1, grad.roll(1, 0 if grad.dim() == 2 else 1)):
            (reason,) = verify.verdict(truth.verify({**right, table: wrong}))
            assert reason.startswith(f"gradient of {table}: ")


def test_zeros_outside_are_keys() -> None:
    """A softmax without them differs at the border alone."""
    case = Case(small("sasa-s1"), "float64", "cpu")
    inputs = make_inputs(case)
    masked = replace(case, workload=replace(case.workload, pattern=Neighborhood((3, 5), border="mask")))
    results = dense(masked, inputs)
    assert verify.verdict(verify.Truth(case, inputs).verify(results))
    same = (results["out"] - dense(case, inputs)["out"]).abs().amax((0, 3, 4)) < 1e-12
    assert same.nonzero().tolist() == [[y, x] for y in range(1, 4) for x in range(2, 4)]


# Costs.


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("sam-h-global", 4096**2),
        ("sam-h-window", 70 * 70 * 14 * 14),
        ("maxvit-grid", 56 * 56 * 49),
        ("nat-b-s1", 56 * 56 * 49),
        ("sasa-s1", 56 * 56 * 49),
        ("swin-b-s1", (7 * 7 * 7 + 3 * 3 + 4 * 4) ** 2),
        ("axial-65-row", 65 * 65 * 65),
        ("axial-65-column", 65 * 65 * 65),
        ("ccnet-97", 97 * 97 * (97 + 96)),
    ],
)
def test_pairs(name: str, pairs: int) -> None:
    w = workloads.find(name)
    assert workloads.pairs(w) == pairs
    case = Case(w, "float32", "cpu")
    assert case.cost("forward").exps == case.batch * case.heads * pairs


def test_logits_have_unit_variance() -> None:
    """And each table adds a quarter."""
    for name in ("swin-b-s1", "sasa-s1", "axial-65-row"):
        w = replace(workloads.find(name), cpu_batch=1, queries=Size(14, 14), keys=Size(14, 14))
        inputs = make_inputs(Case(w, "float32", "cpu"))
        terms = [spec.build(*tensors) for spec, tensors in zip(w.terms, inputs.terms, strict=True)]
        plain = reference.logits(inputs.q, inputs.k, Global(), scale=w.factor)
        with_terms = reference.logits(inputs.q, inputs.k, w.pattern, scale=w.factor, terms=terms)
        seen = with_terms[with_terms.isfinite()]
        assert 0.9 < float(plain.std()) < 1.1
        assert 1.1 < float(seen.std()) < 1.6


def test_inputs_fit_the_public_operation() -> None:
    """The tables have the shapes that `attention` asks for, on the real sizes."""
    for name in SMALL:
        reasons = providers._ours_unsupported("reference", Case(workloads.find(name), "float32", "cpu"), "forward")
        assert reasons == []


def test_layouts_of_cells_are_inverses() -> None:
    x = torch.arange(2 * 3 * 4 * 7 * 5).view(2, 4, 7, 3, 5)
    tokens = to_layout(x, "tokens")
    for cut in CUTS.values():
        assert torch.equal(cut.join(cut.cut(tokens, (4, 7)), (4, 7)), tokens)
