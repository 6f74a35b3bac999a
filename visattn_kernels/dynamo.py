"""What `torch.compile` is told about functions of ours, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """Mark a function whose result `torch.compile` may take as a constant: it calls it, where it would trace it.

    This is `torch.compiler.assume_constant_result`, which imports `torch._dynamo`, and with that sympy and Triton: more
    than torch itself. All that it does then, from torch 2.10 on, is to set the attribute that Dynamo looks for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
