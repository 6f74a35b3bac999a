"""Patterns: which keys a query sees.

A pattern is a frozen dataclass of plain numbers. It checks itself against the two grids, it can write its dense
mask (the definition that every kernel is held to), and it encodes itself as a fixed list of integers for the
kernels (`csrc/pattern.h` reads the same list).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

PATTERN_FIELDS = (
    "kind",
    "size_h",
    "size_w",
    "step_h",
    "step_w",
    "shift_h",
    "shift_w",
    "border",
    "causal_h",
    "causal_w",
)
"""The integers of an encoded pattern, in order; `csrc/pattern.h` has the same names."""

PATTERN_KINDS = ("Global", "Window", "Grid", "Neighborhood", "Row", "Column", "CrissCross")
"""Every kind of pattern by its number in the encoding."""


class Grid(NamedTuple):
    """A grid of positions."""

    height: int
    width: int


class Pattern(ABC):
    """What every pattern can do."""

    @abstractmethod
    def check(self, queries: Grid, keys: Grid) -> None:
        """Raise if the pattern does not fit these grids."""

    @abstractmethod
    def mask(self, queries: Grid, keys: Grid, device: torch.device | None = None) -> torch.Tensor | None:
        """The dense mask, `bool[H, W, Hk, Wk]`, true where a query sees a key; None where it sees every key."""

    @abstractmethod
    def encode(self) -> list[int]:
        """The pattern as integers, in the order of `PATTERN_FIELDS`."""


def encoded(kind: str, **fields: int) -> list[int]:
    """The integers of a pattern; a field that is not named is 0."""
    values = {**dict.fromkeys(PATTERN_FIELDS, 0), "kind": PATTERN_KINDS.index(kind), **fields}
    return [values[name] for name in PATTERN_FIELDS]


@dataclass(frozen=True)
class Global(Pattern):
    """Every query sees every key; the key grid may differ from the query grid.

    As in SAGAN (Zhang et al., 2019), Non-local networks (Wang et al., 2018), DANet (Fu et al., 2019), OCNet (Yuan
    and Wang, 2018), ViT (Dosovitskiy et al., 2021) and the autoencoder of latent diffusion (Rombach et al., 2022).
    """

    def check(self, queries: Grid, keys: Grid) -> None:
        """Every pair of grids fits."""

    def mask(self, queries: Grid, keys: Grid, device: torch.device | None = None) -> torch.Tensor | None:
        """None: nothing is masked."""
        return None

    def encode(self) -> list[int]:
        """The pattern as integers."""
        return encoded("Global")
