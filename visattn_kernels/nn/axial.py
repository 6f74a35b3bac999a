"""Axial attention (Ho et al., 2019) and the position-sensitive one of Axial-DeepLab (Wang et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.errors import expected
from visattn_kernels.nn.common import (
    BatchNorm2d,
    Layer,
    as_convolution,
    averaged,
    by_reach,
    choice,
    count,
    image,
    pair,
    renamed,
    share,
    without_autocast,
)
from visattn_kernels.patterns import AXES, Column, Row
from visattn_kernels.terms import RelativeKey, RelativeQuery, RelativeValue, Term
from visattn_kernels.tracing import refusing

POSITIONS = ("none", "q", "k", "v", "qk", "qv", "kv", "qkv")
"""Which position terms an axial attention has."""


class AxialAttention(Layer):
    """Attention of every position to its own row or column, with positions in the logits and in the values.

        q, k, v = BN(W_qkv x)
        logit[i, j] = BN(q_i·k_j) + BN(q_i·r^q[j - i]) + BN(k_j·r^k[j - i])
        y_i = BN(sum_j softmax_j(logit) v_j) + BN(sum_j softmax_j(logit) r^v[j - i])

    Each BN is a batch norm: that of the logits one over heads × terms, whose statistics go over all pairs, that of the
    output one over channels × 2. There is no scale; without norms it is `1/sqrt(D)`. The tables r are shared by heads.

    Args:
        channels: C, those of the map.
        axis: "height" or "width", the axis along which positions look.
        out_channels: those of values and of the result; None means C.
        key_channels: those of queries and keys; None means half those of values, as in Axial-DeepLab.
        heads: number of heads; divides both.
        size: length of the axis, which the tables are made for; needed unless there is a span, or no table.
        span: odd; only positions up to `span // 2` away are seen, and maps may have any size. None: the whole axis.
        position: the position terms, letters of "qkv", or "none". Axial-DeepLab has all.
        norm: whether there are batch norms. `position="none", norm=False` is Ho et al.'s attention, before its last
            projection.
        bias: whether the convolution has a bias.
        stride: factor of an average pooling of the result, which drops what is left over.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result
        `[B, out_channels, H // stride, W // stride]`, in channels-last in evaluation.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice; no `size` where it is needed.
        RuntimeError: x is no map of C channels, or not of `size` along the axis.

    Batch norms in evaluation while the module trains, as frozen ones are, use what they recorded. The norm of the
    logits is of a class of its own: `convert_sync_batchnorm` and `torch.optim.swa_utils.update_bn` leave it as it is.
    Its variance is E[x²] − E[x]², which loses digits where means are a hundred times what varies.

    Memory:
        Evaluation folds the norms into factors: the convolution's output, q and k at most twice as wide, and one copy
        of v. Training takes the first norm's output, v and the result twice as wide, and sums over positions for the
        statistics of the logits: D² numbers for each line of the map and head; with a span, for each position and
        head. Never a number for each pair.

    References:
        Wang et al., 2020, equations 3 and 4; the norms are those of the authors' code. Ho et al., 2019.
    """

    def __init__(
        self,
        channels: int,
        axis: str,
        *,
        out_channels: int | None = None,
        key_channels: int | None = None,
        heads: int = 8,
        size: int | None = None,
        span: int | None = None,
        position: str = "qkv",
        norm: bool = True,
        bias: bool = False,
        stride: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        self.axis = choice(axis, "axis", AXES)
        self.position = choice(position, "position", POSITIONS)
        self.pattern = (Column if axis == "height" else Row)(span)
        self.size = None if size is None else count(size, "size")
        if position != "none" and size is None and span is None:
            raise expected(f"size or span, for the tables of position={position!r}", "size", None, ValueError)
        values = channels if out_channels is None else count(out_channels, "out_channels")
        keys = max(values // 2, 1) if key_channels is None else count(key_channels, "key_channels")
        self.heads = count(heads, "heads")
        self.widths = (share(keys, heads), share(keys, heads), share(values, heads))
        self.stride = count(stride, "stride")
        self.backend = backend
        self.scale = 1.0 if norm else self.widths[0] ** -0.5
        self.qkv = nn.Conv2d(channels, 2 * keys + values, 1, bias=bias)
        nn.init.normal_(self.qkv.weight, std=channels**-0.5)
        entries = 2 * (size or 0) - 1 if span is None else span
        for letter, name, width in zip("qkv", ("query", "key", "value"), self.widths, strict=True):
            table = torch.randn(entries, width) * self.widths[2] ** -0.5 if letter in self._letters() else None
            self.register_parameter(f"relative_{name}", None if table is None else nn.Parameter(table))
        self.relative_query: nn.Parameter | None
        self.relative_key: nn.Parameter | None
        self.relative_value: nn.Parameter | None
        logits, outputs = 1 + sum(letter in self._letters() for letter in "qk"), 1 + ("v" in self._letters())
        self.norm_qkv = BatchNorm2d(2 * keys + values) if norm else None
        self.norm_logits = _LogitNorm(logits, heads) if norm else None
        self.norm_output = BatchNorm2d(values * outputs) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each position gathered along the axis."""
        q, k, v = self._heads(x)
        q, k, terms = self._logits(q, k)
        norm = self.norm_output
        rel_v: torch.Tensor | None = self.relative_value
        batch_statistics = norm is not None and norm.training
        if batch_statistics and rel_v is not None:  # the two sums side by side, [..., Dv, 2]
            v = nn.functional.pad(v[..., None], (0, 1)).flatten(-2)
            rel_v = nn.functional.pad(rel_v[..., None], (1, 0)).flatten(-2)
        elif norm is not None and not norm.training:  # weights sum to 1, so that shifts can go with the values
            factor, shift = (x.to(v.dtype).view(self.heads, self.widths[2], -1) for x in _recorded(norm))
            v = torch.addcmul(shift.sum(-1), v, factor[..., 0])
            rel_v = None if rel_v is None else rel_v * factor[:, None, :, 1]
        if rel_v is not None:
            terms = [*terms, RelativeValue(*self._along(rel_v))]
        y = channels_first(attention(q, k, v, self.pattern, scale=self.scale, terms=terms, backend=self.backend))
        if norm is not None and batch_statistics:
            y = norm(y) if rel_v is None else norm(y).unflatten(1, (-1, 2)).sum(2)
        return averaged(y, self.stride)

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), heads, H, W]`.

        float32, or float64 for float64 maps. A call in training updates the statistics, as `forward` does.
        """
        q, k, _ = self._heads(x)
        q, k, terms = self._logits(q, k)
        return attention_map(q, k, at, self.pattern, scale=self.scale, terms=terms, backend=self.backend)

    def _letters(self) -> str:
        return "" if self.position == "none" else self.position

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v, views of one projection."""
        x = image(x, self.channels)
        self._check_size(x)
        if self.norm_qkv is None or self.norm_qkv.training:
            qkv = self.qkv(x) if self.norm_qkv is None else self.norm_qkv(self.qkv(x))
        else:  # one map less
            factor, shift = _recorded(self.norm_qkv)
            shift = shift if self.qkv.bias is None else shift + factor * self.qkv.bias
            qkv = nn.functional.conv2d(x, self.qkv.weight * factor[:, None, None, None], shift)
        return torch.split(heads_last(qkv, self.heads), list(self.widths), -1)

    @refusing
    def _check_size(self, x: torch.Tensor) -> None:
        length = x.shape[2 + AXES.index(self.axis)]
        if self._letters() and self.pattern.span is None and length != self.size:
            rule = f"x of {self.axis} {self.size}, which the tables are made for"
            hint = "A module with a span takes any size."
            raise expected(rule, "x.shape", list(x.shape), RuntimeError, hint)

    def _logits(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[Term]]:
        """q, k and the score terms with the norms in them."""
        rel_q: torch.Tensor | None = self.relative_query
        rel_k: torch.Tensor | None = self.relative_key
        if self.norm_logits is not None:
            moments = self._moments(q, k) if self.norm_logits.training and len(q) else None
            of_qk, *others = self.norm_logits(moments).to(q.dtype)[..., None].unbind()  # each [heads, 1]
            rel_q = None if rel_q is None else rel_q * others[0][:, None]
            rel_k = None if rel_k is None else rel_k * others[-1][:, None]
            if rel_q is None:
                q = q * of_qk
            elif rel_k is None:
                k = k * of_qk
            else:  # both tables want what they multiply without that factor, which may be 0
                width = q.shape[-1]
                q, k = torch.cat((q * of_qk, q), -1), nn.functional.pad(k, (0, width))
                rel_q, rel_k = nn.functional.pad(rel_q, (width, 0)), nn.functional.pad(rel_k, (0, width))
        terms: list[Term] = [] if rel_q is None else [RelativeQuery(*self._along(rel_q), scale=self.scale)]
        return q, k, terms if rel_k is None else [*terms, RelativeKey(*self._along(rel_k), scale=self.scale)]

    def _along(self, table: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A table for the axis, and none for the other."""
        table = table if self.pattern.span is None else by_reach(table, -2)
        return (table, None) if self.axis == "height" else (None, table)

    def _moments(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The means of the logits' parts and of their squares, `[parts * heads]`, and the number of pairs."""
        with without_autocast(q.device):
            q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
            if self.axis == "height":
                q, k = q.transpose(1, 2), k.transpose(1, 2)  # [B, lines, length, heads, D]
            length = q.shape[2]
            reach = length - 1 if self.pattern.span is None else min(self.pattern.span // 2, length - 1)
            pairs = q.shape[0] * q.shape[1] * (length * (2 * reach + 1) - reach * (reach + 1))
            sums = [_of_products(q, k, reach)]
            if self.relative_query is not None:
                sums.append(_of_table(q, self.relative_query.to(q.dtype), reach))
            if self.relative_key is not None:  # a key sees queries at the opposite offsets
                sums.append(_of_table(k, self.relative_key.to(k.dtype).flip(0), reach))
            first, second = (torch.cat(parts) / pairs for parts in zip(*sums, strict=True))
            return first, second, pairs

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of `AxialAttention` in the authors' code (csrhddlam/axial-deeplab).

        Their one table `relative` holds those of q, k and v in turn, which for q and v go by query minus key. The
        shifts of `bn_similarity` are left out: the softmax cancels them.
        """
        ours = renamed(state, _NAMES, ("relative", "qkv.weight"))
        relative = ours.pop("relative").T  # [2K-1, 2 * Dv]
        width = relative.shape[1] // 4
        q, k, v = torch.split(relative, [width, width, 2 * width], 1)
        tables = {"relative_query": q.flip(0), "relative_key": k, "relative_value": v.flip(0)}
        ours["qkv.weight"] = as_convolution(ours["qkv.weight"])
        return {**ours, **{name: x.clone(memory_format=torch.contiguous_format) for name, x in tables.items()}}

    def extra_repr(self) -> str:
        """What is not seen in the parts."""
        shown = ("axis", "heads", "size", "position", "stride")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown) + f", span={self.pattern.span}"


_NAMES = {
    **{"qkv_transform": "qkv", "relative": "relative", "flatten_index": None},
    **{"bn_qkv": "norm_qkv", "bn_output": "norm_output", "bn_similarity": "norm_logits", "bn_similarity.bias": None},
}


def _recorded(norm: BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors and shifts of a batch norm in evaluation."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    factor = norm.weight * torch.rsqrt(variance + norm.eps)
    return factor, norm.bias - mean * factor


class _LogitNorm(nn.Module):
    """The batch norm of a sum's parts, as factors of them; it has no shifts, which the softmax cancels."""

    def __init__(self, parts: int, heads: int) -> None:
        super().__init__()
        self.heads, self.eps, self.momentum = heads, 1e-5, 0.1
        self.weight = nn.Parameter(torch.ones(parts * heads))
        self.register_buffer("running_mean", torch.zeros(parts * heads))
        self.register_buffer("running_var", torch.ones(parts * heads))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor
        self.num_batches_tracked: torch.Tensor

    def forward(self, moments: tuple[torch.Tensor, torch.Tensor, int] | None) -> torch.Tensor:
        """The factors `[parts, heads]`, of these moments, which are recorded, or else of those recorded."""
        if moments is None:
            variance = self.running_var
        else:
            mean, square, pairs = moments
            variance = (square - mean.square()).clamp(min=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * (pairs / max(pairs - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked.add_(1)
        return (self.weight * torch.rsqrt(variance + self.eps)).view(-1, self.heads)


def _of_products(q: torch.Tensor, k: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over pairs of q·k and of its square, `[heads]`; q and k are [B, lines, length, heads, D]."""
    if reach == q.shape[2] - 1:  # sum_ij (q_i·k_j)² = <sum_i q_i q_iᵀ, sum_j k_j k_jᵀ>
        squares = (torch.einsum("brlhd,brlhe->brhde", x, x) for x in (q, k))
        return (q.sum(2) * k.sum(2)).sum((0, 1, 3)), torch.mul(*squares).sum((0, 1, 3, 4))
    width = 2 * reach + 1
    products = (k[..., None] * k[..., None, :]).flatten(-2)
    beside = nn.functional.pad(torch.cat((k, products), -1), (0, 0, 0, 0, reach, reach))
    one, two = torch.split(_sliding(beside, 2, width), [k.shape[-1], products.shape[-1]], -1)
    seen = torch.einsum("brlhd,brlhde->brlhe", q, two.reshape(*two.shape[:-1], k.shape[-1], -1))
    return (q * one).sum((0, 1, 2, 4)), (q * seen).sum((0, 1, 2, 4))


def _of_table(x: torch.Tensor, table: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over pairs of x_i·r[j - i] and of its square, `[heads]`; x is [B, lines, length, heads, D]."""
    length, out = x.shape[2], table.shape[0] // 2 - reach
    seen = nn.functional.pad(table[out : table.shape[0] - out], (0, 0, length - 1 - reach, length - 1 - reach))
    products = (seen[:, :, None] * seen[:, None]).flatten(1)
    sums = _sliding(torch.cat((seen, products), 1), 0, length).flip(0)  # the first position's offsets are the last
    one, two = torch.split(sums, [table.shape[1], products.shape[1]], 1)
    squares = torch.einsum("brlhd,brlhe->lhde", x, x)
    first = (x.sum((0, 1)) * one[:, None]).sum((0, 2))
    return first, (squares.flatten(2) * two[:, None]).sum((0, 2))


def _sliding(x: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """The sums of every `width` neighbors along `dim`, from prefix sums."""
    prefix = torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x.cumsum(dim)), dim)
    count = x.shape[dim] - width + 1
    return prefix.narrow(dim, width, count) - prefix.narrow(dim, 0, count)


class AxialBlock(Layer):
    """The residual block of Axial-DeepLab: attention along the height, then the width, in fewer channels.

        y = relu(s(x) + BN(W_up relu(width(height(relu(BN(W_down x)))))))

    s is the identity, or where stride or channels change, a convolution of that stride with a batch norm.

    Args:
        channels: those of the map.
        mid_channels: those of the attention.
        out_channels: those of the result; None means twice `mid_channels`.
        heads: number of heads; divides `mid_channels`, half of which are those of the keys.
        size: sides (h, w) of the map, or one for both; as `AxialAttention` needs it.
        span, position: as in `AxialAttention`.
        stride: factor by which the map shrinks, after the attention.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]); the result `[B, out_channels, H // stride, W // stride]`.

    Raises:
        TypeError, ValueError, RuntimeError: as `AxialAttention`.

    Memory:
        That of its parts, one after the other.

    References:
        Wang et al., 2020, figure 2, with the expansion of 2 of the authors' code.
    """

    def __init__(
        self,
        channels: int,
        mid_channels: int,
        *,
        out_channels: int | None = None,
        heads: int = 8,
        size: int | tuple[int, int] | None = None,
        span: int | None = None,
        position: str = "qkv",
        stride: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels, self.stride = count(channels, "channels"), count(stride, "stride")
        mid_channels = count(mid_channels, "mid_channels")
        out = 2 * mid_channels if out_channels is None else count(out_channels, "out_channels")
        height, width = (None, None) if size is None else pair(size)
        shared = {"heads": heads, "span": span, "position": position, "backend": backend}
        self.down = nn.Conv2d(channels, mid_channels, 1, bias=False)
        self.norm_down = BatchNorm2d(mid_channels)
        self.height = AxialAttention(mid_channels, "height", size=height, **shared)  # type: ignore[arg-type]
        self.width = AxialAttention(mid_channels, "width", size=width, stride=stride, **shared)  # type: ignore[arg-type]
        self.up = nn.Conv2d(mid_channels, out, 1, bias=False)
        self.norm_up = BatchNorm2d(out)
        self.shortcut = None
        if stride != 1 or out != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map, and what its positions gathered."""
        x = image(x, self.channels)
        y = self.width(self.height(torch.relu(self.norm_down(self.down(x)))))
        y = self.norm_up(self.up(torch.relu(y)))
        if self.shortcut is not None:  # the pooling drops what is left over of an odd size, and so does this
            x = self.shortcut(x[..., : y.shape[2] * self.stride, : y.shape[3] * self.stride])
        return torch.relu(x + y)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of `AxialBlock` in the authors' code (csrhddlam/axial-deeplab)."""
        ours = renamed(state, _BLOCK_NAMES)
        for part in ("height.", "width."):
            theirs = {name.removeprefix(part): ours.pop(name) for name in list(ours) if name.startswith(part)}
            ours |= {part + name: x for name, x in AxialAttention.translate(theirs).items()}
        return ours


_BLOCK_NAMES = {
    **{"conv_down": "down", "bn1": "norm_down", "hight_block": "height", "width_block": "width"},
    **{"conv_up": "up", "bn2": "norm_up", "downsample": "shortcut"},
}
