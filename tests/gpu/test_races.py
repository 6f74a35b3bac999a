"""The same bits, 250 times: a race shows as a difference sooner or later."""

from __future__ import annotations

import pytest
import torch
from cases import Case, differentiate, inputs, short

import visattn_kernels as va
from gpu.common import KEPT, all_to_gpu, as_taken, attend, each_backend, named, same_bits

REPEATS, BATCH = 250, 64

PATTERNS = [
    va.Global(),
    va.Window(5, shift=2),
    va.Grid(4),
    va.Neighborhood(5, border="zero"),
    va.Neighborhood(3, dilation=2),
    va.Row(7),
    va.CrissCross(),
]


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
@pytest.mark.parametrize("pattern", PATTERNS, ids=short)
def test_repeats_give_the_same_bits(pattern, dtype: torch.dtype, backend: str) -> None:
    """Forward and backward with every term, at a batch that fills the GPU several times over."""
    case = Case(dtype, BATCH, (14, 15), (14, 15), 4, 2, 16, 16, pattern=pattern, terms=KEPT)
    case = as_taken(case, backend)
    tensors = all_to_gpu(inputs(case))
    call = attend(case, backend)
    first = differentiate(call, tensors, case.wanted)
    assert all(x.isfinite().all() for x in first.values())
    same = {name: torch.ones((), dtype=torch.bool, device="cuda") for name in first}
    for _ in range(REPEATS):
        for name, x in differentiate(call, tensors, case.wanted).items():
            same[name] &= same_bits(x, first[name])
    assert [name for name, x in same.items() if not x] == []


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
@pytest.mark.parametrize("pattern", PATTERNS, ids=short)
def test_a_map_alone_gives_the_bits_that_it_has_in_a_batch(pattern, dtype: torch.dtype, backend: str) -> None:
    case = Case(dtype, 3, (14, 15), (14, 15), 4, 2, 16, 16, pattern=pattern, terms=KEPT)
    case = as_taken(case, backend)
    tensors = all_to_gpu(inputs(case))
    call = attend(case, backend)
    every = differentiate(call, tensors, case.wanted)
    shared = [name for name in case.term_tensors if name != "key_bias"]
    one = {name: x if name in shared else x[1:2] for name, x in tensors.items()}
    for name, x in differentiate(call, one, case.wanted).items():
        if name.removeprefix("grad_") not in shared:  # whose gradients are sums over maps
            assert torch.equal(x, every[name][1:2]), name
