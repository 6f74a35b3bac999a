"""One canonical description of a call, made of plain numbers; backends decide by it and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from visattn_kernels.errors import expected, same, strided, told
from visattn_kernels.patterns import Pattern, Size
from visattn_kernels.terms import Term
from visattn_kernels.tracing import refusing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that q, k and v may have."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32_products() -> bool:
    """Whether torch's settings let float32 products be TF32.

    `allow_tf32` would be the same question, and raises where the newer settings were used.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@dataclass(frozen=True)
class Problem:
    """What is asked, without the data.

    Attributes:
        device: type of the device, such as "cpu".
        dtype: dtype of q, k, v and out.
        batch: number of maps.
        queries: the query grid.
        keys: the key grid.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width D of a query and a key.
        value_dim: width Dv of a value.
        scale: factor of q·k.
        pattern: which keys a query sees.
        terms: names of the terms present.
    """

    device: str
    dtype: torch.dtype
    batch: int
    queries: Size
    keys: Size
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    pattern: Pattern
    terms: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for a person."""
        dtype = str(self.dtype).removeprefix("torch.")
        terms = f" with {', '.join(self.terms)}" if self.terms else ""
        return (
            f"{self.pattern}{terms} on {self.device}, {dtype}: {self.batch} maps, "
            f"queries {self.queries.height}x{self.queries.width}, keys {self.keys.height}x{self.keys.width}, "
            f"{self.heads} heads ({self.kv_heads} of keys), D {self.head_dim}, Dv {self.value_dim}"
        )


@refusing
def check_map(
    value: object, argument: str, hint: str = "heads_last(x, heads) makes this view of an image [B, C, H, W]."
) -> torch.Tensor:
    """Check that `value` is one tensor of the layout `[B, H, W, heads, D]`; the hint is for one of another rank."""
    x = strided(value, argument)
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise expected(f"the dtype of {argument} to be one of {names}", f"{argument}.dtype", x.dtype, RuntimeError)
    if x.dim() != 5:
        raise expected(
            f"{argument} of shape [B, H, W, heads, D]",
            f"{argument}.shape",
            list(x.shape),
            RuntimeError,
            hint,
        )
    for size, name in zip(x.shape[1:], ("H", "W", "heads", "Dv" if argument == "v" else "D"), strict=True):
        if size < 1:
            raise expected(f"{name} of {argument} to be at least 1", f"{argument}.shape", list(x.shape), RuntimeError)
    return x


def _agree(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str], dims: dict[int, str]) -> None:
    """Check that two maps agree in the sizes of `dims`."""
    for dim, name in dims.items():
        if a.shape[dim] != b.shape[dim]:
            raise expected(
                f"{names[0]} and {names[1]} to agree in {name} (dimension {dim})",
                f"{names[0]}.shape",
                f"{list(a.shape)} and {names[1]}.shape={list(b.shape)}",
                RuntimeError,
            )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
    """Check q, k and (where there is one) v: each alone, and against each other.

    Raises:
        TypeError: one is not a tensor.
        RuntimeError: they disagree in rank, shape, dtype or device.
    """
    check_map(q, "q")
    for other, name in ((k, "k"), (v, "v")) if v is not None else ((k, "k"),):
        other = check_map(other, name)
        same(q, other, ("q", name), "device")
        same(q, other, ("q", name), "dtype")
    _agree(q, k, ("q", "k"), {0: "batch", 4: "D"})
    if v is not None:
        _agree(k, v, ("k", "v"), {0: "batch", 1: "H", 2: "W", 3: "heads"})
    if q.shape[3] % k.shape[3] != 0:
        raise expected(
            "the heads of k to divide the heads of q (grouped-query attention)",
            "q.shape",
            f"{list(q.shape)} and k.shape={list(k.shape)}",
            RuntimeError,
        )


def check_options(pattern: object, scale: object, terms: object) -> None:
    """Check what can be without tensors.

    Raises:
        TypeError: an argument has the wrong Python type.
        ValueError: a term comes twice.
    """
    if not isinstance(pattern, Pattern):
        raise expected("pattern to be a pattern such as Global()", "pattern", told(pattern), TypeError)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, Real)):
        raise expected("scale to be a number or None", "scale", told(scale), TypeError)
    if not isinstance(terms, Sequence) or isinstance(terms, str):
        raise expected("terms to be a tuple of terms", "terms", told(terms), TypeError)
    for i, term in enumerate(terms):
        if not isinstance(term, Term):
            raise expected("every term to be a term such as RelativeBias(table)", f"terms[{i}]", told(term), TypeError)
    names = [type(term).__name__ for term in terms]
    if len(set(names)) < len(names):
        raise expected("at most one term of each kind", "terms", f"({', '.join(names)})", ValueError)


@refusing
def make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    pattern: Pattern,
    scale: float | None,
    terms: Sequence[Term],
) -> Problem:
    """Check the arguments of a call and describe it.

    Raises:
        TypeError: an argument has the wrong Python type.
        ValueError: the pattern does not fit the grids, or a term comes twice.
        RuntimeError: tensors, those of terms included, disagree in rank, shape, dtype or device.
    """
    check_tensors(q, k, v)
    heads, kv_heads = q.shape[3], k.shape[3]
    check_options(pattern, scale, terms)
    queries, keys = Size(q.shape[1], q.shape[2]), Size(k.shape[1], k.shape[2])
    parts: tuple[Pattern | Term, ...] = (pattern, *terms)
    for what in parts:
        # Number by number, since of whole tuples torch 2.11's export takes the sizes for constants; and only where it
        # counts, since an answer is kept by whatever graph is in the making.
        if what.one_grid and (queries.height != keys.height or queries.width != keys.width):
            raise expected(
                f"q and k on one grid, as {what if what is pattern else type(what).__name__} needs",
                "q.shape",
                f"{list(q.shape)} and k.shape={list(k.shape)}",
                RuntimeError,
            )
    pattern.check(queries, keys)
    problem = Problem(
        device=q.device.type,
        dtype=q.dtype,
        batch=q.shape[0],
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=q.shape[4],
        value_dim=0 if v is None else v.shape[4],
        scale=float(q.shape[4]) ** -0.5 if scale is None else float(scale),
        pattern=pattern,
        terms=tuple(type(term).__name__ for term in terms),
    )
    for term in terms:
        term.check(problem, q, k)
    return problem
