"""Terms: what is added to scores and to values.

A term is a frozen dataclass of tensors, and of a factor where it has one. It checks itself against a problem and says
which of the operators' term tensors it brings. Equality is identity: tensors have no other that is cheap.

Relative tables have 2K - 1 entries per axis, entry `offset + K - 1`, where the offset is key position minus query
position in units of the pattern's stride and K the pattern's reach on that axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

import torch

from visattn_kernels.errors import expected, same, strided, tensor, told
from visattn_kernels.patterns import AXES

if TYPE_CHECKING:
    from visattn_kernels.problem import Problem

TERM_TENSORS = (
    "relative_bias",
    "relative_query_h",
    "relative_query_w",
    "relative_key_h",
    "relative_key_w",
    "relative_value_h",
    "relative_value_w",
    "key_bias",
)
"""The tensors of the terms, in schema order."""


class Term(ABC):
    """What every term can do."""

    tensors: ClassVar[dict[str, str]]
    """The fields that hold a tensor (or None), by their name among the operators' arguments."""

    one_grid: ClassVar[bool] = True
    """Whether queries and keys must lie on one grid, as offsets between them do."""

    @abstractmethod
    def check(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
        """Raise if the term does not fit the problem of q and k, whose dtype and device its tensors must have."""

    @abstractmethod
    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Term:
        """The same term with `function` applied to each tensor."""


def cast(terms: Sequence[Term], function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Term, ...]:
    """Apply `function` to every tensor of every term; what is no term is left as it is."""
    return tuple(term.map(function) if isinstance(term, Term) else term for term in terms)


def tensors_of(terms: Sequence[Term], values: bool = True) -> tuple[torch.Tensor | None, ...]:
    """The tensors of the terms in the order of `TERM_TENSORS`, None where there is none.

    Args:
        terms: at most one of each kind.
        values: whether value terms take part; they change no weight.
    """
    found = {
        name: getattr(term, field)
        for term in terms
        for name, field in term.tensors.items()
        if values or not isinstance(term, RelativeValue)
    }
    return tuple(found.get(name) for name in TERM_TENSORS)


def terms_of(tensors: Sequence[torch.Tensor | None], query_scale: float, key_scale: float) -> tuple[Term, ...]:
    """The terms of tensors in the order of `TERM_TENSORS`, the inverse of `tensors_of` and `scales`."""
    found = {name: x for name, x in zip(TERM_TENSORS, tensors, strict=True) if x is not None}
    factors = {RelativeQuery: {"scale": float(query_scale)}, RelativeKey: {"scale": float(key_scale)}}
    terms: list[Term] = []
    for kind in (RelativeBias, RelativeQuery, RelativeKey, RelativeValue, KeyBias):
        fields: dict[str, torch.Tensor] = {field: found[name] for name, field in kind.tensors.items() if name in found}
        if fields:
            terms.append(kind(**fields, **factors.get(kind, {})))  # type: ignore[arg-type]
    return tuple(terms)


def scales(terms: Sequence[Term]) -> tuple[float, float]:
    """The factors of `RelativeQuery` and of `RelativeKey`, 1 where there is none."""
    query, key = 1.0, 1.0
    for term in terms:
        if isinstance(term, RelativeQuery):
            query = float(term.scale)
        elif isinstance(term, RelativeKey):
            key = float(term.scale)
    return query, key


@dataclass(frozen=True, eq=False)
class RelativeBias(Term):
    """A number per head and offset, added to the logit: `table[h, Δy, Δx]`.

    As in Swin (Liu et al., 2021, equation 4), MaxViT (Tu et al., 2022) and NAT (Hassani et al., 2023, equation 2).

    Args:
        table (Tensor[heads, 2Kh-1, 2Kw-1]): entry `[h, Δy + Kh - 1, Δx + Kw - 1]`, offsets key minus query.
    """

    table: torch.Tensor

    tensors: ClassVar[dict[str, str]] = {"relative_bias": "table"}

    def __post_init__(self) -> None:
        tensor(self.table, "table")

    def check(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
        """The table has an entry for each head and offset."""
        table = _like_q(self.table, "RelativeBias.table", q)
        reach = problem.pattern.reach(problem.queries, problem.keys)
        shape = [problem.heads, 2 * reach[0] - 1, 2 * reach[1] - 1]
        if not _shaped(table, shape):
            raise expected(
                f"RelativeBias.table of shape {shape} ([heads, 2Kh-1, 2Kw-1])",
                "RelativeBias.table.shape",
                f"{list(table.shape)} and q.shape={list(q.shape)}",
                RuntimeError,
                f"{_entries(problem, 0)}, {_entries(problem, 1)}.",
            )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RelativeBias:
        """The same term with `function` applied to each tensor."""
        return RelativeBias(function(self.table))


@dataclass(frozen=True, eq=False)
class RelativeQuery(Term):
    """A product of the query with a vector per offset and axis, added to the logit.

        scale * (q_i·rel_h[Δy] + q_i·rel_w[Δx])

    q is not multiplied by the attention's own scale here. As in stand-alone self-attention (Ramachandran et al., 2019,
    equation 3), Axial-DeepLab (Wang et al., 2020, r^q), BoTNet (Srinivas et al., 2021), HaloNet (Vaswani et al., 2021),
    MViTv2 (Li et al., 2022), ViTDet (Li et al., 2022) and SAM (Kirillov et al., 2023).

    Args:
        rel_h (Tensor[2Kh-1, D] or Tensor[heads, 2Kh-1, D]): along the height; None for no such part.
        rel_w (Tensor[2Kw-1, D] or Tensor[heads, 2Kw-1, D]): along the width; None for no such part.
        scale: factor of the term.
    """

    rel_h: torch.Tensor | None = None
    rel_w: torch.Tensor | None = None
    scale: float = 1.0

    tensors: ClassVar[dict[str, str]] = {"relative_query_h": "rel_h", "relative_query_w": "rel_w"}

    def __post_init__(self) -> None:
        _tables("RelativeQuery", self.rel_h, self.rel_w)
        _factor("RelativeQuery", self.scale)

    def check(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
        """Each table has a vector as wide as a query for each offset."""
        _check_tables("RelativeQuery", (self.rel_h, self.rel_w), problem, q, ("D", problem.head_dim))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RelativeQuery:
        """The same term with `function` applied to each tensor."""
        return RelativeQuery(_each(function, self.rel_h), _each(function, self.rel_w), self.scale)


@dataclass(frozen=True, eq=False)
class RelativeKey(Term):
    """A product of the key with a vector per offset and axis, added to the logit.

        scale * (k_j·rel_h[Δy] + k_j·rel_w[Δx])

    As in Axial-DeepLab (Wang et al., 2020, equation 4, r^k). Tables per head count the heads of q.

    Args:
        rel_h (Tensor[2Kh-1, D] or Tensor[heads, 2Kh-1, D]): along the height; None for no such part.
        rel_w (Tensor[2Kw-1, D] or Tensor[heads, 2Kw-1, D]): along the width; None for no such part.
        scale: factor of the term.
    """

    rel_h: torch.Tensor | None = None
    rel_w: torch.Tensor | None = None
    scale: float = 1.0

    tensors: ClassVar[dict[str, str]] = {"relative_key_h": "rel_h", "relative_key_w": "rel_w"}

    def __post_init__(self) -> None:
        _tables("RelativeKey", self.rel_h, self.rel_w)
        _factor("RelativeKey", self.scale)

    def check(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
        """Each table has a vector as wide as a key for each offset."""
        _check_tables("RelativeKey", (self.rel_h, self.rel_w), problem, q, ("D", problem.head_dim))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RelativeKey:
        """The same term with `function` applied to each tensor."""
        return RelativeKey(_each(function, self.rel_h), _each(function, self.rel_w), self.scale)


@dataclass(frozen=True, eq=False)
class RelativeValue(Term):
    """A vector per offset and axis, added to the value: `rel_h[Δy] + rel_w[Δx]`.

    As in Axial-DeepLab (Wang et al., 2020, equation 4, r^v). It changes no weight: `attention_map` and
    `attention_received` take it and leave it aside. Tables per head count the heads of q.

    Args:
        rel_h (Tensor[2Kh-1, Dv] or Tensor[heads, 2Kh-1, Dv]): along the height; None for no such part.
        rel_w (Tensor[2Kw-1, Dv] or Tensor[heads, 2Kw-1, Dv]): along the width; None for no such part.
    """

    rel_h: torch.Tensor | None = None
    rel_w: torch.Tensor | None = None

    tensors: ClassVar[dict[str, str]] = {"relative_value_h": "rel_h", "relative_value_w": "rel_w"}

    def __post_init__(self) -> None:
        _tables("RelativeValue", self.rel_h, self.rel_w)

    def check(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
        """Each table has a vector as wide as a value for each offset, where there are values."""
        _check_tables("RelativeValue", (self.rel_h, self.rel_w), problem, q, ("Dv", problem.value_dim))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RelativeValue:
        """The same term with `function` applied to each tensor."""
        return RelativeValue(_each(function, self.rel_h), _each(function, self.rel_w))


@dataclass(frozen=True, eq=False)
class KeyBias(Term):
    """A number per key, added to the logit of every query that sees it; -inf removes the key.

    Padding masks and saliency; with it `-(q - k)^2`, the similarity of LR-Net (Hu et al., 2019), is a dot product.

    Under autocast the bias is cast as q is: in float16, which ends at -65504, a bias of less than -65520 becomes -inf
    and removes its key.

    Args:
        bias (Tensor[B, Hk, Wk] or Tensor[B, Hk, Wk, heads]): the heads are those of q.
    """

    bias: torch.Tensor

    tensors: ClassVar[dict[str, str]] = {"key_bias": "bias"}
    one_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        tensor(self.bias, "bias")

    def check(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
        """One number for each key of each map, and maybe head."""
        bias = _like_q(self.bias, "KeyBias.bias", q)
        shape = [problem.batch, *problem.keys]
        if not _shaped(bias, shape, [*shape, problem.heads]):
            raise expected(
                f"KeyBias.bias of shape {shape} or {[*shape, problem.heads]} ([B, Hk, Wk] or [B, Hk, Wk, heads])",
                "KeyBias.bias.shape",
                f"{list(bias.shape)}, k.shape={list(k.shape)} and q.shape={list(q.shape)}",
                RuntimeError,
            )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> KeyBias:
        """The same term with `function` applied to each tensor."""
        return KeyBias(function(self.bias))


def _each(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor | None) -> torch.Tensor | None:
    """`function(x)`, or None."""
    return None if x is None else function(x)


def _tables(term: str, rel_h: object, rel_w: object) -> None:
    """Check the types of a term's tables: tensors or None, not both None."""
    for name, x in (("rel_h", rel_h), ("rel_w", rel_w)):
        if x is not None:
            tensor(x, name)
    if rel_h is None and rel_w is None:
        raise expected(f"at least one of rel_h and rel_w for {term}", "rel_h", "None and rel_w=None", ValueError)


def _factor(term: str, scale: object) -> None:
    """Check a term's own scale."""
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise expected(f"scale of {term} to be a number", "scale", told(scale), TypeError)


def _like_q(x: torch.Tensor, argument: str, q: torch.Tensor) -> torch.Tensor:
    """Check that a term's tensor is dense and has the device and dtype of q."""
    strided(x, argument)
    same(q, x, ("q", argument), "device")
    same(q, x, ("q", argument), "dtype")
    return x


def _shaped(x: torch.Tensor, *shapes: Sequence[int]) -> bool:
    """Whether a tensor has one of the shapes; number by number, since torch.compile compares symbols no other way."""
    return any(
        len(shape) == x.dim() and all(size == want for size, want in zip(x.shape, shape, strict=True))
        for shape in shapes
    )


def _entries(problem: Problem, axis: int) -> str:
    """How many entries a relative table has along an axis, and why."""
    reach = problem.pattern.reach(problem.queries, problem.keys)[axis]
    return f"2K-1 = {2 * reach - 1} entries for the reach K = {reach} of {problem.pattern} along the {AXES[axis]}"


def _check_tables(
    term: str,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    problem: Problem,
    q: torch.Tensor,
    width: tuple[str, int],
) -> None:
    """Check a term's two tables; `width` is the name and the number of their channels, 0 for any number."""
    reach = problem.pattern.reach(problem.queries, problem.keys)
    for axis, table in enumerate(tables):
        if table is None:
            continue
        argument = f"{term}.rel_{'hw'[axis]}"
        _like_q(table, argument, q)
        channels = width[1] or (table.shape[-1] if table.dim() else 1)
        shape = [2 * reach[axis] - 1, channels]
        if not _shaped(table, shape, [problem.heads, *shape]):
            raise expected(
                f"{argument} of shape {shape} or {[problem.heads, *shape]} "
                f"([2K-1, {width[0]}] or [heads, 2K-1, {width[0]}])",
                f"{argument}.shape",
                f"{list(table.shape)} and q.shape={list(q.shape)}",
                RuntimeError,
                f"{_entries(problem, axis)}.",
            )
