"""Backends, in the order in which `backend="auto"` asks them.

A backend is a record: its name, why it cannot run on this machine, and why it cannot run a given problem. An empty
list of reasons means that it can. The first that can is taken, where one that yields comes after those that don't.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from visattn_kernels.backends import cpu, cuda, reference, triton
from visattn_kernels.errors import expected, told
from visattn_kernels.problem import Problem
from visattn_kernels.tracing import refusing


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: what `backend=` takes.
        about: one line for a person.
        unavailable: reasons why it cannot run on this machine at all.
        unsupported: reasons why it cannot run a problem, given that it is available.
        yields: why it lets others run a problem that it could run itself; an empty text if it doesn't.
        slow: whether falling back to it deserves a warning.
    """

    name: str
    about: str
    unavailable: Callable[[], list[str]]
    unsupported: Callable[[Problem], list[str]]
    yields: Callable[[Problem], str] = lambda problem: ""
    slow: bool = False

    def reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run `problem` here; empty if it can."""
        return self.unavailable() + self.unsupported(problem)


REGISTRY = (
    Backend("cpu", cpu.ABOUT, cpu.unavailable, cpu.unsupported),
    Backend("cuda", cuda.ABOUT, cuda.unavailable, cuda.unsupported, cuda.yields),
    Backend("triton", triton.ABOUT, triton.unavailable, triton.unsupported),
    Backend("reference", reference.ABOUT, reference.unavailable, reference.unsupported, slow=True),
)
NAMES = ("auto", *(backend.name for backend in REGISTRY))

_warned: set[str] = set()


def in_order(problem: Problem) -> list[Backend]:
    """The backends as `backend="auto"` asks them for a problem."""
    ranks = [2 if backend.slow else 1 if backend.yields(problem) else 0 for backend in REGISTRY]
    return [backend for rank in range(3) for backend, its in zip(REGISTRY, ranks, strict=True) if its == rank]


@refusing
def choose(problem: Problem, name: str) -> str:
    """The name of the backend that runs `problem`.

    Raises:
        TypeError: `name` is not a string.
        ValueError: `name` is no backend's name.
        RuntimeError: the backend forced by name cannot run the problem; the message lists every reason.
    """
    if not isinstance(name, str):
        raise expected(f"backend to be one of {', '.join(NAMES)}", "backend", told(name), TypeError)
    if name not in NAMES:
        raise expected(f"backend to be one of {', '.join(NAMES)}", "backend", told(name), ValueError)
    refused: list[str] = []
    for backend in in_order(problem):
        if name not in ("auto", backend.name):
            continue
        reasons = backend.reasons(problem)
        if reasons and name == backend.name:
            raise expected(
                "a backend that can run this problem",
                "backend",
                told(name),
                RuntimeError,
                f"It cannot: {'; '.join(reasons)}. The problem: {problem.describe()}",
            )
        if not reasons:
            if refused and backend.slow:
                _warn_once(backend.name, "; ".join(refused))
            return backend.name
        refused.append(f"{backend.name}: {'; '.join(reasons)}")
    raise RuntimeError(f"visattn: no backend can run {problem.describe()}. {' | '.join(refused)}")


def _warn_once(name: str, why: str) -> None:
    """Say once per reason that a slow backend was taken."""
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"visattn: falling back to the {name} backend, which stores the whole map ({why})", stacklevel=6)
