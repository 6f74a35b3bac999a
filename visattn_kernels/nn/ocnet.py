"""The object context of OCNet (Yuan and Wang, 2018): attention whose queries are its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last, points_in
from visattn_kernels.errors import expected, told
from visattn_kernels.nn.common import BatchNorm2d, Layer, choice, count, image, pooled, renamed
from visattn_kernels.patterns import Window
from visattn_kernels.tracing import frozen

_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class OCNetBlock(Layer):
    """The context of each position: a sum of what is alike to it, over the map or over its region.

        k = act(BN(W_k x)),  v = W_v x
        y = W (softmax(k kᵀ / sqrt(key_channels)) v)

    W starts at 0; there is no residual connection.

    Args:
        channels: C, those of the map.
        key_channels: those of keys, which are the queries; None means C // 2.
        value_channels: those of values; None means C // 2.
        pool: factor of the max pooling of x before anything else; the result is brought back to the size of x
            bilinearly, corners on corners. 1 for none.
        regions: n cuts the map into n × n regions, each of which attends itself alone. As in the authors' code a region
            has `floor(H / n)` rows and `floor(W / n)` columns, and the last ones take what is left over.
        activation: "relu", the paper's, or "leaky_relu" with slope 0.01, that of the norm in the authors' code.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), float64, float32, bfloat16 or float16, in either memory format; the result has as many
        channels, in the channels-last format.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice; the map has fewer rows or columns
            than regions.
        RuntimeError: x is no map of C channels.

    Memory:
        The convolutions' outputs and what `attention` takes; where the regions do not divide the map, twice a map of
        values. Never a map of positions × positions.

    References:
        Yuan and Wang, 2018, "OCNet: Object context network for scene parsing", section 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool: int = 1,
        regions: int = 1,
        activation: str = "relu",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        half = max(channels // 2, 1)
        keys = count(half if key_channels is None else key_channels, "key_channels")
        values = count(half if value_channels is None else value_channels, "value_channels")
        self.pool = count(pool, "pool")
        self.regions = count(regions, "regions")
        self.backend = backend
        self.key = nn.Sequential(*_convolution(channels, keys, activation))
        self.value = nn.Conv2d(channels, values, 1)
        self.project = nn.Conv2d(values, channels, 1)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The context."""
        seen = pooled(image(x, self.channels), self.pool)
        k, v = heads_last(self.key(seen)), heads_last(self.value(seen))
        if self.regions == 1:
            return self._enlarged(attention(k, k, v, backend=self.backend), x)
        rows, columns = (_strips(size, self.regions) for size in self._sides(k))
        strips = [
            _joined([self._attend(k[:, ys, xs], v[:, ys, xs], (height, width)) for xs, width in columns], 2)
            for ys, height in rows
        ]
        return self._enlarged(_joined(strips, 1), x)

    def _enlarged(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The result, of the size of x."""
        out: torch.Tensor = self.project(channels_first(y))
        if self.pool == 1:
            return out
        return nn.functional.interpolate(out, x.shape[2:], mode="bilinear", align_corners=True)

    def _sides(self, k: torch.Tensor) -> tuple[int, ...]:
        """Those of the map, as numbers that windows are made of: a graph is for maps of one size."""
        return tuple(map(int, frozen("the regions of OCNetBlock", *k.shape[1:3])))

    def _attend(self, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        return attention(k, k, v, Window(window), backend=self.backend)

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x) of the pooled map: `[B, len(at), H // pool, W // pool]`.

        float32, zeros outside the region. See `visattn_kernels.attention_map`; no other row is computed.
        """
        k = heads_last(self.key(pooled(image(x, self.channels), self.pool)))
        if self.regions == 1:
            return attention_map(k, k, at, backend=self.backend).squeeze(2)
        height, width = self._sides(k)
        for size in (height, width):
            _strips(size, self.regions)  # refuses a map with too few
        rows = [attention_map(k, k, [], backend=self.backend).squeeze(2)]
        for point in points_in(at, (height, width)).tolist():
            (top, bottom), (left, right) = (
                _region(i, size, self.regions) for i, size in zip(point, (height, width), strict=True)
            )
            own = k[:, top:bottom, left:right]
            row = attention_map(own, own, [(point[0] - top, point[1] - left)], backend=self.backend).squeeze(2)
            rows.append(nn.functional.pad(row, (left, width - right, top, height - bottom)))
        return torch.cat(rows, 1)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor], inplace_abn: bool = True) -> dict[str, torch.Tensor]:
        """Our state dict of that of the authors' `SelfAttentionBlock2D` or `PyramidSelfAttentionBlock2D`.

        Args:
            state: theirs; the entries of f_query are those of f_key once more.
            inplace_abn: whether its norms are the authors' InPlaceABN, not torch's: their factor is |weight| + 1e-5.
                Their leaky ReLU is `activation="leaky_relu"`.
        """
        return _translated(state, _NAMES, inplace_abn)

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"pool={self.pool}, regions={self.regions}"


def _convolution(channels: int, out_channels: int, activation: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A 1x1 convolution, its norm and its activation."""
    act = _ACTIVATIONS[choice(activation, "activation", tuple(_ACTIVATIONS))]
    return nn.Conv2d(channels, out_channels, 1), BatchNorm2d(out_channels), act()


def _strips(length: int, regions: int) -> list[tuple[slice, int]]:
    """An axis as one stretch of regions of one size, or as two, the second being a larger last region."""
    size = length // regions
    if size == 0:
        raise expected(
            f"a map of at least {regions} rows and columns for regions={regions}", "a side", length, ValueError
        )
    if length % regions == 0:
        return [(slice(None), size)]
    end = size * (regions - 1)
    strips = [(slice(0, end), size), (slice(end, length), length - end)]
    return strips if end else strips[1:]


def _region(i: int, length: int, regions: int) -> tuple[int, int]:
    """Where the region of a position begins and ends."""
    size = length // regions
    cell = min(max(i // size, 0), regions - 1)
    return cell * size, length if cell == regions - 1 else (cell + 1) * size


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class BaseOC(Layer):
    """A map fused with its object context.

        y = dropout(act(BN(W [context(x), x])))

    Args:
        channels: C, those of the map.
        out_channels: those of the result; None means C.
        key_channels, value_channels, pool, activation, backend: as in `OCNetBlock`.
        concat: whether x stands beside its context; False: the context alone is convolved, without dropout.
        dropout: the share of channels that training drops.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result has `out_channels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `OCNetBlock`.

    Memory:
        What `OCNetBlock` takes, and a map of 2C channels.

    References:
        Yuan and Wang, 2018, section 3, base object context; `concat=False` is `BaseOC_Context_Module` of the
        authors' code.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool: int = 1,
        concat: bool = True,
        dropout: float = 0.05,
        activation: str = "relu",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.context = OCNetBlock(
            channels,
            key_channels=key_channels,
            value_channels=value_channels,
            pool=pool,
            activation=activation,
            backend=backend,
        )
        self.concat = concat
        out = count(channels if out_channels is None else out_channels, "out_channels")
        last = [nn.Dropout2d(dropout)] if concat else []
        self.fuse = nn.Sequential(*_convolution((1 + concat) * channels, out, activation), *last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map with its context."""
        context = self.context(x)
        fused: torch.Tensor = self.fuse(torch.cat([context, x], 1) if self.concat else context)
        return fused

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """As `OCNetBlock.attention_map`."""
        return self.context.attention_map(x, at)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor], inplace_abn: bool = True) -> dict[str, torch.Tensor]:
        """Our state dict of that of the authors' `BaseOC_Module` or `BaseOC_Context_Module` of one size.

        `inplace_abn` as in `OCNetBlock.translate`.
        """
        names = {f"stages.0.{theirs}": ours and f"context.{ours}" for theirs, ours in _NAMES.items()}
        return _translated(state, {**names, "conv_bn_dropout": "fuse"}, inplace_abn)


class PyramidOC(Layer):
    """A map fused with its object context over regions of several sizes; `contexts` holds the `OCNetBlock`s.

        y = dropout(act(BN(W [act(BN(W_u x)), context_1(x), context_2(x), ...])))

    Args:
        channels: C, those of the map.
        out_channels: those of the result; None means C.
        regions: for each context, how many regions an axis is cut into.
        dropout: the share of channels that training drops.
        activation, backend: as in `OCNetBlock`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result has `out_channels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `OCNetBlock`.

    Memory:
        What the contexts take, and a map of 2 * len(regions) * C channels.

    References:
        Yuan and Wang, 2018, section 3, pyramid object context; W_u, of len(regions) * C channels, and values of C
        channels are those of the authors' code.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        regions: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.05,
        activation: str = "relu",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        out = count(channels if out_channels is None else out_channels, "out_channels")
        if not isinstance(regions, Sequence):
            raise expected("a sequence of numbers of regions", "regions", told(regions), TypeError)
        if not regions:
            raise expected("at least one number of regions", "regions", regions, ValueError)
        self.contexts = nn.ModuleList(
            OCNetBlock(channels, value_channels=channels, regions=n, activation=activation, backend=backend)
            for n in regions
        )
        wide = len(self.contexts) * channels
        self.widen = nn.Sequential(*_convolution(channels, wide, activation))
        self.fuse = nn.Sequential(*_convolution(2 * wide, out, activation), nn.Dropout2d(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map with its contexts."""
        x = image(x, self.channels)
        fused: torch.Tensor = self.fuse(torch.cat([self.widen(x), *(context(x) for context in self.contexts)], 1))
        return fused

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor], inplace_abn: bool = True) -> dict[str, torch.Tensor]:
        """Our state dict of that of the authors' `Pyramid_OC_Module`; `inplace_abn` as in `OCNetBlock.translate`."""
        stages = sorted({key.split(".")[1] for key in state if key.startswith("stages.")})
        names = {
            f"stages.{i}.{theirs}": ours and f"contexts.{i}.{ours}" for i in stages for theirs, ours in _NAMES.items()
        }
        return _translated(state, {**names, "up_dr": "widen", "conv_bn_dropout": "fuse"}, inplace_abn)


_NAMES = {"f_key": "key", "f_query": None, "f_value": "value", "W": "project"}


def _translated(
    state: Mapping[str, torch.Tensor], names: Mapping[str, str | None], inplace_abn: bool
) -> dict[str, torch.Tensor]:
    """Our names, and the factors of InPlaceABN as those of batch norms: the only weights of one dimension."""
    ours = renamed(state, names)
    if inplace_abn:
        ours = {name: x.abs() + 1e-5 if name.endswith("weight") and x.dim() == 1 else x for name, x in ours.items()}
    return ours
