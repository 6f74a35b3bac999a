"""What the operators cost, for `torch.utils.flop_counter`: multiplications and additions of matrix products.

    forward     2 * B * heads * (S + V)          S = pairs * D  + products with relative vectors of queries and of keys
    backward    2 * B * heads * (3S + 2V)        V = pairs * Dv + products with relative vectors of values
    received    2 * B * heads * S
    map         2 * B * heads * S * P / (H * W), for P points

`pairs` are those of a query and of a key on the map that it sees (`Pattern.pairs`), whatever a kernel computes beside
them. A relative vector is multiplied once for each query (for `RelativeKey`, each key) and each offset that it has
along the axis, since pairs share that product; biases are no product. As torch counts its own attention, the backward
recomputes the scores, and has all of its gradients, whichever `needs` asks for. A row of `map` counts as the mean of
all rows, since the formulas see shapes and no points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from visattn_kernels.ops import FAMILIES
from visattn_kernels.patterns import Size, decode
from visattn_kernels.terms import TERM_TENSORS

Shape = Sequence[int]

_N = len(TERM_TENSORS)


def _products(
    q: Shape, k: Shape, value_dim: int, terms: Sequence[Shape | None], encoded: Sequence[int]
) -> tuple[int, int]:
    """Operations of the scores and of the values, S and V above with their factor."""
    pattern, queries, keys = decode(encoded), Size(q[1], q[2]), Size(k[1], k[2])
    pairs = pattern.pairs(queries, keys)
    scores, values = pairs * q[4], pairs * value_dim
    for name, shape in zip(TERM_TENSORS, terms, strict=True):
        _, which, *side = name.split("_")
        if shape is None or not side:  # biases
            continue
        axis = "hw".index(side[0])
        # Keys around the map are zeros, so that nothing is multiplied by them; offsets to them are as all others.
        offsets = pattern.count(axis, queries[axis], keys[axis], outside=which != "key") * queries[1 - axis]
        if which == "value":
            values += offsets * shape[-1]
        else:
            scores += offsets * shape[-1]
    return 2 * q[0] * q[3] * scores, 2 * q[0] * q[3] * values


def forward(q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    """Operations of `<backend>_forward`."""
    return sum(_products(q, k, v[4], rest[:_N], rest[-1]))


def backward(grad_out: Shape, grad_lse: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    """Operations of `<backend>_backward`."""
    scores, values = _products(q, k, v[4], rest[:_N], rest[-2])
    return 3 * scores + 2 * values


def rows(q: Shape, k: Shape, *rest: Any, **_: Any) -> int:
    """Operations of `<backend>_map`."""
    points: int = rest[_N][0]
    return received(q, k, *rest) * points // (q[1] * q[2])


def received(q: Shape, k: Shape, *rest: Any, **_: Any) -> int:
    """Operations of `<backend>_received`."""
    return sum(_products(q, k, 0, rest[:_N], rest[-1]))


FORMULAS: dict[str, Callable[..., int]] = {"forward": forward, "backward": backward, "map": rows, "received": received}
"""The operations of each operator of a family, of the shapes of its arguments."""

COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Tell torch's counter the formulas, at once where it is imported, else when it is.

    The counter imports Triton, so that it must not come with this package; and it copies what is registered when a
    count begins, so that the first call of an operator is too late.
    """
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport())


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for backend, operators in FAMILIES.items():
        for which in operators:
            register_flop_formula(getattr(torch.ops.visattn, f"{backend}_{which}"))(FORMULAS[which])


class _OnImport(MetaPathFinder):
    """Finds nothing itself: it has the formulas registered after the counter that another finder has found."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
