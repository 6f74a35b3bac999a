"""What all tests share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

# Two workers share two cores: what does not test threads runs on one, and where there are two in each worker, one that
# spins while it waits would take another's core. To be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import interpreter
import isas
import pytest
import tiers
import torch

# Without a GPU, Triton's kernels run in its interpreter, which decorators choose when modules are imported (torch does
# not import Triton by itself). With one, tests/gpu runs them there. Ahead-of-time compilation has processes of its own.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from visattn_kernels.backends import cpu, triton


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    if tiers.TIER == "full" and not config.option.collectonly:
        config.pluginmanager.register(tiers.Resumed(), tiers.RESUMED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.select(config, items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    if "tier" in getattr(node, "workeroutput", {}):
        tiers.note(node.config, node.workeroutput["tier"])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reasons = cpu.unavailable()
    engine = "; ".join(reasons) if reasons else f"instruction sets {', '.join(isas.HERE)}"
    absent = f" ({', '.join(isas.ABSENT)} not on this machine)" if isas.ABSENT else ""
    terminalreporter.write_line(f"torch {torch.__version__}; CPU engine: {engine}{absent}")
    if line := tiers.summary(config):
        terminalreporter.write_line(line)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For the CPU engine, whose threads divide its work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend in the interpreter, on CPU tensors; never bfloat16, of which it computes garbage."""
    if triton.missing():
        pytest.skip("; ".join(triton.missing()))
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("TRITON_INTERPRET is not 1: kernels are compiled here")
    interpreter.quicken()
    monkeypatch.setattr(triton, "interpret", True)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, so that an element that is not written shows."""
    with poison():
        yield


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """See `poisoned`."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
