"""The one form of every message: `visattn: expected <rule>, but got <argument>=<value>`."""

from __future__ import annotations

from typing import TypeVar

import torch

E = TypeVar("E", bound=Exception)


def expected(rule: str, argument: str, value: object, kind: type[E], hint: str = "") -> E:
    """Build (not raise) the error for an argument that breaks a rule.

    Args:
        rule: what the argument must be, as the end of "expected ...".
        argument: the argument's name as the caller wrote it.
        value: what came instead.
        kind: the exception's type.
        hint: one more sentence, where it helps.
    """
    message = f"visattn: expected {rule}, but got {argument}={value}"
    return kind(f"{message}. {hint}" if hint else message)


def tensor(value: object, argument: str) -> torch.Tensor:
    """Return `value` if it is a tensor, else raise TypeError."""
    if not isinstance(value, torch.Tensor):
        raise expected(f"{argument} to be a torch.Tensor", argument, type(value).__name__, TypeError)
    return value
