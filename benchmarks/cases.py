"""A case is a workload in one dtype on one device: its cost, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.workloads import Workload, pairs, picture, positions
from visattn_kernels.terms import RelativeKey, RelativeQuery

Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")

Layout = Literal["maps", "tokens"]
"""How a provider takes its tensors: `[B, H, W, heads, D]`, or `[B, heads, N, D]`; contiguous in both."""


@dataclass(frozen=True)
class Cost:
    """What a pass must do at least.

    Attributes:
        flops: of the matrix products; a multiplication and an addition are two.
        bytes: of the operands and results, each moved once.
        exps: exponentials.
    """

    flops: float
    bytes: float
    exps: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.exps + other.exps)


@dataclass(frozen=True)
class Case:
    """A workload in one dtype on one device."""

    workload: Workload
    dtype_name: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def batch(self) -> int:
        """Maps."""
        return self.workload.batch(self.device)

    @property
    def heads(self) -> int:
        """Heads."""
        return self.workload.heads_on(self.device)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int, int]]:
        """Heads-last shapes of q, k, v and out."""
        w = self.workload
        return {
            "q": (self.batch, *w.queries, self.heads, w.head_dim),
            "k": (self.batch, *w.keys, self.heads, w.head_dim),
            "v": (self.batch, *w.keys, self.heads, w.value_dim),
            "out": (self.batch, *w.queries, self.heads, w.value_dim),
        }

    def scores(self) -> int:
        """Pairs of a query and a key that it sees, over all maps and heads."""
        return self.batch * self.heads * pairs(self.workload)

    def cost(self, which: Pass) -> Cost:
        """The least that a pass must do.

        The forward multiplies q by k and the map by v: `2·scores·(D + Dv)` operations. The backward recomputes the
        scores and multiplies for dv, dp, dq and dk: `2·scores·(3D + 2Dv)`; it reads out and its gradient too.

        What a term adds is left out, tables included: how little it can cost depends on the term, and a floor must not
        be too high.
        """
        w, scores = self.workload, float(self.scores())
        size = float(self.dtype.itemsize)
        elements = {name: float(torch.Size(shape).numel()) for name, shape in self.shapes.items()}
        lse = 4.0 * self.batch * self.heads * positions(w.queries)
        tensors = sum(elements.values()) * size
        forward = Cost(2 * scores * (w.head_dim + w.value_dim), tensors + lse, scores)
        backward = Cost(2 * scores * (3 * w.head_dim + 2 * w.value_dim), 2 * tensors + lse, scores)
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, heads-last and contiguous, without history.

    Attributes:
        q, k, v: as `attention` takes them.
        grad (Tensor[B, H, W, heads, Dv]): the gradient that flows into out.
        terms: the tensors of the workload's terms, one tuple a term.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    terms: tuple[tuple[torch.Tensor, ...], ...] = ()


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """The tensors of a case, the same on every machine.

    Random queries are drawn so that the logits have unit variance for every scale: a scale of 1 with D = 32 would
    give logits of +-30, in whose rounding every implementation is lost alike.
    """
    w = case.workload
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Sequence[int], deviation: float = 1.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator) * deviation
        return x.to(dtype=case.dtype).to(case.device)

    shapes = case.shapes
    if w.picture:
        colours = picture().to(dtype=case.dtype).to(case.device)[None, :, :, None]
        q, k, v = (colours.expand(shapes[name]).clone() for name in "qkv")
    else:
        q = draw(shapes["q"], 1 / (w.factor * w.head_dim**0.5))
        k, v = draw(shapes["k"]), draw(shapes["v"])
    # Each table too adds a variance to the logits that is of their size.
    deviations = {RelativeQuery: w.factor / 2, RelativeKey: w.head_dim**-0.5 / 2}
    terms = tuple(
        tuple(draw(shape, deviations.get(term.term, 1.0)) for shape in shapes)
        for term, shapes in zip(w.terms, w.term_shapes(case.heads), strict=True)
    )
    return Inputs(q, k, v, draw(shapes["out"]), terms)


def to_layout(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A contiguous copy of a heads-last tensor in a provider's layout."""
    if layout == "maps":
        return x.clone(memory_format=torch.contiguous_format)
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).clone(memory_format=torch.contiguous_format)  # [B, heads, N, D]


def from_layout(x: torch.Tensor, layout: Layout, grid: tuple[int, int]) -> torch.Tensor:
    """A heads-last view of a tensor in a provider's layout."""
    if layout == "maps":
        return x
    return x.view(*x.shape[:2], *grid, x.shape[-1]).permute(0, 2, 3, 1, 4)
