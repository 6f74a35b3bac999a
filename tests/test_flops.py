"""What torch's counter of operations says of the operators, against pairs and products counted one by one."""

from __future__ import annotations

import sys

import by_hand
import pytest
import torch
from building import ROOT, run
from cases import PATTERNS, TERM_CASES, Case, TermCase, inputs
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import visattn_kernels as va
import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu
from visattn_kernels.ops import FAMILIES

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

TERMS = ((), *((options[0],) for options in TERM_CASES), tuple(options[0] for options in TERM_CASES))


def counted(call) -> int:
    """The operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_every_operator_has_a_formula() -> None:
    for backend, operators in FAMILIES.items():
        for which in operators:
            assert getattr(torch.ops.visattn, f"{backend}_{which}") in flop_registry


@pytest.mark.parametrize("first", ["visattn_kernels", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first: str) -> None:
    """The counter imports Triton; it does not come with the package, and knows of it all the same."""
    code = f"""
import sys, torch, {first}
if {first!r} == "visattn_kernels":
    assert "torch.utils.flop_counter" not in sys.modules
finders = len(sys.meta_path)
import visattn_kernels as va
from torch.utils.flop_counter import FlopCounterMode
q = torch.rand(1, 8, 8, 2, 16, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    out = va.attention(q, q, q)
assert counter.get_total_flops() == 524288, counter.get_total_flops()
with FlopCounterMode(display=False) as counter:
    out.sum().backward()
assert counter.get_total_flops() == 1310720, counter.get_total_flops()
assert len(sys.meta_path) == finders - ({first!r} == "visattn_kernels")
"""
    run(sys.executable, "-c", code, cwd=ROOT)


def products(case: Case) -> tuple[int, int]:
    """Multiplications of the scores and of the values of one head of one map, from what each query sees."""
    height, width = case.queries
    pairs, offsets = 0, {(which, axis): set() for which in ("query", "key") for axis in "hw"}
    for query in ((y, x) for y in range(height) for x in range(width)):
        for i, j, dy, dx in by_hand.keys_of(case.pattern, height, width, *query):
            inside = 0 <= i < height and 0 <= j < width
            pairs += inside
            for axis, offset in (("h", dy), ("w", dx)):
                offsets["query", axis].add((query, offset))
                if inside:
                    offsets["key", axis].add(((i, j), offset))
    vectors = {"query": 0, "key": 0, "value": 0}
    for term in case.terms:
        which = term.kind.removeprefix("Relative").lower()
        if which in vectors:
            vectors[which] = sum(len(offsets["key" if which == "key" else "query", axis]) for axis in term.sides)
    return (pairs + vectors["query"] + vectors["key"]) * case.head_dim, (pairs + vectors["value"]) * case.value_dim


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(term.kind for term in terms) or "none")
def test_patterns_and_terms(terms: tuple[TermCase, ...]) -> None:
    for pattern, grid in PATTERNS:
        sizes = {"queries": grid, "keys": grid, "heads": 4, "kv_heads": 2, "head_dim": 5, "value_dim": 3}
        case = Case(pattern=pattern, terms=terms, **sizes)
        tensors = inputs(case)
        q, k, v = (tensors[name].requires_grad_() for name in "qkv")
        call = {"pattern": pattern, "terms": case.build_terms(tensors)}
        scores, values = (2 * case.batch * case.heads * number for number in products(case))
        with FlopCounterMode(display=False) as counter:
            out = va.attention(q, k, v, **call)
        assert counter.get_total_flops() == scores + values, case.id
        assert counted(lambda out=out: out.sum().backward()) == 3 * scores + 2 * values, case.id
        every = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
        assert counted(lambda q=q, k=k, call=call: va.attention_received(q, k, **call)) == scores, case.id
        assert counted(lambda q=q, k=k, call=call, at=every: va.attention_map(q, k, at, **call)) == scores, case.id
        some = counted(lambda q=q, k=k, call=call: va.attention_map(q, k, [(0, 0)] * 3, **call))
        assert some == scores * 3 // len(every), case.id


def test_keys_of_another_grid() -> None:
    q, k = torch.rand(2, 3, 5, 2, 4), torch.rand(2, 7, 2, 1, 4)
    assert counted(lambda: va.attention(q, k, k)) == 2 * 2 * 2 * (15 * 14) * (4 + 4)


def test_tensors_without_numbers() -> None:
    """As one counts what is too large to be run: the sum of the windows' squares, and nothing of N²."""
    with FakeTensorMode():
        q = torch.empty(1, 2048, 2048, 1, 32, requires_grad=True)
        pairs = (292 * 7**2 + 4**2) ** 2
        assert counted(lambda: va.attention(q, q, q, va.Window(7))) == 2 * pairs * 64
        out = va.attention(q, q, q, va.Window(7))
        assert counted(lambda: out.sum().backward()) == 2 * pairs * 160


def test_a_module() -> None:
    block = vn.SwinBlock(8, 4, shift=2, heads=2)
    convolutions = 2 * 64 * (8 * 24 + 8 * 8 + 2 * 8 * 32)
    assert counted(lambda: block(torch.rand(1, 8, 8, 8))) == convolutions + 2 * 2 * 24**2 * (4 + 4)
