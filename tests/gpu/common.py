"""What the tests of the GPU tier share: the backends they run, calls, and tensors moved as they lie."""

from __future__ import annotations

import os
from zlib import crc32

import pytest
import torch
from cases import TERM_CASES, Case, TermCase, differentiate, fitted, hold, inputs
from conftest import poison

import visattn_kernels as va
from visattn_kernels import backends, reference
from visattn_kernels.backends import Backend
from visattn_kernels.patterns import Size
from visattn_kernels.problem import Problem

EVERYTHING: tuple[TermCase, ...] = tuple(options[0] for options in TERM_CASES)
"""Every term; the key bias removes keys."""

KEPT = (*EVERYTHING[:-1], TermCase("KeyBias"))
"""Every term; no key is removed."""


def _for_gpus(backend: Backend) -> bool:
    """Whether a backend of the registry has kernels for a plain problem on a GPU."""
    grid = Size(4, 4)
    plain = Problem("cuda", torch.float32, 1, grid, grid, 1, 1, 8, 8, 1.0, va.Global())
    return not backend.slow and not backend.unsupported(plain)


FOR_GPUS = tuple(backend for backend in backends.REGISTRY if _for_gpus(backend))
"""The backends that are for GPUs, available or not."""

_COLLECTED_ONLY = os.environ.get("VISATTN_COLLECT_GPU") == "1"

BACKENDS = tuple(backend.name for backend in FOR_GPUS if _COLLECTED_ONLY or not backend.unavailable())
"""Those that are available: each test runs with each of them, forced by name."""

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _reads(backend: str) -> bool:
    """Whether a backend has `attention_map` and `attention_received`."""
    grid = Size(4, 4)
    asked = Problem("cuda", torch.float32, 1, grid, grid, 1, 1, 8, 0, 1.0, va.Global())
    return not next(one for one in FOR_GPUS if one.name == backend).unsupported(asked)


READERS = tuple(backend for backend in BACKENDS if _reads(backend))

each_reader = pytest.mark.parametrize("backend", READERS)
"""For tests of what reads the map, with each backend that does."""


each_of_any_width = pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "cuda"])
"""For tests of widths that the CUDA kernels are not compiled for, with each backend that has them."""


def as_taken(case: Case, backend: str) -> Case:
    """A case as a backend takes it: with widths that the CUDA kernels are compiled for, in the place of its own."""
    if backend != "cuda":
        return case
    fit = fitted(case, turn=crc32(case.id.encode()))
    if fit is None:
        pytest.skip("with one key a query, gradients in 16 bits are little but the rounding of out")
    return fit


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def named(dtype: torch.dtype) -> str:
    """A dtype in the name of a test."""
    return str(dtype).removeprefix("torch.")


def to_gpu(x: torch.Tensor) -> torch.Tensor:
    """A tensor on the GPU as it lies: the same strides and offset, in a copy of its whole storage."""
    count = x.untyped_storage().nbytes() // x.element_size()
    moved = x.detach().as_strided((count,), (1,), 0).cuda().as_strided(x.shape, x.stride(), x.storage_offset())
    assert (moved.stride(), moved.storage_offset()) == (x.stride(), x.storage_offset())
    return moved


def all_to_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`to_gpu` of each."""
    return {name: to_gpu(x) for name, x in tensors.items()}


def all_to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Results where they are compared."""
    return {name: x.cpu() for name, x in tensors.items()}


def attend(case: Case, backend: str):
    """A case's call with a backend forced by name, a function of q, k, v and the term tensors by name."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": backend}
        return va.attention(q, k, v, case.pattern, **call, return_lse=True)

    return forward


def poisoned(forward):
    """The same function with every uninitialised tensor full of NaN."""

    def run(*args, **kwargs):
        with poison():
            assert torch.empty(3, device="cuda").isnan().all()
            return forward(*args, **kwargs)

    return run


SMALL = tuple(
    Case(dtype, pattern=pattern, terms=EVERYTHING)
    for dtype in DTYPES
    for pattern in (va.Window(3, shift=1), va.Neighborhood(3, border="zero"), va.CrissCross(), va.Global())
)
"""A small problem for every kernel in every dtype: a first look, and what the sanitizers are shown."""

NEAR = {"rtol": 1e-4, "atol": 1e-5}


def run_small(case: Case, backend: str) -> None:
    """One of `SMALL`: forward, backward, and, of who has them, the map and what keys receive."""
    case = as_taken(case, backend)
    tensors = all_to_gpu(inputs(case))
    results = differentiate(attend(case, backend), tensors, case.wanted)
    assert {x.device.type for x in results.values()} == {"cuda"}
    hold(case, all_to_cpu(results))
    if backend not in READERS:
        return
    q, k = tensors["q"], tensors["k"]
    rows = va.attention_map(q, k, [(0, 0), (4, 6)], case.pattern, backend=backend).cpu()
    sums = va.attention_received(q, k, case.pattern, backend=backend).cpu()
    call = {"pattern": case.pattern, "scale": case.true_scale}
    exact = reference.probabilities(q.double().cpu(), k.double().cpu(), **call)  # [B, heads, H, W, Hk, Wk]
    torch.testing.assert_close(rows.double(), exact[:, :, [0, 4], [0, 6]].transpose(1, 2), **NEAR)
    torch.testing.assert_close(sums.double(), exact.sum((2, 3)).permute(0, 2, 3, 1), **NEAR)


def needs_memory(count: int) -> None:
    """Skip, with the reason, where the GPU has not so many bytes free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < count:
        pytest.skip(f"needs {count / 1e9:.0f} GB of GPU memory; {free / 1e9:.0f} GB are free")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether two tensors have the same bits, NaN and the sign of 0 included, as a tensor on their device."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.contiguous().view(kind) == b.contiguous().view(kind)).all()
