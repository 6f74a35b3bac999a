"""Patterns: which keys a query sees.

A pattern is a frozen dataclass of plain numbers. It checks itself against the two grids, it can write its dense
mask (the definition that every kernel is held to), and it encodes itself as a fixed list of integers for the
kernels (`csrc/pattern.h` reads the same list).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from visattn_kernels.errors import expected, told

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


BORDERS = ("shift", "mask", "zero")
"""What a neighborhood does at the border, by its number in the encoding."""

MOST = 2**31 - 1
"""The largest number of a pattern, so that no product of two leaves 64 bits; as in csrc/binding/check.h."""

AXES = ("height", "width")
"""The axes of a map, in order."""

Pair = tuple[int, int]
"""One integer per axis: height, width."""


class Size(NamedTuple):
    """The size of a grid of positions."""

    height: int
    width: int


class Pattern(ABC):
    """What every pattern can do.

    All but one are a product of two one-axis rules, which is what a subclass gives (`sees`); the dense mask and the
    offsets follow. With `outside` they also have the positions around the key grid that `margin` tells of.
    """

    one_grid: ClassVar[bool] = True
    """Whether queries and keys must lie on one grid."""

    def check(self, queries: Size, keys: Size) -> None:
        """Raise if the pattern does not fit these grids."""
        if self.one_grid and tuple(queries) != tuple(keys):
            raise expected(
                f"queries and keys on one grid, as {self} needs",
                "queries",
                f"{queries[0]}x{queries[1]} and keys={keys[0]}x{keys[1]}",
                ValueError,
            )

    @abstractmethod
    def reach(self, queries: Size, keys: Size) -> Pair:
        """K of each axis: offsets lie between 1 - K and K - 1, so that a relative table has 2K - 1 entries."""

    @abstractmethod
    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Which keys a query sees on one axis, `bool[H, Hk]`.

        Args:
            axis: 0 for the height, 1 for the width.
            length: that of the axis.
            y (Tensor[H, 1]): positions of the queries.
            k (Tensor[1, Hk]): positions of the keys.
        """

    @abstractmethod
    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """How many pairs of positions on one axis a query and a key that it sees can have, in closed form.

        For a product of two rules that is the sum of `sees`.

        Args:
            axis: 0 for the height, 1 for the width.
            queries, keys: the lengths of the axis.
            outside: whether positions around the key grid count.
        """

    @abstractmethod
    def encode(self) -> list[int]:
        """The pattern as integers, in the order of `PATTERN_FIELDS`."""

    def pairs(self, queries: Size, keys: Size, outside: bool = False) -> int:
        """How many pairs of a query and a key that it sees there are: the sum of the mask."""
        return self.count(0, queries[0], keys[0], outside) * self.count(1, queries[1], keys[1], outside)

    def stride(self, queries: Size) -> Pair:
        """The distance of neighbouring keys, which is the unit of offsets."""
        return (1, 1)

    def margin(self) -> tuple[Pair, Pair]:
        """How many positions before and after the key grid exist all the same, per axis."""
        return ((0, 0), (0, 0))

    def mask(
        self, queries: Size, keys: Size, device: torch.device | None = None, outside: bool = False
    ) -> torch.Tensor | None:
        """The dense mask, `bool[H, W, Hk, Wk]`, true where a query sees a key; None where it sees every key."""
        height, width = (
            self.sees(axis, queries[axis], *self._positions(axis, queries, keys, device, outside)) for axis in (0, 1)
        )
        return height[:, None, :, None] & width[:, None, :]

    def offsets(
        self, queries: Size, keys: Size, device: torch.device | None = None, outside: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key position minus query position in units of the stride, int64 `[H, Hk]` and `[W, Wk]`.

        They mean something where the mask is true.
        """
        stride = self.stride(queries)
        height, width = (
            torch.div(k - y, stride[axis], rounding_mode="floor")
            for axis in (0, 1)
            for y, k in (self._positions(axis, queries, keys, device, outside),)
        )
        return height, width

    def _positions(
        self, axis: int, queries: Size, keys: Size, device: torch.device | None, outside: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions of queries, `[H, 1]`, and of keys, `[1, Hk]`, on one axis."""
        before, after = self.margin()[axis] if outside else (0, 0)
        y = torch.arange(queries[axis], device=device)[:, None]
        return y, torch.arange(-before, keys[axis] + after, device=device)[None, :]


def encoded(kind: str, **fields: int) -> list[int]:
    """The integers of a pattern; a field that is not named is 0."""
    values = {**dict.fromkeys(PATTERN_FIELDS, 0), "kind": PATTERN_KINDS.index(kind), **fields}
    return [values[name] for name in PATTERN_FIELDS]


def _pair(value: object, argument: str, least: int) -> Pair:
    """An integer, for both axes, or a pair of them (h, w); none below `least` or above `MOST`."""
    both = value if isinstance(value, (tuple, list)) else (value, value)
    rule = f"{argument} to be an integer or a pair of integers (h, w)"
    if any(isinstance(size, bool) or not isinstance(size, int) for size in both):
        raise expected(rule, argument, told(value), TypeError)
    if len(both) != 2:
        raise expected(rule, argument, told(value), ValueError)
    if min(both) < least:
        raise expected(f"{argument} of at least {least}", argument, told(value), ValueError)
    if max(both) > MOST:
        raise expected(f"{argument} of at most {MOST}", argument, told(value), ValueError)
    return (both[0], both[1])


def _both(value: int | Pair) -> Pair:
    """A pair that `_pair` has made, as the type checker wants it."""
    return (value, value) if isinstance(value, int) else value


def _squares(length: int, classes: int) -> int:
    """The sum of the squares of the sizes of this many classes of residues."""
    least, longer = divmod(length, classes)
    return longer * (least + 1) ** 2 + (classes - longer) * least**2


def _beside(length: int, span: int) -> int:
    """How many of the `span` positions to one side each position of an axis has, summed over all."""
    span = max(min(span, length - 1), 0)
    return span * length - span * (span + 1) // 2


def _set(pattern: Pattern, **fields: object) -> None:
    """Write normalised fields of a frozen dataclass at construction."""
    for name, value in fields.items():
        object.__setattr__(pattern, name, value)


@dataclass(frozen=True)
class Global(Pattern):
    """Every query sees every key; the key grid may differ from the query grid.

    As in SAGAN (Zhang et al., 2019), Non-local networks (Wang et al., 2018), DANet (Fu et al., 2019), OCNet (Yuan
    and Wang, 2018), ViT (Dosovitskiy et al., 2021) and the autoencoder of latent diffusion (Rombach et al., 2022).
    """

    one_grid: ClassVar[bool] = False

    def reach(self, queries: Size, keys: Size) -> Pair:
        """The sides of the key grid."""
        return (keys[0], keys[1])

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Every key."""
        return (y == y) & (k == k)

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """All."""
        return queries * keys

    def mask(
        self, queries: Size, keys: Size, device: torch.device | None = None, outside: bool = False
    ) -> torch.Tensor | None:
        """None: nothing is masked."""
        return None

    def encode(self) -> list[int]:
        """The pattern as integers."""
        return encoded("Global")


@dataclass(frozen=True)
class Window(Pattern):
    """Every query sees the keys of its own cell: each axis is cut at every `y ≡ shift (mod window_size)`.

        keys(y) = {y' : floor((y' - shift) / window_size) = floor((y - shift) / window_size)}

    Cells at the border are smaller; nothing is rolled or padded. A shifted window equals the cyclic shift with its
    mask of Swin (Liu et al., 2021, section 3.2). A window may be larger than the map.

    Args:
        window_size: sides of a window, an integer or a pair (h, w).
        shift: where the first cut lies, an integer or a pair, `0 <= shift < window_size`.
    """

    window_size: int | Pair
    shift: int | Pair = 0

    def __post_init__(self) -> None:
        size, shift = _pair(self.window_size, "window_size", 1), _pair(self.shift, "shift", 0)
        if shift[0] >= size[0] or shift[1] >= size[1]:
            raise expected(f"0 <= shift < window_size, which is {size}", "shift", told(self.shift), ValueError)
        _set(self, window_size=size, shift=shift)

    def reach(self, queries: Size, keys: Size) -> Pair:
        """The sides of a window."""
        return _both(self.window_size)

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The keys of the query's cell."""
        size, shift = (_both(x)[axis] for x in (self.window_size, self.shift))
        return (y - shift) // size == (k - shift) // size

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """The squares of the cells: the first, which the shift cuts off, whole ones, and the rest."""
        size, shift = (_both(x)[axis] for x in (self.window_size, self.shift))
        first = min(shift, keys)
        whole, rest = divmod(keys - first, size)
        return first**2 + whole * size**2 + rest**2

    def encode(self) -> list[int]:
        """The pattern as integers."""
        (h, w), (shift_h, shift_w) = _both(self.window_size), _both(self.shift)
        return encoded("Window", size_h=h, size_w=w, shift_h=shift_h, shift_w=shift_w)


@dataclass(frozen=True)
class Grid(Pattern):
    """Every query sees a dilated grid of keys that spans the map: MaxViT's (Tu et al., 2022, section 3.2).

        keys(y) = {y' : y' ≡ y (mod s)},    s = ceil(H / gh)

    Args:
        grid_size: how many keys at most a query sees along each axis, an integer or a pair (gh, gw). More than the
            axis has positions is fine: then it sees them all.
    """

    grid_size: int | Pair

    def __post_init__(self) -> None:
        _set(self, grid_size=_pair(self.grid_size, "grid_size", 1))

    def reach(self, queries: Size, keys: Size) -> Pair:
        """The sides of the grid."""
        return _both(self.grid_size)

    def stride(self, queries: Size) -> Pair:
        """The distance of neighbouring keys, `ceil(H / gh)`."""
        h, w = _both(self.grid_size)
        return (-(-queries[0] // h), -(-queries[1] // w))

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The keys of the query's residue."""
        stride = self.stride(Size(length, length))[axis]
        return y % stride == k % stride

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """The squares of the residues' classes."""
        return _squares(keys, self.stride(Size(keys, keys))[axis])

    def encode(self) -> list[int]:
        """The pattern as integers."""
        h, w = _both(self.grid_size)
        return encoded("Grid", size_h=h, size_w=w)


@dataclass(frozen=True)
class Neighborhood(Pattern):
    """Every query sees the keys around it: K of them along each axis, d apart.

    On an axis a query y sees only positions `≡ y (mod d)`. Along that class of n positions it has the index
    i = y // d, and sees K in a row, `start ... start + K - 1`, of those that exist:

        border="shift"   start = clamp(i - K // 2, 0, n - K): always K keys. Needs K * d <= the axis
        border="mask"    start = i - K // 2; positions outside the map do not exist
        border="zero"    start = i - K // 2; positions outside exist, with k = 0 and v = 0: they take score and value
                         terms and stay in the denominator
        is_causal        start = i - K + 1 instead, so that the keys end at the query; not clamped

    As in NAT (Hassani et al., 2023), DiNAT (Hassani and Shi, 2022), stand-alone self-attention (Ramachandran et al.,
    2019; "zero" or "mask") and LR-Net (Hu et al., 2019).

    Args:
        kernel_size: K, an integer or a pair (h, w).
        dilation: d, an integer or a pair.
        border: "shift", "mask" or "zero".
        is_causal: a bool or a pair of them, per axis.
    """

    kernel_size: int | Pair
    dilation: int | Pair = 1
    border: str = "shift"
    is_causal: bool | tuple[bool, bool] = False

    def __post_init__(self) -> None:
        causal = self.is_causal if isinstance(self.is_causal, (tuple, list)) else (self.is_causal, self.is_causal)
        rule = "is_causal to be a bool or a pair of them (h, w)"
        if not all(isinstance(flag, bool) for flag in causal):
            raise expected(rule, "is_causal", told(self.is_causal), TypeError)
        if len(causal) != 2:
            raise expected(rule, "is_causal", told(self.is_causal), ValueError)
        if not isinstance(self.border, str) or self.border not in BORDERS:
            kind = ValueError if isinstance(self.border, str) else TypeError
            raise expected(f"border to be one of {', '.join(BORDERS)}", "border", told(self.border), kind)
        _set(
            self,
            kernel_size=_pair(self.kernel_size, "kernel_size", 1),
            dilation=_pair(self.dilation, "dilation", 1),
            is_causal=tuple(causal),
        )

    def check(self, queries: Size, keys: Size) -> None:
        """The grids must be one, and with border="shift" the kernel must fit."""
        super().check(queries, keys)
        if self.border != "shift":
            return
        for axis, length in enumerate(keys):
            kernel, dilation, _ = self._axis(axis)
            if kernel * dilation > length:
                most = length // dilation
                legal = f"kernel_size <= {most}" if most else f"dilation <= {length}"
                raise expected(
                    f'kernel_size * dilation <= {length}, the {AXES[axis]} of the map, with border="shift"',
                    "kernel_size",
                    f"{kernel} and dilation={dilation} along the {AXES[axis]}",
                    ValueError,
                    f'Legal there: {legal}, or border="mask" or border="zero".',
                )

    def reach(self, queries: Size, keys: Size) -> Pair:
        """The sides of the kernel."""
        return _both(self.kernel_size)

    def stride(self, queries: Size) -> Pair:
        """The dilation."""
        return _both(self.dilation)

    def margin(self) -> tuple[Pair, Pair]:
        """What the kernel reaches beyond the map, with border="zero"."""
        height, width = (
            (-first * dilation, (first + kernel - 1) * dilation)
            for kernel, dilation, first in (self._axis(0), self._axis(1))
        )
        return (height, width) if self.border == "zero" else ((0, 0), (0, 0))

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The keys of the query's class, K in a row."""
        kernel, dilation, first = self._axis(axis)
        start = y // dilation + first
        if self.border == "shift" and not self._causal(axis):
            in_class = (length - y % dilation + dilation - 1) // dilation  # positions of the query's class
            start = torch.minimum(start.clamp_min(0), in_class - kernel)
        index = k // dilation - start
        return (y % dilation == k % dilation) & (index >= 0) & (index < kernel)

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """Those of each class: K for each query, less what lies beyond the border."""
        kernel, dilation, first = self._axis(axis)
        if (outside and self.border == "zero") or (self.border == "shift" and not self._causal(axis)):
            return keys * kernel
        least, longer = divmod(keys, dilation)
        return keys + sum(
            number * (_beside(length, -first) + _beside(length, first + kernel - 1))
            for number, length in ((longer, least + 1), (dilation - longer, least))
        )

    def encode(self) -> list[int]:
        """The pattern as integers."""
        (h, step_h, _), (w, step_w, _) = self._axis(0), self._axis(1)
        return encoded(
            "Neighborhood",
            size_h=h,
            size_w=w,
            step_h=step_h,
            step_w=step_w,
            border=BORDERS.index(self.border),
            causal_h=int(self._causal(0)),
            causal_w=int(self._causal(1)),
        )

    def _causal(self, axis: int) -> bool:
        """Whether keys end at the query on one axis."""
        return self.is_causal if isinstance(self.is_causal, bool) else self.is_causal[axis]

    def _axis(self, axis: int) -> tuple[int, int, int]:
        """Kernel, dilation, and the first key's index relative to the query's (before any clamping) on one axis."""
        kernel, dilation = (_both(x)[axis] for x in (self.kernel_size, self.dilation))
        return kernel, dilation, 1 - kernel if self._causal(axis) else -(kernel // 2)


def _span(value: object) -> None:
    """Check the span of `Row` and `Column`."""
    if value is None:
        return
    rule = f"span to be an odd integer from 1 to {MOST}, or None for the whole axis"
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected(rule, "span", told(value), TypeError)
    if not 1 <= value <= MOST or value % 2 == 0:
        raise expected(rule, "span", value, ValueError)


@dataclass(frozen=True)
class Row(Pattern):
    """Every query sees the keys of its own row: axial attention (Ho et al., 2019) along the width.

    As in Axial-DeepLab (Wang et al., 2020), which also has spans.

    Args:
        span: odd; only keys with `|x' - x| <= span // 2`. May exceed the width. None: the whole row.
    """

    span: int | None = None

    def __post_init__(self) -> None:
        _span(self.span)

    def reach(self, queries: Size, keys: Size) -> Pair:
        """One row of the span or of the width."""
        return (1, self.span or keys[1])

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The same row; in it, the keys of the span."""
        return y == k if axis == 0 else (k - y).abs() <= (self.span // 2 if self.span else length)

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """Each position with itself; along the axis, with those of the span."""
        return keys if axis == 0 else keys + 2 * _beside(keys, self.span // 2 if self.span else keys)

    def encode(self) -> list[int]:
        """The pattern as integers."""
        return encoded("Row", size_w=self.span or 0)


@dataclass(frozen=True)
class Column(Pattern):
    """Every query sees the keys of its own column: axial attention along the height; see `Row`.

    Args:
        span: odd; only keys with `|y' - y| <= span // 2`. May exceed the height. None: the whole column.
    """

    span: int | None = None

    def __post_init__(self) -> None:
        _span(self.span)

    def reach(self, queries: Size, keys: Size) -> Pair:
        """One column of the span or of the height."""
        return (self.span or keys[0], 1)

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The same column; in it, the keys of the span."""
        return y == k if axis == 1 else (k - y).abs() <= (self.span // 2 if self.span else length)

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """Each position with itself; along the axis, with those of the span."""
        return keys if axis == 1 else keys + 2 * _beside(keys, self.span // 2 if self.span else keys)

    def encode(self) -> list[int]:
        """The pattern as integers."""
        return encoded("Column", size_h=self.span or 0)


@dataclass(frozen=True)
class CrissCross(Pattern):
    """Every query sees its row and its column in one softmax, itself once: H + W - 1 keys.

    As in CCNet (Huang et al., 2019, section 3.2). The one pattern that is a union of two products.
    """

    def reach(self, queries: Size, keys: Size) -> Pair:
        """The sides of the key grid."""
        return (keys[0], keys[1])

    def sees(self, axis: int, length: int, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The same position on this axis: enough if either axis says so."""
        return y == k

    def count(self, axis: int, queries: int, keys: int, outside: bool = False) -> int:
        """All, since a query's own row or column has every position of an axis."""
        return queries * keys

    def pairs(self, queries: Size, keys: Size, outside: bool = False) -> int:
        """H + W - 1 keys for each query."""
        return queries[0] * queries[1] * (keys[0] + keys[1] - 1)

    def mask(
        self, queries: Size, keys: Size, device: torch.device | None = None, outside: bool = False
    ) -> torch.Tensor | None:
        """The same row or the same column."""
        row, column = (
            self.sees(axis, queries[axis], *self._positions(axis, queries, keys, device, outside)) for axis in (0, 1)
        )
        return row[:, None, :, None] | column[:, None, :]

    def encode(self) -> list[int]:
        """The pattern as integers."""
        return encoded("CrissCross")


def decode(fields: Sequence[int]) -> Pattern:
    """The pattern of its integers, the inverse of `encode`.

    Raises:
        RuntimeError: they are no pattern's.
    """
    rule = f"pattern to be the integers of a pattern ({', '.join(PATTERN_FIELDS)})"
    wrong = expected(rule, "pattern", list(fields), RuntimeError)
    if len(fields) != len(PATTERN_FIELDS) or not 0 <= fields[0] < len(PATTERN_KINDS):
        raise wrong
    f = dict(zip(PATTERN_FIELDS, fields, strict=True))
    both = {name: (f[f"{name}_h"], f[f"{name}_w"]) for name in ("size", "step", "shift", "causal")}
    try:
        pattern = _of_kind(PATTERN_KINDS[fields[0]], f, both)
    except (ValueError, IndexError):
        raise wrong from None
    if pattern.encode() != list(fields):
        raise wrong
    return pattern


def _of_kind(kind: str, f: dict[str, int], both: dict[str, Pair]) -> Pattern:
    """The pattern of a kind; `f` has its integers by name, `both` those that come in pairs."""
    if kind == "Window":
        return Window(both["size"], both["shift"])
    if kind == "Grid":
        return Grid(both["size"])
    if kind == "Neighborhood":
        causal = (both["causal"][0] == 1, both["causal"][1] == 1)
        return Neighborhood(both["size"], both["step"], BORDERS[f["border"]], causal)
    if kind == "Row":
        return Row(f["size_w"] or None)
    if kind == "Column":
        return Column(f["size_h"] or None)
    return CrissCross() if kind == "CrissCross" else Global()
