"""The CUDA kernels in the emulator against the reference: the case table, every cell, every schedule."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import building
import cuda_emulated as emulated
import pytest
import torch
from building import ROOT
from cases import CASES, PATTERNS, TERM_CASES, Case, TermCase, cuda_problems, differentiate, hold, inputs, short
from conftest import poison
from tolerance import check

import visattn_kernels as va
from visattn_kernels import ops, reference
from visattn_kernels.backends import cuda
from visattn_kernels.backends.cells import CELLS, kinds
from visattn_kernels.terms import TERM_TENSORS

EVERYTHING = tuple(options[0] for options in TERM_CASES)  # every term


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA backend on CPU tensors."""
    emulated.load(emulated.build())
    monkeypatch.setattr(cuda, "emulate", True)
    yield
    emulated.control()


def attend(case: Case):
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": "cuda"}
        with poison():
            return va.attention(q, k, v, case.pattern, **call, return_lse=True)

    return forward


def run(case: Case) -> dict[str, torch.Tensor]:
    """Results and gradients of a case, on poisoned memory."""
    with poison():
        return differentiate(attend(case), inputs(case), case.wanted)


RUN = emulated.taken(case for case in CASES if case.dtype in (torch.float32, torch.float16))
RUN = RUN[::6] if emulated.SANITIZED else RUN


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.id)
def test_forward_and_backward(case: Case) -> None:
    results = run(case)
    assert results["out"].is_contiguous()
    assert results["out"].dtype == case.dtype
    hold(case, results)


CELL_CASES = [
    Case(
        dtype=dtype, batch=1, queries=(7, 11), keys=(7, 11), kv_heads=1, head_dim=d, value_dim=dv,
        pattern=pattern, terms=terms,
    )
    for d, dv, named in CELLS
    for dtype, numbers in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float32, "float32"))
    if (d, dv) in emulated.WIDTHS[numbers]
    for kind in kinds(numbers, named)
    for pattern, terms in cuda_problems(kind)
]  # fmt: skip


@pytest.mark.parametrize("case", CELL_CASES, ids=lambda case: case.id)
def test_every_cell(case: Case) -> None:
    """Every kernel that is compiled, in each dtype that the emulator has of it."""
    hold(case, run(case))


SMALL = emulated.taken(
    Case(dtype=torch.float16, batch=1, queries=grid, keys=grid, kv_heads=1, pattern=pattern, terms=terms)
    for pattern, grid in PATTERNS
    for terms in ((), EVERYTHING)
)


@pytest.mark.parametrize("schedule", emulated.SCHEDULES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_every_schedule_gives_the_same_bits(case: Case, schedule: int) -> None:
    """Held to the reference by the first, the others by equality: a race shows as a difference, or as a NaN."""
    first = run(case)
    if schedule == 0:
        hold(case, first)
        return
    emulated.control(schedule)
    for name, x in run(case).items():
        assert torch.equal(x, first[name]), name


# Larger than a block and a stage, so that both turn over: the buffers of slots are used again.
LARGE = [
    Case(dtype=dtype, batch=1, queries=grid, keys=grid, heads=1, kv_heads=1, head_dim=d, value_dim=dv, pattern=pattern,
         terms=terms)
    for dtype, (d, dv) in ((torch.float16, (16, 32)), (torch.float32, (8, 8)))
    for pattern, grid in (
        (va.Global(), (13, 17)),
        (va.Neighborhood((1, 11)), (2, 27)),
        (va.Neighborhood(7, border="zero"), (13, 23)),
        (va.Row(), (2, 100)),
    )
    for terms in ((), EVERYTHING)
]  # fmt: skip


@pytest.mark.parametrize("schedule", emulated.SCHEDULES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_many_stages(case: Case, schedule: int) -> None:
    emulated.control(schedule)
    hold(case, run(case))


@pytest.mark.parametrize("case", emulated.taken([case for case in CASES if case.dtype == torch.float32][::7], "tf32"),
                         ids=lambda case: case.id)  # fmt: skip
def test_tf32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    hold(case, run(case), tf32=True)


@pytest.mark.parametrize("pattern", [va.Global(), va.Window(5, 2), va.Neighborhood(5, border="zero"), va.CrissCross()])
def test_same_bits_for_any_batch_and_any_run(pattern) -> None:
    case = Case(batch=3, queries=(7, 9), keys=(7, 9), kv_heads=1, pattern=pattern, terms=EVERYTHING)
    tensors = inputs(case)
    first = differentiate(attend(case), tensors, case.wanted)
    again = differentiate(attend(case), tensors, case.wanted)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
    shared = [name for name in case.term_tensors if name != "key_bias"]
    alone = differentiate(
        attend(case), {name: x if name in shared else x[1:2] for name, x in tensors.items()}, case.wanted
    )
    for name, x in first.items():
        if name.removeprefix("grad_") not in shared:  # whose gradients are sums over maps
            assert torch.equal(x[1:2], alone[name]), name


LEAKING = (va.Window(4, shift=(1, 3)), va.Neighborhood((4, 5), dilation=(1, 2)), va.Neighborhood(3, border="zero"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out", *TERM_TENSORS[:-1]])
@pytest.mark.parametrize("pattern", [*LEAKING, va.CrissCross()], ids=short)
def test_nan_never_leaks(pattern, where: str, dtype: torch.dtype) -> None:
    """What a bad number reaches in the reference, and nothing else; forwards, and in every gradient."""
    terms = (*EVERYTHING[:-1], TermCase("KeyBias"))
    case = Case(
        dtype=dtype, batch=1, queries=(7, 11), keys=(7, 11), heads=1, kv_heads=1, pattern=pattern, terms=terms,
    )  # fmt: skip
    tensors = inputs(case)
    tensors["key_bias"][0, 2, 2] = -torch.inf
    tensors["k"][0, 2, 2] = torch.nan  # removed: reaches nothing
    if where in TERM_TENSORS:
        tensors[where][..., 0, 0] = torch.nan  # the longest offset, which few pairs have, or none
    else:
        tensors[where][0, 3, 5, 0, 1] = torch.nan
    results = differentiate(attend(case), tensors, case.wanted)

    def formula(q, k, v, **extra):
        return reference.formula(q, k, v, pattern, scale=case.true_scale, terms=case.build_terms(extra))

    exact = differentiate(formula, {name: x.double() for name, x in tensors.items()}, case.wanted)
    for name, x in results.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name
        there = exact[name].isfinite()
        size = exact[name].where(there, 0).abs().max()
        assert ((x.double() - exact[name]).abs()[there] <= 0.02 * size).all(), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("pattern", [va.Global(), va.Neighborhood(3)], ids=short)
def test_nan_and_inf_reach_what_they_reach_in_the_reference(pattern, value: float, where: str) -> None:
    case = Case(batch=1, queries=(7, 9), keys=(7, 9), pattern=pattern)
    tensors = inputs(case)
    tensors[where][0, 2, 3, 1, 0] = value
    with torch.no_grad():
        results = attend(case)(tensors["q"], tensors["k"], tensors["v"])
        call = {"scale": case.true_scale}
        exact = reference.formula(*(tensors[n].double() for n in "qkv"), pattern, **call)
        eager = reference.formula(*(tensors[n] for n in "qkv"), pattern, **call)
    for name, x, r, low in zip(("out", "lse"), results, exact, eager, strict=True):
        low = torch.where(r.isfinite(), low.double().nan_to_num(), r)
        check(name, x, r, low, torch.float32)


@pytest.mark.parametrize("pattern", [va.Global(), va.Window(3), va.CrissCross()], ids=short)
def test_queries_with_no_key(pattern) -> None:
    case = Case(batch=2, queries=(5, 7), keys=(5, 7), pattern=pattern, terms=(TermCase("KeyBias"), *EVERYTHING[:-1]))
    tensors = inputs(case)
    tensors["key_bias"][1] = -torch.inf
    results = differentiate(attend(case), tensors, case.wanted)
    for name in ("out", "grad_q", "grad_k", "grad_v", "grad_key_bias"):
        assert results[name][1].eq(0).all(), name
        assert results[name].isfinite().all(), name
    assert results["lse"][1].eq(-torch.inf).all()


def test_a_folded_grid_has_no_block_too_many() -> None:
    """Grids of two dimensions, of which the last row is not full."""
    emulated.control(max_grid_x=5)
    case = Case(batch=2, queries=(5, 7), keys=(5, 7), pattern=va.Window(3), terms=EVERYTHING)
    hold(case, run(case))


def test_shares_are_dealt_among_a_fixed_number_of_blocks() -> None:
    """More tiles than blocks: each block goes on with the next tile, and its share with it."""
    case = Case(queries=(5, 5), keys=(5, 5), heads=64, kv_heads=64, pattern=va.Window(1), terms=EVERYTHING, batch=1)
    assert 25 > 1024 / 64
    hold(case, run(case))


@pytest.mark.parametrize("span", [None, 9])
@pytest.mark.parametrize("terms", [EVERYTHING[:1], EVERYTHING[1:2], EVERYTHING[1:4], EVERYTHING])
def test_memory_that_a_block_has_not_is_a_reason(terms, span: int | None) -> None:
    """The longest row that is accepted runs, and uses what it was said to."""

    def attend_row(length: int):
        case = Case(dtype=torch.float16, batch=1, queries=(1, length), keys=(1, length), heads=1, kv_heads=1,
                    pattern=va.Row(span), terms=terms)  # fmt: skip
        return case, va.explain(*(inputs(case)[n] for n in "qkv"), case.pattern, terms=case.build_terms(inputs(case)))

    lengths = (40, 80, 160) if span else (40, 80, 160, 320, 640, 1280)  # tables of a span do not grow with the row
    runs = [length for length in lengths if "shared memory" not in attend_row(length)[1]]
    assert runs
    hold(attend_row(runs[-1])[0], run(attend_row(runs[-1])[0]))


@pytest.mark.parametrize("kilobytes", [99, 163])
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_what_is_accepted_fits_smaller_gpus_too(dtype: torch.dtype, kilobytes: int, monkeypatch) -> None:
    """Of the widest cells some do not fit 8.6, 8.9 and 12.0: that is a reason, not a launch that fails."""
    monkeypatch.setattr(cuda, "_most_shared", lambda: kilobytes * 1024)
    refused = []
    for d, dv, _ in CELLS:
        q, v = torch.zeros(1, 8, 8, 1, d, dtype=dtype), torch.zeros(1, 8, 8, 1, dv, dtype=dtype)
        text = next(line for line in va.explain(q, q, v).splitlines() if line.startswith("cuda"))
        if "shared memory" in text:
            refused.append((d, dv))
    assert refused == ([(128, 128)] if dtype == torch.float32 and kilobytes == 99 else [])


@pytest.mark.parametrize(
    ("gencode", "runs"),
    [
        ("arch=compute_80,code=sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("arch=compute_90a,code=sm_90a", [(9, 0)]),
        ("arch=compute_86,code=sm_86", [(8, 6), (8, 9)]),
        ("arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90", [(9, 0), (10, 0), (12, 0)]),
        ("", []),
    ],
)
def test_which_gpus_run_what_was_compiled(gencode: str, runs: list[tuple[int, int]]) -> None:
    known = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [capability for capability in known if cuda.has_code(gencode, capability)] == runs


def test_either_way_to_ask_for_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's newer setting, beside which the older one cannot be read."""
    q = torch.randn(1, 5, 7, 1, 8)
    exact = va.attention(q, q, q, backend="cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    rounded = va.attention(q, q, q, backend="cuda")
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 1e-2
    half = q.half()
    assert va.attention(half, half, half, backend="cuda").isfinite().all()


def test_sizes_beyond_a_block_are_refused_by_the_operator() -> None:
    """Where products of sizes leave 32 bits, of tables that take no memory."""
    q = torch.zeros(1, 4, 4, 1, 8)
    table = torch.zeros(1, 1, 1).expand(1, 59_999, 59_999)
    terms = [table, *ops.NO_TERMS[1:]]
    with pytest.raises(RuntimeError, match=r"visattn: expected .*bytes of shared memory"):
        torch.ops.visattn.cuda_launch_forward(q, q, q, *terms, 1.0, 1.0, 1.0, va.Window(30_000).encode(), False)


@pytest.mark.long
@pytest.mark.skipif(emulated.SANITIZED, reason="this is the process that it starts")
def test_sanitizers_are_silent(tmp_path: Path) -> None:
    """Every memory access of the kernels, by AddressSanitizer and UndefinedBehaviorSanitizer."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    emulated.build(widths=emulated.NARROW, sanitize=True)  # here, where the compiler has no sanitizer itself
    chosen = "test_forward_and_backward or test_every_cell or test_many_stages or test_nan_never_leaks"
    text = building.run(*command, "-k", chosen, cwd=ROOT, **building.sanitized_environment(tmp_path))
    assert re.search(r"\d{3,} passed", text), text
