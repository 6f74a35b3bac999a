"""The one table of workloads: what is asked, and at which batch on which device.

A new workload is one more row. A row names one pattern and any number of terms, so that an operation of two patterns
(axial attention) is two rows: `axial-65-row` and `axial-65-column`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from visattn_kernels.patterns import Column, CrissCross, Global, Grid, Neighborhood, Pattern, Row, Size, Window
from visattn_kernels.terms import RelativeBias, RelativeKey, RelativeQuery, RelativeValue, Term

CPU_DTYPES = ("float32", "bfloat16")
GPU_DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class TermSpec:
    """A relative term of a workload.

    Attributes:
        term: its class.
        tensors: the names of its tables, as the class takes them: "table", or "rel_h" and "rel_w" or one of these.
        per_head: whether vectors differ between heads; a number per offset always does.
    """

    term: type[Term]
    tensors: tuple[str, ...]
    per_head: bool = False

    @property
    def name(self) -> str:
        """The name of the class, such as "RelativeBias"."""
        return self.term.__name__

    def build(self, *tensors: torch.Tensor) -> Term:
        """The term with its tables."""
        return self.term(**dict(zip(self.tensors, tensors, strict=True)))


@dataclass(frozen=True)
class Workload:
    """One problem that the benchmark times.

    Attributes:
        name: what `--workload` takes.
        about: where it comes from.
        queries: the query grid.
        keys: the key grid.
        heads: query, key and value heads.
        head_dim: width D of queries and keys.
        value_dim: width Dv of values.
        gpu_batch: maps on a GPU; 0 where it is not run there.
        cpu_batch: maps on a CPU; 0 where it is not run there.
        scale: factor of q·k; None means `1/sqrt(D)`.
        pattern: which keys a query sees.
        terms: what is added to scores and values.
        cpu_heads: heads on a CPU, where those of `heads` are too many.
        cpu_dtypes, gpu_dtypes: dtypes that it is timed in.
        picture: q = k = v = the colours of a photograph, instead of random numbers.
        quick: small enough for `--quick`.
    """

    name: str
    about: str
    queries: Size
    keys: Size
    heads: int
    head_dim: int
    value_dim: int
    gpu_batch: int
    cpu_batch: int
    scale: float | None = None
    pattern: Pattern = field(default_factory=Global)
    terms: tuple[TermSpec, ...] = ()
    cpu_heads: int | None = None
    cpu_dtypes: tuple[str, ...] = CPU_DTYPES
    gpu_dtypes: tuple[str, ...] = GPU_DTYPES
    picture: bool = False
    quick: bool = True

    @property
    def factor(self) -> float:
        """The factor of q·k as a number."""
        return float(self.head_dim) ** -0.5 if self.scale is None else self.scale

    def batch(self, device: str) -> int:
        """Maps on a device."""
        return self.cpu_batch if device == "cpu" else self.gpu_batch

    def dtypes(self, device: str) -> tuple[str, ...]:
        """Names of the dtypes on a device."""
        return self.cpu_dtypes if device == "cpu" else self.gpu_dtypes

    def heads_on(self, device: str) -> int:
        """Heads on a device."""
        return self.cpu_heads if device == "cpu" and self.cpu_heads is not None else self.heads

    @property
    def term_names(self) -> list[str]:
        """The name of each tensor of each term, such as "RelativeBias.table"."""
        return [f"{term.name}.{name}" for term in self.terms for name in term.tensors]

    def tables(self, terms: Sequence[Sequence[torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of the terms by names: of the term, of the tensor."""
        return {
            term.name: dict(zip(term.tensors, tensors, strict=True))
            for term, tensors in zip(self.terms, terms, strict=True)
        }

    def term_shapes(self, heads: int) -> list[list[tuple[int, ...]]]:
        """The shapes of the terms' tables."""
        entries = [2 * reach - 1 for reach in self.pattern.reach(self.queries, self.keys)]

        def shape(term: TermSpec, name: str) -> tuple[int, ...]:
            if name == "table":
                return (heads, *entries)
            width = self.value_dim if term.term is RelativeValue else self.head_dim
            vectors = (entries[name == "rel_w"], width)
            return (heads, *vectors) if term.per_head else vectors

        return [[shape(term, name) for name in term.tensors] for term in self.terms]

    def describe(self) -> dict[str, Any]:
        """The workload as plain values, for a results file."""
        return {
            "about": self.about,
            "queries": list(self.queries),
            "keys": list(self.keys),
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "scale": self.factor,
            "pattern": repr(self.pattern),
            "terms": [term.name for term in self.terms],
        }


def _square(side: int) -> Size:
    return Size(side, side)


_BIAS = (TermSpec(RelativeBias, ("table",)),)
_DECOMPOSED = (TermSpec(RelativeQuery, ("rel_h", "rel_w")),)


def _axial(table: str) -> tuple[TermSpec, ...]:
    """The three relative terms of Axial-DeepLab, along one axis."""
    return tuple(TermSpec(term, (table,)) for term in (RelativeQuery, RelativeKey, RelativeValue))


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "image-320x213",
        "self-attention of a photograph's colours, as the SAGAN tutorial draws it",
        Size(213, 320), Size(213, 320), 1, 3, 3, gpu_batch=1, cpu_batch=1, scale=1.0,
        cpu_dtypes=("float32",), gpu_dtypes=("float32",), picture=True, quick=False,
    ),
    Workload(
        "sagan-64", "SAGAN, 64 channels, pooled keys",
        _square(64), _square(32), 1, 8, 32, gpu_batch=64, cpu_batch=4, scale=1.0,
    ),
    Workload(
        "sagan-64-wide", "SAGAN, 256 channels, pooled keys",
        _square(64), _square(32), 1, 32, 128, gpu_batch=64, cpu_batch=4, scale=1.0,
    ),
    Workload(
        "sagan-128", "SAGAN, 64 channels, a 128x128 map, pooled keys",
        _square(128), _square(64), 1, 8, 32, gpu_batch=16, cpu_batch=1, scale=1.0, quick=False,
    ),
    Workload(
        "vit-global", "a vision transformer's global layer",
        _square(64), _square(64), 8, 64, 64, gpu_batch=8, cpu_batch=1, quick=False,
    ),
    Workload(
        "vae-64", "the autoencoder of latent diffusion, 512 pixels",
        _square(64), _square(64), 1, 512, 512, gpu_batch=4, cpu_batch=1, quick=False,
    ),
    Workload(
        "vae-128", "the autoencoder of latent diffusion, 1024 pixels",
        _square(128), _square(128), 1, 512, 512, gpu_batch=1, cpu_batch=0, quick=False,
    ),
    Workload(
        "sam-h-global", "SAM's ViT-H, a global layer",
        _square(64), _square(64), 16, 80, 80, gpu_batch=1, cpu_batch=1, cpu_heads=4, quick=False,
        terms=_DECOMPOSED,
    ),
    Workload(
        "sam-h-window", "SAM's ViT-H, a layer of windows, its map padded to 70x70",
        _square(70), _square(70), 16, 80, 80, gpu_batch=8, cpu_batch=1, cpu_heads=4, quick=False,
        pattern=Window(14), terms=_DECOMPOSED,
    ),
    Workload(
        "swin-b-s1", "Swin-B's first stage, shifted windows",
        _square(56), _square(56), 4, 32, 32, gpu_batch=128, cpu_batch=8, pattern=Window(7, shift=3), terms=_BIAS,
    ),
    Workload(
        "maxvit-grid", "MaxViT's grid attention, first stage",
        _square(56), _square(56), 4, 32, 32, gpu_batch=128, cpu_batch=8, pattern=Grid(7), terms=_BIAS,
    ),
    Workload(
        "nat-b-s1", "NAT-B's first stage",
        _square(56), _square(56), 4, 32, 32, gpu_batch=128, cpu_batch=2, pattern=Neighborhood(7), terms=_BIAS,
    ),
    Workload(
        "sasa-s1", "stand-alone self-attention, first stage",
        _square(56), _square(56), 8, 8, 8, gpu_batch=128, cpu_batch=2, pattern=Neighborhood(7, border="zero"),
        terms=(TermSpec(RelativeQuery, ("rel_h", "rel_w"), per_head=True),),
    ),
    *(
        Workload(
            f"axial-{side}-{name}", f"Axial-DeepLab, the {name} stage",
            _square(side), _square(side), 8, 16, 32, gpu_batch=16, cpu_batch=batch, pattern=pattern,
            terms=_axial(table), quick=side == 65,
        )
        for side, batch in ((65, 4), (129, 1))
        for name, table, pattern in (("row", "rel_w", Row()), ("column", "rel_h", Column()))
    ),
    Workload(
        "ccnet-97", "CCNet, one of its two rounds",
        _square(97), _square(97), 1, 64, 512, gpu_batch=8, cpu_batch=1, scale=1.0, pattern=CrissCross(), quick=False,
    ),
    Workload(
        "global-d8", "one narrow head: bound by exp",
        _square(64), _square(64), 1, 8, 8, gpu_batch=64, cpu_batch=1,
    ),
)  # fmt: skip


def find(name: str) -> Workload:
    """The workload of a name.

    Raises:
        KeyError: there is none.
    """
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    raise KeyError(f"no workload {name!r}; there are {', '.join(workload.name for workload in WORKLOADS)}")


def pairs(workload: Workload) -> int:
    """Pairs of a query and a key that it sees, per map and head; zeros outside the map are keys where they count."""
    return workload.pattern.pairs(workload.queries, workload.keys, outside=True)


def positions(grid: Size) -> int:
    """The number of positions of a grid."""
    return grid.height * grid.width


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A size of a pattern, which may be one number for both axes."""
    return (value, value) if isinstance(value, int) else value


@cache
def picture() -> torch.Tensor:
    """The photograph of the `image` workload, float32 [213, 320, 3] in 0..1: china.jpg at half its size."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise RuntimeError("the picture ships with scikit-learn, which is not installed") from error
    full = torch.from_numpy(load_sample_image("china.jpg").copy()).float() / 255  # [427, 640, 3]
    return full[:426].view(213, 2, 320, 2, 3).mean((1, 3))
