"""The one table of workloads: what is asked, and at which batch on which device.

A new workload is one more row. A row names one pattern and any number of terms, so that an operation of two patterns
(axial attention) is two rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from visattn_kernels.patterns import Global, Pattern, Size

CPU_DTYPES = ("float32", "bfloat16")
GPU_DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class TermSpec:
    """A term of a workload: its name, the shapes of its tensors, and how the term is made of them.

    Attributes:
        name: the name of the term's class in `visattn_kernels`, such as "RelativeBias".
        shapes: the shape of each of its tensors, by the number of heads.
        build: makes the term of those tensors.
    """

    name: str
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]
    build: Callable[..., Any]


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


@cache
def pairs(workload: Workload) -> int:
    """Pairs of a query and a key that it sees, per map and head."""
    mask = workload.pattern.mask(workload.queries, workload.keys)
    if mask is None:
        return positions(workload.queries) * positions(workload.keys)
    return int(mask.sum())


def positions(grid: Size) -> int:
    """The number of positions of a grid."""
    return grid.height * grid.width


@cache
def picture() -> torch.Tensor:
    """The photograph of the `image` workload, float32 [213, 320, 3] in 0..1: china.jpg at half its size."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise RuntimeError("the picture ships with scikit-learn, which is not installed") from error
    full = torch.from_numpy(load_sample_image("china.jpg").copy()).float() / 255  # [427, 640, 3]
    return full[:426].view(213, 2, 320, 2, 3).mean((1, 3))
