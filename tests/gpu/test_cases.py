"""The one table of cases on a GPU: forward and backward, the map and what keys receive, and the row of TF32."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, cuda_problems, differentiate, hold, inputs
from tolerance import check

import visattn_kernels as va
from gpu.common import (
    BACKENDS,
    DTYPES,
    all_to_cpu,
    all_to_gpu,
    as_taken,
    attend,
    each_backend,
    each_of_any_width,
    each_reader,
    named,
    poisoned,
)
from visattn_kernels import reference
from visattn_kernels.backends import cells, cuda

RUN = [case for case in CASES if case.dtype in DTYPES]


@each_backend
@pytest.mark.parametrize("case", RUN, ids=lambda case: case.id)
def test_forward_and_backward(case: Case, backend: str) -> None:
    run_and_hold(case, backend)


@each_backend
@pytest.mark.parametrize("case", [case for case in RUN if case.dtype == torch.float32], ids=lambda case: case.id)
def test_tf32(case: Case, backend: str, tf32: None) -> None:
    run_and_hold(case, backend, tf32=True)


def run_and_hold(case: Case, backend: str, tf32: bool = False) -> None:
    """Forward and backward, poisoned, against the policy."""
    case = as_taken(case, backend)
    tensors = all_to_gpu(inputs(case))
    # The backward runs while differentiate does; the forward poisons itself.
    results = poisoned(differentiate)(attend(case, backend), tensors, case.wanted)
    assert results["out"].is_contiguous()
    assert results["out"].dtype == case.dtype
    hold(case, all_to_cpu(results), tf32)


READ = [case for case in RUN if case.needs == "qkv" and (len(case.terms) in (0, 5) or case.pattern == va.CrissCross())]


@each_reader
@pytest.mark.parametrize("case", READ, ids=lambda case: case.id)
def test_map_and_received(case: Case, backend: str) -> None:
    tensors = inputs(case)
    moved = all_to_gpu(tensors)
    height, width = case.queries
    points = [(0, 0), (height - 1, width - 1), (height // 2, width // 3)]
    call = {"pattern": case.pattern, "scale": case.scale, "terms": case.build_terms(moved), "backend": backend}
    rows = poisoned(va.attention_map)(moved["q"], moved["k"], points, **call).cpu()
    sums = poisoned(va.attention_received)(moved["q"], moved["k"], **call).cpu()
    call = {"pattern": case.pattern, "scale": case.true_scale}
    # L: eager in the case's dtype.
    dense = reference.probabilities(tensors["q"], tensors["k"], **call, terms=case.build_terms(tensors))
    doubles = {name: x.double() for name, x in tensors.items()}
    exact = reference.probabilities(doubles["q"], doubles["k"], **call, terms=case.build_terms(doubles))
    ys, xs = torch.tensor(points).T
    grouped = [x.sum((2, 3)).unflatten(1, (case.kv_heads, -1)).sum(2).permute(0, 2, 3, 1) for x in (exact, dense)]
    picked = [x[:, :, ys, xs].transpose(1, 2) for x in (exact, dense)]
    for name, x, (true, eager) in (("map", rows, picked), ("received", sums, grouped)):
        check(name, x, true, eager, case.dtype)
        assert x[true == 0].eq(0).all(), f"{name}: weight in a masked place"


@each_reader
def test_points_outside_a_map_are_nan_rows(backend: str) -> None:
    """A tensor of points on the GPU is not waited for: `torch.compile` hands such to the operator."""
    from visattn_kernels import ops

    q = torch.randn(2, 3, 4, 1, 8, device="cuda")
    at = torch.tensor([[0, 0], [3, 0], [0, -1], [2, 3]], device="cuda")
    rows = ops.operator(backend, "map")(q, q, *ops.NO_TERMS, at, 1.0, 1.0, 1.0, va.Global().encode())
    assert rows[:, [1, 2]].isnan().all()
    assert rows[:, [0, 3]].isfinite().all()


@each_of_any_width
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("width", [96, 128, 200, 257, 512])
def test_wide_heads(width: int, dtype: torch.dtype, backend: str) -> None:
    """Every row of the tables of tiles, several tiles of each."""
    case = Case(dtype, 1, (9, 13), (9, 13), 1, 1, width, width - 3)
    run_and_hold(case, backend)


CELLS = [
    Case(
        dtype, 2, (14, 15), (14, 15), 4, 2, d, dv, pattern=pattern, terms=terms,
    )
    for d, dv, named_kinds in cells.CELLS
    for dtype in DTYPES
    for kind in cells.kinds(cuda.DTYPES[dtype], named_kinds)
    for pattern, terms in cuda_problems(kind)
]  # fmt: skip


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA backend is not available")
@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.id)
def test_every_cell(case: Case) -> None:
    """Every kernel that is compiled."""
    run_and_hold(case, "cuda")
