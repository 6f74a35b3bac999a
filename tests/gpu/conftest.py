"""Without an NVIDIA GPU each module here is one skip, and is not imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NEEDS = "needs an NVIDIA GPU; make gpu runs it"

COLLECT = "VISATTN_COLLECT_GPU"
"""The environment variable by which the tier is collected, though not run, without a GPU."""


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(NEEDS, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if torch.cuda.is_available() or os.environ.get(COLLECT) == "1":
        return None  # as always
    return _Skipped.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def _a_gpu() -> Iterator[None]:
    """For whoever collects without one, and runs; a fault on the device belongs to the test that it is found in."""
    if not torch.cuda.is_available():
        pytest.skip(NEEDS)
    yield
    torch.cuda.synchronize()


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may be TF32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def alone() -> Iterator[None]:
    """For tests that need much of the GPU's memory: one of them at a time, whatever process it is in."""
    import fcntl

    lock = Path(__file__).parents[2] / "build" / "gpu-memory.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()
