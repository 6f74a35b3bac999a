"""The one form of every message: `visattn: expected <rule>, but got <argument>=<value>`."""

from __future__ import annotations

from typing import TypeVar, cast

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


def told(value: object) -> str:
    """A value as a message shows it: itself where it is plain, else its type; a tensor would fill the screen."""
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(told, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def tensor(value: object, argument: str) -> torch.Tensor:
    """Return `value` if it is a tensor, or a proxy of torch.fx, which will be one; else raise TypeError."""
    if not isinstance(value, (torch.Tensor, torch.fx.Proxy)):
        raise expected(f"{argument} to be a torch.Tensor", argument, type(value).__name__, TypeError)
    return cast(torch.Tensor, value)


def strided(value: object, argument: str) -> torch.Tensor:
    """Return `value` if it is a dense tensor, else raise."""
    x = tensor(value, argument)
    if x.is_nested or x.layout != torch.strided:
        layout = "nested" if x.is_nested else x.layout
        raise expected(f"{argument} to be a strided (dense) tensor", f"{argument}.layout", layout, RuntimeError)
    return x


def same(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str], what: str) -> None:
    """Check that two tensors agree in `what`, an attribute."""
    if getattr(a, what) != getattr(b, what):
        raise expected(
            f"{names[0]} and {names[1]} to have the same {what}",
            f"{names[0]}.{what}",
            f"{getattr(a, what)} and {names[1]}.{what}={getattr(b, what)}",
            RuntimeError,
        )
