"""The record of the CPU backend: the C++ engine of `csrc/cpu`, where it was built."""

from __future__ import annotations

from visattn_kernels.backends import parts
from visattn_kernels.problem import Problem

MAX_CHANNELS = 65536
"""The widest head that the engine takes, as in csrc/binding/check.h."""

ABOUT = "C++ engine: tiled, multi-threaded, SIMD chosen at run time"

_failure = parts.failure(parts.ENGINE)


def unavailable() -> list[str]:
    """Why the engine cannot run on this machine."""
    return [_failure] if _failure else []


def unsupported(problem: Problem) -> list[str]:
    """Why the engine cannot run `problem`."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"the tensors are on {problem.device}, not on the CPU")
    if max(problem.head_dim, problem.value_dim) > MAX_CHANNELS:
        reasons.append(f"D and Dv may be at most {MAX_CHANNELS}, since scratch memory grows with them")
    return reasons


def isa() -> str:
    """The instruction set that the engine uses on this machine, such as "avx512_bf16".

    Raises:
        RuntimeError: VISATTN_CPU_ISA names none that can run here.
    """
    return parts.selected_isa()
