"""What a bad number reaches in the reference, and nothing else."""

from __future__ import annotations

import pytest
import torch
from cases import PATTERNS, Case, differentiate, inputs, short
from tolerance import check

import visattn_kernels as va
from gpu.common import DTYPES, KEPT, all_to_cpu, all_to_gpu, as_taken, attend, each_backend, named
from visattn_kernels import reference
from visattn_kernels.terms import TERM_TENSORS


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out", *TERM_TENSORS[:-1]])
@pytest.mark.parametrize("pattern", [pattern for pattern, grid in PATTERNS if grid == (7, 11)], ids=short)
def test_nan_never_leaks(pattern, where: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(dtype, 2, (7, 11), (7, 11), 2, 1, 3, 2, pattern=pattern, terms=KEPT)
    case = as_taken(case, backend)
    tensors = inputs(case)
    tensors["key_bias"][1, 2, 2] = -torch.inf
    tensors["k"][1, 2, 2] = torch.nan  # removed: reaches nothing
    if where in TERM_TENSORS:
        tensors[where][..., 0, 0] = torch.nan  # the longest offset, which few pairs have, or none
    else:
        tensors[where][1, 3, 5, 0, 1] = torch.nan
    results = all_to_cpu(differentiate(attend(case, backend), all_to_gpu(tensors), case.wanted))

    def formula(q, k, v, **extra):
        return reference.formula(q, k, v, pattern, scale=case.true_scale, terms=case.build_terms(extra))

    exact = differentiate(formula, {name: x.double() for name, x in tensors.items()}, case.wanted)
    for name, x in results.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
@pytest.mark.parametrize("pattern", [va.Global(), va.Neighborhood(3)], ids=short)
def test_nan_and_inf_reach_what_they_reach_in_the_reference(pattern, dtype, where: str, value: float, backend) -> None:
    case = Case(dtype, 1, (7, 9), (7, 9), head_dim=3, value_dim=4, pattern=pattern, needs="")
    case = as_taken(case, backend)
    tensors = inputs(case)
    tensors[where][0, 2, 3, 1, 0] = value
    moved = all_to_gpu(tensors)
    results = attend(case, backend)(moved["q"], moved["k"], moved["v"])
    exact = reference.formula(*(tensors[n].double() for n in "qkv"), pattern, scale=case.true_scale)
    eager = reference.formula(*(tensors[n] for n in "qkv"), pattern, scale=case.true_scale)
    for name, x, r, low in zip(("out", "lse"), results, exact, eager, strict=True):
        low = torch.where(r.isfinite(), low.double().nan_to_num(), r)
        check(name, x.cpu(), r, low, dtype)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("pattern", [va.Global(), va.Window(3), va.CrissCross()], ids=short)
def test_queries_with_no_key(pattern, dtype: torch.dtype, backend: str) -> None:
    case = as_taken(Case(dtype, pattern=pattern, terms=KEPT), backend)
    tensors = inputs(case)
    tensors["key_bias"][1] = -torch.inf
    results = differentiate(attend(case, backend), all_to_gpu(tensors), case.wanted)
    for name in ("out", "grad_q", "grad_k", "grad_v", "grad_key_bias"):
        assert results[name][1].eq(0).all(), name
        assert results[name].isfinite().all(), name
    assert results["lse"][1].eq(-torch.inf).all()
