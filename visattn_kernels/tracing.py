"""What becomes of a call while torch makes a graph: of torch.fx, of torch.jit.trace, of torch.compile and torch.export.

torch.fx hands proxies to what it traces, which have no shape to check or to decide by, so that a call with one becomes
a node of the graph as it is. The others hand tensors whose sizes may stand for those of other calls: what is decided by
such a size holds for them too, or is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.fx import Proxy
from torch.jit import TracerWarning, is_tracing  # type: ignore[attr-defined]

F = TypeVar("F", bound=Callable[..., Any])


def one_node(function: F) -> F:
    """Make a function one node of the graphs that torch.fx traces."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = proxy_in((*args, *kwargs.values()))
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", call, args, kwargs)

    return cast(F, call)


def proxy_in(values: Iterable[Any]) -> Proxy | None:
    """A proxy of torch.fx among values, lists of them, and terms."""
    for value in values:
        if isinstance(value, Proxy):
            return value
        inside: Iterable[Any] = ()
        if isinstance(value, (list, tuple)):
            inside = value
        elif hasattr(type(value), "tensors"):  # a term, and not its class
            inside = [getattr(value, field) for field in value.tensors.values()]
        if inside and (proxy := proxy_in(inside)) is not None:
            return proxy
    return None


def recording() -> bool:
    """Whether torch.jit.trace records: sizes are tensors then, of which arithmetic is kept, and no decision."""
    return bool(is_tracing())  # type: ignore[no-untyped-call]


def refusing(function: F) -> F:
    """A function that decides by sizes only whether to refuse, so that torch.jit.trace need not warn of it."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not recording():
            return function(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TracerWarning)
            return function(*args, **kwargs)

    return cast(F, call)


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds, for all sizes that a graph in the making is for; a doubt is a no."""
    if recording():
        return False
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def lacking(size: int, least: int) -> int:
    """How much a size lacks of the least that is needed, 0 if nothing."""
    lack = least - size
    if recording():
        return lack * (lack > 0)
    most: int = torch.sym_max(lack, 0)  # type: ignore[no-untyped-call]
    return most


def frozen(what: str, *sizes: int) -> tuple[int, ...]:
    """Sizes for a decision that no graph can hold; torch.jit.trace, which would not say so, warns."""
    if not recording():
        return sizes
    sizes = _plain(*sizes)
    warnings.warn(
        f"visattn: torch.jit.trace keeps for maps of all sizes {what}, as for this one of "
        f"{'×'.join(map(str, sizes))}. Trace each size alone, or use torch.export, which refuses other sizes.",
        TracerWarning,
        stacklevel=3,
    )
    return sizes


@refusing
def _plain(*sizes: int) -> tuple[int, ...]:
    """Sizes that torch.jit.trace has made tensors, as numbers."""
    return tuple(map(int, sizes))
