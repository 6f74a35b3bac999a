"""The record of the reference backend: dense, pure torch, everywhere."""

from __future__ import annotations

from visattn_kernels.problem import Problem

ABOUT = "dense pure torch: stores the whole map, differentiable any number of times"


def unavailable() -> list[str]:
    """It is always there."""
    return []


def unsupported(problem: Problem) -> list[str]:
    """It runs every problem."""
    return []
