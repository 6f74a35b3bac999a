"""What `backend=` does on a machine with a GPU: a forced one runs or says why not; auto takes one that is for GPUs."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from cases import Case, short

import visattn_kernels as va
from gpu.common import BACKENDS, FOR_GPUS, SMALL, each_backend, named, run_small


def test_a_backend_for_gpus_is_available() -> None:
    reasons = {backend.name: backend.unavailable() for backend in FOR_GPUS}
    assert BACKENDS, f"no kernels run on this GPU: {reasons}"


@pytest.mark.parametrize("backend", FOR_GPUS, ids=lambda backend: backend.name)
def test_which_are_available(backend) -> None:
    reasons = backend.unavailable()
    if reasons:
        pytest.skip("; ".join(reasons))
    assert backend.name in BACKENDS
    assert any(line.startswith(f"{backend.name} ") and " yes " in line for line in va.explain().splitlines())


@each_backend
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{named(case.dtype)}-{short(case.pattern)}")
def test_forced_by_name(case: Case, backend: str) -> None:
    run_small(case, backend)


def test_auto_takes_one_for_gpus_without_a_warning() -> None:
    q = torch.randn(1, 4, 4, 1, 8, device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="visattn")
        auto = va.attention(q, q, q)
    taken = next(line for line in va.explain(q, q, q).splitlines() if "yes, taken" in line)
    assert taken.split()[0] == BACKENDS[0]
    assert torch.equal(auto, va.attention(q, q, q, backend=BACKENDS[0]))


@each_backend
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(1, 2, 2, 1, 8), "the tensors are on cpu, not on a GPU"),
        (lambda: torch.zeros(1, 2, 2, 1, 8, dtype=torch.float64, device="cuda"), "the dtype is float64"),
        (lambda: torch.zeros(1, 2, 2, 1, 513, device="cuda"), "at most 512|not one of"),
    ],
    ids=["on the CPU", "float64", "D 513"],
)
def test_what_it_cannot_run_it_says(backend: str, make, reason: str) -> None:
    q = make()
    with pytest.raises(RuntimeError, match=rf"backend='{backend}'\. It cannot: .*({reason})"):
        va.attention(q, q, q, backend=backend)
    assert re.search(reason, va.explain(q, q, q))


def test_the_cpu_engine_does_not_take_a_gpus_tensors() -> None:
    q = torch.zeros(1, 2, 2, 1, 8, device="cuda")
    with pytest.raises(RuntimeError, match=r"backend='cpu'\. It cannot: .*the tensors are on cuda, not on the CPU"):
        va.attention(q, q, q, backend="cpu")


@each_backend
def test_two_devices_are_refused(backend: str) -> None:
    q = torch.zeros(1, 2, 2, 1, 8)
    with pytest.raises(RuntimeError, match="q and k to have the same device"):
        va.attention(q.cuda(), q, q, backend=backend)
    with pytest.raises(RuntimeError, match="the same device"):
        va.attention(q.cuda(), q.cuda(), q.cuda(), terms=(va.KeyBias(torch.zeros(1, 2, 2)),), backend=backend)
